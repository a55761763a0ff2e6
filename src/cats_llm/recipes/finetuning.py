"""The fine-tuning part of a reproduction: a run for each method and sparsity of a recipe, one by one."""

import gc
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cats_llm import formats
from cats_llm.errors import CatsError
from cats_llm.loading import ModelSource
from cats_llm.outputs import write_json
from cats_llm.recipes.recipe import FinetuningPlan, Recipe, ReproduceConfig
from cats_llm.training.classification_data import write_instructions
from cats_llm.training.config import FinetuneConfig
from cats_llm.training.export import LOG

_RECIPE_FILE = "recipe.json"


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
    plan: FinetuningPlan,
    source: ModelSource,
    config: ReproduceConfig,
    *,
    force: bool,
    notify: Callable[[str], None],
    command: str,
) -> dict[str, Any]:
    """Every run of the plan; each leaves its model in a folder of ``config.out``, and is not repeated when resumed.

    Args:
        source: the base model.
        config: with its profile.
        command: for the record.

    Returns:
        The logs of all runs, as `cats report` reads them.
    """
    from cats_llm.training.finetune import finetune  # it imports much

    out = config.out
    assert out is not None
    data, reading = plan.data, plan.reading
    if plan.instructions is not None:
        data, heldout = (_instructions(plan.instructions, split, out, config) for split in ("train", "validation"))
        reading = replace(reading, heldout=reading.heldout or heldout)
    logs = []
    for name, (method, sparsity) in plan.runs.items():
        folder = out / name.replace(" ", "-").replace("=", "")
        if not (config.resume and (folder / LOG).is_file()):
            notify(f"{name}:")
            refresh = plan.training.refresh_every if method == "cats" else 0
            run = FinetuneConfig(
                source=source,
                out=folder,
                data=str(data),
                reading=reading,
                sparsity=sparsity,
                profile=config.profile if method == "cats" else None,
                training=replace(plan.training, method=method, micro_batch=config.batch_size, refresh_every=refresh),
                resume=config.resume,
            )
            finetune(run, force=force, notify=notify, command=command)
            gc.collect()  # models have cycles, and the next one needs the memory
        logs.append(json.loads((folder / LOG).read_text(encoding="utf-8")))
    return {
        "format": formats.FINETUNING_RUNS,
        "version": formats.FINETUNING_VERSION,
        "model": source.model,
        "command": command,
        "runs": logs,
    }


def _instructions(task: str, split: str, out: Path, config: ReproduceConfig) -> str:
    file = out / f"{task}-{split}.jsonl"
    if not (config.resume and file.is_file()):
        source = config.data_dir / file.name if config.data_dir is not None else None
        write_instructions(task, split, file, source, force=True)
    return str(file)
