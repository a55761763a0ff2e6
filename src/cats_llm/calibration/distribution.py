"""The distribution of |act(gate)|: counted in one pass, in bounded memory, exactly enough for any quantile.

What is counted is the gate *before* the activation. SiLU and GELU have a minimum, near which activations crowd so
densely (7 % within one bfloat16 number) that no histogram of |act(gate)| separates them; the gate itself has no such
point, and the activation is applied to the few distinct values at the end.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cats_llm.checkpoint.config import check_sparsity
from cats_llm.errors import CatsError
from cats_llm.kernels.definition import Activation, gate_activation

# neighbouring values are merged into groups of at least this share of all, a twentieth of the promised tolerance
_GROUP = 5e-5
# A bin is a range of float32 numbers with the same sign, exponent and first 12 bits of the mantissa, so that every
# bfloat16 and float16 number has a bin of its own, and in float32 a bin is 2^-12 of its value wide.
MANTISSA_BITS = 12
_SHIFT = 23 - MANTISSA_BITS
# magnitudes from 2^-64 to 2^64; smaller ones count as zero
_FIRST_BIN = (127 - 64) << MANTISSA_BITS
_BINS = 128 << MANTISSA_BITS
_CHUNK = 1 << 22


@dataclass(frozen=True)
class MagnitudeDistribution:
    """How many activations have which magnitude, and the rule that turns a sparsity into a threshold.

    Attributes:
        edges: float32, (m,), ascending from 0. ``counts[:i].sum()`` magnitudes are below ``edges[i]``: exactly, if
            they come from 16-bit gates; give or take what one bin of the histogram holds, if from wider ones.
        counts: int64, (m,), all positive: the magnitudes from ``edges[i]`` up to ``edges[i + 1]``.
        maximum: the largest magnitude.
        zeros: how many magnitudes are exactly zero; if any, they are the first group.
    """

    edges: Tensor
    counts: Tensor
    maximum: float
    zeros: int

    def __post_init__(self) -> None:
        if not (
            self.edges.dtype == torch.float32
            and self.counts.dtype == torch.int64
            and self.edges.dim() == 1
            and self.edges.shape == self.counts.shape
            and len(self.edges) > 0
            and self.edges[0] == 0
            and bool((self.edges.diff() > 0).all())
            and bool(self.edges.isfinite().all())
            and bool((self.counts > 0).all())
            and self.counts.double().sum() < 2**62
            and self.edges[-1] <= self.maximum < float("inf")
            and self.zeros in (0, self.counts[0].item())
        ):
            raise CatsError("the calibration profile is damaged: a layer's distribution is not one; calibrate again.")

    @classmethod
    def from_values(cls, values: Tensor, counts: Tensor) -> "MagnitudeDistribution":
        """From magnitudes, float32 (m,), in any order, and how often each occurs, int64 (m,)."""
        values, inverse = values.unique(return_inverse=True)
        counts = torch.zeros(len(values), dtype=torch.int64).index_add_(0, inverse, counts)
        # a threshold halfway between two neighbours: the same neurons are kept where exp differs in the last bit
        edges = values.clone()
        edges[1:] = torch.maximum(values[:-1].lerp(values[1:], 0.5), values[:-1].nextafter(values[1:]))
        edges[:1] = 0
        zeros = int(counts[0]) if values[0] == 0 else 0
        # merge into groups: a group begins where the count so far enters another of the 1 / _GROUP steps
        step = (counts.cumsum(0) - counts).double().div(counts.sum().double() * _GROUP).floor()
        first = torch.ones(len(values), dtype=torch.bool)
        first[1:] = step.diff() > 0
        if zeros:
            first[1:2] = True
        group = first.cumsum(0) - 1
        merged = torch.zeros(int(group[-1]) + 1, dtype=torch.int64).index_add_(0, group, counts)
        return cls(edges[first].contiguous(), merged, float(values[-1]), zeros)

    @property
    def total(self) -> int:
        """How many magnitudes there are."""
        return int(self.counts.sum())

    def sparsity(self) -> Tensor:
        """The share of magnitudes below each edge, float64, (m,): the sparsity of that threshold."""
        return (self.counts.cumsum(0) - self.counts).double() / self.total

    def below(self, threshold: float) -> float:
        """The share of magnitudes below a threshold, to within a group's (5e-5)."""
        return int(self.counts[self.edges < threshold].sum()) / self.total

    def threshold(self, sparsity: float) -> tuple[float, float]:
        """The threshold whose sparsity is nearest to the one asked for (paper, section 3.1), and its sparsity.

        Sparsity 0 gives threshold 0, which keeps everything. Above 0, exact zeros are always skipped, since they
        contribute nothing; the sparsity is then at least their share.

        Args:
            sparsity: k, in [0, 1).

        Raises:
            CatsError: ``sparsity`` is out of range.
        """
        if check_sparsity(sparsity) == 0:
            return 0.0, 0.0
        if self.zeros == self.total:
            return torch.finfo(torch.float32).tiny, 1.0
        first = 1 if self.zeros else 0
        achieved = self.sparsity()[first:]
        nearest = int((achieved - sparsity).abs().argmin())
        return float(self.edges[first + nearest]), float(achieved[nearest])


class GateHistogram:
    """Counts the gate pre-activations of one layer. 8 MiB whatever the number of tokens.

    Counts are integers: neither the order of batches nor their split over processes changes the result.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(2 * _BINS, dtype=torch.int64, device=device)
        # more than 0 once a value was NaN or infinite
        self.not_finite = torch.zeros((), dtype=torch.int64, device=device)
        # more than 0 once a value does not sit on the lower edge of its bin, as all 16-bit numbers do
        self.between = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, gate: Tensor) -> None:
        """Count every element of ``gate``, of any shape and floating dtype."""
        for chunk in gate.detach().reshape(-1).split(_CHUNK):
            bits = chunk.to(self.counts.device, torch.float32).view(torch.int32)
            if not len(bits):
                continue
            magnitude = bits & 0x7FFFFFFF
            self.not_finite += magnitude.amax() >= 0x7F800000
            self.between += (bits & ((1 << _SHIFT) - 1)).amax() > 0
            index = (magnitude >> _SHIFT).sub_(_FIRST_BIN).clamp_(0, _BINS - 1)
            index += (bits >> 31) & _BINS
            self.counts += torch.bincount(index, minlength=2 * _BINS)

    def tensors(self) -> list[Tensor]:
        """The state. Adding the states of two histograms merges them."""
        return [self.counts, self.not_finite, self.between]

    def check(self, layer: int) -> None:
        """Make sure that all that was counted was finite.

        Raises:
            CatsError: it was not.
        """
        if self.not_finite:
            raise CatsError(
                f"gate activations of layer {layer} are NaN or infinite; the weights are damaged "
                "or the dtype overflows: try --dtype float32."
            )

    def distribution(self, activation: Activation) -> MagnitudeDistribution:
        """The distribution of ``|activation(gate)|`` over all that was counted."""
        index = self.counts.nonzero().squeeze(1).cpu()
        counts = self.counts.cpu()[index]
        negative = index >= _BINS
        inside = index % _BINS
        bits = (inside + _FIRST_BIN) << _SHIFT
        if self.between:
            bits += 1 << (_SHIFT - 1)
        values = torch.where(inside == 0, 0.0, bits.to(torch.int32).view(torch.float32))
        gate = torch.where(negative, -values, values)
        return MagnitudeDistribution.from_values(gate_activation(gate, activation).abs().float(), counts)
