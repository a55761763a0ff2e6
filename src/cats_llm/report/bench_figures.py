"""Figures of benchmarks: latency and throughput of each contestant, beside what the bytes allow."""

import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cats_llm.errors import CatsError
from cats_llm.number_format import counted, number
from cats_llm.outputs import write_file
from cats_llm.report.bench import Bench, differ, facts, sparsity, time_unit
from cats_llm.report.optional_dependency import require_extra
from cats_llm.report.page_figure import PageFigure, numbered

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OURS, _OTHERS, _BOUND = "#2563a8", "#9aa4b2", "#c2410c"


def figures(benches: Sequence[Bench]) -> list[PageFigure]:
    """Latency of each, and the throughput of those that decode."""
    drawable = []
    for i, bench in enumerate(benches):
        caption = (
            f"On {bench.place}. Bars are medians, whiskers quartiles; k is the gate sparsity, k = 0 our own kernel "
            "without any. "
        )
        if any(row.get("speedup_over_own_dense") for row in bench.rows):
            caption += (
                "The upright marks are our k = 0 changed by the share of weights that need not be read: what sparsity "
                "alone allows. "
            )
        if bench.kind == "mlp" and any(row["contestant"].endswith(", eager") for row in bench.rows):
            caption += "Those named eager are launched by Python, the others from a CUDA graph. "
        if bench.kind == "decode" and any(facts(bench.kind, row)[1] > 1 for row in bench.rows):
            caption += "With several sequences at a time their neurons are read together, so that less can be skipped."
        name, draw = numbered("latency", i, len(benches)), partial(latency, bench.kind, bench.rows)
        drawable.append(PageFigure(name, f"Latency: {bench.subject}", [caption], draw))
        if bench.kind == "decode":
            name, draw = numbered("throughput", i, len(benches)), partial(throughput, bench.kind, bench.rows)
            caption = "The same runs, longer is better."
            drawable.append(PageFigure(name, f"Throughput: {bench.subject}", [caption], draw))
    return drawable


def write_figure(kind: str, rows: list[dict[str, Any]], path: Path, force: bool = False) -> None:
    """Draw the rows of `cats bench` or benchmarks/gpu.py into an .svg or .png file.

    Args:
        kind: "mlp" or "decode".
        rows: as in the JSON file.

    Raises:
        CatsError: the file cannot be written, or has another ending.
        MissingExtraError: matplotlib is not installed.
    """
    require_extra("a figure", ("matplotlib",))
    if path.suffix not in (".svg", ".png"):
        raise CatsError(f"{path} has an unknown ending; figures are written as .svg or .png.")
    with write_file(path, force) as temporary:
        latency(kind, rows).savefig(temporary, format=path.suffix[1:], dpi=150, bbox_inches="tight")


def latency(kind: str, rows: list[dict[str, Any]], wide: bool = True) -> "Figure":
    """Time: one panel for each setting; bars are medians, whiskers quartiles. Microseconds if all are below 1 ms."""
    return _bars(kind, rows, wide, throughput=False)


def throughput(kind: str, rows: list[dict[str, Any]], wide: bool = True) -> "Figure":
    """Tokens a second, in the same panels."""
    return _bars(kind, rows, wide, throughput=True)


def _bars(kind: str, rows: list[dict[str, Any]], wide: bool, throughput: bool) -> "Figure":
    # here, so that results can be read without matplotlib
    from cats_llm.report import style

    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_title(kind, row, rows), []).append(row)
    most = max(len(group) for group in groups.values())
    unit, factor = ("tokens per second", 1.0) if throughput else time_unit(kind, rows)
    bounded = False
    with style.style():
        columns = (3 if len(groups) > 6 else 2) if wide else 1
        figure, panels = style.panels(len(groups), columns, wide, 0.55 + 0.27 * most, sharex=False)
        for axes, (title, group) in zip(panels, groups.items(), strict=True):
            for place, row in enumerate(group):
                value, low, high = (factor * v for v in _value(kind, row, throughput))
                ours = sparsity(row) is not None
                whiskers = [[max(0.0, value - low)], [max(0.0, high - value)]]
                colour = _OURS if ours else _OTHERS
                axes.barh(place, value, xerr=whiskers, color=colour, ecolor=style.INK, height=0.7)
                end = max(value, high)
                if ours and (gain := row.get("speedup_over_own_dense")) is not None:
                    # what our k = 0 took, in the same rounds, changed by the saving
                    change = row["byte_bound"] / gain["median"]
                    bound = value * change if throughput else value / change
                    axes.plot([bound, bound], [place - 0.4, place + 0.4], color=_BOUND, linewidth=2)
                    bounded, end = True, max(end, bound)
                axes.text(end, place, f"  {number(value, 3)}", va="center", fontsize=8.5)
            axes.set_yticks(range(len(group)), [_name(row) for row in group])
            # bars of one thickness, whatever number of contestants a panel has
            axes.set_ylim(most - 0.5, -0.5)
            axes.grid(visible=False, axis="y")
            axes.margins(x=0.17 if columns < 3 else 0.22)
            axes.set_title(title if wide and columns < 3 else _wrapped(title, 30))
        figure.supxlabel(unit if throughput else f"{unit} a {'call' if kind == 'mlp' else 'step'}", fontsize=9)
        if bounded:
            allowed = "times the saving in bytes" if throughput else "divided by the saving in bytes"
            style.legend(figure, {f"our k = 0 {allowed}": {"color": _BOUND, "linewidth": 2}})
        return figure


def _title(kind: str, row: Mapping[str, Any], rows: list[dict[str, Any]]) -> str:
    """The setting of a row: what was timed where rows differ in it, then how."""
    threads, tokens, _ = facts(kind, row)
    parts = [str(row[name]) for name in ("shape", "dtype", "model") if name in row and differ(name, rows)]
    if threads is not None:
        parts.append(counted(threads, "thread"))
    if "mode" in row:
        parts.append(row["mode"])
    parts.append(f"{counted(tokens, 'token')} at a time")
    if kind == "decode" and "tokens" in row and differ("tokens", rows):
        parts.append(f"{row['tokens']} long")
    return ", ".join(parts)


def _wrapped(title: str, width: int) -> str:
    """A title in lines that break between its parts only."""
    parts = [part.replace(" ", "\xa0") for part in title.split(", ")]
    return textwrap.fill(", ".join(parts), width, break_long_words=False, break_on_hyphens=False).replace("\xa0", " ")


def _name(row: Mapping[str, Any]) -> str:
    """A contestant, without the way to decode that the panel's title says."""
    mode = str(row.get("mode", "")).rpartition(", ")[2]
    return str(row["contestant"]).removesuffix(f", {mode}")


def _value(kind: str, row: Mapping[str, Any], throughput: bool) -> tuple[float, float, float]:
    """Median, low and high of what is drawn."""
    _, tokens, spread = facts(kind, row)
    if not throughput:
        return spread["median"], spread["low"], spread["high"]
    # a quick step is a high rate
    low, high = (1000 * tokens / spread[end] for end in ("high", "low"))
    return row.get("tokens_per_second", 1000 * tokens / spread["median"]), low, high
