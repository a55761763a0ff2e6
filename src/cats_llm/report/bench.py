"""Benchmark results as figures: latency and throughput of each contestant, beside what the bytes allow."""

from __future__ import annotations

import math
import re
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cats_llm.errors import CatsError
from cats_llm.outputs import write_file
from cats_llm.report.extra import require_extra
from cats_llm.report.wording import SPACE, number, short_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from matplotlib.figure import Figure

KINDS = ("mlp", "decode")
# what a file of benchmarks/gpu.py has in place of rows: its lists, and the kind of each
GPU_SECTIONS = {"mlp": "mlp", "prefill": "mlp", "decode": "decode"}
_SCRIPT = "benchmarks/gpu.py"
_OURS, _OTHERS, _BOUND = "#2563a8", "#9aa4b2", "#c2410c"


@dataclass(frozen=True)
class Bench:
    """A table of `cats bench` or benchmarks/gpu.py.

    Attributes:
        name: of the file, without its ending; with the list's name where a file has several.
        kind: one of `KINDS`.
        machine: facts about where it ran.
        rows: one a contestant and setting: on a CPU the threads and tokens at a time; on a GPU the shape, dtype, way to
            decode and tokens at a time.
    """

    name: str
    kind: str
    machine: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def subject(self) -> str:
        """What was timed."""
        what = f"one MLP of {self._all('shape')}" if self.kind == "mlp" else f"{self.model}, whole tokens"
        return f"{what}, {self._all('dtype')}"

    @property
    def model(self) -> str:
        """What decoded."""
        row = self.rows[0]
        return short_name(str(row.get("model", row.get("shape", "?"))))

    @property
    def place(self) -> str:
        """The processor that it ran on."""
        if "device" in self.rows[0]:
            return str(self.rows[0]["device"])
        gpus = self.machine.get("gpus")
        # rows older than "device" tell a GPU by having no threads
        if isinstance(gpus, list) and gpus and not any("threads" in row for row in self.rows):
            return ", ".join(map(str, gpus))
        return str(self.machine.get("cpu", "an unknown machine"))

    def _all(self, name: str) -> str:
        return "/".join(dict.fromkeys(str(row.get(name, "?")) for row in self.rows))


def is_bench(values: Any) -> bool:
    """Whether this JSON says of itself that it is a result of `cats bench` or benchmarks/gpu.py."""
    return isinstance(values, dict) and "benchmark" in values and ("rows" in values or values["benchmark"] == "gpu")


def read_bench(values: Mapping[str, Any], path: Path) -> list[Bench]:
    """The tables in a result file: one of `cats bench`, up to three of benchmarks/gpu.py.

    Raises:
        CatsError: it is of a kind that is not known here, or damaged.
    """
    kind, machine = values["benchmark"], values.get("machine")
    machine = dict(machine) if isinstance(machine, dict) else {}
    if kind == "gpu":
        found = {name: values[name] for name in GPU_SECTIONS if values.get(name)}
        if not found:
            raise CatsError(f"{path} is a benchmark without rows; run {_SCRIPT} again.")
        return [
            Bench(
                f"{path.stem}-{name}", GPU_SECTIONS[name], machine, _rows(GPU_SECTIONS[name], name, rows, path, _SCRIPT)
            )
            for name, rows in found.items()
        ]
    if kind not in KINDS:
        raise CatsError(
            f"{path} is a benchmark of the unknown kind {kind!r}; this version draws {' and '.join(KINDS)}."
        )
    return [Bench(path.stem, kind, machine, _rows(kind, "rows", values["rows"], path, f"cats bench {kind}"))]


def _rows(kind: str, name: str, rows: Any, path: Path, made_by: str) -> list[dict[str, Any]]:
    """The rows, if all are usable."""
    again = f"run {made_by} again."
    if not isinstance(rows, list) or not rows:
        raise CatsError(f"{path} is a benchmark without rows; {again}")
    for i, row in enumerate(rows):
        try:
            _check(kind, row)
        except ValueError as error:
            raise CatsError(
                f"{path} is a damaged benchmark result: {name}[{i}] has no usable {error}; {again}"
            ) from error
    return rows


