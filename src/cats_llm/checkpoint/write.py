"""A CATS checkpoint from a dense one and back: the same files to the byte, and one entry of config.json."""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cats_llm.checkpoint.config import QUANT_METHOD, CatsConfig
from cats_llm.checkpoint.folder import ADAPTERS, CONFIG, ModelFolder, read_folder
from cats_llm.checkpoint.json_text import remove_entry, set_entry
from cats_llm.checkpoint.layer_tensors import LayerTensors, write_layer_tensors
from cats_llm.errors import CatsError
from cats_llm.outputs import check_space, write_folder

_ENTRY = "quantization_config"


@dataclass(frozen=True)
class Written:
    """What came into a new folder.

    Attributes:
        weights: the files of the weights, by their path in the folder, with their bytes.
        linked: whether they are the source's own files, under one more name.
        left_out: what of the source was not copied, as in `ModelFolder`.
    """

    weights: dict[str, int]
    linked: bool
    left_out: dict[str, int]


def check_source(source: Path, out: Path, with_weights: bool = True) -> ModelFolder:
    """Refuse, before any long work, a model that could not become a CATS checkpoint in the folder ``out``.

    Args:
        with_weights: the disk needs room for the weights; not where they are linked.

    Raises:
        CatsError: as `write_checkpoint`.
    """
    folder = _check_copy(source, out, with_weights)
    method = _method(folder, QUANT_METHOD)
    if method != QUANT_METHOD:
        raise CatsError(f"{source} is already quantised with {method}; start from the unquantised model.")
    return folder


def write_checkpoint(source: Path, out: Path, config: CatsConfig, force: bool = False, link: bool = False) -> Written:
    """Copy the model's folder ``source`` to ``out``, put ``config`` into its config.json and its vectors beside it.

    All files are copied as they are, those of subfolders too, but what `read_folder` leaves out.

    Args:
        link: let the weight files be hard links, see `write_dense_checkpoint`.

    Raises:
        CatsError: ``source`` is quantised by another method, holds no weights or leads out of itself, the config's
            vectors are not read yet, or ``out`` cannot be written. ``out`` is then as it was.
    """
    folder = check_source(source, out, with_weights=not link)
    entry = config.to_dict()
    return _write_copy(folder, out, force, lambda text: set_entry(text, _ENTRY, entry), link, config.vectors)


def write_dense_checkpoint(source: Path, out: Path, force: bool = False, link: bool = False) -> Written:
    """Copy the CATS checkpoint ``source`` to ``out`` without what makes it one: the dense model's folder.

    Weight files are the same to the byte, and config.json is what it was before `write_checkpoint`. A ReLUfied model
    stays one, since its own config.json says so.

    Args:
        link: let the weight files be hard links, which cost no time and space, but are one file under two names: a
            program that writes into one in place changes both. Where the disk refuses, they are copied.

    Raises:
        CatsError: ``source`` is no CATS checkpoint, holds no weights or leads out of itself, or ``out`` cannot be
            written. ``out`` is then as it was.
    """
    folder = _check_copy(source, out, with_weights=not link)
    method = _method(folder, None)
    if method != QUANT_METHOD:
        reason = "its config.json has no quantization_config" if method is None else f"it is quantised with {method}"
        raise CatsError(f"{source} is no CATS checkpoint: {reason}.")
    return _write_copy(folder, out, force, lambda text: remove_entry(text, _ENTRY), link)


def _check_copy(source: Path, out: Path, with_weights: bool = True) -> ModelFolder:
    """A model's folder that can be copied to ``out``."""
    if out.exists() and out.resolve() == source.resolve():
        raise CatsError(f"{out} is the model itself; write to another folder.")
    for inner, outer in ((out, source), (source, out)):
        if inner.resolve().is_relative_to(outer.resolve()):
            raise CatsError(f"{inner} lies inside {outer}; write to a folder beside the model.")
    folder = read_folder(source)
    if not folder.weights:
        raise CatsError(f"{source} holds no weights (model.safetensors or pytorch_model.bin).")
    if ADAPTERS in folder.others:
        raise CatsError(f"{source} holds adapters beside the model; merge them into it first (cats finetune does).")
    check_space(out, sum(_size(folder, name) for name in (folder.files if with_weights else folder.others)))
    return folder


def _method(folder: ModelFolder, default: str | None) -> Any:
    entry = folder.config.get(_ENTRY)
    return entry.get("quant_method", default) if isinstance(entry, dict) else default


def _write_copy(
    folder: ModelFolder,
    out: Path,
    force: bool,
    change: Callable[[str], str],
    link: bool = False,
    vectors: Mapping[int, LayerTensors] | None = None,
) -> Written:
    """The folder at ``out``, with what ``change`` makes of the text of config.json."""
    with write_folder(out, force) as new:
        linked = link and _link(folder, new)
        for name in folder.others if linked else folder.files:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder.path / name, new / name)
        # bytes: reading as text would change the ends of lines
        text = (folder.path / CONFIG).read_bytes().decode("utf-8")
        (new / CONFIG).write_bytes(change(text).encode("utf-8"))
        if vectors is not None:
            write_layer_tensors(new, vectors)
    return Written({name: _size(folder, name) for name in folder.weights}, linked, folder.left_out)


def _size(folder: ModelFolder, name: str) -> int:
    return (folder.path / name).stat().st_size


def _link(folder: ModelFolder, new: Path) -> bool:
    """Link the weight files, and say whether the disk could."""
    try:
        for name in folder.weights:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            os.link((folder.path / name).resolve(), new / name)
    except OSError:
        for name in folder.weights:
            (new / name).unlink(missing_ok=True)
        return False
    return True
