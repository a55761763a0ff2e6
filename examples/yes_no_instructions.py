"""CoLA, SST-2 or BoolQ as instructions with the answer yes or no, for `cats finetune --data`.

    python examples/yes_no_instructions.py cola train cola-train.jsonl
    python examples/yes_no_instructions.py cola validation cola-validation.jsonl

reads the dataset from the hub (pip install 'cats-llm[data]'), or with --source from a .jsonl file in the hub's columns.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from cats_llm.checkpoint.files import write_file
from cats_llm.errors import CatsError

Row = dict[str, Any]


class Task(NamedTuple):
    """Where a dataset is on the hub, and what a row asks and answers."""

    dataset: str
    config: str | None
    prompt: Callable[[Row], str]
    yes: Callable[[Row], bool]


TASKS = {
    "cola": Task(
        "nyu-mll/glue",
        "cola",
        lambda row: f"{row['sentence']}\nQuestion: Is this sentence acceptable English, yes or no?\nAnswer:",
        lambda row: row["label"] == 1,
    ),
    "sst2": Task(
        "nyu-mll/glue",
        "sst2",
        lambda row: (
            f"{row['sentence'].strip()}\nQuestion: Does this review speak well of the film, yes or no?\nAnswer:"
        ),
        lambda row: row["label"] == 1,
    ),
    "boolq": Task(
        "google/boolq",
        None,
        lambda row: f"{row['passage']}\nQuestion: {row['question']}, yes or no?\nAnswer:",
        lambda row: row["answer"] is True,
    ),
}


def rows_of(task: Task, split: str, source: Path | None) -> Iterable[Row]:
    """The rows of the dataset."""
    if source is not None:
        if not source.is_file():
            raise CatsError(f"there is no file {source}.")
        return [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    from datasets import load_dataset

    rows: Iterable[Row] = load_dataset(task.dataset, task.config, split=split)
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("split")
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    task = TASKS[args.task]
    try:
        with write_file(args.out, args.force) as temporary, temporary.open("w", encoding="utf-8") as file:
            for row in rows_of(task, args.split, args.source):
                made = {"prompt": task.prompt(row), "completion": " yes" if task.yes(row) else " no"}
                file.write(json.dumps(made, ensure_ascii=False) + "\n")
    except (CatsError, KeyError) as error:
        missing = (
            f"a row of the data has no {error}, which {args.task} needs." if isinstance(error, KeyError) else error
        )
        sys.exit(f"error: {missing}")


if __name__ == "__main__":
    main()
