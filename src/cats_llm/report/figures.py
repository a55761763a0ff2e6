"""The pictures. Each function takes data and returns a matplotlib Figure; pyplot's global state is not touched.

Every figure exists in two layouts: wide for a desk, and narrow for a phone, with text of the same size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cats_llm.report.density import axis_range, density, zero_share
from cats_llm.report.extra import MissingExtraError
from cats_llm.report.wording import known, label, number, percent

try:
    from matplotlib import colormaps, rc_context
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
except ImportError as error:
    raise MissingExtraError from error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from cats_llm.report.data import LayerDistribution, Report, Variant

INK = "#1f2937"
MUTED = "#6b7280"
GRID = "#e5e7eb"
_FILL = "#cbd5e1"
_OUTLINE = "#94a3b8"
# told apart by people with any colour vision, and by their shapes in print
_COLOURS = ("#0063a6", "#d97706", "#0f8a5f", "#b5179e", "#5b4bc4", "#8a5a2b")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1)), (0, (1, 2)))

MAX_PANELS = 12
# inches
_WIDE = 9.6
_NARROW = 4.2
_BINS = 80
# more numbers than this would be written over each other; the table has them
_LABELLED = 6
# a broken model's perplexity may be anything up to the end of float64, where axes overflow
_HIGHEST = 1e30
_STYLE = {
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.unicode_minus": True,
    "figure.facecolor": "white",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same layout on every machine
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8.5,
}


class _Look(NamedTuple):
    colour: str
    marker: str
    dash: Any


_DENSE = _Look(INK, "o", "-")


def style() -> AbstractContextManager[None]:
    """The settings that figures are made and saved with, whatever the user's matplotlibrc says."""
    from matplotlib import rcParamsDefault

    # the backend is not a matter of style, and naming it would load one
    settings = {key: value for key, value in rcParamsDefault.items() if not key.startswith("backend")}
    context: AbstractContextManager[None] = rc_context({**settings, **_STYLE})
    return context


def looks(variants: Sequence[Variant]) -> dict[str, _Look]:
    """A colour, marker and dash for each variant, by name; the same ones in every figure."""
    count = len(variants)
    colours: Sequence[str] = _COLOURS
    if count > len(_COLOURS):
        colours = [to_hex(colormaps["viridis"](x)) for x in np.linspace(0, 0.85, count)]
    return {
        variant.name: _Look(colours[i], _MARKERS[i % len(_MARKERS)], _DASHES[i % len(_DASHES)])
        for i, variant in enumerate(variants)
    }


def shown_layers(distributions: Sequence[LayerDistribution]) -> list[LayerDistribution]:
    """The layers whose histograms are drawn: all, or as many as a person looks at, evenly spaced."""
    ordered = sorted(distributions, key=lambda distribution: distribution.layer)
    if len(ordered) <= MAX_PANELS:
        return ordered
    return [ordered[round(i)] for i in np.linspace(0, len(ordered) - 1, MAX_PANELS)]


def histograms(report: Report, wide: bool = True) -> Figure:
    """How |act(gate)| is distributed in each layer, and where the thresholds cut."""
    shown = shown_layers(report.distributions)
    look = looks(report.sparse)
    cutting = [variant for variant in report.sparse if variant.thresholds]
    with style():
        columns = min(len(shown), 4 if wide else 2)
        figure, panels = _panels(len(shown), columns, wide, height=1.75 if wide else 1.55, sharey=True)
        low, high = axis_range(shown)
        inside = [t for v in cutting for d in shown if known(t := v.thresholds.get(d.layer, math.nan))]
        # a threshold far off, as a layer of zeros has it, is not worth an axis of forty decades
        inside = [t for t in inside if low / 30 <= t <= high * 30]
        low, high = min([low, *(t / 1.2 for t in inside)]), max([high, *(t * 1.2 for t in inside)])
        bins = np.geomspace(low, high, _BINS + 1)
        curves = [density(distribution, bins) * 100 for distribution in shown]
        top = _top(curves)
        for axes, distribution, heights in zip(panels, shown, curves, strict=True):
            axes.stairs(heights, bins, fill=True, color=_FILL, linewidth=0)
            axes.stairs(heights, bins, color=_OUTLINE, linewidth=0.7)
            axes.set_ylim(0, top)
            if heights.max() > top:
                peak = f"peak {number(heights.max(), 2)}"
                axes.set_title(peak, loc="right", fontsize=8.5, fontweight="normal", color=MUTED)
            for variant in cutting:
                threshold = variant.thresholds.get(distribution.layer, math.nan)
                if low <= threshold <= high:
                    colour, _, dash = look[variant.name]
                    axes.axvline(threshold, color=colour, linestyle=dash, linewidth=1.5)
            axes.set_xscale("log")
            axes.set_xlim(low, high)
            axes.xaxis.set_major_locator(LogLocator(numticks=5 if wide else 4))
            axes.xaxis.set_major_formatter(FuncFormatter(_magnitude))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.set_title(f"layer {distribution.layer}")
            zeros = zero_share(distribution)
            if not distribution.total or zeros == 1:
                _say(axes, "all zero" if distribution.total else "no data")
            elif zeros >= 1e-3:
                axes.text(0.03, 0.95, f"{percent(zeros)} zero", transform=axes.transAxes, va="top", color=MUTED)
        figure.supxlabel("|act(gate)|, logarithmic", fontsize=9)
        figure.supylabel("% of activations per decade", fontsize=9)
        _legend(figure, [_line(look[v.name], marker=False) for v in cutting], [label(v.name) for v in cutting])
        return figure


