"""Figures of evaluations: what sparsity costs, with error bars, and how it spreads over the layers."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

from cats_llm.report import drawing
from cats_llm.report.costs import DISTANCES, Measure, costs, measures
from cats_llm.report.extra import MissingExtraError
from cats_llm.report.results import DENSE, EvalResult, EvalVariant
from cats_llm.report.wording import known, label

try:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, MaxNLocator
except ImportError as error:
    raise MissingExtraError from error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PANELS = 12
# names of models are long, and differ at the end
_LEGEND = 48
# of a normal distribution: 95 % lie within
_Z95 = 1.96


class Point(NamedTuple):
    """A variant in a panel: sparsity, value, and half of its 95 % interval (0 if unknown)."""

    x: float
    y: float
    error: float


class Panel(NamedTuple):
    """One measure: points by series, which are a model and a method.

    ``of_weights``: sparsity is of all linear weights, since not every method skips neurons; else it is of neurons.
    """

    measure: Measure
    series: dict[str, list[Point]]
    of_weights: bool = False


def accuracy_panels(results: Sequence[EvalResult]) -> list[Panel]:
    """Of each task that is answered right or wrong, or scored, the metric that comes first; means before tasks."""
    return _panels(results, lambda measure: measure.task.kind != "perplexity" and "perplexity" not in measure.metric)


def text_panels(results: Sequence[EvalResult]) -> list[Panel]:
    """Perplexity of each text, KL divergence, top-1 agreement."""
    found = _panels(results, lambda m: "perplexity" in m.metric or m.task.kind == "perplexity", first_only=False)
    # a word's and a byte's perplexity have the shape of a token's
    tokens = {panel.measure.task.name for panel in found if panel.measure.metric == "perplexity"}
    return [
        panel
        for panel in found
        if panel.measure.metric not in ("word_perplexity", "byte_perplexity") or panel.measure.task.name not in tokens
    ]


def _panels(results: Sequence[EvalResult], wanted: Callable[[Measure], bool], first_only: bool = True) -> list[Panel]:
    found: dict[tuple[str, str], Panel] = {}
    seen: dict[str, str] = {}
    of_weights = any(row.skips_inputs for result in results for row in result.rows)
    for result in results:
        for measure in measures(result):
            key = (measure.task.name, measure.metric)
            if not wanted(measure) or (first_only and seen.setdefault(key[0], key[1]) != key[1]):
                continue
            series = _series(result, measure, of_weights, alone=len(results) == 1)
            if key in found:
                found[key].series.update(series)
            elif series:
                found[key] = Panel(measure, series, of_weights)
    return sorted(found.values(), key=lambda panel: panel.measure.task.kind != "mean")


def _series(result: EvalResult, measure: Measure, of_weights: bool, alone: bool) -> dict[str, list[Point]]:
    """The points of each method, the dense model's first. A model that is alone needs no name."""
    points: dict[str, list[Point]] = {}
    start: list[Point] = []
    for cost in costs(result, measure):
        row = cost.row
        if not known(row.value) or row.value is None:
            continue
        x = 0.0 if cost.variant.name == DENSE else row.model if of_weights else row.gate
        if x is None and not of_weights:
            x = cost.variant.sparsity
        if x is None:
            continue
        point = Point(x, row.value, _Z95 * (row.stderr or 0.0))
        if cost.variant.name == DENSE:
            start.append(point)
        else:
            points.setdefault(_method(cost.variant), []).append(point)
    methods = points or {DENSE: []}
    if measure.metric in DISTANCES and not start:
        # no model is any distance from itself
        start = [Point(0.0, float(measure.metric == "top1_agreement"), 0.0)]
    return {
        method if alone else f"{result.label}, {method}": sorted([*start, *found]) for method, found in methods.items()
    }


def _method(variant: EvalVariant) -> str:
    return f"{variant.method}, {variant.coverage}" if variant.coverage else variant.method


def cost_curves(panels: Sequence[Panel], wide: bool = True) -> Figure:
    """Value against measured sparsity, one panel a measure and one line a series, with 95 % error bars."""
    shown = panels[:MAX_PANELS]
    names = list(dict.fromkeys(name for panel in shown for name in panel.series))
    look = drawing.looks(names)
    with drawing.style():
        columns = min(len(shown), 3 if wide else 1)
        figure, axes_of = drawing.panels(len(shown), columns, wide, height=2.5 if wide else 2.2)
        for axes, panel in zip(axes_of, shown, strict=True):
            scale = 100 if panel.measure.share else 1
            ends: list[float] = []
            for name, points in panel.series.items():
                drawn = look[name]
                x = [100 * point.x for point in points]
                y = [min(scale * point.y, drawing.HIGHEST) for point in points]
                errors = [scale * point.error for point in points]
                axes.errorbar(
                    x,
                    y,
                    yerr=errors if any(errors) else None,
                    color=drawn.colour,
                    marker=drawn.marker,
                    capsize=2.5,
                    elinewidth=1,
                    clip_on=False,
                )
                ends += [value for v, e in zip(y, errors, strict=True) for value in (v, v - e, v + e)]
            _axis(axes, panel.measure, ends)
        unit = "share of all linear weights skipped" if shown[0].of_weights else "gate sparsity"
        figure.supxlabel(f"{unit}, measured on the same data", fontsize=9)
        drawing.legend(figure, [drawing.line(look[name]) for name in names], [label(name, _LEGEND) for name in names])
        return figure


