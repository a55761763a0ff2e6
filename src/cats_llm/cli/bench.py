"""`cats bench mlp` and `cats bench decode`: speed, beside the machine's bandwidth and PyTorch."""

from pathlib import Path
from typing import Annotated

import typer

from cats_llm.benchmark.bench import BenchResult, bench_decode, bench_mlp
from cats_llm.benchmark.config import DecodeBench, MLPBench
from cats_llm.cli.output import Results, progress_console, quiet_libraries, show, table, track
from cats_llm.cli.signature import with_options

Figure = Annotated[Path | None, typer.Option(help="Draw the results into this .svg or .png file.", show_default=False)]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    group = typer.Typer(help="Measure speed, beside PyTorch and the machine's own bandwidth.", no_args_is_help=True)
    group.command(name="mlp")(with_options(mlp))
    group.command(name="decode")(with_options(decode))
    app.add_typer(group, name="bench")


def mlp(config: MLPBench, results: Results, figure: Figure = None) -> None:
    """Time one MLP at decode with random weights: our kernel, PyTorch dense, a plain read of the same bytes.

    Contestants take turns, weights rotate over more than a gigabyte, ratios are taken round by round. On a GPU they are
    CUDA graphs, and eager calls beside them, and bandwidth is that of a copy.

    Example: **cats bench mlp --shape mistral-7b --threads 1,2 --json mlp.json**
    """
    results.check(figure)
    _finish(bench_mlp(config, track), results, figure)


def decode(config: DecodeBench, results: Results, figure: Figure = None) -> None:
    """Time whole tokens through `generate`: stock transformers, our dense path (k = 0), and CATS on the same weights.

    On a GPU each of them eager, compiled by `generate` with a static cache, with our loop, and as a bare compiled step.

    Example: **cats bench decode --shape mistral-7b --layers 4 --threads 1,2 --json decode.json**
    """
    results.check(figure)
    quiet_libraries()
    _finish(bench_decode(config, track, progress_console.print), results, figure)


def _finish(result: BenchResult, results: Results, figure: Path | None) -> None:
    """Write the files and show the tables."""
    results.write(result.record)
    if figure is not None:
        from cats_llm.report.bench_figures import write_figure

        write_figure(result.record["benchmark"], result.record["rows"], figure, results.force)
    show(result.title)
    for header, *lines in result.tables:
        show(table(*header, rows=lines))
