"""`cats bench mlp` and `cats bench decode`: speed, beside the machine's bandwidth and PyTorch. GPUs: bench_cuda.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from cats_llm.benchmark import machine
from cats_llm.benchmark.decode import bench_decode
from cats_llm.benchmark.mlp import bench_mlp
from cats_llm.benchmark.models import random_model
from cats_llm.benchmark.shapes import SHAPES, parse_shape
from cats_llm.calibration.profile import Profile
from cats_llm.cli import bench_cuda, options
from cats_llm.cli.output import quiet_libraries, show, table, track
from cats_llm.errors import CatsError
from cats_llm.kernels import cpu
from cats_llm.loading import load_model
from cats_llm.model.sparsify import densify
from cats_llm.number_format import percent
from cats_llm.outputs import check_output, write_json

ShapeOption = Annotated[
    str | None,
    typer.Option(metavar="NAME|D,F", help=f"{', '.join(SHAPES)}, or hidden and intermediate size.", show_default=False),
]
Sparsities = Annotated[str, typer.Option("--sparsity", help="Gate sparsities, separated by commas.")]
Threads = Annotated[
    str | None, typer.Option(help="Numbers of threads, separated by commas. Default: all.", show_default=False)
]
Device = Annotated[
    str, typer.Option(parser=options.parse_device, metavar="DEVICE", help="cpu, cuda or cuda:1.", show_default="cpu")
]
Batches = Annotated[str, typer.Option("--batch", help="Tokens at a time, separated by commas.")]
Figure = Annotated[Path | None, typer.Option(help="Draw the results into this .svg or .png file.", show_default=False)]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    group = typer.Typer(help="Measure speed, beside PyTorch and the machine's own bandwidth.", no_args_is_help=True)
    group.command(name="mlp")(mlp)
    group.command(name="decode")(decode)
    app.add_typer(group, name="bench")


def mlp(
    shape: ShapeOption = "mistral-7b",
    dtype: options.Dtype = "bfloat16",
    sparsity: Sparsities = "0,0.5,0.7,0.9",
    batch: Batches = "1",
    device: Device = "cpu",
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contestant.")] = 40,
    json: options.JsonFile = None,
    figure: Figure = None,
    force: options.Force = False,
) -> None:
    """Time one MLP at decode with random weights: our kernel, PyTorch dense, a plain read of the same bytes.

    Contestants take turns, weights rotate over more than a gigabyte, ratios are taken round by round. On a GPU they are
    CUDA graphs, and eager calls beside them, and bandwidth is that of a copy.

    Example: **cats bench mlp --shape mistral-7b --threads 1,2 --json mlp.json**
    """
    _check_outputs(device, threads, json, figure, force)
    sizes = parse_shape(str(shape))
    ks = _sparsities(sparsity)
    rows: list[dict[str, Any]] = []
    if device != "cpu":
        rows, more = bench_cuda.mlp(device, sizes, _dtype(dtype), ks, options.whole_numbers(batch, "--batch"), rounds)
        _finish("mlp", rows, more, json, figure, force)
        return
    combinations = [(n, b) for n in _threads(threads) for b in options.whole_numbers(batch, "--batch")]
    for number, tokens in track(combinations, "measuring", len(combinations)):
        with _thread_count(number):
            rows += bench_mlp(sizes, _dtype(dtype), ks, tokens, rounds)
    _finish("mlp", rows, {}, json, figure, force)
    shown = table(
        "contestant", "threads", "batch", "ms", "quartiles", "GB/s", "of read", "x torch", "x own dense", "bound"
    )
    for row in rows:
        ms = row["ms"]
        shown.add_row(
            row["contestant"],
            str(row["threads"]),
            str(row["tokens"]),
            f"{ms['median']:.2f}",
            f"{ms['low']:.2f} to {ms['high']:.2f}",
            f"{row['gb_per_s']:.1f}",
            percent(row["share_of_read_bandwidth"]["median"], 0),
            f"{row['speedup_over_torch']['median']:.2f}",
            f"{row['speedup_over_own_dense']['median']:.2f}" if row["speedup_over_own_dense"] else "-",
            f"{row['byte_bound']:.2f}",
        )
    show(f"one MLP of {sizes.name} ({sizes.hidden_size} x {sizes.intermediate_size}), {dtype}, {cpu.isa()}")
    show(shown)


def decode(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A folder or name; or pass --shape.", show_default=False)
    ] = None,
    shape: ShapeOption = None,
    layers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Layers of the random model of --shape. Default: 4, on a GPU all.", show_default=False
        ),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Of MODEL. Default: thresholds from random tokens.", show_default=False)
    ] = None,
    dtype: options.Dtype = "bfloat16",
    sparsity: Sparsities = "0,0.5,0.7,0.9",
    batch: Batches = "1",
    device: Device = "cpu",
    threads: Threads = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=3, help="Tokens generated in each turn. Default: 16, on a GPU 128.", show_default=False),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contestant.")] = 7,
    json: options.JsonFile = None,
    figure: Figure = None,
    force: options.Force = False,
) -> None:
    """Time whole tokens through `generate`: stock transformers, our dense path (k = 0), and CATS on the same weights.

    On a GPU each of them eager, compiled by `generate` with a static cache, with our loop, and as a bare compiled step.

    Example: **cats bench decode --shape mistral-7b --layers 4 --threads 1,2 --json decode.json**
    """
    if (model is None) == (shape is None):
        raise typer.BadParameter("pass either MODEL or --shape.")
    _check_outputs(device, threads, json, figure, force)
    ks = _sparsities(sparsity)
    quiet_libraries()
    if model is not None:
        loaded = densify(load_model(model, dtype, device))
        name = model
    else:
        sizes = parse_shape(str(shape))
        layers = layers or (4 if device == "cpu" else sizes.layers)
        loaded = random_model(sizes, layers, _dtype(dtype), device)
        name = f"{sizes.name}, {layers} layers, random weights"
    found = Profile.load(profile) if profile is not None else None
    if device != "cpu":
        batches = options.whole_numbers(batch, "--batch")
        measured, more = bench_cuda.decode(loaded, name, dtype, ks, found, batches, tokens or 128, rounds)
        _finish("decode", measured, more, json, figure, force)
        return
    tokens = tokens or 16
    rows: list[dict[str, Any]] = []
    breakdowns: list[dict[str, Any]] = []
    combinations = [(n, b) for n in _threads(threads) for b in options.whole_numbers(batch, "--batch")]
    for number, size in track(combinations, "measuring", len(combinations)):
        with _thread_count(number):
            result = bench_decode(loaded, ks, found, size, tokens, rounds)
        rows += [row | {"model": name, "dtype": dtype} for row in result["rows"]]
        breakdowns += [
            {"contestant": contestant, "threads": number, "batch": size, "ms": parts}
            for contestant, parts in result["breakdown"].items()
        ]
    _finish("decode", rows, {"breakdown": breakdowns}, json, figure, force)
    shown = table(
        "contestant", "threads", "batch", "skipped", "ms a step", "tokens/s", "GB/s", "of read", "x stock", "x own"
    )
    for row in rows:
        shown.add_row(
            row["contestant"],
            str(row["threads"]),
            str(row["batch"]),
            percent(row["sparsity_decoded"], 1),
            f"{row['ms_per_step']['median']:.2f}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['gb_per_s']:.1f}",
            percent(row["share_of_read_bandwidth"], 0),
            f"{row['speedup_over_stock']['median']:.2f}",
            f"{row['speedup_over_own_dense']['median']:.2f}",
        )
    show(f"{name}, {dtype}, {cpu.isa()}")
    show(shown)
    parts = table("where a step's ms go", "threads", "batch", *breakdowns[0]["ms"])
    for row in breakdowns:
        values = (f"{value:.2f}" for value in row["ms"].values())
        parts.add_row(row["contestant"], str(row["threads"]), str(row["batch"]), *values)
    show(parts)


def _check_outputs(device: str, threads: str | None, json: Path | None, figure: Path | None, force: bool) -> None:
    if device == "auto":
        raise typer.BadParameter("'auto' may be several devices; name one.")
    if device != "cpu" and threads is not None:
        raise typer.BadParameter("--threads is for the CPU.")
    if device == "cpu" and not cpu.available():
        raise CatsError("the CPU kernels are not built here; install cats-llm with a C++ compiler at hand.")
    for path in (json, figure):
        if path is not None:
            check_output(path, force)


def _finish(
    kind: str, rows: list[dict[str, Any]], more: dict[str, Any], json: Path | None, figure: Path | None, force: bool
) -> None:
    if json is not None:
        write_json(json, {"benchmark": kind, "machine": machine.facts(), "rows": rows, **more}, force)
    if figure is not None:
        from cats_llm.report.bench_figures import write_figure

        write_figure(kind, rows, figure, force)


def _dtype(name: str) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _sparsities(text: str) -> list[float]:
    return [options.parse_sparsity(part) for part in text.split(",")]


def _threads(text: str | None) -> list[int]:
    return [torch.get_num_threads()] if text is None else options.whole_numbers(text, "--threads")


@contextmanager
def _thread_count(number: int) -> Iterator[None]:
    """Compute with so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
