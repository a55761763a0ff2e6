"""What a criterion knows of one layer's neurons: sums over the calibration tokens, split by the size of the gate.

Symbols: a = act(x W_gate), u = x W_up, h = a u the hidden activation, n tokens, f neurons, d hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cats_llm.calibration.batches import CalibrationText, rows_of, run_decoder
from cats_llm.distributed import sum_over_processes
from cats_llm.errors import CatsError
from cats_llm.kernels.definition import gate_activation
from cats_llm.model.structure import GatedMLP, observe_inputs

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
        down_norm: float64 (f,), the Euclidean norm of each neuron's column of W_down.
    """

    def __init__(self, mlp: GatedMLP) -> None:
        w_down = down_weight(mlp)
        self.down_norm = w_down.norm(dim=0)
        f, device = w_down.shape[1], w_down.device
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.up, self.up_squared = torch.zeros(2, f, dtype=torch.float64, device=device)
        self.counts, self.hidden, self.hidden_squared = torch.zeros(3, f, BINS, dtype=torch.float64, device=device)

    def add(self, a: Tensor, u: Tensor) -> None:
        """Count tokens: a and u, (n, f), a in float32 or wider."""
        f = a.shape[-1]
        for a_part, u_part in zip(*(t.split(max(1, _CHUNK // f)) for t in (a, u)), strict=True):
            self.tokens += len(a_part)
            wide, u_wide = a_part.float(), u_part.double()
            h = wide.double() * u_wide
            self.up += u_wide.abs().sum(0)
            self.up_squared += u_wide.square().sum(0)
            index = _bins(wide) + torch.arange(f, device=a.device) * BINS
            for total, weight in ((self.counts, None), (self.hidden, h), (self.hidden_squared, h.square())):
                total += torch.bincount(
                    index.reshape(-1), None if weight is None else weight.reshape(-1), minlength=f * BINS
                ).view(f, BINS)

    def tensors(self) -> list[Tensor]:
        """The sums. Adding those of two sets of tokens gives those of both."""
        return [self.tokens, self.up, self.up_squared, self.counts, self.hidden, self.hidden_squared]

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
def statistics_of(model: nn.Module, mlps: Sequence[GatedMLP], text: CalibrationText) -> dict[int, LayerStatistics]:
    """The statistics of every layer by its index, in one pass, over all processes; the model computes what it does."""
    statistics = {mlp.layer: LayerStatistics(mlp) for mlp in mlps}
    counted: Tensor | None = None

    def add(mlp: GatedMLP, x: Tensor) -> None:
        statistics[mlp.layer].add(*hidden_parts(mlp, rows_of(x, counted)))

    with observe_inputs(mlps, add):
        for inputs, counted in zip(text.inputs, text.counted, strict=True):  # noqa: B007  # add reads it
            run_decoder(model, inputs)
    sum_over_processes([t for layer in statistics.values() for t in layer.tensors()])
    return statistics