def sparsity_by_layer(report: Report, wide: bool = True) -> Figure:
    """The gate sparsity that each layer achieved, beside the one asked for: one panel a variant."""
    shown = [v for v in report.sparse if v.calibration_sparsity or v.measured_sparsity]
    look = looks(report.sparse)
    with style():
        figure, panels = _panels(len(shown), min(len(shown), 3) if wide else 1, wide, height=2.5 if wide else 1.9)
        centres = [_centre(variant) for variant in shown]
        values = [[*v.calibration_sparsity.values(), *v.measured_sparsity.values()] for v in shown]
        away = [abs(x - c) for c, xs in zip(centres, values, strict=True) for x in xs if known(x)]
        # the same span in all panels, or a tenth of a point would look like ten
        span = max([0.01, *(1.15 * x for x in away)])
        for axes, variant, centre in zip(panels, shown, centres, strict=True):
            colour = look[variant.name].colour
            if known(variant.target_sparsity):
                axes.axhline(centre * 100, color=INK, linestyle=(0, (4, 2)), linewidth=1)
            x, y = _by_layer(variant.calibration_sparsity)
            axes.plot(x, y * 100, color=MUTED, linewidth=0.9, marker=_dot("o", x), markerfacecolor="white")
            x, y = _by_layer(variant.measured_sparsity)
            axes.plot(x, y * 100, color=colour, marker=_dot("o", x))
            axes.set_ylim((centre - span) * 100, (centre + span) * 100)
            axes.set_title(label(variant.name))
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} %" if 0 <= x <= 100 else ""))
            _layers_axis(axes)
        figure.supxlabel("layer", fontsize=9)
        figure.supylabel("gate sparsity", fontsize=9)
        handles = [
            Line2D([], [], color=INK, linestyle=(0, (4, 2)), linewidth=1),
            Line2D([], [], color=MUTED, linewidth=0.9, marker="o", markerfacecolor="white"),
            Line2D([], [], color=look[shown[0].name].colour if len(shown) == 1 else INK, marker="o"),
        ]
        _legend(figure, handles, ["asked for", "calibration", "held-out text"])
        return figure


def quality(report: Report, wide: bool = True) -> Figure:
    """What the sparsity costs: perplexity and KL divergence against gate sparsity."""
    measures: list[tuple[str, int, Callable[[Variant], float | None]]] = [("perplexity", 4, lambda v: v.perplexity)]
    if any(known(v.kl) for v in report.sparse):
        # no model is any distance from itself
        measures.append(("KL divergence from dense, nats", 3, lambda v: 0.0 if v is report.dense else v.kl))
    look = looks(report.sparse)
    with style():
        figure, panels = _panels(len(measures), len(measures) if wide else 1, wide, height=2.8 if wide else 2.3)
        for axes, (name, digits, measure) in zip(panels, measures, strict=True):
            points = [(v, v.gate_sparsity, measure(v)) for v in report.variants]
            found = [(v, x, y) for v, x, y in points if x is not None and y is not None and known(x) and known(y)]
            found.sort(key=lambda point: point[1])
            heights = [min(y, _HIGHEST) for *_, y in found]
            axes.plot([x * 100 for _, x, _ in found], heights, color=_OUTLINE, linewidth=1.2, zorder=1)
            for (variant, x, y), height in zip(found, heights, strict=True):
                drawn = look.get(variant.name, _DENSE)
                axes.plot([x * 100], [height], drawn.marker, color=drawn.colour, markersize=7, clip_on=False)
                if len(found) > _LABELLED:
                    continue
                # costs rise to the right: up and to the left of a point there is room
                axes.annotate(
                    number(y, digits), (x * 100, height), (-5, 5), textcoords="offset points", ha="right", fontsize=8.5
                )
            axes.set_title(name)
            axes.set_xlim(-12 if wide else -19, 104)
            axes.set_xticks(range(0, 101, 20), [f"{x} %" for x in range(0, 101, 20)])
            _value_axis(axes, heights, from_zero=name != "perplexity")
        figure.supxlabel("gate sparsity, measured on the held-out text", fontsize=9)
        names = [_line(look.get(v.name, _DENSE), line=False) for v in report.variants]
        _legend(figure, names, [label(v.name) for v in report.variants])
        return figure


