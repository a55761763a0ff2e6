"""A GGUF model in one file or in several, and what kind of model it is."""

import re
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cats_llm.errors import CatsError
from cats_llm.gguf_files.header import ARCHITECTURE, MAGIC, GgufHeader, GgufTensor, read_header
from cats_llm.outputs import check_space

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE | re.DOTALL)
_OTHER_KINDS = {
    "adapter": "an adapter without its model; merge it into the model first",
    "mmproj": "the part of a multimodal model that reads images or sound; pass the file of the language model",
    "vocab": "a vocabulary without weights; pass the file with the weights",
    "imatrix": "statistics for quantisation; pass the file with the weights",
}


@dataclass(frozen=True)
class GgufModel:
    """A model in GGUF files that were checked.

    Attributes:
        parts: the headers of its files, in order; one, if it is not split.
    """

    parts: tuple[GgufHeader, ...]

    @property
    def metadata(self) -> Any:
        """The entries of the first file, which describe the whole model."""
        return self.parts[0].metadata

    @property
    def architecture(self) -> str:
        """The name that llama.cpp gives to its architecture."""
        return str(self.metadata[ARCHITECTURE])

    @property
    def tensors(self) -> tuple[GgufTensor, ...]:
        """Of all parts."""
        return tuple(tensor for part in self.parts for tensor in part.tensors)

    @contextmanager
    def one_file(self, with_data: bool = True) -> Iterator[Path]:
        """The model in one file, which is all that transformers reads, and alone in a folder.

        Files beside it, which may be another model's tokenizer or adapters, would be read too. An unsplit file is
        there as a link; of a split one a temporary file is made.

        Args:
            with_data: without it the tensors' data in a temporary file are holes, which take no space.

        Raises:
            CatsError: there is no room for it.
        """
        with tempfile.TemporaryDirectory(prefix="cats-gguf-") as folder:
            whole = Path(folder) / "model.gguf"
            if len(self.parts) == 1:
                whole.symlink_to(self.parts[0].path.resolve())
            else:
                if with_data:
                    check_space(whole, sum(tensor.bytes for tensor in self.tensors))
                _join(self.parts, whole, with_data)
            yield whole


def read_gguf(path: Path) -> GgufModel:
    """The model that a GGUF file, or any part of a split one, belongs to.

    Raises:
        CatsError: the package gguf is not installed; a part is missing, damaged or of another form; or what the file
            holds is no model of weights.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise CatsError(f"{path} is in GGUF, which needs the package gguf: pip install 'cats-llm[gguf]'.") from error
    blocks = {int(kind): (int(weights), int(size)) for kind, (weights, size) in GGML_QUANT_SIZES.items()}
    header = read_header(path, blocks.get)
    count = header.metadata.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        model = GgufModel((header,))
    else:
        model = GgufModel(tuple(read_header(part, blocks.get) for part in _parts(path, count)))
        _check_parts(model, count)
    _check_kind(model)
    return model


def _parts(path: Path, count: int) -> list[Path]:
    """The files of a split model."""
    named = _PART.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        raise CatsError(
            f"{path} is one of {count} parts of a model, but is not named as one; give all parts their names back "
            f"(NAME-00001-of-{count:05d}.gguf, ...)."
        )
    suffix = path.name[-5:]
    parts = [path.with_name(f"{named[1]}-{i + 1:05d}-of-{count:05d}{suffix}") for i in range(count)]
    missing = [part for part in parts if not part.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CatsError(
            f"{missing[0]}{more} of the model's {count} parts cannot be found; put all parts into one folder."
        )
    return parts


def _check_parts(model: GgufModel, count: int) -> None:
    for i, part in enumerate(model.parts):
        if part.metadata.get("split.no") != i or part.metadata.get("split.count") != count:
            raise CatsError(
                f"{part.path} does not say that it is part {i + 1} of {count}; it belongs to another model, or was "
                "renamed: download it again."
            )
    total = model.metadata.get("split.tensors.count")
    if isinstance(total, int) and total != len(model.tensors):
        raise CatsError(
            f"the parts of {model.parts[0].path} hold {len(model.tensors)} tensors where it names {total}; they belong "
            "to different models: download them again."
        )


def _check_kind(model: GgufModel) -> None:
    path, metadata = model.parts[0].path, model.metadata
    architecture = metadata.get(ARCHITECTURE)
    kind = metadata.get("general.type", "model")
    if architecture == "clip":
        kind = "mmproj"
    if kind in _OTHER_KINDS:
        raise CatsError(f"{path} holds {_OTHER_KINDS[kind]}.")
    if not isinstance(architecture, str):
        raise CatsError(f"{path} does not say of which architecture it is ({ARCHITECTURE}); download it again.")
    if not model.tensors:
        raise CatsError(f"{path} holds {_OTHER_KINDS['vocab']}.")


def _join(parts: tuple[GgufHeader, ...], out: Path, with_data: bool) -> None:
    """Write one file of several: the entries of the first but for those of the split, and the tensors of all."""
    first = parts[0]
    kept = [place for key, place in first.entries.items() if not key.startswith("split.")]
    tensors = [(part, *item) for part in parts for item in zip(part.tensors, part.tensor_table, strict=True)]
    with out.open("wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", first.version, len(tensors), len(kept)))
        with first.path.open("rb") as source:
            for place in kept:
                file.write(_bytes(source, *place))
        offset = 0
        for part, tensor, (start, end) in tensors:
            with part.path.open("rb") as source:
                # what ends the description is the offset
                file.write(_bytes(source, start, end - 8) + struct.pack("<Q", offset))
            offset += _aligned(tensor.bytes, first.alignment)
        data = _aligned(file.tell(), first.alignment)
        file.truncate(data + offset)
        if not with_data:
            return
        for part, tensor, _ in tensors:
            file.seek(data)
            with part.path.open("rb") as source:
                source.seek(tensor.offset)
                _copy(source, file, tensor.bytes)
            data += _aligned(tensor.bytes, first.alignment)


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _bytes(source: Any, start: int, end: int) -> bytes:
    source.seek(start)
    return bytes(source.read(end - start))


def _copy(source: Any, target: Any, size: int, chunk: int = 1 << 24) -> None:
    while size:
        content = source.read(min(size, chunk))
        target.write(content)
        size -= len(content)
