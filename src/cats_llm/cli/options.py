"""Options that all commands share: where results go."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cats_llm.options import Panel, option
from cats_llm.outputs import check_output, write_json


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
