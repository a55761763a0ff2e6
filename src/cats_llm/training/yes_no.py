"""CoLA, SST-2 and BoolQ as instructions with the answer yes or no, as the paper fine-tunes on; prompts are ours."""

import json
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
        for row in _rows(task, split, source):
            try:
                made = {"prompt": task.prompt(row), "completion": " yes" if task.yes(row) else " no"}
            except KeyError as error:
                raise CatsError(f"a row of the data has no {error}, which {name} needs.") from error
            file.write(json.dumps(made, ensure_ascii=False) + "\n")


def _rows(task: Task, split: str, source: Path | None) -> Iterable[Row]:
    if source is not None:
        try:
            lines = source.read_text(encoding="utf-8").splitlines()
            return [json.loads(line) for line in lines if line.strip()]
        except OSError as error:
            raise CatsError(f"could not read {source}: {error.strerror or error}.") from error
        except ValueError as error:
            raise CatsError(f"{source} is no JSON lines in UTF-8: {error}.") from error
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CatsError(f"{task.dataset} comes by way of datasets: pip install 'cats-llm[data]'.") from error
    try:
        rows: Iterable[Row] = load_dataset(task.dataset, task.config, split=split)
    except Exception as error:  # datasets raises whatever its parts raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CatsError(f"could not load {task.dataset}: {reason}; pass its rows as a .jsonl file.") from error
    return rows
