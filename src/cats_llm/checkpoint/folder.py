"""A model's folder: which of its files are the model's, that none leads out of it, and that all are whole."""

import json
import os
import re
import stat
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from cats_llm.checkpoint.layer_tensors import FILE
from cats_llm.errors import CatsError

CONFIG = "config.json"
ADAPTERS = "adapter_config.json"
_FORMATS = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"
_ADVICE = "download the model again"
_POINTER = b"version https://git-lfs"
_HIDDEN_AND_BACKUPS = (".*", "*~", "#*#", "*.swp", "*.swo", "*.bak", "*.bak[0-9]", "*.orig", "*.old", "*.tmp", "*.part",
                       "*.incomplete", "__pycache__", "*.pyc", "__MACOSX", "Thumbs.db", "desktop.ini")  # fmt: skip
_TRAINING = ("checkpoint-[0-9]*", "global_step[0-9]*", "optimizer*.pt", "optimizer*.bin", "scheduler*.pt", "scaler.pt",
             "rng_state*.pth", "trainer_state.json", "training_args.bin", "pytorch_model_fsdp*", "runs", "wandb",
             "events.out.tfevents*")  # fmt: skip
_OTHER_PROGRAMS = ("*.gguf", "*.onnx", "*.onnx_data*", "*.msgpack", "*.h5", "*.ot", "*.mlmodel", "*.mlpackage",
                   "*.tflite", "*.distcp", "onnx", "openvino", "coreml", "original", "metal")  # fmt: skip
LEFT_OUT = _HIDDEN_AND_BACKUPS + _TRAINING + _OTHER_PROGRAMS
"""Names of files and folders that are no part of a model, at any depth, as patterns of `fnmatch`."""
_AGAIN = ("model.*safetensors*", "model-[0-9]*.safetensors", "pytorch_model.*bin*", "pytorch_model-[0-9]*.bin",
          "consolidated.*", "consolidated-*", FILE)  # fmt: skip
"""Names that weights have in the folder itself; those that transformers does not load there are left out."""


@dataclass(frozen=True)
class ModelFolder:
    """What a model's folder holds; paths are inside it, with slashes.

    Attributes:
        path: of the folder.
        config: what stands in config.json.
        weights: the files that transformers loads, and their index; empty if there are none.
        others: everything else that is the model's.
        left_out: the size in bytes of every file or folder (ends in a slash) that is not.
    """

    path: Path
    config: dict[str, Any]
    weights: tuple[str, ...]
    others: tuple[str, ...]
    left_out: dict[str, int]

    @property
    def files(self) -> tuple[str, ...]:
        """All that belong to the model."""
        return self.weights + self.others


def read_folder(path: Path, links_may_leave: bool = False) -> ModelFolder:
    """List a model's folder. Only config.json and the weights' index are read.

    Args:
        links_may_leave: let links lead anywhere, since nothing is to be copied: who keeps weights on another disk has
            made them. What the index names stays inside in any case, since somebody else wrote that.

    Raises:
        CatsError: there is no model, one in a form that transformers does not load, its index is damaged or names what
            is not there, or an entry leads out of the folder.
    """
    if not (path / CONFIG).is_file() and not (path / CONFIG).is_symlink():
        raise CatsError(_elsewhere(path) or f"the folder {path} has no config.json, so it holds no model.")
    root = None if links_may_leave else path
    files, left_out = _walk(path, root)
    config = _read_object(path / CONFIG)
    weights = _weights(path, config, root)
    if not weights and (hint := _elsewhere(path)) is not None:
        raise CatsError(hint)
    for name in set(weights) - files.keys():
        _check_link(path / name, root)  # one that has a name of those that are left out
        left_out.pop(name, None)
    again = {name: size for name, size in files.items() if name not in weights and _matches(name, _AGAIN)}
    others = files.keys() - again.keys() - set(weights)
    return ModelFolder(path, config, tuple(weights), tuple(sorted(others)), dict(sorted((left_out | again).items())))


