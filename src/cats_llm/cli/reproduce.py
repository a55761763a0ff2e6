"""`cats reproduce`: an experiment of the paper, and its numbers beside ours."""

from pathlib import Path
from typing import Annotated

import typer

from cats_llm.benchmark import machine
from cats_llm.cli.output import Results, notify, quiet_libraries, show, show_progress, table, track
from cats_llm.errors import CatsError
from cats_llm.number_format import MISSING, number
from cats_llm.outputs import command_line, write_file
from cats_llm.recipes.load import find, names
from cats_llm.recipes.recipe import BenchPlan, FinetuningPlan, ReproduceConfig
from cats_llm.recipes.reproduce import REPORTED, Reproduction, reproduce
from cats_llm.report import MissingExtraError, read_files, render_page, require_extra


def command(
    config: ReproduceConfig,
    results: Results,
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="A name, or the path of a YAML file. Without it: list the names.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run an experiment of the paper, and print the published numbers beside the measured ones.

    A recipe is calibration and evaluation, a benchmark, or fine-tuning by several methods, with the settings that were
    published, and the numbers to expect with their source. Models and data come from the hub; a stopped evaluation goes
    on where it was, stopped fine-tuning with --resume.

    Example: **cats reproduce quality-mistral-7b --out mistral**
    """
    if recipe is None:
        _list()
        return
    chosen = find(recipe)
    try:
        config.check_usage(chosen)
    except CatsError as error:
        raise typer.BadParameter(str(error)) from error
    results.check()
    quiet_libraries()
    reproduction = reproduce(
        chosen,
        config,
        force=results.force,
        notify=show if isinstance(chosen.plan, FinetuningPlan) else notify,
        progress=show_progress,
        track=track,
        command=command_line(),
    )
    if config.out is not None:
        _draw(config.out)
    results.write(reproduction.to_dict())
    _show(reproduction)
    if config.out is not None:
        show(f"Written to {config.out}.")


def _draw(out: Path) -> None:
    """A report of the results, if what draws it is installed."""
    try:
        require_extra()
    except MissingExtraError as error:
        show(f"No report.html: {error}")
        return
    files = [out / name for name in REPORTED if (out / name).is_file()]
    with write_file(out / "report.html", force=True) as temporary:
        temporary.write_text(render_page(read_files(files)), encoding="utf-8")


def _list() -> None:
    rows = table("recipe", "what it reproduces")
    rows.columns[1].justify = "left"
    for name in names():
        rows.add_row(name, find(name).title)
    show(rows)


def _show(reproduction: Reproduction) -> None:
    recipe, smoke = reproduction.recipe, reproduction.smoke
    show(f"{recipe.title}\n{' '.join(recipe.about.split())}\n")
    if smoke:
        what = "a tiny MLP" if recipe.model is None else f"the bundled model and a few documents, not {recipe.model}"
        show(f"Smoke run on {what}: the numbers only show that every step runs, and are not to be compared.\n")
    rows = table("number", "published", "measured", "± stderr", "difference")
    for comparison in reproduction.comparisons:
        difference = None if smoke else comparison.difference
        rows.add_row(
            comparison.expected.of.label,
            _range(comparison.expected.value),
            _range(comparison.measured),
            _range(comparison.stderr),
            MISSING if difference is None else f"{difference:+.4g}",
        )
    show(rows)
    for source in dict.fromkeys(comparison.expected.source for comparison in reproduction.comparisons):
        show(f"published: {source}")
    facts = machine.facts()
    # benchmarks run on the CPU
    place = facts["gpus"][0] if facts["gpus"] and not isinstance(recipe.plan, BenchPlan) else facts["cpu"]
    show(f"measured: on {place}, cats-llm {facts['versions']['cats-llm']}")


def _range(value: float | tuple[float, float] | None) -> str:
    return " to ".join(map(number, value)) if isinstance(value, tuple) else number(value)
