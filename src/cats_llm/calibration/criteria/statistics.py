"""What a criterion knows of one layer's neurons: sums over the calibration tokens, split by the size of the gate.

Symbols: a = act(x W_gate), u = x W_up, h = a u the hidden activation, n tokens, f neurons, d hidden size; g the
gradient of the model's loss by h.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from cats_llm.calibration.batches import CalibrationText, rows_of, run_decoder
from cats_llm.calibration.criteria.divergence import counted_tokens, logits_of
from cats_llm.distributed import sum_over_processes
from cats_llm.errors import CatsError
from cats_llm.kernels.definition import gate_activation
from cats_llm.model.predictions import log_probabilities
from cats_llm.model.structure import GatedMLP, frozen, observe_inputs

# A bin is a range of |a| with the same exponent and first 3 bits of the mantissa: 8 an octave.
_MANTISSA_BITS = 3
_SHIFT = 23 - _MANTISSA_BITS
_OCTAVES = (-14, 8)  # smaller ones share the first bin, larger ones the last
_FIRST = (127 + _OCTAVES[0]) << _MANTISSA_BITS
BINS = (_OCTAVES[1] - _OCTAVES[0]) << _MANTISSA_BITS
_CHUNK = 1 << 23


class LayerStatistics:
    """Sums over tokens, for every neuron of a layer.

    They are kept in float64: their order, which differs with batches, processes and GPU atomics, changes them by far
    less than the precision that weights are rounded to (`scores`).

    Attributes:
        tokens: int64 (), how many tokens there were.
        up, up_squared: float64 (f,), the sums of |u| and u^2.
        counts, hidden, hidden_squared: float64 (f, BINS), how many tokens had |a| in the bin, and their sums of h and
            h^2.
        sensitivity, sensitivity_hidden, sensitivity_hidden_squared: float64 (f, BINS), their sums of g^2, g^2 h and
            g^2 h^2; (f, 0) without gradients.
        down_norm: float64 (f,), the Euclidean norm of each neuron's column of W_down.
    """

    def __init__(self, mlp: GatedMLP, gradients: bool = False) -> None:
        w_down = down_weight(mlp)
        self.down_norm = w_down.norm(dim=0)
        f, device = w_down.shape[1], w_down.device
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.up, self.up_squared = torch.zeros(2, f, dtype=torch.float64, device=device)
        self.counts, self.hidden, self.hidden_squared = torch.zeros(3, f, BINS, dtype=torch.float64, device=device)
        self.sensitivity, self.sensitivity_hidden, self.sensitivity_hidden_squared = torch.zeros(
            3, f, BINS if gradients else 0, dtype=torch.float64, device=device
        )

    def add(self, a: Tensor, u: Tensor, gradient: Tensor | None = None) -> None:
        """Count tokens: a, u and, if they are gathered, g, (n, f), a in float32 or wider."""
        f = a.shape[-1]
        rows = max(1, _CHUNK // f)
        for begin in range(0, len(a), rows):
            a_part, u_part = a[begin : begin + rows], u[begin : begin + rows]
            self.tokens += len(a_part)
            wide, u_wide = a_part.float(), u_part.double()
            h = wide.double() * u_wide
            self.up += u_wide.abs().sum(0)
            self.up_squared += u_wide.square().sum(0)
            index = (_bins(wide) + torch.arange(f, device=a.device) * BINS).reshape(-1)

            def sums(weight: Tensor | None, index: Tensor = index) -> Tensor:
                flat = None if weight is None else weight.reshape(-1)
                return torch.bincount(index, flat, minlength=f * BINS).view(f, BINS)

            self.counts += sums(None)
            self.hidden += sums(h)
            self.hidden_squared += sums(h.square())
            if gradient is not None:
                squared = gradient[begin : begin + rows].double().square()
                self.sensitivity += sums(squared)
                self.sensitivity_hidden += sums(squared * h)
                self.sensitivity_hidden_squared += sums(squared * h.square())

    def tensors(self) -> list[Tensor]:
        """The sums. Adding those of two sets of tokens gives those of both."""
        sums = [self.tokens, self.up, self.up_squared, self.counts, self.hidden, self.hidden_squared]
        return [*sums, self.sensitivity, self.sensitivity_hidden, self.sensitivity_hidden_squared]

    @property
    def edges(self) -> Tensor:
        """The lower edge of every bin, float32 (BINS,), from 0."""
        bits = torch.arange(_FIRST, _FIRST + BINS, dtype=torch.int32, device=self.up.device) << _SHIFT
        edges = bits.view(torch.float32)
        edges[0] = 0
        return edges

    def thresholds(self, weights: Tensor, sparsity: float) -> Tensor:
        """T_j = tau / w_j, float64 (f,), such that the share ``sparsity`` lies below; as exact as the bins allow."""
        low, high = 0.0, float(2.0 ** _OCTAVES[1] * weights.max())
        goal = sparsity * float(self.counts.sum())
        for _ in range(50):
            middle = (low + high) / 2
            below = float(self._below(self.counts, middle / weights.double()).sum())
            low, high = (middle, high) if below < goal else (low, middle)
        return high / weights.double()

    def dropped_mean(self, thresholds: Tensor) -> Tensor:
        """E[(1 - m) h], float64 (f,): what is dropped below the thresholds, (f,); as exact as the bins allow."""
        return self._below(self.hidden, thresholds) / self.tokens

    def _below(self, sums: Tensor, thresholds: Tensor) -> Tensor:
        """The part of each neuron's sums, (f, BINS), that lies below its threshold; within a bin, proportionally."""
        edges = self.edges.double()
        index = (torch.searchsorted(edges, thresholds, right=True) - 1).clamp(0, BINS - 1)
        width = torch.cat([edges[1:], edges[-1:] * 2]) - edges
        share = ((thresholds - edges[index]) / width[index]).clamp(0, 1)
        whole = sums.cumsum(1) - sums
        at = index[:, None]
        return (whole.gather(1, at) + sums.gather(1, at) * share[:, None]).squeeze(1)