def _check(kind: str, row: Any) -> None:
    """Raise an error that names the first member that figures and tables could not use."""
    if not isinstance(row, dict) or not isinstance(row.get("contestant"), str):
        raise ValueError("contestant")
    for name in ("shape", "dtype", "mode", "model", "device"):
        if not isinstance(row.get(name, ""), str):
            raise ValueError(name)
    milliseconds, tokens = _names(kind)
    for name in (tokens, *(name for name in ("threads", "tokens") if name in row)):
        if isinstance(row.get(name), bool) or not isinstance(row.get(name), int) or row[name] < 1:
            raise ValueError(name)
    spread = row.get(milliseconds)
    parts = [spread.get(part) if isinstance(spread, dict) else None for part in ("low", "median", "high")]
    numbers = [("byte_bound", row.get("byte_bound")), *((milliseconds, part) for part in parts)]
    if kind == "decode":
        numbers.append(("tokens_per_second", row.get("tokens_per_second")))
    for name in ("speedup_over_torch", "speedup_over_stock", "speedup_over_own_dense"):
        if (ratio := row.get(name)) is not None:
            numbers.append((name, ratio.get("median") if isinstance(ratio, dict) else None))
    for name, value in numbers:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(name)


def _names(kind: str) -> tuple[str, str]:
    """Where a row keeps its milliseconds, and its tokens at a time."""
    return ("ms", "tokens") if kind == "mlp" else ("ms_per_step", "batch")


def facts(kind: str, row: Mapping[str, Any]) -> tuple[int | None, int, dict[str, float]]:
    """Threads (None on a GPU), tokens at a time, and the milliseconds (median, low, high) of a row."""
    milliseconds, tokens = _names(kind)
    return row.get("threads"), row[tokens], row[milliseconds]


def sparsity(row: Mapping[str, Any]) -> float | None:
    """The gate sparsity of one of our contestants; None for others'."""
    found = re.match(r"k = (\d+(?:\.\d+)?)(?:,|$)", row["contestant"])
    return float(found[1]) if found else None


def time_unit(kind: str, rows: Iterable[Mapping[str, Any]]) -> tuple[str, float]:
    """The unit that suits all rows, and how many of it are a millisecond."""
    return ("µs", 1000.0) if all(facts(kind, row)[2]["median"] < 1 for row in rows) else ("ms", 1.0)


def several(name: str, rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether rows differ in a member."""
    return len({row.get(name) for row in rows}) > 1


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


def latency(kind: str, rows: list[dict[str, Any]], wide: bool = True) -> Figure:
    """Time: one panel for each setting; bars are medians, whiskers quartiles. Microseconds if all are below 1 ms."""
    return _bars(kind, rows, wide, throughput=False)


def throughput(kind: str, rows: list[dict[str, Any]], wide: bool = True) -> Figure:
    """Tokens a second, in the same panels."""
    return _bars(kind, rows, wide, throughput=True)


def _bars(kind: str, rows: list[dict[str, Any]], wide: bool, throughput: bool) -> Figure:
    from matplotlib.lines import Line2D

    from cats_llm.report import drawing

    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_title(kind, row, rows), []).append(row)
    most = max(len(group) for group in groups.values())
    unit, factor = ("tokens per second", 1.0) if throughput else time_unit(kind, rows)
    bounded = False
    with drawing.style():
        columns = min((3 if len(groups) > 6 else 2) if wide else 1, len(groups))
        figure, panels = drawing.panels(len(groups), columns, wide, 0.55 + 0.27 * most, sharex=False)
        for axes, (title, group) in zip(panels, groups.items(), strict=True):
            for place, row in enumerate(group):
                value, low, high = (factor * v for v in _value(kind, row, throughput))
                ours = sparsity(row) is not None
                whiskers = [[max(0.0, value - low)], [max(0.0, high - value)]]
                colour = _OURS if ours else _OTHERS
                axes.barh(place, value, xerr=whiskers, color=colour, ecolor=drawing.INK, height=0.7)
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
            handle = Line2D([], [], color=_BOUND, linewidth=2)
            drawing.legend(figure, [handle], [f"our k = 0 {allowed}"])
        return figure


def _title(kind: str, row: Mapping[str, Any], rows: list[dict[str, Any]]) -> str:
    """The setting of a row: what was timed where rows differ in it, then how."""
    threads, tokens, _ = facts(kind, row)
    parts = [str(row[name]) for name in ("shape", "dtype", "model") if name in row and several(name, rows)]
    if threads is not None:
        parts.append(f"{threads} thread{'s' * (threads > 1)}")
    if "mode" in row:
        parts.append(row["mode"])
    parts.append(f"{tokens} token{'s' * (tokens > 1)} at a time")
    if kind == "decode" and "tokens" in row and several("tokens", rows):
        parts.append(f"{row['tokens']} long")
    return ", ".join(parts)


def _wrapped(title: str, width: int) -> str:
    """A title in lines that break between its parts only."""
    parts = [part.replace(" ", SPACE) for part in title.split(", ")]
    return textwrap.fill(", ".join(parts), width, break_long_words=False, break_on_hyphens=False).replace(SPACE, " ")


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
