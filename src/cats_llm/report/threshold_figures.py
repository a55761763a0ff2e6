"""Figures of calibration: how gate activations are distributed, and where thresholds cut."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from cats_llm.calibration.distribution import MagnitudeDistribution
from cats_llm.number_format import number, percent
from cats_llm.report import style
from cats_llm.report.inputs import CalibratedModel
from cats_llm.report.labels import short_name
from cats_llm.report.page_figure import PageFigure, numbered
from cats_llm.report.results import EvalResult

Distributions = Mapping[int, MagnitudeDistribution]  # by layer
Thresholds = Mapping[str, Mapping[int, float]]  # by variant and layer

_FILL = "#cbd5e1"
_BINS = 80
# the axis leaves out this share of each layer's non-zero activations at either end
_TAILS = (2e-2, 1e-3)
# the shortest axis, in decades
_SHORTEST = 1.0


def figures(profiles: Sequence[CalibratedModel], results: Sequence[EvalResult]) -> list[PageFigure]:
    """Histograms of each profile, and thresholds of each model: its profile's, or else those that were evaluated."""
    drawable = [
        PageFigure(
            numbered("histograms", i, len(profiles)),
            f"Where the thresholds cut: {profile.label}",
            _about_histograms(profile.distributions),
            partial(histograms, profile.distributions, profile.thresholds),
        )
        for i, profile in enumerate(profiles)
    ]
    calibrated = {profile.label for profile in profiles}
    by_model = [(profile.label, profile.thresholds) for profile in profiles] + [
        (result.label, {variant.name: variant.thresholds for variant in result.sparse if variant.thresholds})
        for result in results
        if short_name(result.model) not in calibrated
    ]
    by_model = [(model, thresholds) for model, thresholds in by_model if thresholds]
    caption = (
        "One number a layer: what is smaller than it is treated as zero. They differ from layer to layer because the "
        "activations do, which is why one threshold for the whole model would skip far more in some layers than in "
        "others."
    )
    for i, (model, thresholds) in enumerate(by_model):
        draw = partial(thresholds_by_layer, thresholds)
        name = numbered("thresholds", i, len(by_model))
        drawable.append(PageFigure(name, f"The thresholds: {model}", [caption], draw))
    return drawable


def _about_histograms(distributions: Distributions) -> list[str]:
    captions = [
        "How large the gate activations of each layer are on the calibration tokens: the higher the curve, the more "
        "activations have that magnitude, and the area to the left of a coloured line is the share that its model "
        "skips. The axis is logarithmic; a decade is a factor of ten. A sharp peak comes from the activation function: "
        "SiLU and GELU go no lower than −0.28 and −0.17, and activations crowd there. Where the peak is cut off, its "
        "height stands above the panel. Thresholds inside it look alike and still skip very different shares."
    ]
    shown = shown_layers(distributions)
    if len(shown) < len(distributions):
        layers = ", ".join(map(str, shown))
        captions.append(f"{len(shown)} of {len(distributions)} layers are shown, evenly spaced: {layers}.")
    return captions


def shown_layers(distributions: Distributions) -> list[int]:
    """The layers whose histograms are drawn: all, or as many as a person looks at, evenly spaced."""
    layers = sorted(distributions)
    if len(layers) <= style.MAX_PANELS:
        return layers
    return [layers[round(i)] for i in np.linspace(0, len(layers) - 1, style.MAX_PANELS)]


