"""Results of `cats bench` and benchmarks/gpu.py: reading them, a table, and what they say."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cats_llm.errors import CatsError
from cats_llm.number_format import counted, number, target
from cats_llm.report.labels import short_name

KINDS = ("mlp", "decode")
# what a file of benchmarks/gpu.py has in place of rows: its lists, and the kind of each
GPU_SECTIONS = {"mlp": "mlp", "prefill": "mlp", "decode": "decode"}
_SCRIPT = "benchmarks/gpu.py"


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
        sections = {name: values[name] for name in GPU_SECTIONS if values.get(name)}
        if not sections:
            raise CatsError(f"{path} is a benchmark without rows; run {_SCRIPT} again.")
        return [
            Bench(
                f"{path.stem}-{name}", GPU_SECTIONS[name], machine, _rows(GPU_SECTIONS[name], name, rows, path, _SCRIPT)
            )
            for name, rows in sections.items()
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
    match = re.match(r"k = (\d+(?:\.\d+)?)(?:,|$)", row["contestant"])
    return float(match[1]) if match else None


def time_unit(kind: str, rows: Iterable[Mapping[str, Any]]) -> tuple[str, float]:
    """The unit that suits all rows, and how many of it are a millisecond."""
    return ("µs", 1000.0) if all(facts(kind, row)[2]["median"] < 1 for row in rows) else ("ms", 1.0)


def differ(name: str, rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether rows differ in a member."""
    return len({row.get(name) for row in rows}) > 1


def finding(bench: Bench) -> list[str]:
    """The speed-up at the sparsity nearest to a half, one token at a time, on the fewest threads that were tried."""
    sparse = [(k, row) for row in bench.rows if (k := sparsity(row))]
    if not sparse:
        return []

    def order(item: tuple[float, dict[str, Any]]) -> tuple[int, int, float]:
        threads, tokens, _ = facts(bench.kind, item[1])
        return tokens, threads or 0, abs(item[0] - 0.5)

    k, row = min(sparse, key=order)
    threads, tokens, milliseconds = facts(bench.kind, row)
    ratios = [
        f"{row[name]['median']:.2f} times as fast as {baseline}"
        for name, baseline in (
            ("speedup_over_torch", "PyTorch"),
            ("speedup_over_stock", "stock transformers"),
            ("speedup_over_own_dense", "our own kernels without sparsity"),
        )
        if row.get(name)
    ]
    step = "one token" if tokens == 1 else "one step"
    model = ", ".join(filter(None, (bench.model, row.get("mode"))))
    what = f"one MLP of {row.get('shape')}" if bench.kind == "mlp" else f"{step} ({model})"
    what += f" with {tokens} tokens at a time" if tokens > 1 else ""
    where = f"{counted(threads, 'thread')} of {bench.place}" if threads else bench.place
    return [
        f"At {target(k)} gate sparsity {what} takes {number(milliseconds['median'], 3)} ms on {where}"
        + (f", {' and '.join(ratios)}" if ratios else "")
        + f" (its bytes allow {row['byte_bound']:.2f} times)."
    ]
