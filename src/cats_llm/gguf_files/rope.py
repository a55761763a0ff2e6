"""Rotary positions of a GGUF model, of which transformers reads the base frequency and nothing else."""

import math
from typing import Any

import numpy as np

from cats_llm.errors import CatsError
from cats_llm.gguf_files.parts import GgufModel

FREQUENCIES = ("rope_freqs.weight",)
"""A tensor by which every frequency is divided, computed from the config of Llama 3.1 and later."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def set_rope(config: Any, gguf: GgufModel, name: str) -> None:
    """Let the config scale its rotary positions as the file says.

    Args:
        config: of transformers, made from the file.
        gguf: the file.
        name: what the user calls it.

    Raises:
        CatsError: it says so in a way that is not known here.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None)
    if not isinstance(rope, dict):
        return
    # where layers differ in kind, those of full attention are scaled
    own = rope["full_attention"] if isinstance(rope.get("full_attention"), dict) else rope
    if own.get("rope_type", "default") != "default":
        return  # transformers read it itself
    scaling = _scaling(gguf, name)
    factors = _factors(gguf)
    if factors is not None:
        scaling = _LLAMA3 | {"rope_type": "llama3", "factor": float(factors.max())}
        if not np.allclose(factors, _llama3(len(factors), float(own["rope_theta"]), scaling), rtol=1e-3):
            raise CatsError(
                f"{name} scales its rotary positions ({FREQUENCIES[0]}) otherwise than Llama 3 does; take the model "
                "that the file was made from."
            )
    own.update(scaling)


def _scaling(gguf: GgufModel, name: str) -> dict[str, Any]:
    """What the metadata say, as ``rope_parameters`` of transformers; empty if positions are not scaled."""
    prefix = f"{gguf.architecture}.rope."
    entries = {key.removeprefix(prefix): value for key, value in gguf.metadata.items() if key.startswith(prefix)}
    factor = entries.get("scaling.factor", entries.get("scale_linear"))
    kind = entries.get("scaling.type", "linear" if factor is not None else "none")
    if kind == "none" or (kind == "linear" and (factor is None or factor in (0.0, 1.0))):
        return {}
    original = entries.get("scaling.original_context_length")
    more = [key for key in entries if key.startswith(("scaling.yarn", "scaling.attn", "scaling.alpha"))]
    if kind == "linear" and factor is not None and not more:
        return {"rope_type": "linear", "factor": float(factor)}
    if kind == "yarn" and factor is not None and original is not None and not more:
        return {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": int(original)}
    raise CatsError(
        f"{name} scales its rotary positions by {kind!r}{f' with {more[0]}' if more else ''}, which is not read from "
        "GGUF; take the model that the file was made from."
    )


def _factors(gguf: GgufModel) -> np.ndarray | None:
    for part in gguf.parts:
        for tensor in part.tensors:
            if tensor.name in FREQUENCIES and tensor.type == 0:
                return np.fromfile(part.path, "<f4", tensor.numel, offset=tensor.offset)
    return None


def _llama3(number: int, base: float, scaling: dict[str, Any]) -> np.ndarray:
    """What Llama 3 divides each of its frequencies by, as llama.cpp computes it."""
    low = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
    high = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
    lengths = 2 * math.pi * base ** (np.arange(number) / number)
    smooth = (scaling["original_max_position_embeddings"] / lengths - scaling["low_freq_factor"]) / (
        scaling["high_freq_factor"] - scaling["low_freq_factor"]
    )
    between = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return np.where(lengths < high, 1.0, np.where(lengths > low, scaling["factor"], between))
