"""Rows of results as tables: a header, then a line a row, all of it text."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]
Table = list[list[str]]
Columns = Mapping[str, Callable[[Row], str]]
"""By the header: the text of a cell."""


def _text(key: str) -> Callable[[Row], str]:
    return lambda row: str(row[key])


def _number(key: str, digits: int, scale: float = 1.0) -> Callable[[Row], str]:
    """A number or the median of several; a dash for None."""

    def text(row: Row) -> str:
        value = row[key]
        value = value["median"] if isinstance(value, Mapping) else value
        return "-" if value is None else f"{scale * value:.{digits}f}"

    return text


def _quartiles(key: str, digits: int, scale: float = 1.0) -> Callable[[Row], str]:
    return lambda row: f"{scale * row[key]['low']:.{digits}f} to {scale * row[key]['high']:.{digits}f}"


def _percent(key: str, digits: int = 0) -> Callable[[Row], str]:
    number = _number(key, digits, 100)

    def text(row: Row) -> str:
        value = number(row)
        return value if value == "-" else f"{value}%"

    return text


CPU_MLP: Columns = {
    "contestant": _text("contestant"),
    "threads": _text("threads"),
    "batch": _text("tokens"),
    "ms": _number("ms", 2),
    "quartiles": _quartiles("ms", 2),
    "GB/s": _number("gb_per_s", 1),
    "of read": _percent("share_of_read_bandwidth"),
    "x torch": _number("speedup_over_torch", 2),
    "x own dense": _number("speedup_over_own_dense", 2),
    "bound": _number("byte_bound", 2),
}
CUDA_MLP: Columns = {
    "contestant": _text("contestant"),
    "shape": _text("shape"),
    "dtype": _text("dtype"),
    "tokens": _text("tokens"),
    "kernel": lambda row: row["kernel"] or "-",
    "us": _number("ms", 1, 1e3),
    "quartiles": _quartiles("ms", 1, 1e3),
    "TB/s": _number("gb_per_s", 2, 1e-3),
    "of copy": _percent("share_of_copy_bandwidth"),
    "x torch": _number("speedup_over_torch", 2),
    "x torch eager": _number("speedup_over_torch_eager", 2),
    "x own k=0": _number("speedup_over_own_dense", 2),
    "bytes allow": _number("byte_bound", 2),
}
CPU_DECODE: Columns = {
    "contestant": _text("contestant"),
    "threads": _text("threads"),
    "batch": _text("batch"),
    "skipped": _percent("sparsity_decoded", 1),
    "ms a step": _number("ms_per_step", 2),
    "tokens/s": _number("tokens_per_second", 1),
    "GB/s": _number("gb_per_s", 1),
    "of read": _percent("share_of_read_bandwidth"),
    "x stock": _number("speedup_over_stock", 2),
    "x own": _number("speedup_over_own_dense", 2),
}
CUDA_DECODE: Columns = {
    "contestant": _text("contestant"),
    "batch": _text("batch"),
    "skipped": _percent("sparsity_decoded", 1),
    "ms a token": _number("ms_per_step", 2),
    "quartiles": _quartiles("ms_per_step", 2),
    "floor ms": _number("floor_ms", 2),
    "TB/s": _number("gb_per_s", 2, 1e-3),
    "of copy": _percent("share_of_copy_bandwidth"),
    "x stock": _number("speedup_over_stock", 2),
    "x own k=0": _number("speedup_over_own_dense", 2),
    "bytes allow": _number("byte_bound", 2),
}


def table(rows: Iterable[Row], columns: Columns) -> Table:
    """Header and lines."""
    return [list(columns), *([text(row) for text in columns.values()] for row in rows)]


def cpu_breakdown(entries: list[dict[str, Any]]) -> Table:
    """Where a step's milliseconds go, from the ``breakdown`` of `bench_decode` on a CPU."""
    lines = [["where a step's ms go", "threads", "batch", *entries[0]["ms"]]]
    for entry in entries:
        values = (f"{value:.2f}" for value in entry["ms"].values())
        lines.append([entry["contestant"], str(entry["threads"]), str(entry["batch"]), *values])
    return lines


def cuda_kernels(entry: dict[str, Any], most: int = 10) -> Table:
    """The longest kernels of a step, from an entry of ``kernels`` of `bench_decode` on a GPU."""
    lines = [[f"GPU kernels of one step, {entry['contestant']}, batch {entry['batch']}", "us"]]
    return lines + [[name[:100], f"{1e6 * seconds:.1f}"] for name, seconds in list(entry["seconds"].items())[:most]]


def as_text(lines: Table) -> str:
    """A table for a terminal: the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [[c.rjust(width) for c, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *right[1:]]) for line, right in zip(lines, padded, strict=True)
    )