def check_files(folder: ModelFolder) -> None:
    """Make sure that every file can be read and is what its name says, without reading the weights.

    Raises:
        CatsError: one is unreadable, empty, truncated, or the pointer that git-lfs leaves in its place.
    """
    for name in folder.files:
        path = folder.path / name
        start = _start(path)
        if name in folder.weights and not start:
            raise CatsError(f"{path} is empty; {_ADVICE}.")
        if name in folder.weights[:1] and name.endswith(_INDEX) and "metadata" not in _read_object(path):
            raise CatsError(f"{path} has no metadata, without which transformers does not read it; {_ADVICE}.")
    vectors = (FILE,) if (folder.path / FILE).is_file() else ()
    for name in (*folder.weights, *vectors):
        if name.endswith(".safetensors"):
            _check_safetensors(folder.path / name)


def _check_safetensors(path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise CatsError(f"{path} is truncated or damaged ({error}); download or write it again.") from error


def _start(path: Path) -> bytes:
    """The first bytes of a file.

    Raises:
        CatsError: it cannot be read, or git-lfs has not fetched it.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError as error:
        raise CatsError(f"{path} cannot be read ({error.strerror}); see to its permissions.") from error
    if start == _POINTER:
        raise CatsError(f"{path} is only the pointer that git-lfs leaves; run: git lfs pull.")
    return start


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    _start(path)
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CatsError(f"{path} is not UTF-8 text; mend it, or {_ADVICE}.") from error
    except (ValueError, RecursionError) as error:
        if path.read_bytes().startswith(b"\xef\xbb\xbf"):
            raise CatsError(
                f"{path} begins with a byte order mark, which transformers does not read; save it as UTF-8 without one."
            ) from error
        place = f" (line {error.lineno}: {error.msg})" if isinstance(error, json.JSONDecodeError) else ""
        raise CatsError(f"{path} is not JSON{place}; mend it, or {_ADVICE}.") from error
    if not isinstance(value, dict):
        raise CatsError(f"{path} holds no JSON object; mend it, or {_ADVICE}.")
    return value


def _weights(path: Path, config: dict[str, Any], root: Path | None) -> list[str]:
    """The files that transformers loads, in its order of preference: the index first, then its shards."""
    named = config.get("transformers_weights")
    candidates = [f"{name}{end}" for name in _FORMATS for end in ("", _INDEX)]
    if named is not None:
        candidates = [_safe(named, f"transformers_weights in {path / CONFIG}")]
    for name in candidates:
        if os.path.lexists(path / name):
            _check_link(path / name, root)
            return [name, *_shards(path, name, root)] if name.endswith(_INDEX) else [name]
    if named is not None:
        raise CatsError(f"{path} lacks {named}, which its config.json names; {_ADVICE}.")
    return []


def _shards(path: Path, name: str, root: Path | None) -> list[str]:
    """The files that an index names."""
    index = path / name
    names = _read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CatsError(f"{index} has no weight_map that names the files of the weights; {_ADVICE}.")
    shards = sorted({_safe(shard, f"the weight {weight} in {index}") for weight, shard in names.items()})
    for shard in shards:
        if not shard.endswith((".safetensors", ".bin")):
            raise CatsError(f"{index} names {shard}, which is no file of weights; {_ADVICE}.")
        if not os.path.lexists(path / shard):
            raise CatsError(f"{path} lacks {shard}, which its index names; {_ADVICE}.")
        _check_link(path / shard, root)
    return shards


def _safe(name: object, where: str) -> str:
    """A file's name that stays inside its folder, from a file that somebody else wrote."""
    if not isinstance(name, str) or not name:
        raise CatsError(f"{where} names no file ({name!r}); {_ADVICE}.")
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or re.search(r"[\\:\0]", name):
        raise CatsError(
            f"{where} names {name!r}, which leads out of the model's folder; do not use this model, or mend the name."
        )
    return PurePosixPath(name).as_posix()


def _walk(path: Path, root: Path | None) -> tuple[dict[str, int], dict[str, int]]:
    """The size of every file that belongs to a model, and of every file or folder that does not."""
    files: dict[str, int] = {}
    left_out: dict[str, int] = {}
    for place, folders, names in os.walk(path, onerror=_unreadable):
        here = Path(place)
        for name in list(folders):
            relative = (here / name).relative_to(path).as_posix()
            if _matches(name, LEFT_OUT):
                folders.remove(name)
                left_out[f"{relative}/"] = _size_of_tree(here / name)
            elif (here / name).is_symlink() and root is not None:
                raise CatsError(
                    f"{here / name} is a link to another folder, which is not followed; put the folder itself in its "
                    "place, or remove the link."
                )
        for name in names:
            relative = (here / name).relative_to(path).as_posix()
            if _matches(name, LEFT_OUT):
                left_out[relative] = (here / name).lstat().st_size
            else:
                files[relative] = _check_link(here / name, root)
    return files, left_out


def _unreadable(error: OSError) -> None:
    raise CatsError(f"{error.filename} cannot be read ({error.strerror}); see to its permissions.") from error


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _size_of_tree(path: Path) -> int:
    if path.is_symlink():
        return 0
    return sum((Path(place) / name).lstat().st_size for place, _, names in os.walk(path) for name in names)


def _check_link(path: Path, root: Path | None) -> int:
    """The size of a plain file that lies inside the folder, or in the hub's cache that the folder is a part of.

    Args:
        root: the folder; None if the file may lie anywhere.

    Raises:
        CatsError: it is a link to elsewhere or to nothing, or no plain file.
    """
    try:
        target = path.resolve(strict=True)
        facts = target.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop, before Python 3.13
        raise CatsError(f"{path} is a link to nothing; copy or download the file again.") from error
    if root is not None and not any(target.is_relative_to(place) for place in _own_places(root.resolve())):
        raise CatsError(
            f"{path} is a link that leads out of the model's folder, to {target}; put the file itself in its place if "
            "it belongs to the model, else remove the link."
        )
    if not stat.S_ISREG(facts.st_mode):
        raise CatsError(f"{path} is neither a file nor a folder of a model; remove it.")
    return facts.st_size


def _own_places(root: Path) -> list[Path]:
    """Where a model's files may lie: its folder; in the hub's cache also the model's blobs and those that all share."""
    for place in root.parents:
        if place.name == "snapshots" and place.parent.name.startswith("models--"):
            return [root, place.parent / "blobs", place.parent.parent / "blobs"]
    return [root]


def _elsewhere(path: Path) -> str | None:
    """The sentence for a folder without the files that transformers loads, if what is there says more."""
    names = sorted(file.name for file in path.iterdir() if not _matches(file.name, _HIDDEN_AND_BACKUPS))
    config = (path / CONFIG).is_file()

    def first(*patterns: str) -> str | None:
        return next((name for name in names if _matches(name, patterns)), None)

    if ADAPTERS in names:
        return (
            f"{path} holds adapters beside their model, which cats generate and cats eval can load, and nothing else; "
            "write a merged model with cats finetune."
        )
    inside = _weights_inside(path)
    whole = [folder for folder in inside if (folder / CONFIG).is_file()]
    if whole:
        part = "weights" if config else CONFIG
        return f"{path} holds no {part} itself, but a folder in it does: pass {whole[0]} as the model."
    if config and inside:
        return f"{path} holds no weights; they are in {inside[0]}: move them beside config.json."
    if not config and (weights := first("model.*safetensors*", "pytorch_model.*bin*")):
        return f"{path} holds weights ({weights}) but no config.json; put the model's config.json beside them."
    for patterns, meaning in (
        (("*.distcp",), "a checkpoint of several processes; load and save it once with transformers"),
        (("*.h5", "*.msgpack", "*.ot"), "weights for TensorFlow, Flax or Rust; convert them with transformers 4"),
        (("*.gguf",), "a model in GGUF: pass {file} as the model"),
        (
            ("consolidated*", "params.json"),
            "weights in their maker's own layout; take or convert to the layout of transformers",
        ),
        (("*.safetensors", "*.bin"), "weights, but neither model.safetensors nor the index that names the parts"),
    ):
        if name := first(*patterns):
            meaning = meaning.format(file=path / name)
            return f"{path} holds no model that transformers loads, but {name}: {meaning}."
    return None


def _weights_inside(path: Path) -> list[Path]:
    """Folders one or two levels down that hold weights as transformers names them."""
    names = [f"{depth}{name}{end}" for depth in ("*/", "*/*/") for name in _FORMATS for end in ("", _INDEX)]
    files = [file.relative_to(path) for name in names for file in sorted(path.glob(name))]
    return [path / file.parent for file in files if not any(_matches(part, LEFT_OUT) for part in file.parts)]
