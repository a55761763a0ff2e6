"""`bench_mlp` and `bench_decode`: what `cats bench` measures, on the device that is named."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cats_llm.benchmark import cuda, machine, tables
from cats_llm.benchmark.config import DecodeBench, MLPBench
from cats_llm.benchmark.cpu_decode import bench_cpu_decode
from cats_llm.benchmark.cuda_decode import bench_cuda_decode
from cats_llm.benchmark.mlp import bench_cpu_mlp, bench_cuda_mlp
from cats_llm.benchmark.models import parse_shape
from cats_llm.calibration.profile import Profile
from cats_llm.errors import CatsError
from cats_llm.kernels import cpu
from cats_llm.progress import Track, untracked


@dataclass(frozen=True)
class BenchResult:
    """What was measured.

    Attributes:
        title: what was measured and on what.
        record: as JSON files hold it: ``benchmark``, ``machine``, ``rows``, and more of some kinds.
        tables: the rows, and what else there is, as text.
    """

    title: str
    record: dict[str, Any]
    tables: list[tables.Table]


def bench_mlp(config: MLPBench, track: Track = untracked, working_set: int | None = None) -> BenchResult:
    """Time one MLP: our kernel at several sparsities, PyTorch dense, and on a CPU a plain read of the same bytes.

    Args:
        config: what to measure.
        track: shows how many settings are done.
        working_set: see `bench_cpu_mlp`.

    Raises:
        CatsError: the shape is none, or the CPU kernels are not built.
    """
    shape = parse_shape(config.shape)
    title = f"one MLP of {shape.name} ({shape.hidden_size} x {shape.intermediate_size}), "
    rows: list[dict[str, Any]] = []
    if config.device == "cpu":
        check_cpu_kernels()
        for threads, tokens in track(config.cpu_settings, "measuring", len(config.cpu_settings)):
            with _thread_count(threads):
                rows += bench_cpu_mlp(config, tokens, working_set)
        shown = tables.table(rows, tables.CPU_MLP)
        return BenchResult(f"{title}{config.dtype}, {cpu.isa()}", _record("mlp", rows), [shown])
    with torch.cuda.device(config.device):
        memory = cuda.bandwidths(config.device)
        for tokens in track(config.batches, "measuring", len(config.batches)):
            rows += bench_cuda_mlp(config, memory["copy"], tokens)
    shown = tables.table(rows, tables.CUDA_MLP)
    return BenchResult(title + cuda.title(config.device, memory), _record("mlp", rows, bandwidth=memory), [shown])


def bench_decode(
    config: DecodeBench,
    track: Track = untracked,
    announce: Callable[[str], None] = lambda text: None,
    model: Any = None,
    profile: Profile | None = None,
) -> BenchResult:
    """Time whole tokens: stock transformers, our dense path (k = 0) and CATS on the same weights.

    Args:
        config: what to measure.
        track: shows how many settings are done; on a CPU.
        announce: is told what begins; on a GPU.
        model: dense, on the device, if it is loaded already.
        profile: in place of the file that ``config`` names.

    Raises:
        CatsError: the CPU kernels are not built, or the model or profile cannot be loaded.
    """
    if config.device == "cpu":
        check_cpu_kernels()
    model, name = (model, str(config.model)) if model is not None else config.load()
    if profile is None and config.profile is not None:
        profile = Profile.load(config.profile)
    of_row = {"model": name, "dtype": config.dtype}
    rows: list[dict[str, Any]] = []
    if config.device == "cpu":
        breakdown: list[dict[str, Any]] = []
        for threads, batch in track(config.cpu_settings, "measuring", len(config.cpu_settings)):
            with _thread_count(threads):
                timed, parts = bench_cpu_decode(config, model, profile, batch)
            rows += [row | of_row for row in timed]
            breakdown += [{"contestant": c, "threads": threads, "batch": batch, "ms": ms} for c, ms in parts.items()]
        shown = [tables.table(rows, tables.CPU_DECODE), tables.cpu_breakdown(breakdown)]
        record = _record("decode", rows, breakdown=breakdown)
        return BenchResult(f"{name}, {config.dtype}, {cpu.isa()}", record, shown)
    kernels: list[dict[str, Any]] = []
    with torch.cuda.device(config.device):
        memory = cuda.bandwidths(config.device)
        for batch in config.batches:
            result = bench_cuda_decode(config, model, memory["copy"], profile, batch, announce=announce)
            rows += [row | of_row for row in result["rows"]]
            kernels += [{"contestant": c, "batch": batch, "seconds": s} for c, s in result["kernels"].items()]
    shown = [tables.table(rows, tables.CUDA_DECODE), *map(tables.cuda_kernels, kernels)]
    record = _record("decode", rows, bandwidth=memory, kernels=kernels, tuned_for=result["tuned_for"])
    return BenchResult(f"{name}, {config.dtype}, {cuda.title(config.device, memory)}", record, shown)


def check_cpu_kernels() -> None:
    """Refuse to measure what is not there.

    Raises:
        CatsError: the CPU kernels are not built.
    """
    if not cpu.BACKEND.available():
        raise CatsError("the CPU kernels are not built here; install cats-llm with a C++ compiler at hand.")


def _record(kind: str, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"benchmark": kind, "machine": machine.facts(), "rows": rows, **more}


@contextmanager
def _thread_count(number: int) -> Iterator[None]:
    """Compute with so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
