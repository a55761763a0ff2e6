"""A distribution of magnitudes, and the rule that turns a sparsity into a threshold."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cats_llm.checkpoint.config import check_sparsity
from cats_llm.errors import CatsError

# neighbouring values are merged into groups of at least this share of all, a twentieth of the promised tolerance
_GROUP = 5e-5


@dataclass(frozen=True)
class MagnitudeDistribution:
    """How many activations have which magnitude.

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
