"""`cats bench mlp` and `cats bench decode`: speed, beside the machine's bandwidth and PyTorch."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cats_llm.benchmark.bench import BenchResult, DecodeBench, MLPBench, bench_decode, bench_mlp
from cats_llm.cli import options
from cats_llm.cli.output import progress_console, quiet_libraries, show, table, track
from cats_llm.cli.signature import with_options
from cats_llm.outputs import check_output, write_json

Figure = Annotated[Path | None, typer.Option(help="Draw the results into this .svg or .png file.", show_default=False)]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    group = typer.Typer(help="Measure speed, beside PyTorch and the machine's own bandwidth.", no_args_is_help=True)
    group.command(name="mlp")(with_options(mlp))
    group.command(name="decode")(with_options(decode))
    app.add_typer(group, name="bench")


def mlp(config: MLPBench, json: options.JsonFile = None, figure: Figure = None, force: options.Force = False) -> None:
    """Time one MLP at decode with random weights: our kernel, PyTorch dense, a plain read of the same bytes.

    Contestants take turns, weights rotate over more than a gigabyte, ratios are taken round by round. On a GPU they are
    CUDA graphs, and eager calls beside them, and bandwidth is that of a copy.

    Example: **cats bench mlp --shape mistral-7b --threads 1,2 --json mlp.json**
    """
    _check_outputs(json, figure, force)
    _finish(bench_mlp(config, _measuring), json, figure, force)


def decode(
    config: DecodeBench, json: options.JsonFile = None, figure: Figure = None, force: options.Force = False
) -> None:
    """Time whole tokens through `generate`: stock transformers, our dense path (k = 0), and CATS on the same weights.

    On a GPU each of them eager, compiled by `generate` with a static cache, with our loop, and as a bare compiled step.

    Example: **cats bench decode --shape mistral-7b --layers 4 --threads 1,2 --json decode.json**
    """
    _check_outputs(json, figure, force)
    quiet_libraries()
    _finish(bench_decode(config, _measuring, progress_console.print), json, figure, force)


def _measuring(settings: Sequence[Any]) -> Iterable[Any]:
    return track(settings, "measuring", len(settings))


def _check_outputs(json: Path | None, figure: Path | None, force: bool) -> None:
    for path in (json, figure):
        if path is not None:
            check_output(path, force)


def _finish(result: BenchResult, json: Path | None, figure: Path | None, force: bool) -> None:
    """Write the files and show the tables."""
    if json is not None:
        write_json(json, result.record, force)
    if figure is not None:
        from cats_llm.report.bench_figures import write_figure

        write_figure(result.record["benchmark"], result.record["rows"], figure, force)
    show(result.title)
    for header, *lines in result.tables:
        shown = table(*header)
        for line in lines:
            shown.add_row(*line)
        show(shown)
