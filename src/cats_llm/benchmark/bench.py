"""`bench_mlp` and `bench_decode`: what `cats bench` measures, on the device that is named."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cats_llm.benchmark import cuda, machine, tables
from cats_llm.benchmark.cpu_decode import bench_cpu_decode
from cats_llm.benchmark.cpu_mlp import bench_cpu_mlp
from cats_llm.benchmark.cuda_decode import bench_cuda_decode
from cats_llm.benchmark.cuda_mlp import bench_cuda_mlp
from cats_llm.benchmark.models import random_model
from cats_llm.benchmark.shapes import SHAPES, parse_shape
from cats_llm.calibration.profile import Profile
from cats_llm.checkpoint.config import parse_sparsity
from cats_llm.dtypes import DTYPE_NAMES, DTYPES
from cats_llm.errors import CatsError
from cats_llm.kernels import cpu
from cats_llm.loading import load_model, parse_device
from cats_llm.model.sparsify import densify
from cats_llm.options import Panel, option

Progress = Callable[[Sequence[Any]], Iterable[Any]]
"""Passes on the settings that are measured one after the other, and may show how far it is."""

_SHAPE = f"{', '.join(SHAPES)}, or hidden and intermediate size."
_WHOLE = "whole numbers from 1, separated by commas"


def _one_device(text: str) -> str:
    if text == "auto":
        raise CatsError("'auto' may be several devices; name one.")
    return parse_device(text)


@dataclass(frozen=True)
class _Settings:
    """What both benchmarks can be told."""

    dtype: str = option(
        "bfloat16",
        help=f"{', '.join(DTYPE_NAMES)}; auto is the checkpoint's own.",
        choices=DTYPE_NAMES,
        metavar="DTYPE",
        panel=Panel.DATA,
    )
    sparsities: tuple[float, ...] = option(
        (0.0, 0.5, 0.7, 0.9),
        help="Gate sparsities, separated by commas.",
        flags=("--sparsity",),
        parse=parse_sparsity,
        default_text="0,0.5,0.7,0.9",
        panel=Panel.SPARSITY,
    )
    batches: tuple[int, ...] = option(
        (1,),
        help="Tokens at a time, separated by commas.",
        flags=("--batch",),
        minimum=1,
        expected=_WHOLE,
        panel=Panel.MEASURING,
    )
    device: str = option("cpu", help="cpu, cuda or cuda:1.", parse=_one_device, metavar="DEVICE", panel=Panel.MEASURING)
    threads: tuple[int, ...] | None = option(
        None,
        help="Numbers of threads, separated by commas. Default: all.",
        minimum=1,
        expected=_WHOLE,
        panel=Panel.MEASURING,
    )

    def __post_init__(self) -> None:
        if self.device != "cpu" and self.threads is not None:
            raise CatsError("--threads is for the CPU.")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of random weights: bfloat16 for "auto"."""
        return DTYPES.get(self.dtype, torch.bfloat16)

    @property
    def cpu_settings(self) -> list[tuple[int, int]]:
        """Pairs of threads and tokens at a time."""
        return list(itertools.product(self.threads or (torch.get_num_threads(),), self.batches))


@dataclass(frozen=True)
class MLPBench(_Settings):
    """One MLP at decode, with random weights."""

    shape: str = option("mistral-7b", help=_SHAPE, metavar="NAME|D,F", panel=Panel.DATA)
    rounds: int = option(40, help="Turns of each contestant.", minimum=1, panel=Panel.MEASURING)


@dataclass(frozen=True)
class DecodeBench(_Settings):
    """Whole tokens through `generate`, of a model or of one of a shape with random weights."""

    model: str | None = option(None, help="A folder or name; or pass --shape.", positional=True, metavar="[MODEL]")
    shape: str | None = option(None, help=_SHAPE, metavar="NAME|D,F", panel=Panel.DATA)
    layers: int | None = option(
        None, help="Layers of the random model of --shape. Default: 4, on a GPU all.", minimum=1, panel=Panel.DATA
    )
    profile: Path | None = option(None, help="Of MODEL. Default: thresholds from random tokens.", panel=Panel.SPARSITY)
    tokens: int | None = option(
        None, help="Tokens generated in each turn. Default: 16, on a GPU 128.", minimum=3, panel=Panel.MEASURING
    )
    rounds: int = option(7, help="Turns of each contestant.", minimum=1, panel=Panel.MEASURING)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) == (self.shape is None):
            raise CatsError("pass either MODEL or --shape.")

    def load(self) -> tuple[Any, str]:
        """The dense model on the device, and what tables call it."""
        if self.model is not None:
            return densify(load_model(self.model, self.dtype, self.device)), self.model
        shape = parse_shape(str(self.shape))
        layers = self.layers or (4 if self.device == "cpu" else shape.layers)
        model = random_model(shape, layers, self.torch_dtype, self.device)
        return model, f"{shape.name}, {layers} layers, random weights"


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


