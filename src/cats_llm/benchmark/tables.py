"""Rows of results as tables: a header, then a line a row, all of it text."""

from collections.abc import Iterable, Mapping
from typing import Any

Table = list[list[str]]
Columns = Mapping[str, str]
"""By the header: how a row's entries are written, as `str.format` reads it."""

CPU_MLP: Columns = {
    "contestant": "{contestant}",
    "threads": "{threads}",
    "batch": "{tokens}",
    "ms": "{ms[median]:.2f}",
    "quartiles": "{ms[low]:.2f} to {ms[high]:.2f}",
    "GB/s": "{gb_per_s:.1f}",
    "of read": "{share_of_read_bandwidth[median]:.0%}",
    "x torch": "{speedup_over_torch[median]:.2f}",
    "x own dense": "{speedup_over_own_dense[median]:.2f}",
    "bound": "{byte_bound:.2f}",
}
CUDA_MLP: Columns = {
    "contestant": "{contestant}",
    "shape": "{shape}",
    "dtype": "{dtype}",
    "tokens": "{tokens}",
    "kernel": "{kernel:s}",
    "us": "{us[median]:.1f}",
    "quartiles": "{us[low]:.1f} to {us[high]:.1f}",
    "TB/s": "{tb_per_s:.2f}",
    "of copy": "{share_of_copy_bandwidth:.0%}",
    "x torch": "{speedup_over_torch[median]:.2f}",
    "x torch eager": "{speedup_over_torch_eager[median]:.2f}",
    "x own k=0": "{speedup_over_own_dense[median]:.2f}",
    "bytes allow": "{byte_bound:.2f}",
}
CPU_DECODE: Columns = {
    "contestant": "{contestant}",
    "threads": "{threads}",
    "batch": "{batch}",
    "skipped": "{sparsity_decoded:.1%}",
    "ms a step": "{ms_per_step[median]:.2f}",
    "tokens/s": "{tokens_per_second:.1f}",
    "GB/s": "{gb_per_s:.1f}",
    "of read": "{share_of_read_bandwidth:.0%}",
    "x stock": "{speedup_over_stock[median]:.2f}",
    "x own": "{speedup_over_own_dense[median]:.2f}",
}
CUDA_DECODE: Columns = {
    "contestant": "{contestant}",
    "batch": "{batch}",
    "skipped": "{sparsity_decoded:.1%}",
    "ms a token": "{ms_per_step[median]:.2f}",
    "quartiles": "{ms_per_step[low]:.2f} to {ms_per_step[high]:.2f}",
    "floor ms": "{floor_ms:.2f}",
    "TB/s": "{tb_per_s:.2f}",
    "of copy": "{share_of_copy_bandwidth:.0%}",
    "x stock": "{speedup_over_stock[median]:.2f}",
    "x own k=0": "{speedup_over_own_dense[median]:.2f}",
    "bytes allow": "{byte_bound:.2f}",
}


def table(rows: Iterable[Mapping[str, Any]], columns: Columns) -> Table:
    """Header and lines; a dash for None."""
    lines = [list(columns)]
    for row in rows:
        us = {name: 1e3 * ms for name, ms in row.get("ms", {}).items()}
        entries = {**row, "us": us, "tb_per_s": row["gb_per_s"] / 1e3}
        lines.append([_cell(pattern, entries) for pattern in columns.values()])
    return lines


def _cell(pattern: str, entries: Mapping[str, Any]) -> str:
    try:
        return pattern.format_map(entries)
    except TypeError:  # None has no median and no digits
        return "-"


def cpu_breakdown(entries: list[dict[str, Any]]) -> Table:
    """Where a step's milliseconds go, from the ``breakdown`` of `bench_decode` on a CPU."""
    lines = [["where a step's ms go", "threads", "batch", *entries[0]["ms"]]]
    for entry in entries:
        values = (f"{value:.2f}" for value in entry["ms"].values())
        lines.append([entry["contestant"], str(entry["threads"]), str(entry["batch"]), *values])
    return lines


def cuda_kernels(entry: dict[str, Any]) -> Table:
    """The longest kernels of a step, from an entry of ``kernels`` of `bench_decode` on a GPU."""
    lines = [[f"GPU kernels of one step, {entry['contestant']}, batch {entry['batch']}", "us"]]
    return lines + [[name[:100], f"{1e6 * seconds:.1f}"] for name, seconds in list(entry["seconds"].items())[:10]]
