"""Sequential (layer-wise) calibration: a layer is decided on after it has seen all batches, which go on with that.

The usual way, as in GPTQ and SparseGPT, captures what decoder layers are called with and calls them one by one. That
gives the same bits, but each layer runs twice more (fitting takes 1.3 to 1.6 times as long), and a model that computes
something between its layers has to be refused. Here the model's own forward is the only code that knows how its layers
are called: each batch runs in a thread, of which only one is ever running, and waits at a layer until all others are
there.
"""

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cats_llm.errors import CatsError
from cats_llm.model.token_mask import TokenMask

_WAY_OUT = "so its layers cannot be calibrated one after the other; leave sequential out of the criterion."


class _Cancelled(BaseException):
    """Ends a thread that waits, when another one failed."""


class PausedForward:
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
    token_mask: TokenMask | None = None,
) -> None:
    """Run all calls, and at each module's call stop them until ``decide`` has seen the inputs of all.

    Args:
        modules: called once in each call, in this order.
        calls: forward passes, run without gradients.
        decide: (index of the module, its input in every call); what it changes, all calls go on with.
        token_mask: of the model, if it has one; each pass finds in it what it left there.

    Raises:
        CatsError: a call does not call the modules once each in their order. Errors of calls come through.
    """
    passes = [PausedForward(call) for call in calls]
    by_thread = {one.thread.ident: one for one in passes}

    def stop_at(place: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            current = by_thread.get(threading.get_ident())
            if current is not None:
                sparse = token_mask.sparse if token_mask is not None else True
                current.wait_at(place, inputs[0])
                if token_mask is not None:
                    token_mask.sparse = sparse

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
