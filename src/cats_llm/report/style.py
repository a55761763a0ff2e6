"""What all figures share: fonts and colours, panels, axes and legends. Only this module imports matplotlib.

Figures exist in two layouts, wide for a desk and narrow for a phone, with text of the same size. pyplot's global state
is not touched.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cats_llm.number_format import known, number
from cats_llm.report.labels import label
from cats_llm.report.optional_dependency import MissingExtraError

try:
    from matplotlib import colormaps, rc_context, rcParamsDefault
    from matplotlib.axes import Axes
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure as Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
except ImportError as error:
    raise MissingExtraError from error

INK = "#1f2937"
MUTED = "#6b7280"
OUTLINE = "#94a3b8"
TARGET: dict[str, Any] = {"color": INK, "linestyle": (0, (4, 2)), "linewidth": 1}
"""Of the line that says what was asked for."""
CALIBRATION: dict[str, Any] = {"color": MUTED, "linewidth": 0.9, "marker": "o", "markerfacecolor": "white"}
"""Of the line that shows calibration tokens beside others."""
HIGHEST = 1e30
"""Where values are cut: a broken model's perplexity may be anything up to the end of float64, where axes overflow."""
MAX_PANELS = 12
_GRID = "#e5e7eb"
# told apart by people with any colour vision, and by their shapes in print
_COLOURS = ("#0063a6", "#d97706", "#0f8a5f", "#b5179e", "#5b4bc4", "#8a5a2b")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1)), (0, (1, 2)))
# inches
_WIDE = 9.6
_NARROW = 4.2
# names of models are long, and differ at the end
_LEGEND = 48
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
    "grid.color": _GRID,
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


class Look(NamedTuple):
    """How a model or method is drawn."""

    colour: str
    marker: str = "o"
    dash: Any = "-"

    @property
    def marked(self) -> dict[str, Any]:
        """A line with markers."""
        return {"color": self.colour, "marker": self.marker}

    @property
    def dashed(self) -> dict[str, Any]:
        """A line without markers, told apart by its dash."""
        return {"color": self.colour, "linestyle": self.dash}


DENSE = Look(INK)


def style(**settings: Any) -> AbstractContextManager[None]:
    """The settings that figures are made and saved with, whatever the user's matplotlibrc says."""
    # the backend is not a matter of style, and naming it would load one
    defaults = {key: value for key, value in rcParamsDefault.items() if not key.startswith("backend")}
    context: AbstractContextManager[None] = rc_context({**defaults, **_STYLE, **settings})
    return context


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A colour, marker and dash for each name."""
    colours: Sequence[str] = _COLOURS
    if len(names) > len(_COLOURS):
        colours = [to_hex(colormaps["viridis"](x)) for x in np.linspace(0, 0.85, len(names))]
    return {
        name: Look(colours[i], _MARKERS[i % len(_MARKERS)], _DASHES[i % len(_DASHES)]) for i, name in enumerate(names)
    }


def panels(
    count: int, columns: int, wide: bool, height: float, sharey: bool = False, sharex: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels in reading order, all of one size; ``height`` is a panel's, in inches."""
    columns = max(min(columns, count), 1)
    rows = max(math.ceil(count / columns), 1)
    figure = Figure(figsize=(_WIDE if wide else _NARROW, rows * height + 0.75), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey).flatten().tolist()
    for axes in grid[count:]:
        axes.remove()
    # where the last row is short, the panels above its gaps carry the axis
    for axes in grid[max(0, count - columns) : count]:
        axes.tick_params(labelbottom=True)
    return figure, grid[:count]


def legend(figure: Figure, lines: Mapping[str, Mapping[str, Any]]) -> None:
    """A legend above the panels, in as many columns as fit: by name, the settings of a line."""
    if lines:
        names = [label(name, _LEGEND) for name in lines]
        widths = [0.51 + 0.075 * len(name) for name in names]
        room = figure.get_figwidth()
        columns = len(names) if sum(widths) <= room else max(1, int(room / max(widths)))
        # what a long legend needs is not taken from the panels
        figure.set_figheight(figure.get_figheight() + 0.18 * (math.ceil(len(names) / columns) - 1))
        entries = [Line2D([], [], **line) for line in lines.values()]
        layout = {"loc": "outside upper left", "ncols": columns}
        figure.legend(entries, names, columnspacing=1.3, handlelength=2, borderpad=0.3, **layout)


def by_layer(values: Mapping[int, float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Layers and their values, both (n,), without what is not known."""
    points = sorted((layer, value) for layer, value in values.items() if known(value))
    layers, shown = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return layers, shown


def dot(marker: str, layers: NDArray[np.float64]) -> str:
    """Markers where there is room for them."""
    return marker if len(layers) <= 40 else "none"


def layers_axis(axes: Axes) -> None:
    """A horizontal axis of whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.margins(x=0.04)


def percent_axis(axes: Axes) -> None:
    """A vertical axis of shares in percent."""
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} %" if 0 <= y <= 100 else ""))


def magnitude_axis(axes: Axes, low: float, high: float, ticks: int) -> None:
    """A logarithmic horizontal axis."""
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(LogLocator(numticks=ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(_magnitude))
    axes.xaxis.set_minor_locator(NullLocator())


def few_ticks(axes: Axes) -> None:
    """Four at most on the vertical axis, for small panels."""
    axes.yaxis.set_major_locator(MaxNLocator(4))


def value_axis(axes: Axes, values: Sequence[float], from_zero: bool) -> None:
    """Linear while that shows all values; logarithmic where the small ones would lie flat on the axis."""
    if not values:
        say(axes, "not measured")
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


def say(axes: Axes, text: str) -> None:
    """Text in place of a plot."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED)


def note(axes: Axes, text: str) -> None:
    """Text in the upper left corner of a plot."""
    axes.text(0.03, 0.95, text, transform=axes.transAxes, va="top", color=MUTED)


def _magnitude(value: float, _position: int) -> str:
    """A tick of a logarithmic axis."""
    return f"{value:g}" if 1e-3 <= abs(value) < 1e4 else number(value, 1)
