"""What commands put out: tables on stdout, progress on stderr, results as files."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from cats_llm import distributed
from cats_llm.evaluation.run import Progress as EvaluationProgress
from cats_llm.number_format import fixed, size
from cats_llm.options import Panel, option
from cats_llm.outputs import check_output, write_json

Item = TypeVar("Item")
_MOST_NAMES = 12

# texts of users are printed as they are, whatever brackets and colons they hold
_PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
# a file has no width; tables keep theirs there
_WIDE = 160
console = Console(**_PLAIN, width=None if Console().is_terminal else _WIDE)
progress_console = Console(**_PLAIN, stderr=True)


@dataclass(frozen=True)
class Results:
    """Where a command writes its results as JSON, and whether its outputs may replace what is there."""

    json: Path | None = option(None, help="Write the results as JSON too.", metavar="FILE", panel=Panel.OUTPUT)
    force: bool = option(False, help="Replace existing outputs.", panel=Panel.OUTPUT)

    def check(self, *paths: Path | None) -> None:
        """Refuse, before any long work, what could not be written at the end: the JSON file and other outputs.

        Raises:
            CatsError: one exists, or its folder does not.
        """
        for path in (*paths, self.json):
            if path is not None:
                check_output(path, self.force)

    def write(self, results: Any) -> None:
        """Write the JSON file, if one was asked for."""
        if self.json is not None:
            write_json(self.json, results, self.force)


def quiet_libraries() -> None:
    """Keep the libraries' own notes and bars out of the output; errors still come through."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Iterate with a progress bar and the time left."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # a log file wants no bars
    hidden = not progress_console.is_terminal
    with Progress(*columns, console=progress_console, transient=True, disable=hidden) as progress:
        yield from progress.track(items, description=description, total=total)


def notify(message: str) -> None:
    """Tell the user, once for all processes."""
    if distributed.rank() == 0:
        progress_console.print(message)


def show_progress(step: EvaluationProgress) -> None:
    """Tell the user what was measured, and what time is left."""
    metric = next(iter(step.measurement.metrics), None)
    value = "no metric" if metric is None else f"{metric.name} {fixed(metric.value)}"
    how = "known already" if step.cached else f"{step.seconds:.0f} s"
    left = "" if not step.left else f", about {_duration(step.left)} left"
    notify(f"[{step.done}/{step.total}] {step.variant} on {step.task}: {value} ({how}){left}")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def table(*columns: str, rows: Iterable[Iterable[str]] = ()) -> Table:
    """A table with the first column to the left and the others, numbers, to the right."""
    shown = Table(header_style="bold")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    return shown


def show_left_out(left_out: Mapping[str, int]) -> None:
    """Say which files of a model's folder were not copied; nothing if there are none."""
    if left_out:
        names = [f"{name} ({size(number)})" for name, number in left_out.items()]
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        show(f"left out, no part of the model: {', '.join(names[:_MOST_NAMES])}{more}")


def show(value: Any) -> None:
    """Print to stdout; text is not wrapped, tables are."""
    console.print(value, soft_wrap=not isinstance(value, Table))
