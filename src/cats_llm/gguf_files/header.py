"""What a GGUF file says of itself, checked before any weight is read: metadata, and where its tensors lie.

The layout is little endian: ``GGUF``, a version, the numbers of tensors and of entries; the entries (key, type, value);
of each tensor its name, sizes, type and offset; and the data, each tensor at a multiple of the alignment.
"""

import mmap
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from cats_llm.errors import CatsError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ARCHITECTURE = "general.architecture"
_AGAIN = "download it again"
_ALIGNMENT = "general.alignment"
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_LONGEST_SHAPE = 8


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file.

    Attributes:
        name: as llama.cpp names it.
        shape: in the order of torch, rows first.
        type: the number of its GGML type.
        offset: of its data, from the beginning of the file.
        bytes: of its data.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    bytes: int

    @property
    def numel(self) -> int:
        """How many weights it holds."""
        return prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """All that stands before the data.

    Attributes:
        path: of the file.
        metadata: its entries; of an array of strings the number of strings.
        tensors: in the order of the file.
        entries: where in the file each entry stands, from and to which byte.
        tensor_table: where the description of each tensor stands.
        version: of the format.
        alignment: every tensor begins at a multiple of so many bytes, counted from the beginning of the data.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]
    entries: Mapping[str, tuple[int, int]]
    tensor_table: tuple[tuple[int, int], ...]
    version: int
    alignment: int

    def strings(self, key: str, places: Collection[int]) -> dict[int, str]:
        """The strings at some places of an array, by their place; those beyond its end are left out."""
        found: dict[int, str] = {}
        start, end = self.entries[key]
        with self.path.open("rb") as file:
            file.seek(start)
            content = file.read(end - start)
        position = 8 + len(key.encode()) + 4 + 4  # after the key, the type and that of the elements
        number = struct.unpack_from("<Q", content, position)[0]
        position += 8
        for i in range(min(number, max(places, default=-1) + 1)):
            length = struct.unpack_from("<Q", content, position)[0]
            position += 8
            if i in places:
                found[i] = content[position : position + length].decode("utf-8")
            position += length
        return found


def is_gguf(path: Path) -> bool:
    """Whether a name is that of a file in this form: by its ending, or by how it begins."""
    if path.is_dir():
        return False
    if path.name.lower().endswith(".gguf"):
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_header(path: Path, block_of: Callable[[int], tuple[int, int] | None]) -> GgufHeader:
    """Read what stands before the data, and check that the data is there.

    Args:
        path: a file.
        block_of: weights and bytes of a block of a GGML type; None if there is no such type.

    Raises:
        CatsError: it cannot be read, is in another form or version, or is truncated or damaged.
    """
    try:
        with path.open("rb") as file:
            start = file.read(40)
            _check_start(path, start)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Parser(path, content).header(block_of)
    except CatsError:
        raise
    except FileNotFoundError as error:
        raise CatsError(f"there is no file {path}.") from error
    except OSError as error:
        raise CatsError(f"{path} cannot be read ({error.strerror or error}); see to its permissions.") from error
    except (struct.error, ValueError, OverflowError, MemoryError) as error:
        raise _damaged(path) from error


def _check_start(path: Path, start: bytes) -> None:
    if start.startswith(b"version https://git-lfs"):
        raise CatsError(f"{path} is only the pointer that git-lfs leaves; run: git lfs pull.")
    if not start:
        raise CatsError(f"{path} is empty; {_AGAIN}.")
    if start[:4] != MAGIC:
        raise CatsError(f"{path} is no GGUF file: it begins with {start[:4]!r} instead of {MAGIC!r}; {_AGAIN}.")
    if len(start) < 24:
        raise _damaged(path)
    version = struct.unpack_from("<I", start, 4)[0]
    if version in VERSIONS:
        return
    if version >= 1 << 16:
        raise CatsError(f"{path} is a GGUF file of a big-endian machine; convert it to little endian first.")
    what = "older" if version < min(VERSIONS) else "newer"
    raise CatsError(
        f"{path} is of version {version} of GGUF, {what} than {VERSIONS[0]} and {VERSIONS[1]}, which are read; "
        "convert it again with a present llama.cpp."
    )


def _damaged(path: Path, what: str = "its header is damaged or ends too early") -> CatsError:
    return CatsError(f"{path} is truncated or damaged: {what}; {_AGAIN}.")


class _Parser:
    """Reads a file from its first byte on; past its end raises struct.error or ValueError."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.position = path, content, 4

    def header(self, block_of: Callable[[int], tuple[int, int] | None]) -> GgufHeader:
        version, number, entries = self._unpack("IQQ")
        if max(number, entries) > len(self.content):
            raise ValueError("more entries than bytes")
        metadata: dict[str, Any] = {}
        places: dict[str, tuple[int, int]] = {}
        for _ in range(entries):
            start = self.position
            key = self._string()
            metadata[key] = self._value(self._unpack("I")[0])
            places[key] = (start, self.position)
        alignment = metadata.get(_ALIGNMENT, 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError("no alignment")
        described, table = [], []
        for _ in range(number):
            start = self.position
            described.append(self._tensor())
            table.append((start, self.position))
        data = -(-self.position // alignment) * alignment
        tensors = tuple(self._placed(data, block_of, *facts) for facts in described)
        return GgufHeader(self.path, metadata, tensors, places, tuple(table), version, alignment)

    def _placed(
        self,
        data: int,
        block_of: Callable[[int], tuple[int, int] | None],
        name: str,
        shape: tuple[int, ...],
        kind: int,
        offset: int,
    ) -> GgufTensor:
        block = block_of(kind)
        if block is None:
            raise CatsError(
                f"{self.path} holds {name} in the GGML type {kind}, which the installed gguf does not know; "
                "pip install --upgrade gguf."
            )
        weights, size = block
        if not shape or shape[-1] % weights:
            raise _damaged(self.path, f"{name} has the shape {shape} in blocks of {weights}")
        tensor = GgufTensor(name, shape, kind, data + offset, prod(shape) // weights * size)
        if tensor.offset + tensor.bytes > len(self.content):
            missing = tensor.offset + tensor.bytes - len(self.content)
            raise _damaged(self.path, f"{name} ends {missing:,} bytes after the end of the file")
        return tensor

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = self._unpack("I")[0]
        if dimensions > _LONGEST_SHAPE:
            raise ValueError("too many dimensions")
        shape = tuple(reversed(self._unpack(f"{dimensions}Q")))
        kind, offset = self._unpack("IQ")
        return name, shape, kind, offset

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._unpack(self._scalar(kind))[0]
        kind, length = self._unpack("IQ")
        if length > len(self.content):
            raise ValueError("longer than the file")
        if kind == _STRING:
            for _ in range(length):
                self._skip(self._unpack("Q")[0])
            return length
        return list(self._unpack(f"{length}{self._scalar(kind)}"))

    def _scalar(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"no type {kind}")
        return _SCALARS[kind]

    def _string(self) -> str:
        length = self._unpack("Q")[0]
        start = self.position
        self._skip(length)
        return self.content[start : self.position].decode("utf-8")

    def _skip(self, length: int) -> None:
        if self.position + length > len(self.content):
            raise ValueError("past the end")
        self.position += length

    def _unpack(self, form: str) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{form}")
        values = layout.unpack_from(self.content, self.position)
        self.position += layout.size
        return values
