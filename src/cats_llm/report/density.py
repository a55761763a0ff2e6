"""From counted magnitudes to the curve that is drawn: a density over the logarithm of the magnitude."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from cats_llm.report.data import LayerDistribution

# the axis leaves out this share of each layer's non-zero activations at either end
_TAILS = (2e-2, 1e-3)
_DECADES = 1.0


def zero_share(distribution: LayerDistribution) -> float:
    """The share of activations that a logarithmic axis cannot show: the group that begins at 0."""
    if not distribution.total or distribution.edges[0] > 0:
        return 0.0
    return distribution.counts[0] / distribution.total


def density(distribution: LayerDistribution, bins: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of activations in each bin, divided by the bin's width in decades.

    Groups seldom end where bins do. Within a group the activations are spread evenly over the logarithm; so whatever
    the bins, the area under the curve is the share of activations between the first edge and the last.

    Args:
        distribution: of one layer.
        bins: (n + 1,) ascending positive edges.

    Returns:
        (n,) shares a decade. The shares are of all activations, zeros among them.
    """
    position = np.log10(bins)
    edges, below = _cumulative(distribution)
    if not len(edges):
        return np.zeros(len(bins) - 1)
    result: NDArray[np.float64] = np.diff(np.interp(position, edges, below)) / np.diff(position)
    return result


def axis_range(distributions: Sequence[LayerDistribution]) -> tuple[float, float]:
    """The magnitudes that an axis for all these layers begins and ends with."""
    low, high = math.inf, -math.inf
    for distribution in distributions:
        edges, below = _cumulative(distribution)
        if len(edges):
            first, last = below[0], below[-1]
            cut = [first + (last - first) * _TAILS[0], last - (last - first) * _TAILS[1]]
            left, right = np.interp(cut, below, edges)
            low, high = min(low, float(left)), max(high, float(right))
    if low > high:
        low, high = -3.0, 0.0
    # not less than a decade, or a layer whose activations are all alike would be a bar as wide as the panel
    spare = max(0.0, _DECADES - (high - low)) / 2
    return float(10 ** (low - spare)), float(10 ** (high + spare))


def _cumulative(distribution: LayerDistribution) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """log10 of the edges of the groups above 0, the last one's end included, and the share below each."""
    counts = np.asarray(distribution.counts, dtype=np.float64)
    first = 1 if distribution.edges and distribution.edges[0] <= 0 else 0
    if not counts[first:].sum():
        return np.empty(0), np.empty(0)
    edges = np.log10([*distribution.edges[first:], distribution.maximum])
    # a last group of one value has no width; the smallest that interpolation can see makes it a step
    edges[-1] = max(edges[-1], np.nextafter(edges[-2], np.inf))
    below = np.concatenate([[0.0], counts.cumsum()])[first:] / counts.sum()
    return edges, below
