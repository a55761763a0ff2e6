"""Figures of evaluations: quality against sparsity, with error bars, and how sparsity spreads over the layers."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from cats_llm.number_format import Z95, known
from cats_llm.report import style
from cats_llm.report.deltas import Measure, deltas, measures
from cats_llm.report.labels import label
from cats_llm.report.page_figure import PageFigure
from cats_llm.report.results import DENSE, EvalResult, EvalVariant


def figures(results: Sequence[EvalResult]) -> list[PageFigure]:
    """Those for which there is data."""
    drawable = []
    if panels := accuracy_panels(results):
        captions = [
            "Each point is one model; further right, more is skipped on that task. Higher is better. "
            "Bars are 95 % intervals of each value alone. Whether a model differs from the dense one is told "
            "more sharply by the paired differences in the tables, since both answered the same questions.",
            *_left_out(panels),
        ]
        draw = partial(quality_curves, panels)
        drawable.append(PageFigure("accuracy", "Quality of answers against sparsity", captions, draw))
    if panels := text_panels(results):
        captions = [
            "Perplexity says how surprised a model is by a text, KL divergence how far its next-token "
            "probabilities are from the dense model’s; both are better when lower. Top-1 agreement is how "
            "often both find the same next token most likely. Where a line turns, each further point costs "
            "more than the one before. Bars are 95 % intervals.",
            *_left_out(panels),
        ]
        draw = partial(quality_curves, panels)
        drawable.append(PageFigure("perplexity", "Prediction of text against sparsity", captions, draw))
    if layer_lines(results):
        title = "Sparsity of each layer, asked for and achieved"
        caption = (
            "The share of neurons that each layer skipped, over all data of the evaluation; the band spans its "
            "lowest and highest task. "
        )
        if len(results) > 1:
            title = "Sparsity of each layer, model beside model"
            caption += (
                "One line a model: where two models share their thresholds, as before and after fine-tuning, "
                "the distance between the lines is what the training changed."
            )
        else:
            caption += (
                "Thresholds are chosen so that each layer skips the share asked for on the calibration tokens (grey, "
                "which should lie on the dashed line). A layer far from the line sees text unlike what its threshold "
                "was calibrated on."
            )
        drawable.append(PageFigure("sparsity-by-layer", title, [caption], partial(sparsity_by_layer, results)))
    return drawable


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
    panels = [panel for panel in _panels(results) if not _is_of_text(panel.measure)]
    first = {panel.measure.task.name: panel for panel in reversed(panels)}
    return [panel for panel in panels if panel is first[panel.measure.task.name]]


def text_panels(results: Sequence[EvalResult]) -> list[Panel]:
    """Perplexity of each text, KL divergence, top-1 agreement."""
    panels = [panel for panel in _panels(results) if _is_of_text(panel.measure)]
    # a word's and a byte's perplexity have the shape of a token's
    by_token = {panel.measure.task.name for panel in panels if panel.measure.metric == "perplexity"}
    doubled = ("word_perplexity", "byte_perplexity")
    return [p for p in panels if p.measure.metric not in doubled or p.measure.task.name not in by_token]


def _is_of_text(measure: Measure) -> bool:
    return measure.task.kind == "perplexity" or "perplexity" in measure.metric


def _panels(results: Sequence[EvalResult]) -> list[Panel]:
    panels: dict[tuple[str, str], Panel] = {}
    of_weights = any(row.skips_inputs for result in results for row in result.rows)
    for result, measure in ((r, m) for r in results for m in measures(r)):
        if series := _series(result, measure, of_weights, alone=len(results) == 1):
            panel = panels.setdefault((measure.task.name, measure.metric), Panel(measure, {}, of_weights))
            panel.series.update(series)
    return sorted(panels.values(), key=lambda panel: panel.measure.task.kind != "mean")


def _series(result: EvalResult, measure: Measure, of_weights: bool, alone: bool) -> dict[str, list[Point]]:
    """The points of each method, the dense model's first. A model that is alone needs no name."""
    dense: list[Point] = []
    by_method: dict[str, list[Point]] = {}
    for delta in deltas(result, measure):
        row, variant = delta.row, delta.variant
        x = 0.0 if variant.name == DENSE else row.sparsity.model if of_weights else row.sparsity.gate
        if x is None and not of_weights:
            x = variant.sparsity
        if x is None or not known(row.value):
            continue
        method = f"{variant.method}, {variant.tokens}" if variant.tokens else variant.method
        points = dense if variant.name == DENSE else by_method.setdefault(method, [])
        points.append(Point(x, row.value, Z95 * (row.stderr or 0.0)))
    if measure.is_distance and not dense:
        # no model is any distance from itself
        dense = [Point(0.0, float(measure.metric == "top1_agreement"), 0.0)]
    return {
        method if alone else f"{result.label}, {method}": sorted([*dense, *points])
        for method, points in (by_method or {DENSE: []}).items()
    }


def _left_out(panels: Sequence[Panel]) -> list[str]:
    most = style.MAX_PANELS
    return [f"{most} of {len(panels)} are drawn; the tables have all."] if len(panels) > most else []


