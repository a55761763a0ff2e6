"""CoLA, SST-2 and BoolQ as instructions with the answer yes or no, as the paper fine-tunes on; prompts are ours."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cats_llm.errors import CatsError
from cats_llm.outputs import write_file
from cats_llm.rows import read_rows

Row = dict[str, Any]


class YesNoTask(NamedTuple):
    """Where a dataset is on the hub, and what a row asks and answers."""

    dataset: str
    config: str | None
    texts: tuple[str, ...]
    label: str
    prompt: Callable[[Row], str]


TASKS = {
    "cola": YesNoTask(
        "nyu-mll/glue",
        "cola",
        ("sentence",),
        "label",
        lambda row: f"{row['sentence']}\nQuestion: Is this sentence acceptable English, yes or no?\nAnswer:",
    ),
    "sst2": YesNoTask(
        "nyu-mll/glue",
        "sst2",
        ("sentence",),
        "label",
        lambda row: (
            f"{row['sentence'].strip()}\nQuestion: Does this review speak well of the film, yes or no?\nAnswer:"
        ),
    ),
    "boolq": YesNoTask(
        "google/boolq",
        None,
        ("passage", "question"),
        "answer",
        lambda row: f"{row['passage']}\nQuestion: {row['question']}, yes or no?\nAnswer:",
    ),
}


def write_instructions(name: str, split: str, out: Path, source: Path | None = None, force: bool = False) -> None:
    """Write a split of a task as a .jsonl file of prompt and completion, for `cats finetune --data`.

    Args:
        name: a key of `TASKS`.
        source: a .jsonl file in the hub's columns, in place of the hub.

    Raises:
        CatsError: the data cannot be had, or a row lacks what the task needs.
    """
    task = TASKS[name]
    with write_file(out, force) as temporary, temporary.open("w", encoding="utf-8") as file:
        rows = read_rows(str(source or task.dataset), None, None if source else task.config, split)
        for where, row in rows:
            _check(row, task, name, where)
            instruction = {"prompt": task.prompt(row), "completion": " yes" if row[task.label] else " no"}
            file.write(json.dumps(instruction, ensure_ascii=False) + "\n")


def _check(row: Any, task: YesNoTask, name: str, where: str) -> None:
    """Refuse a row that lacks what is asked, or has no label, as in the hub's test splits."""
    if not isinstance(row, dict) or not all(isinstance(row.get(column), str) for column in task.texts):
        raise CatsError(f"{where} has no text in {' and '.join(task.texts)}, which {name} needs.")
    if row.get(task.label) not in (0, 1):
        raise CatsError(
            f"{where} has no {task.label} of yes or no (it is {row.get(task.label)!r}), which {name} needs."
        )
