"""Options that several commands share, and what they are turned into."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from cats_llm import loading
from cats_llm.dtypes import DTYPE_NAMES
from cats_llm.errors import CatsError
from cats_llm.options import Panel, option
from cats_llm.outputs import check_output, write_json


def _dtype(text: str) -> str:
    if text not in DTYPE_NAMES:
        raise typer.BadParameter(f"{text!r} is none of {', '.join(DTYPE_NAMES)}.")
    return text


def parse_device(text: str) -> str:
    """The text as a device that is there; anything else is wrong usage."""
    try:
        return loading.parse_device(text)
    except CatsError as error:
        raise typer.BadParameter(str(error)) from error


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


Device = Annotated[
    str | None,
    typer.Option(
        parser=parse_device,
        metavar="DEVICE",
        show_default=False,
        help="cpu, cuda, cuda:1, or auto to spread over all. Default: the GPU if there is one.",
    ),
]
Dtype = Annotated[
    str, typer.Option(parser=_dtype, metavar="DTYPE", help=f"{', '.join(DTYPE_NAMES)}; auto is the checkpoint's own.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace existing outputs.")]
