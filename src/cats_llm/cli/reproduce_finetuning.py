"""The fine-tuning part of `cats reproduce`: `cats finetune` for each method and sparsity of a recipe, one by one."""

import gc
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cats_llm.cli import finetune
from cats_llm.cli.output import show
from cats_llm.errors import CatsError
from cats_llm.outputs import write_json
from cats_llm.recipes import FinetuningPlan, Recipe
from cats_llm.training.settings import METHODS, RUNS_FORMAT, RUNS_VERSION
from cats_llm.training.write import LOG
from cats_llm.training.yes_no import TASKS, write_instructions

_RECIPE_FILE = "recipe.json"


def check(name: str, plan: FinetuningPlan) -> None:
    """Refuse, before any work, what cannot be trained.

    Raises:
        CatsError: an unknown method or task.
    """
    for method in plan.methods:
        if method not in METHODS:
            raise CatsError(
                f"the recipe {name}: {method!r} is no method of training; choose from {', '.join(METHODS)}."
            )
    if plan.instructions is not None and plan.instructions not in TASKS:
        raise CatsError(f"the recipe {name}: {plan.instructions!r} is no task; choose from {', '.join(TASKS)}.")


def is_begun(out: Path) -> bool:
    """Whether the folder holds a reproduction that can be resumed."""
    return (out / _RECIPE_FILE).is_file()


def begin(out: Path, recipe: Recipe, resume: bool) -> None:
    """Note which recipe the folder is of, or make sure that it is of this one.

    Raises:
        CatsError: it is of another recipe.
    """
    facts = json.loads(json.dumps(asdict(recipe)))
    file = out / _RECIPE_FILE
    if not (resume and is_begun(out)):
        write_json(file, facts, force=True)
    elif json.loads(file.read_text(encoding="utf-8")) != facts:
        raise CatsError(f"{out} was begun with another recipe; choose another --out, or begin again with --force.")


def finetune_all(
    recipe: Recipe,
    plan: FinetuningPlan,
    out: Path,
    *,
    profile: Path | None,
    data_dir: Path | None,
    micro_batch: int,
    device: str | None,
    resume: bool,
    force: bool,
    command: str,
) -> dict[str, Any]:
    """Every run of the plan; each leaves its model in a folder of ``out``, and is not repeated when resumed.

    Args:
        profile: thresholds of the base model.
        data_dir: folder with TASK-train.jsonl and TASK-validation.jsonl in the hub's columns, in place of the hub.
        command: for the record.

    Returns:
        The logs of all runs, as `cats report` reads them.
    """
    data, heldout = plan.data, None
    if plan.instructions is not None:
        data, heldout = (
            _instructions(plan.instructions, split, out, data_dir, resume) for split in ("train", "validation")
        )
    logs = []
    for name, (method, sparsity) in plan.runs.items():
        folder = out / name.replace(" ", "-").replace("=", "")
        if not (resume and (folder / LOG).is_file()):
            show(f"{name}:")
            finetune.command(
                model=str(recipe.model),
                out=folder,
                data=str(data),
                heldout=heldout,
                sparsity=sparsity,
                method=method,
                profile=profile if method == "cats" else None,
                steps=plan.steps,
                epochs=plan.epochs,
                learning_rate=plan.learning_rate,
                batch_size=plan.batch_size,
                micro_batch=micro_batch,
                eval_every=plan.eval_every,
                resume=resume,
                heldout_samples=plan.heldout_samples,
                seq_length=plan.seq_length,
                text_column=plan.text_column,
                dataset_config=plan.dataset_config,
                split=plan.split,
                seed=plan.seed,
                revision=recipe.revision,
                device=device,
                dtype=recipe.dtype,
                force=force,
            )
            gc.collect()  # models have cycles, and the next one needs the memory
        logs.append(json.loads((folder / LOG).read_text(encoding="utf-8")))
    return {"format": RUNS_FORMAT, "version": RUNS_VERSION, "model": recipe.model, "command": command, "runs": logs}


def _instructions(task: str, split: str, out: Path, data_dir: Path | None, resume: bool) -> str:
    file = out / f"{task}-{split}.jsonl"
    if not (resume and file.is_file()):
        source = data_dir / f"{task}-{split}.jsonl" if data_dir is not None else None
        write_instructions(task, split, file, source, force=True)
    return str(file)