def bench_mlp(config: MLPBench, progress: Progress = iter, working_set: int | None = None) -> BenchResult:
    """Time one MLP: our kernel at several sparsities, PyTorch dense, and on a CPU a plain read of the same bytes.

    Args:
        config: what to measure.
        progress: see `Progress`.
        working_set: see `bench_cpu_mlp`.

    Raises:
        CatsError: the shape is none, or the CPU kernels are not built.
    """
    shape = parse_shape(config.shape)
    title = f"one MLP of {shape.name} ({shape.hidden_size} x {shape.intermediate_size}), "
    rows: list[dict[str, Any]] = []
    if config.device == "cpu":
        check_cpu_kernels()
        for threads, tokens in progress(config.cpu_settings):
            with _thread_count(threads):
                rows += bench_cpu_mlp(
                    shape, config.torch_dtype, list(config.sparsities), tokens, config.rounds, working_set
                )
        lines = tables.table(rows, tables.CPU_MLP)
        return BenchResult(f"{title}{config.dtype}, {cpu.isa()}", _record("mlp", rows), [lines])
    with torch.cuda.device(config.device):
        memory = cuda.bandwidths(config.device)
        for tokens in progress(config.batches):
            rows += bench_cuda_mlp(
                shape, config.torch_dtype, list(config.sparsities), memory["copy"], tokens, config.rounds, config.device
            )
    lines = tables.table(rows, tables.CUDA_MLP)
    return BenchResult(title + cuda.title(config.device, memory), _record("mlp", rows, bandwidth=memory), [lines])


def bench_decode(
    config: DecodeBench,
    progress: Progress = iter,
    announce: Callable[[str], None] = lambda text: None,
    model: Any = None,
    profile: Profile | None = None,
) -> BenchResult:
    """Time whole tokens: stock transformers, our dense path (k = 0) and CATS on the same weights.

    Args:
        config: what to measure.
        progress: see `Progress`; on a CPU.
        announce: is told what begins; on a GPU.
        model: dense, on the device, if it is loaded already.
        profile: in place of the file that ``config`` names.

    Raises:
        CatsError: the CPU kernels are not built, or the model or profile cannot be loaded.
    """
    on_cpu = config.device == "cpu"
    if on_cpu:
        check_cpu_kernels()
    model, name = (model, str(config.model)) if model is not None else config.load()
    if profile is None and config.profile is not None:
        profile = Profile.load(config.profile)
    if on_cpu:
        rows, more, place, shown = _bench_decode_on_cpu(config, model, profile, progress)
    else:
        rows, more, place, shown = _bench_decode_on_cuda(config, model, profile, announce)
    record = _record("decode", [row | {"model": name, "dtype": config.dtype} for row in rows], **more)
    return BenchResult(f"{name}, {config.dtype}, {place}", record, shown)


_Decoded = tuple[list[dict[str, Any]], dict[str, Any], str, list[tables.Table]]
"""Rows, what else the record keeps, the place, and tables."""


def _bench_decode_on_cpu(config: DecodeBench, model: Any, profile: Profile | None, progress: Progress) -> _Decoded:
    rows: list[dict[str, Any]] = []
    breakdown: list[dict[str, Any]] = []
    sparsities, tokens = list(config.sparsities), config.tokens or 16
    for threads, batch in progress(config.cpu_settings):
        with _thread_count(threads):
            timed, parts = bench_cpu_decode(model, sparsities, profile, batch, tokens, config.rounds)
        rows += timed
        breakdown += [{"contestant": c, "threads": threads, "batch": batch, "ms": ms} for c, ms in parts.items()]
    shown = [tables.table(rows, tables.CPU_DECODE), tables.cpu_breakdown(breakdown)]
    return rows, {"breakdown": breakdown}, cpu.isa(), shown


def _bench_decode_on_cuda(
    config: DecodeBench, model: Any, profile: Profile | None, announce: Callable[[str], None]
) -> _Decoded:
    rows: list[dict[str, Any]] = []
    kernels: list[dict[str, Any]] = []
    device, tokens = str(model.device), config.tokens or 128
    with torch.cuda.device(device):
        memory = cuda.bandwidths(device)
        for batch in config.batches:
            result = bench_cuda_decode(
                model, list(config.sparsities), memory["copy"], profile, batch, tokens, config.rounds, announce=announce
            )
            rows += result["rows"]
            kernels += [{"contestant": c, "batch": batch, "seconds": s} for c, s in result["kernels"].items()]
    more = {"bandwidth": memory, "kernels": kernels, "tuned_for": result["tuned_for"]}
    shown = [tables.table(rows, tables.CUDA_DECODE), *map(tables.cuda_kernels, kernels)]
    return rows, more, cuda.title(device, memory), shown


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
