"""Tuned launch configs, kept on disk: by GPU, shape, dtype, tokens and sparsity.

Nothing is tuned unless asked for (`cats tune`); a missing or unreadable file means the defaults.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from cats_llm.dtypes import dtype_name
from cats_llm.kernels.gpu.config import Config, GemvConfig, SmallBatchConfig, Tile
from cats_llm.outputs import write_json

logger = logging.getLogger(__name__)

VARIABLE = "CATS_GPU_TUNING"
"""Environment variable: the file of tuned configs, or "off" to use the defaults."""

_SPARSITIES = (0.0, 0.5, 0.7, 0.9)
_TOKENS = (1, 2, 4, 8, 16)
_entries: dict[str, Any] | None = None


def bucket(sparsity: float) -> float:
    """The sparsity among those tuned for that is nearest."""
    return min(_SPARSITIES, key=lambda k: abs(k - sparsity))


def path() -> Path | None:
    """The file of tuned configs; None if switched off."""
    named = os.environ.get(VARIABLE)
    if named == "off":
        return None
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "cats-llm" / "gpu-tuning.json"


def lookup(device: torch.device, tokens: int, d: int, f: int, dtype: torch.dtype, sparsity: float) -> Config | None:
    """The tuned config of a call, if there is one."""
    global _entries
    if device.type != "cuda":
        return None
    if _entries is None:
        _entries = _read()
    record = _entries.get(_key(device, tokens, d, f, dtype, sparsity))
    return None if record is None else _config(record)


def remember(
    device: torch.device, tokens: int, d: int, f: int, dtype: torch.dtype, sparsity: float, config: Config, us: float
) -> None:
    """Keep a tuned config, in this process and on disk."""
    global _entries
    _entries = _read()
    record = {name: vars(tile) for name, tile in vars(config).items()} | {"us": us}
    _entries[_key(device, tokens, d, f, dtype, sparsity)] = record
    file = path()
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, _entries, force=True)


def _key(device: torch.device, tokens: int, d: int, f: int, dtype: torch.dtype, sparsity: float) -> str:
    name = torch.cuda.get_device_name(device)
    rounded = next(n for n in _TOKENS if n >= min(tokens, _TOKENS[-1]))
    return f"{name} {d}x{f} {dtype_name(dtype)} {rounded} tokens k={bucket(sparsity)}"


def _config(record: dict[str, Any]) -> Config:
    tiles = {name: Tile(**tile) for name, tile in record.items() if name != "us"}
    return GemvConfig(**tiles) if "up_down" in tiles else SmallBatchConfig(**tiles)


def _read() -> dict[str, Any]:
    file = path()
    if file is None or not file.exists():
        return {}
    try:
        entries: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for record in entries.values():
            _config(record)
        return entries
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("the file of tuned GPU kernels %s cannot be read, so the defaults are used: %s", file, error)
        return {}
