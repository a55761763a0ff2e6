"""The folder of a run while it is unfinished: what it was begun with, its checkpoints, and how it ends."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from cats_llm import distributed
from cats_llm.errors import CatsError
from cats_llm.outputs import write_json

_RUN_FILE = "run.json"


class Checkpoint(NamedTuple):
    """What a run goes on from: the Trainer's folder, and its history so far."""

    folder: Path
    history: list[dict[str, Any]]


def last_checkpoint(work: Path) -> Checkpoint | None:
    """The newest checkpoint that was written whole; None if there is none."""
    for folder in sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            # the Trainer writes it last
            state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return Checkpoint(folder, state["log_history"])
    return None


def begin(work: Path, facts: dict[str, Any], resume: bool, force: bool) -> Checkpoint | None:
    """Make the folder of a run, or find the checkpoint to go on from. All processes get the same answer.

    Args:
        work: the folder.
        facts: what decides the run; a run is resumed only with the same.

    Raises:
        CatsError: there is an unfinished run that is neither resumed nor to be replaced, or it is another run.
    """
    outcome: Checkpoint | CatsError | None = None
    if distributed.rank() == 0:
        try:
            outcome = _begin(work, json.loads(json.dumps(facts)), resume, force)
        except CatsError as error:
            outcome = error
    outcome = distributed.broadcast(outcome)
    if isinstance(outcome, CatsError):
        raise outcome
    return outcome


def _begin(work: Path, facts: dict[str, Any], resume: bool, force: bool) -> Checkpoint | None:
    last = last_checkpoint(work) if work.is_dir() else None
    if last is not None and resume:
        before = json.loads((work / _RUN_FILE).read_text(encoding="utf-8"))
        for key in facts:
            if facts[key] != before.get(key):
                raise CatsError(
                    f"{work} was begun with {key} {before.get(key)!r} and not {facts[key]!r}; resume it with the same "
                    "options, or begin again with --force."
                )
        return last
    if last is not None and not force:
        raise CatsError(f"{work} holds a run that was not finished; pass --resume, or --force to begin again.")
    finish(work)
    work.mkdir(exist_ok=True)
    write_json(work / _RUN_FILE, facts, force=True)
    return None


def finish(work: Path) -> None:
    """Remove what a run needs only while it is unfinished; TensorBoard's files stay."""
    if not work.is_dir():
        return
    for path in work.iterdir():
        if path.is_dir() and path.name != "tensorboard":
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    if not any(work.iterdir()):
        work.rmdir()