def _bins(a: Tensor) -> Tensor:
    """The bin of every |a|, int64."""
    bits = a.contiguous().view(torch.int32) & 0x7FFFFFFF
    return ((bits >> _SHIFT) - _FIRST).clamp_(0, BINS - 1).long()


def hidden_parts(mlp: GatedMLP, x: Tensor) -> tuple[Tensor, Tensor]:
    """a, in float32 or wider, and u, of inputs (n, d): both (n, f)."""
    gate, up = mlp.roles.gate_and_up(mlp.module, x)
    return gate_activation(gate, mlp.activation), up


def down_weight(mlp: GatedMLP) -> Tensor:
    """W_down in float64, (d, f), also of an offloaded layer.

    Raises:
        CatsError: each process has only a part of it.
    """
    from accelerate.utils import align_module_device  # imports much

    with align_module_device(mlp.down_linear):
        weight = mlp.down_linear.weight.detach()
    if hasattr(weight, "to_local"):
        raise CatsError(
            "this model's weights are spread over processes (tensor parallel), where only the criterion cats can be "
            "calibrated; load it without tp_plan, with device_map if it is too large for one device."
        )
    return weight.double()


@torch.no_grad()
def statistics_of(
    model: nn.Module, mlps: Sequence[GatedMLP], text: CalibrationText, gradients: bool = False
) -> dict[int, LayerStatistics]:
    """The statistics of every layer by its index, in one pass, over all processes; the model computes what it does.

    Args:
        gradients: those of the loss too, which costs a pass backward. The loss is that of labels drawn from what the
            model itself predicts, whose mean g g^T is the Fisher information: how the KL divergence from the model's
            predictions grows with an error of h.
    """
    statistics = {mlp.layer: LayerStatistics(mlp, gradients) for mlp in mlps}
    counted: Tensor | None = None

    def add(mlp: GatedMLP, x: Tensor, gradient: Tensor | None = None) -> None:
        g = None if gradient is None else rows_of(gradient, counted)
        statistics[mlp.layer].add(*hidden_parts(mlp, rows_of(x, counted)), g)

    with _observe_gradients(model, mlps, add) if gradients else observe_inputs(mlps, add):
        for inputs, counted in zip(text.inputs, text.counted, strict=True):  # noqa: B007  # add reads it
            if gradients:
                with torch.enable_grad():
                    _loss(model, inputs).backward()
            else:
                run_decoder(model, inputs)
    sum_over_processes([t for layer in statistics.values() for t in layer.tensors()])
    return statistics


def _loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The sum over tokens of -log p of labels drawn from p, the model's own predictions; float32 ()."""
    logits, ids = logits_of(model, inputs), inputs["input_ids"]
    # a seed a sequence: the same draws in whatever batch and process it is computed
    drawn = [torch.rand(len(row), generator=torch.Generator().manual_seed(int(row.sum()))) for row in ids]
    at = torch.stack(drawn).to(logits.device)
    loss = torch.zeros((), device=logits.device)
    for where, (log_p,) in log_probabilities(counted_tokens(inputs), logits):
        cumulative = log_p.detach().exp().cumsum(1)
        labels = torch.searchsorted(cumulative, at[where][:, None]).clamp(max=log_p.shape[1] - 1)
        loss = loss - log_p.gather(1, labels).sum()
    return loss


@contextmanager
def _observe_gradients(
    model: nn.Module, mlps: Sequence[GatedMLP], observer: Callable[[GatedMLP, Tensor, Tensor], None]
) -> Iterator[None]:
    """Show the observer the input of every MLP, (..., d), and the gradient by h, (..., f), in the backward pass.

    Weights want no gradients meanwhile.
    """
    inputs: dict[int, Tensor] = {}

    def hook(mlp: GatedMLP) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def before_down(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            h, x = args[0], inputs.pop(mlp.layer)
            if not h.requires_grad:  # nothing below is trained: the graph begins here
                h = h.detach().requires_grad_()
            h.register_hook(lambda gradient: observer(mlp, x, gradient))
            return (h,)

        return before_down

    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.enter_context(observe_inputs(mlps, lambda mlp, x: inputs.update({mlp.layer: x.detach()})))
        for mlp in mlps:
            stack.callback(mlp.down_linear.register_forward_pre_hook(hook(mlp)).remove)
        yield