def histograms(distributions: Distributions, thresholds: Thresholds, wide: bool = True) -> style.Figure:
    """How |act(gate)| is distributed in each layer, and where the thresholds cut."""
    layers = shown_layers(distributions)
    shown = [distributions[layer] for layer in layers]
    looks = style.looks(list(thresholds))
    with style.style():
        figure, panels = style.panels(len(shown), 4 if wide else 2, wide, height=1.75 if wide else 1.55, sharey=True)
        low, high = axis_range(shown)
        # a threshold far off, as a layer of zeros has it, is not worth an axis of forty decades
        near = [t for cuts in thresholds.values() for t in map(cuts.get, layers) if t and low / 30 <= t <= high * 30]
        low, high = min([low, *(t / 1.2 for t in near)]), max([high, *(t * 1.2 for t in near)])
        bins = np.geomspace(low, high, _BINS + 1)
        curves = [density(distribution, bins) * 100 for distribution in shown]
        top = _top(curves)
        for axes, layer, distribution, heights in zip(panels, layers, shown, curves, strict=True):
            axes.stairs(heights, bins, fill=True, color=_FILL, linewidth=0)
            axes.stairs(heights, bins, color=style.OUTLINE, linewidth=0.7)
            axes.set_ylim(0, top)
            if heights.max() > top:
                peak = f"peak {number(heights.max(), 2)}"
                axes.set_title(peak, loc="right", fontsize=8.5, fontweight="normal", color=style.MUTED)
            for name, cuts in thresholds.items():
                if low <= cuts.get(layer, math.nan) <= high:
                    axes.axvline(cuts[layer], **looks[name].dashed, linewidth=1.5)
            style.magnitude_axis(axes, low, high, ticks=5 if wide else 4)
            style.few_ticks(axes)
            axes.set_title(f"layer {layer}")
            zeros = int(distribution.counts[0]) / distribution.total
            if zeros == 1:
                style.say(axes, "all zero")
            elif zeros >= 1e-3:
                style.note(axes, f"{percent(zeros, 1)} zero")
        figure.supxlabel("|act(gate)|, logarithmic", fontsize=9)
        figure.supylabel("% of activations per decade", fontsize=9)
        style.legend(figure, {name: look.dashed for name, look in looks.items()})
        return figure


def thresholds_by_layer(thresholds: Thresholds, wide: bool = True) -> style.Figure:
    """The threshold of each layer, one line a variant."""
    looks = style.looks(list(thresholds))
    with style.style():
        figure, (axes,) = style.panels(1, 1, wide, height=2.9 if wide else 2.6)
        heights: list[float] = []
        for name, look in looks.items():
            layers, cuts = style.by_layer(thresholds[name])
            axes.plot(layers, cuts, color=look.colour, marker=style.dot(look.marker, layers), clip_on=False)
            heights += cuts.tolist()
        style.value_axis(axes, heights, from_zero=True)
        style.layers_axis(axes)
        axes.set_xlabel("layer")
        axes.set_ylabel("threshold on |act(gate)|")
        style.legend(figure, {name: look.marked for name, look in looks.items()})
        return figure


def density(distribution: MagnitudeDistribution, bins: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of activations in each bin, divided by the bin's width in decades.

    Groups seldom end where bins do. Within a group the activations are spread evenly over the logarithm; so whatever
    the bins, the area under the curve is the share of activations between the first edge above 0 and the last.

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


def axis_range(distributions: Sequence[MagnitudeDistribution]) -> tuple[float, float]:
    """The magnitudes that an axis for all these layers begins and ends with."""
    ends = []
    for distribution in distributions:
        edges, below = _cumulative(distribution)
        if len(edges):
            first, last = below[0], below[-1]
            cut = [first + (last - first) * _TAILS[0], last - (last - first) * _TAILS[1]]
            ends.append(np.interp(cut, below, edges))
    low, high = (min(e[0] for e in ends), max(e[1] for e in ends)) if ends else (-3.0, 0.0)
    # a layer whose activations are all alike would be a bar as wide as the panel
    spare = max(0.0, _SHORTEST - (high - low)) / 2
    return float(10 ** (low - spare)), float(10 ** (high + spare))


def _cumulative(distribution: MagnitudeDistribution) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """log10 of the edges of the groups above 0, the last one's end included, and the share below each."""
    counts = np.asarray(distribution.counts, dtype=np.float64)
    # a logarithmic axis cannot show the first group, which begins at 0
    if len(counts) < 2:
        return np.empty(0), np.empty(0)
    edges = np.log10([*distribution.edges.tolist()[1:], distribution.maximum])
    # a last group of one value has no width; the smallest that interpolation can see makes it a step
    edges[-1] = max(edges[-1], np.nextafter(edges[-2], np.inf))
    return edges, counts.cumsum() / counts.sum()


def _top(curves: Sequence[NDArray[np.float64]]) -> float:
    """Where the vertical axis ends: a peak that would flatten all else is cut off."""
    heights = np.concatenate([curve[curve > 0] for curve in curves])
    if not len(heights):
        return 1.0
    top, usual = float(heights.max()), 2 * float(np.quantile(heights, 0.9))
    return 1.06 * top if top < 2 * usual else usual