def thresholds_by_layer(report: Report, wide: bool = True) -> Figure:
    """The threshold of each layer, one line a variant."""
    shown = [variant for variant in report.sparse if variant.thresholds]
    look = looks(report.sparse)
    with style():
        figure, (axes,) = _panels(1, 1, wide, height=2.9 if wide else 2.6)
        every: list[float] = []
        for variant in shown:
            x, y = _by_layer(variant.thresholds)
            axes.plot(x, y, color=look[variant.name].colour, marker=_dot(look[variant.name].marker, x), clip_on=False)
            every += y.tolist()
        _value_axis(axes, every, from_zero=True)
        _layers_axis(axes)
        axes.set_xlabel("layer")
        axes.set_ylabel("threshold on |act(gate)|")
        _legend(figure, [_line(look[v.name]) for v in shown], [label(v.name) for v in shown])
        return figure


def _top(curves: Sequence[NDArray[np.float64]]) -> float:
    """Where the vertical axis ends: a peak that would flatten all else is cut off."""
    heights = np.concatenate([curve[curve > 0] for curve in curves]) if curves else np.empty(0)
    if not len(heights):
        return 1.0
    top, usual = float(heights.max()), 2 * float(np.quantile(heights, 0.9))
    return 1.06 * top if top < 2 * usual else usual


def _panels(count: int, columns: int, wide: bool, height: float, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels in reading order, all of one size."""
    columns = max(columns, 1)
    rows = max(math.ceil(count / columns), 1)
    figure = Figure(figsize=(_WIDE if wide else _NARROW, rows * height + 0.75), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=sharey).flatten().tolist()
    for axes in grid[count:]:
        axes.remove()
    # where the last row is short, the panels above its gaps carry the axis
    for axes in grid[max(0, count - columns) : count]:
        axes.tick_params(labelbottom=True)
    return figure, grid[:count]


def _legend(figure: Figure, handles: list[Line2D], labels: list[str]) -> None:
    if handles:
        widths = [0.51 + 0.075 * len(text) for text in labels]
        room = figure.get_figwidth()
        columns = len(labels) if sum(widths) <= room else max(1, int(room / max(widths)))
        # what a long legend needs is not taken from the panels
        figure.set_figheight(figure.get_figheight() + 0.18 * (math.ceil(len(labels) / columns) - 1))
        figure.legend(
            handles, labels, loc="outside upper left", ncols=columns, columnspacing=1.3, handlelength=2, borderpad=0.3
        )


def _line(look: _Look, marker: bool = True, line: bool = True) -> Line2D:
    return Line2D(
        [],
        [],
        color=look.colour,
        linestyle=("-" if marker else look.dash) if line else "none",
        marker=look.marker if marker else "none",
        markersize=5 if line else 7,
    )


def _by_layer(values: dict[int, float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    found = sorted((layer, value) for layer, value in values.items() if known(value))
    return np.array([layer for layer, _ in found], dtype=np.float64), np.array(
        [value for _, value in found], dtype=np.float64
    )


def _centre(variant: Variant) -> float:
    values = [*variant.measured_sparsity.values(), *variant.calibration_sparsity.values()]
    found = [value for value in values if known(value)]
    if variant.target_sparsity is not None and known(variant.target_sparsity):
        return variant.target_sparsity
    return sum(found) / len(found) if found else 0.0


def _dot(marker: str, layers: NDArray[np.float64]) -> str:
    """Markers where there is room for them."""
    return marker if len(layers) <= 40 else "none"


def _layers_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.margins(x=0.04)


def _value_axis(axes: Axes, values: Sequence[float], from_zero: bool) -> None:
    """Linear while that shows all values; logarithmic where the small ones would lie flat on the axis."""
    if not values:
        _say(axes, "not measured")
        return
    low, high = min(values), max(values)
    if low > 0 and high / low > 30:
        # limits first: finding its own, the logarithmic scale overflows
        axes.set_ylim(low / 1.4, high * (high / low) ** 0.15)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(_magnitude))
        return
    if from_zero:
        low = min(low, 0.0)
    spread = (high - low) or abs(high) or 1.0
    axes.set_ylim(low - 0.06 * spread * (low != 0), high + 0.16 * spread)


def _magnitude(value: float, _position: int) -> str:
    return f"{value:g}" if 1e-3 <= abs(value) < 1e4 else number(value, 1)


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED)


__all__ = [
    "histograms",
    "looks",
    "quality",
    "shown_layers",
    "sparsity_by_layer",
    "style",
    "thresholds_by_layer",
]