def quality_curves(panels: Sequence[Panel], wide: bool = True) -> style.Figure:
    """Value against measured sparsity, one panel a measure and one line a series, with 95 % error bars."""
    panels = panels[: style.MAX_PANELS]
    looks = style.looks(list(dict.fromkeys(name for panel in panels for name in panel.series)))
    with style.style():
        figure, all_axes = style.panels(len(panels), 3 if wide else 1, wide, height=2.5 if wide else 2.2)
        for axes, panel in zip(all_axes, panels, strict=True):
            scale = 100 if panel.measure.share else 1
            ends: list[float] = []
            for name, points in panel.series.items():
                values = [min(scale * point.y, style.HIGHEST) for point in points]
                errors = [scale * point.error for point in points]
                axes.errorbar(
                    [100 * point.x for point in points],
                    values,
                    yerr=errors if any(errors) else None,
                    **looks[name].marked,
                    capsize=2.5,
                    elinewidth=1,
                    clip_on=False,
                )
                ends += [end for v, e in zip(values, errors, strict=True) for end in (v, v - e, v + e)]
            axes.set_title(label(panel.measure.task.name))
            axes.set_ylabel(panel.measure.metric_label)
            axes.set_xlim(-4, 104)
            axes.set_xticks(range(0, 101, 25), [f"{x} %" for x in range(0, 101, 25)])
            style.value_axis(axes, ends, from_zero=panel.measure.metric == "kl")
            if panel.measure.share:
                style.percent_axis(axes)
        share = "share of all linear weights skipped" if panels[0].of_weights else "gate sparsity"
        figure.supxlabel(f"{share}, measured on the same data", fontsize=9)
        style.legend(figure, {name: look.marked for name, look in looks.items()})
        return figure


class LayerLine(NamedTuple):
    """Gate sparsity by layer, over all data: the mean, and the lowest and highest of any task."""

    mean: dict[int, float]
    low: dict[int, float]
    high: dict[int, float]


def layer_lines(results: Sequence[EvalResult]) -> dict[str, dict[str, LayerLine]]:
    """By variant's name and model's label, what each layer skipped. Means weigh each task's tokens."""
    lines: dict[str, dict[str, LayerLine]] = {}
    for result, variant in ((r, v) for r in results for v in r.sparse):
        # a task has the same sparsity whatever its metric
        rows = {
            row.task: row
            for row in result.rows
            if row.variant == variant.name and row.layer_sparsity and result.task(row.task).kind != "mean"
        }
        if not rows:
            continue
        weights = {task: row.tokens or 1 for task, row in rows.items()}
        layers = sorted(set.intersection(*(set(row.layer_sparsity) for row in rows.values())))
        shares = {layer: [row.layer_sparsity[layer] for row in rows.values()] for layer in layers}
        sums = {layer: sum(weights[task] * row.layer_sparsity[layer] for task, row in rows.items()) for layer in layers}
        lines.setdefault(variant.name, {})[result.label] = LayerLine(
            {layer: total / sum(weights.values()) for layer, total in sums.items()},
            {layer: min(values) for layer, values in shares.items()},
            {layer: max(values) for layer, values in shares.items()},
        )
    return lines


def sparsity_by_layer(results: Sequence[EvalResult], wide: bool = True) -> style.Figure:
    """What each layer skipped: one panel a variant, one line a model, so that models before and after compare."""
    lines = dict(itertools.islice(layer_lines(results).items(), style.MAX_PANELS))
    looks = style.looks(list(dict.fromkeys(model for by_model in lines.values() for model in by_model)))
    variants = {variant.name: variant for result in results for variant in result.sparse}
    calibrated = len(results) == 1 and any(variants[name].layer_sparsity for name in lines)
    with style.style():
        figure, all_axes = style.panels(len(lines), 3 if wide else 1, wide, height=2.5 if wide else 1.9)
        # the same span in all panels, or a tenth of a point would look like ten
        span = max([0.01, *(1.15 * _largest_miss(variants[name], by_model) for name, by_model in lines.items())])
        for axes, (name, by_model) in zip(all_axes, lines.items(), strict=True):
            target = variants[name].sparsity
            if target is not None:
                axes.axhline(100 * target, **style.TARGET)
                axes.set_ylim(100 * (target - span), 100 * (target + span))
            if calibrated:
                layers, shares = style.by_layer(variants[name].layer_sparsity)
                axes.plot(layers, 100 * shares, **style.CALIBRATION | {"marker": style.dot("o", layers)})
            for model, line in by_model.items():
                look = looks[model]
                layers, mean = style.by_layer(line.mean)
                low, high = style.by_layer(line.low)[1], style.by_layer(line.high)[1]
                axes.fill_between(layers, 100 * low, 100 * high, color=look.colour, alpha=0.2, linewidth=0)
                axes.plot(layers, 100 * mean, color=look.colour, marker=style.dot(look.marker, layers))
            axes.set_title(label(name))
            style.percent_axis(axes)
            style.layers_axis(axes)
        figure.supxlabel("layer", fontsize=9)
        figure.supylabel("gate sparsity", fontsize=9)
        entries = {model: look.marked for model, look in looks.items()}
        if any(variants[name].sparsity is not None for name in lines):
            entries["asked for"] = style.TARGET
        if calibrated:
            entries["calibration"] = style.CALIBRATION
        style.legend(figure, entries)
        return figure


def _largest_miss(variant: EvalVariant, by_model: dict[str, LayerLine]) -> float:
    """How far any layer is from the sparsity asked for."""
    if variant.sparsity is None:
        return 0.0
    shares = [*variant.layer_sparsity.values()]
    for line in by_model.values():
        shares += [*line.low.values(), *line.high.values()]
    return max((abs(share - variant.sparsity) for share in shares), default=0.0)
