"""Give every layer a sparsity of its own: the same bytes in all, where they cost the least.

What a layer costs is measured: how far the model's predictions diverge from the dense model's when that layer alone is
sparse. Costs of layers are taken to add up, which turns the choice into a Lagrangian one on their curves.
"""

import bisect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cats_llm.calibration.batches import CalibrationText
from cats_llm.calibration.criteria.criterion import Criterion
from cats_llm.calibration.criteria.divergence import logits_of, mean_divergence
from cats_llm.calibration.criteria.scores import SCORES
from cats_llm.calibration.criteria.statistics import LayerStatistics, down_weight
from cats_llm.model.sparsify import sparse_mlps
from cats_llm.model.structure import GatedMLP

GRID = (0.2, 0.4, 0.55, 0.7, 0.8, 0.9, 0.97)
"""The sparsities at which a layer's cost is measured; a layer gets at most the last one."""

PROBE_TOKENS = 2048
"""Costs are measured on at least so many tokens, if there are."""


@torch.no_grad()
def allocate(
    model: nn.Module,
    mlps: Sequence[GatedMLP],
    text: CalibrationText,
    criterion: Criterion,
    sparsity: float,
    statistics: Mapping[int, LayerStatistics],
) -> dict[int, float]:
    """The sparsity of every layer.

    Args:
        model: with sparse modules that compute the dense function; it is left as such.
        mlps: its MLPs.
        text: calibration text.
        criterion: by which each layer will be thresholded.
        sparsity: the average, weighted by the sizes of the MLPs.
        statistics: of the dense model, see `statistics_of`.
    """
    costs = layer_costs(model, mlps, text, criterion, statistics)
    sizes = [mlp.hidden_size * mlp.intermediate_size for mlp in mlps]
    shares = least_cost([GRID] * len(mlps), costs.tolist(), sizes, sparsity)
    return {mlp.layer: share for mlp, share in zip(mlps, shares, strict=True)}


def layer_costs(
    model: nn.Module,
    mlps: Sequence[GatedMLP],
    text: CalibrationText,
    criterion: Criterion,
    statistics: Mapping[int, LayerStatistics],
) -> Tensor:
    """KL divergence a token to the dense model with one layer sparse: float64 (layers, len(GRID))."""
    probe: list[Mapping[str, Tensor]] = []
    while len(probe) < len(text.inputs) and sum(p["input_ids"].numel() for p in probe) < PROBE_TOKENS:
        probe.append(text.inputs[len(probe)])
    expected = [logits_of(model, batch) for batch in probe]
    costs = torch.zeros(len(mlps), len(GRID), dtype=torch.float64)
    modules = sparse_mlps(model)
    for row, mlp in enumerate(mlps):
        module = modules[mlp.layer]
        for column, share in enumerate(GRID):
            threshold, compensation = _one_layer(mlp, statistics[mlp.layer], criterion, share)
            module.set_tensors(threshold, compensation, score=0.0)
            module.sparse = True
            costs[row, column] = mean_divergence(model, probe, expected)
            module.sparse = False
    return costs


def _one_layer(
    mlp: GatedMLP, statistics: LayerStatistics, criterion: Criterion, sparsity: float
) -> tuple[Tensor, Tensor | None]:
    thresholds = statistics.thresholds(SCORES[criterion.score](statistics, sparsity), sparsity)
    compensation = None
    if criterion.compensate:
        compensation = (down_weight(mlp) @ statistics.dropped_mean(thresholds)).float()
    return thresholds.float(), compensation


def least_cost(
    grids: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], sizes: Sequence[float], sparsity: float
) -> list[float]:
    """Sparsities of layers with the average ``sparsity``, weighted by ``sizes``, and the least sum of costs.

    Between the measured points the root of the cost is taken to be linear, as it is for a squared error. Costs are
    made to rise; where a curve is not convex the Lagrangian skips its hollow, and the budget is met in between.

    Args:
        grids: the sparsities at which a layer's cost is known; 0 costs nothing and is added.
        costs: the costs there.
    """
    fine = torch.linspace(0, 1, 401, dtype=torch.float64)
    sizes_ = torch.tensor(list(sizes), dtype=torch.float64)
    sizes_ = sizes_ / sizes_.sum()
    curves = torch.stack([_curve(g, c, fine) for g, c in zip(grids, costs, strict=True)])

    def at(price: float) -> Tensor:
        return fine[(curves - price * sizes_[:, None] * fine).argmin(1)]

    low, high = 0.0, 1.0
    while float(at(high) @ sizes_) < sparsity and high < 1e30:
        high *= 2
    for _ in range(200):
        price = (low + high) / 2
        low, high = (price, high) if float(at(price) @ sizes_) < sparsity else (low, price)
    below, above = at(low), at(high)
    reach, missing = float((above - below) @ sizes_), sparsity - float(below @ sizes_)
    part = missing / reach if reach > 0 else 0.0
    shares: list[float] = (below + (above - below) * min(max(part, 0.0), 1.0)).tolist()
    return shares


def _curve(grid: Sequence[float], costs: Sequence[float], fine: Tensor) -> Tensor:
    """The cost at every point of ``fine``; infinite past the last known one."""
    known = [0.0, *grid]
    roots, highest = [0.0], 0.0
    for cost in costs:
        highest = max(highest, cost)
        roots.append(highest**0.5)
    values = []
    for share in fine.tolist():
        i = min(max(bisect.bisect_right(known, share) - 1, 0), len(known) - 2)
        part = (share - known[i]) / (known[i + 1] - known[i])
        values.append(float("inf") if part > 1 + 1e-9 else (roots[i] + part * (roots[i + 1] - roots[i])) ** 2)
    return torch.tensor(values, dtype=torch.float64)
