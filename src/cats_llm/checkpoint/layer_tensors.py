"""Vectors of a CATS checkpoint, beside the one number a layer in config.json: a small file of its own."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cats_llm.errors import CatsError
from cats_llm.outputs import write_file

FILE = "cats.safetensors"
"""The file's name, beside the weights."""
_PARTS = ("thresholds", "compensation")
_NAME = re.compile(r"(0|[1-9][0-9]*)\.(thresholds|compensation)")
# one key only: more would be written in any order
_METADATA = {"format": "cats-vectors"}


@dataclass(frozen=True, eq=False)
class LayerTensors:
    """What a layer has beside one threshold.

    Attributes:
        thresholds: float32 (f,), one a neuron, which takes the place of the layer's one threshold.
        compensation: float32 (d,), added to the MLP's output of sparse tokens.
    """

    thresholds: Tensor | None = None
    compensation: Tensor | None = None

    def __post_init__(self) -> None:
        for part in _PARTS:
            vector = getattr(self, part)
            if vector is None:
                continue
            if not isinstance(vector, Tensor) or vector.dtype != torch.float32 or vector.dim() != 1:
                kind = f"{vector.dtype} {tuple(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__
                raise CatsError(
                    f"{part} of a layer must be a float32 tensor of one dimension, but the value is {kind}."
                )
            if not vector.isfinite().all():
                raise CatsError(f"{part} of a layer must be finite numbers, but there is NaN or infinity.")
            if part == "thresholds" and (vector < 0).any():
                raise CatsError(f"{part} of a layer must be 0 or more, but there is a negative number.")

    def __bool__(self) -> bool:
        return self.thresholds is not None or self.compensation is not None

    def sizes(self) -> dict[str, int]:
        """How many numbers each vector that there is has, by its name."""
        return {part: len(vector) for part in _PARTS if (vector := getattr(self, part)) is not None}

    def copy(self) -> "LayerTensors":
        """Tensors of its own, on the CPU."""
        return replace(
            self, **{part: v.detach().to("cpu", copy=True) for part in _PARTS if (v := getattr(self, part)) is not None}
        )


def encode(vectors: Mapping[int, LayerTensors]) -> bytes:
    """The file's content: the same bytes for the same vectors."""
    tensors = {
        f"{layer}.{part}": vector.detach().cpu().contiguous()
        for layer, parts in sorted(vectors.items())
        for part in _PARTS
        if (vector := getattr(parts, part)) is not None
    }
    content: bytes = save(tensors, metadata=_METADATA)
    return content


def digest(content: bytes) -> str:
    """The sha256 of a file's content, as it stands in config.json."""
    return hashlib.sha256(content).hexdigest()


def write_layer_tensors(folder: Path, vectors: Mapping[int, LayerTensors]) -> None:
    """Write the file into a checkpoint's folder, in the place of one that may be there.

    Raises:
        CatsError: the disk refuses.
    """
    with write_file(folder / FILE, force=True) as temporary:
        temporary.write_bytes(encode(vectors))


def read_layer_tensors(path: Path, sha256: str) -> dict[int, LayerTensors]:
    """Read a file that `write_layer_tensors` wrote.

    Raises:
        CatsError: it is missing, damaged, or another one than the config names.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CatsError(
            f"{path}, which the CATS config names, cannot be read ({error.strerror}); it belongs to the checkpoint, so "
            "copy or download it again."
        ) from error
    if digest(content) != sha256:
        raise CatsError(
            f"{path} is damaged or belongs to another checkpoint (its sha256 is not the one in config.json); copy or "
            "download it again."
        )
    try:
        with torch.device("cpu"):  # transformers calls us where new tensors go to the meta device
            tensors = load(content)
        layers: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            match = _NAME.fullmatch(name)
            if match is None:
                raise CatsError(f"it holds {name!r}.")
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
        return {layer: LayerTensors(**parts) for layer, parts in sorted(layers.items())}
    except (SafetensorError, CatsError, KeyError, ValueError) as error:
        raise CatsError(f"{path} holds no vectors of a CATS model: {str(error).rstrip('.')}.") from error
