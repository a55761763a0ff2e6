"""Measurements on disk, one file a model x task x variant, found by what they depend on and not by names."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cats_llm
from cats_llm.errors import CatsError
from cats_llm.evaluation.task import Measurement
from cats_llm.model.structure import unwrap
from cats_llm.outputs import write_json

# parts of the package whose code decides results
_CODE = ("evaluation", "model", "kernels", "checkpoint", "text.py", "rows.py", "chat.py")


def default_cache() -> Path:
    """Where measurements are kept if the user names no place."""
    root = os.environ.get("CATS_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "cats-llm") / "eval"


class Cache:
    """A folder of measurements.

    Args:
        folder: made when the first measurement is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, key: dict[str, Any]) -> Measurement | None:
        """The measurement with this key, if there is one; a damaged file counts as none."""
        try:
            values = json.loads(self._file(key).read_text(encoding="utf-8"))
            return Measurement.from_dict(values["measurement"]) if values["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError, CatsError):
            return None

    def save(self, key: dict[str, Any], measurement: Measurement) -> None:
        """Keep a measurement.

        Raises:
            CatsError: the disk refuses.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CatsError(f"could not make the cache folder {self.folder}: {error.strerror or error}.") from error
        write_json(self._file(key), {"key": key, "measurement": measurement.to_dict()}, force=True)

    def _file(self, key: dict[str, Any]) -> Path:
        return self.folder / f"{digest_json(key)}.json"


def digest_json(value: Any) -> str:
    """SHA-256 of the value as JSON with sorted keys; what JSON does not know, as text."""
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@torch.no_grad()
def digest_model(model: nn.Module) -> str:
    """SHA-256 of weights, their names and dtypes, and the config without its CATS entry: the same, dense or sparse.

    Raises:
        CatsError: a weight is not in memory.
    """
    base: Any = unwrap(model)
    digest = hashlib.sha256()
    config = base.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "transformers_version"):
        config.pop(key, None)
    digest.update(digest_json(config).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            raise CatsError(f"{name} is offloaded, so the model cannot be told from others; pass --no-cache.")
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def digest_tokenizer(tokenizer: Any) -> str:
    """SHA-256 of everything that turns text into tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    core = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    template = getattr(tokenizer, "chat_template", None)
    flags = [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token", "padding_side")]
    return digest_json([type(tokenizer).__name__, core, template, tokenizer.special_tokens_map, flags])


def digest_code() -> str:
    """SHA-256 of the parts of this package that decide results, so that a changed method is measured again."""
    root = Path(cats_llm.__file__).parent
    digest = hashlib.sha256()
    for name in _CODE:
        place = root / name
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(file.relative_to(root).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