def _axis(axes: Axes, measure: Measure, ends: list[float]) -> None:
    axes.set_title(label(measure.task.name))
    axes.set_ylabel(measure.metric_label)
    axes.set_xlim(-4, 104)
    axes.set_xticks(range(0, 101, 25), [f"{x} %" for x in range(0, 101, 25)])
    drawing.value_axis(axes, ends, from_zero=measure.metric == "kl")
    if measure.share:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} %" if 0 <= y <= 100 else ""))


class LayerLine(NamedTuple):
    """Gate sparsity by layer, over all data: the mean, and the lowest and highest of any task."""

    mean: dict[int, float]
    low: dict[int, float]
    high: dict[int, float]


def layer_lines(results: Sequence[EvalResult]) -> dict[str, dict[str, LayerLine]]:
    """By variant's name and model's label, what each layer skipped. Means weigh each task's tokens."""
    found: dict[str, dict[str, LayerLine]] = {}
    for result, variant in ((r, v) for r in results for v in r.sparse):
        means = {task.name for task in result.tasks if task.kind == "mean"}
        # a task has the same sparsity whatever its metric
        rows = {
            r.task: r for r in result.rows if r.variant == variant.name and r.layer_sparsity and r.task not in means
        }
        if not rows:
            continue
        layers = sorted(set.intersection(*(set(row.layer_sparsity) for row in rows.values())))
        weights = [row.tokens or 1 for row in rows.values()]
        by_layer = {layer: [row.layer_sparsity[layer] for row in rows.values()] for layer in layers}
        found.setdefault(variant.name, {})[result.label] = LayerLine(
            {i: sum(v * w for v, w in zip(vs, weights, strict=True)) / sum(weights) for i, vs in by_layer.items()},
            {i: min(vs) for i, vs in by_layer.items()},
            {i: max(vs) for i, vs in by_layer.items()},
        )
    return found


def sparsity_by_layer(results: Sequence[EvalResult], wide: bool = True) -> Figure:
    """What each layer skipped: one panel a variant, one line a model, so that models before and after compare."""
    lines = dict(itertools.islice(layer_lines(results).items(), MAX_PANELS))
    models = list(dict.fromkeys(model for by_model in lines.values() for model in by_model))
    look = drawing.looks(models)
    variants = {variant.name: variant for result in results for variant in result.sparse}
    alone = len(results) == 1
    with drawing.style():
        columns = min(len(lines), 3) if wide else 1
        figure, axes_of = drawing.panels(len(lines), columns, wide, height=2.5 if wide else 1.9)
        span = max([0.01, *(1.15 * _away(variants[name], by_model) for name, by_model in lines.items())])
        for axes, (name, by_model) in zip(axes_of, lines.items(), strict=True):
            target = variants[name].sparsity
            if target is not None:
                axes.axhline(100 * target, color=drawing.INK, linestyle=(0, (4, 2)), linewidth=1)
                # the same span in all panels, or a tenth of a point would look like ten
                axes.set_ylim(100 * (target - span), 100 * (target + span))
            if alone:
                x, y = drawing.by_layer(variants[name].calibration_sparsity)
                axes.plot(
                    x, 100 * y, color=drawing.MUTED, linewidth=0.9, marker=drawing.dot("o", x), markerfacecolor="white"
                )
            for model, line in by_model.items():
                drawn = look[model]
                x, y = drawing.by_layer(line.mean)
                low, high = drawing.by_layer(line.low)[1], drawing.by_layer(line.high)[1]
                axes.fill_between(x, 100 * low, 100 * high, color=drawn.colour, alpha=0.2, linewidth=0)
                axes.plot(x, 100 * y, color=drawn.colour, marker=drawing.dot(drawn.marker, x))
            axes.set_title(label(name))
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} %" if 0 <= y <= 100 else ""))
            drawing.layers_axis(axes)
        figure.supxlabel("layer", fontsize=9)
        figure.supylabel("gate sparsity", fontsize=9)
        handles = [drawing.line(look[model]) for model in models]
        names = [label(model, _LEGEND) for model in models]
        if any(variants[name].sparsity is not None for name in lines):
            handles.append(Line2D([], [], color=drawing.INK, linestyle=(0, (4, 2)), linewidth=1))
            names.append("asked for")
        if alone and any(variants[name].calibration_sparsity for name in lines):
            handles.append(Line2D([], [], color=drawing.MUTED, linewidth=0.9, marker="o", markerfacecolor="white"))
            names.append("calibration")
        drawing.legend(figure, handles, names)
        return figure


def _away(variant: EvalVariant, by_model: dict[str, LayerLine]) -> float:
    """How far any layer is from the sparsity asked for."""
    target = variant.sparsity
    if target is None:
        return 0.0
    shares = [*variant.calibration_sparsity.values()]
    for line in by_model.values():
        shares += [*line.low.values(), *line.high.values()]
    return max((abs(share - target) for share in shares if math.isfinite(share)), default=0.0)
