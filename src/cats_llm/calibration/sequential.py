"""Run a model on many batches side by side, layer by layer, each batch in one forward pass.

Sequential calibration decides on a layer after it has seen all batches there, and every batch must go on with what was
decided. The model's own forward is the only code that knows how its layers are called, so it is not taken apart: each
batch runs in a thread, of which only one is ever running, and waits at the layer until all others are there.
"""

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cats_llm.errors import CatsError

_WAY_OUT = "so its layers cannot be calibrated one after the other; leave sequential out of the criterion."


class _Cancelled(BaseException):
    """Ends a thread that waits, when another one failed."""


class _Pass:
    """One forward pass, which stops where `wait_at` is called and goes on with `advance`."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call
        self.x: Tensor | None = None
        self.place = -1
        self.done = False
        self.error: BaseException | None = None
        self.cancelled = False
        self.go = threading.Semaphore(0)
        self.stopped = threading.Semaphore(0)
        # autograd's switch and the current GPU belong to a thread
        self.device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self.go.acquire()
        try:
            if not self.cancelled:
                if self.device is not None:
                    torch.cuda.set_device(self.device)
                with torch.no_grad():
                    self.call()
        except _Cancelled:
            pass
        except BaseException as error:  # raised again where `advance` was called
            self.error = error
        self.done = True
        self.stopped.release()

    def wait_at(self, place: int, x: Tensor) -> None:
        """Called in the thread: stop here."""
        self.place, self.x = place, x
        self.stopped.release()
        self.go.acquire()
        self.x = None
        if self.cancelled:
            raise _Cancelled

    def advance(self) -> None:
        """Called outside: go on to the next stop, or to the end."""
        self.go.release()
        self.stopped.acquire()
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        """End the thread."""
        self.cancelled = True
        while not self.done:
            self.go.release()
            self.stopped.acquire()
        self.thread.join()


def run_layer_by_layer(
    modules: Sequence[nn.Module],
    calls: Sequence[Callable[[], object]],
    decide: Callable[[int, list[Tensor]], None],
    state: tuple[Callable[[], object], Callable[[object], None]] | None = None,
) -> None:
    """Run all calls, and at each module's call stop them until ``decide`` has seen the inputs of all.

    Args:
        modules: called once in each call, in this order.
        calls: forward passes, run without gradients.
        decide: (index of the module, its input in every call); what it changes, all calls go on with.
        state: get and set something that a pass leaves behind and relies on; each pass finds its own.

    Raises:
        CatsError: a call does not call the modules once each in their order. Errors of calls come through.
    """
    passes = [_Pass(call) for call in calls]
    by_thread = {p.thread.ident: p for p in passes}
    read, write = state or (lambda: None, lambda _: None)

    def stop_at(place: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            own = by_thread.get(threading.get_ident())
            if own is not None:
                found = read()
                own.wait_at(place, inputs[0])
                write(found)

        return hook

    hooks = [module.register_forward_pre_hook(stop_at(place)) for place, module in enumerate(modules)]
    try:
        for place in range(len(modules)):
            for one in passes:
                one.advance()
                if one.done or one.place != place:
                    raise CatsError(f"the model does not call MLP {place} once, after those before it, {_WAY_OUT}")
            decide(place, [one.x for one in passes if one.x is not None])
        for one in passes:
            one.advance()
            if not one.done:
                raise CatsError(f"the model calls an MLP more than once, {_WAY_OUT}")
    finally:
        for one in passes:
            one.cancel()
        for handle in hooks:
            handle.remove()
