"""Local files in the place of the hub's datasets, as tasks of lm-eval."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cats_llm.errors import CatsError

SPLITS = ("train", "validation", "test")
SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def local_files(folder: Path) -> dict[str, dict[str, Path]]:
    """Data files by task and split.

    ``folder/TASK.jsonl`` (or .json, .parquet) is the data that the task is scored on, under the split "";
    ``folder/TASK/SPLIT.jsonl`` is a split of it by name: train, validation or test.

    Raises:
        CatsError: there is no such folder, or it holds no data file.
    """
    if not folder.is_dir():
        raise CatsError(f"there is no folder {folder}.")
    files: dict[str, dict[str, Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in SUFFIXES:
            files.setdefault(file.stem, {})[""] = file
        elif file.is_dir():
            for part in sorted(file.iterdir()):
                if part.suffix in SUFFIXES and part.stem in SPLITS:
                    files.setdefault(file.name, {})[part.stem] = part
    if not files:
        raise CatsError(
            f"the folder {folder} holds no data: files TASK.jsonl, or folders TASK with {', '.join(SPLITS)}.jsonl "
            "(also .json or .parquet), in the columns of the task's dataset on the hub."
        )
    return files


def local_task(name: str, stock: Path, config: dict[str, Any], files: dict[str, Path]) -> dict[str, Any]:
    """A task as the stock one, on local files. It keeps its name, so that groups find it.

    Args:
        name: of the task.
        stock: the YAML file of the stock task.
        config: its content.
        files: from `local_files`.

    Raises:
        CatsError: there is no file of the split that the task is scored on.
    """
    scored = "test_split" if config.get("test_split") else "validation_split"
    by_split = {config.get(scored) or scored.removesuffix("_split"): file for split, file in files.items() if not split}
    for split, file in files.items():
        if split:
            by_split[config.get(f"{'training' if split == 'train' else split}_split") or split] = file
    if (config.get(scored) or scored.removesuffix("_split")) not in by_split:
        raise CatsError(
            f"the data folder has no {scored.removesuffix('_split')} file of {name}, the split that it is scored on."
        )
    kinds = {SUFFIXES[file.suffix] for file in by_split.values()}
    if len(kinds) > 1:
        raise CatsError(f"the data files of {name} are of different kinds; make them all .jsonl or all .parquet.")
    task: dict[str, Any] = {
        "include": str(stock),
        "task": name,
        "dataset_path": kinds.pop(),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file.resolve()) for split, file in by_split.items()}},
    }
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if config.get(key) and config[key] not in by_split:
            task[key] = None
    return task


@contextmanager
def task_folder(data_dir: Path | None, manager: Any) -> Iterator[Path]:
    """A folder of YAML files, one for each task that ``data_dir`` has data of, for lm-eval's ``include_path``.

    Args:
        data_dir: see `local_files`; None for none.
        manager: lm-eval's TaskManager, which knows the stock tasks.

    Raises:
        CatsError: from `local_files` and `local_task`.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    with TemporaryDirectory(prefix="cats-eval-") as temporary:
        folder = Path(temporary)
        for name, files in (local_files(data_dir) if data_dir is not None else {}).items():
            entry = manager.task_index.get(name)
            stock = getattr(entry, "yaml_path", None)
            if stock is None:
                continue
            config = load_yaml(stock, resolve_func=False)
            if isinstance(config.get("task"), str):
                task = local_task(name, Path(stock), config, files)
                # JSON is YAML
                (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")
        yield folder
