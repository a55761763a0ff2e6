"""The neuron scores, in one registry: how much a neuron's activation has to weigh before it is compared.

A score is a weight w_j a neuron: neuron j is kept where ``|a_j| w_j >= tau``, with one tau a layer, the quantile of
``|a| w`` over the layer. So its threshold is ``T_j = tau / w_j``, and all scores run on the same kernels. A new score
is one function in `SCORES`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cats_llm.calibration.criteria.statistics import LayerStatistics

Score = Callable[[LayerStatistics, float], Tensor]
"""(statistics of a layer, gate sparsity) -> positive weights, float32 (f,), of any common scale."""

# of the largest weight: a neuron that weighs less is as good as dropped, but its threshold stays finite
_SMALLEST = 1e-6


def cats(statistics: LayerStatistics, sparsity: float) -> Tensor:
    """All neurons alike: one threshold a layer on |a| (paper, section 3.1)."""
    return torch.ones_like(statistics.up, dtype=torch.float32)


def chess(statistics: LayerStatistics, sparsity: float) -> Tensor:
    """E|u|: how much of u each neuron's gate lets through on average (CHESS, arXiv 2409.01366)."""
    return _rounded(statistics.up / statistics.tokens)


def norm(statistics: LayerStatistics, sparsity: float) -> Tensor:
    """rms(u) times the norm of the neuron's column of W_down: the size of its contribution for a given gate."""
    return _rounded((statistics.up_squared / statistics.tokens).sqrt() * statistics.down_norm)


def moment(statistics: LayerStatistics, sparsity: float) -> Tensor:
    """The thresholds of least squared error of the output, if neurons are independent and means are compensated.

    Dropping neuron j below T costs ``(sum h^2 - (sum h)^2 / n) ||W_down[:, j]||^2`` over the tokens it drops, measured
    bin by bin, so that it counts how u depends on the gate and that a constant error costs nothing. (Ours; the closest
    published idea is CHESS, which takes E|u| for all gates.)
    """
    s, weight = statistics, statistics.down_norm.square()[:, None]
    return _least_error(s, sparsity, weight * s.counts, weight * s.hidden, weight * s.hidden_squared)


def fisher(statistics: LayerStatistics, sparsity: float) -> Tensor:
    """As `moment`, but an error counts by what it does to the model's predictions, and not by its size.

    The weight of an error is the squared gradient of the loss by h at that token, so that the sum of all is the growth
    of the KL divergence to second order with the Fisher information's diagonal (as in optimal brain damage, LeCun et
    al. 1990). Errors count little where a token's later layers drown them, as at the first tokens of real models.
    """
    s = statistics
    return _least_error(s, sparsity, s.sensitivity, s.sensitivity_hidden, s.sensitivity_hidden_squared)


def _least_error(
    statistics: LayerStatistics, sparsity: float, weight: Tensor, weighted: Tensor, weighted_squared: Tensor
) -> Tensor:
    """1 / T_j of the thresholds with the least ``sum w (h [dropped] - mean)^2``, the mean being compensated.

    A Lagrange multiplier makes the thresholds' costs add up to the least for the tokens dropped.

    Args:
        weight, weighted, weighted_squared: sums of w, w h and w h^2 by the bin of the gate, float64 (f, BINS).
    """
    s = statistics
    zero = torch.zeros(len(s.up), 1, dtype=torch.float64, device=s.up.device)
    # by how many bins are dropped: 0 to BINS
    dropped, first, second, mean = (
        torch.cat([zero, t.cumsum(1)], 1) for t in (s.counts, weighted, weighted_squared, s.hidden / s.tokens)
    )
    cost = second - 2 * mean * first + mean.square() * weight.sum(1, keepdim=True)
    low, high = 0.0, float(cost.max())
    for _ in range(100):
        price = (low + high) / 2
        number = (cost - price * dropped).argmin(1, keepdim=True)
        enough = float(dropped.gather(1, number).sum()) >= sparsity * float(s.counts.sum())
        low, high = (low, price) if enough else (price, high)
    number = (cost - high * dropped).argmin(1)
    edges = torch.cat([s.edges, s.edges[-1:] * 2])
    thresholds = edges[number.clamp(min=1)].double()  # at least the first bin: its share is nothing
    return _rounded(1 / thresholds)


def _rounded(weights: Tensor) -> Tensor:
    """Positive float32 weights of 8 bits: enough, and equal whatever the order of the sums was."""
    largest = weights.max()
    if not largest > 0:
        return torch.ones_like(weights, dtype=torch.float32)
    return (weights / largest).clamp(min=_SMALLEST).to(torch.bfloat16).float()


SCORES: dict[str, Score] = {score.__name__: score for score in (cats, chess, norm, moment, fisher)}
"""By the name that `--criterion` takes."""

OF_GRADIENTS = frozenset({"fisher"})
"""Those that need the statistics of gradients, which a pass backward through the dense model gathers."""
