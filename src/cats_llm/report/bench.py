"""Benchmark results as a figure: milliseconds a contestant, beside what the bytes allow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cats_llm.checkpoint.files import write_file
from cats_llm.errors import CatsError
from cats_llm.report.extra import require_extra

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

_OURS, _OTHERS, _BOUND = "#2563a8", "#9aa4b2", "#c2410c"


def write_figure(kind: str, rows: list[dict[str, Any]], path: Path, force: bool = False) -> None:
    """Draw the rows of `cats bench` into an .svg or .png file.

    Args:
        kind: "mlp" or "decode".
        rows: as in the JSON file.

    Raises:
        CatsError: the file cannot be written, or has another ending.
        MissingExtraError: matplotlib is not installed.
    """
    require_extra()
    if path.suffix not in (".svg", ".png"):
        raise CatsError(f"{path} has an unknown ending; figures are written as .svg or .png.")
    with write_file(path, force) as temporary:
        draw(kind, rows).savefig(temporary, format=path.suffix[1:], dpi=150, bbox_inches="tight")


def draw(kind: str, rows: list[dict[str, Any]]) -> Figure:
    """One panel for each number of threads and tokens at a time; bars are medians, whiskers quartiles."""
    from matplotlib.figure import Figure

    milliseconds, tokens = ("ms", "tokens") if kind == "mlp" else ("ms_per_step", "batch")
    panels: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault((row["threads"], row[tokens]), []).append(row)
    figure = Figure(figsize=(5.2 * min(2, len(panels)), 3.4 * -(-len(panels) // 2)), layout="constrained")
    axes = figure.subplots(-(-len(panels) // 2), min(2, len(panels)), squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, ((threads, number), group) in zip(axes, panels.items(), strict=False):
        own_dense = next((row[milliseconds]["median"] for row in group if row["contestant"] == "k = 0.0"), None)
        for place, row in enumerate(group):
            spread = row[milliseconds]
            ours = row["contestant"].startswith("k =")
            whiskers = [[spread["median"] - spread["low"]], [spread["high"] - spread["median"]]]
            axis.barh(place, spread["median"], xerr=whiskers, color=_OURS if ours else _OTHERS, ecolor="#374151")
            axis.text(spread["high"], place, f"  {spread['median']:.1f}", va="center", fontsize=8)
            if ours and own_dense is not None:
                bound = own_dense / row["byte_bound"]
                axis.plot([bound, bound], [place - 0.4, place + 0.4], color=_BOUND, linewidth=2)
        axis.set_yticks(range(len(group)), [row["contestant"] for row in group])
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("ms a call" if kind == "mlp" else "ms a step")
        what = "token" if number == 1 else "tokens"
        axis.set_title(f"{threads} thread{'s' * (threads > 1)}, {number} {what} at a time", fontsize=10, loc="left")
    figure.text(0, -0.03, "| our k = 0 divided by the saving in bytes", color=_BOUND, fontsize=8)
    return figure
