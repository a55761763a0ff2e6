"""Rows of texts: one reader a format; every row comes with the place where it stands."""

import codecs
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from cats_llm.errors import CatsError, first_line

Row = tuple[str, Any]
"""Where it stands, for people, and the row: a dict of columns, or of a .txt file a document."""

SEPARATOR = "<|endoftext|>"
"""A line of its own between two documents of a .txt file."""
SUFFIXES = (".txt", ".jsonl", ".parquet")
_GZIP = ".gz"
_LONGEST_DOCUMENT = 1 << 20
# of a .parquet file, at most so many rows and bytes are held
_ROWS, _BYTES = 256, 64 << 20
# how files begin that are no text, and what to do about it
_NO_TEXT = {
    codecs.BOM_UTF32_LE: "UTF-32; convert it first: iconv -f UTF-32 -t UTF-8",  # before UTF-16, which it begins like
    codecs.BOM_UTF32_BE: "UTF-32; convert it first: iconv -f UTF-32 -t UTF-8",
    codecs.BOM_UTF16_LE: "UTF-16; convert it first: iconv -f UTF-16 -t UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16; convert it first: iconv -f UTF-16 -t UTF-8",
    b"\x1f\x8b": "compressed by gzip; call it .gz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; decompress it first",
    b"PK\x03\x04": "a zip archive; unpack it first",
}
_POINTER = b"version https://git-lfs."
# as the hub names the files of a dataset
_SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}\.(parquet|jsonl|jsonl\.gz)", re.IGNORECASE)


@dataclass
class Tally:
    """What was met while reading.

    Attributes:
        rows: read so far; documents of .txt files are none.
        empty: of them, those without any text, which are left out.
        mended: of them, those with half of a surrogate pair, in whose place U+FFFD stands.
        where: the place of the row that was read last, for people.
        first_empty, first_mended: the places of the first ones.
    """

    rows: int = 0
    empty: int = 0
    mended: int = 0
    where: str = ""
    first_empty: str = ""
    first_mended: str = ""

    def count_empty(self) -> None:
        """Count the row that was read last as empty."""
        self.first_empty = self.first_empty or self.where
        self.empty += 1

    def count_mended(self, where: str) -> None:
        """Count a row as mended."""
        self.first_mended = self.first_mended or where
        self.mended += 1

    def notes(self) -> list[str]:
        """Sentences on what was left out and mended."""
        notes = []
        if self.empty:
            notes.append(f"{self.empty} of {self.rows} rows hold no text and were left out (first: {self.first_empty})")
        if self.mended:
            notes.append(
                f"{self.mended} of {self.rows} rows hold half of a surrogate pair, for which U+FFFD was read "
                f"(first: {self.first_mended})"
            )
        return notes


def read_rows(
    source: str,
    columns: Sequence[str] | None = None,
    dataset_config: str | None = None,
    split: str = "train",
    tally: Tally | None = None,
) -> Iterator[Row]:
    """Rows of a .txt, .jsonl, .json or .parquet file, of a folder of them, or of a dataset on the hub, one at a time.

    Args:
        source: a path, or the name of a dataset.
        columns: the ones of interest, where the format can leave out others; None takes all.
        dataset_config: of a dataset on the hub.
        split: of a dataset on the hub, or of a folder whose files bear the names that the hub gives.
        tally: counts rows, and what had to be mended in them.

    Raises:
        CatsError: there is no such file or dataset, it is damaged, or it has none of the columns.
    """
    tally = tally if tally is not None else Tally()
    path, is_folder, is_file = _look_up(source)
    if is_folder:
        files = _files_in(path, split)
    elif is_file:
        files = [path]
    elif _suffix(path) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        what = "is no file that can be read twice; write the text to one" if path.exists() else None
        raise CatsError(f"{source} {what}." if what else f"there is no file or folder {source}.")
    else:
        yield from _read_dataset(source, columns, dataset_config, split, tally)
        return
    for file in files:
        reader = _READERS.get(_suffix(file))
        if reader is None:
            raise CatsError(f"{file} has an unknown ending; {_advice(file)}.")
        with _reading(file):
            _refuse_pointer(file)
            for where, row in reader(file, columns, tally):
                tally.rows += isinstance(row, dict)
                tally.where = where
                yield where, row


def _look_up(source: str) -> tuple[Path, bool, bool]:
    """The path, and whether it is a folder or a file."""
    if not source.strip():
        raise CatsError("no text is named; pass a file, a folder or the name of a dataset.")
    try:
        path = Path(source).expanduser()
        return path, path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # too long, not permitted; no such user
        reason = getattr(error, "strerror", None) or error
        shown = source if len(source) < 100 else f"{source[:80]}..."
        raise CatsError(f"{shown} is no file, folder or dataset that can be looked up: {reason}.") from error


def _suffix(path: Path) -> str:
    """The ending that says what the format is, or nothing."""
    name = path.name.lower()
    plain = name.removesuffix(_GZIP)
    return next((suffix for suffix in _READERS if (name if suffix == ".parquet" else plain).endswith(suffix)), "")


def _advice(file: Path) -> str:
    if file.suffix.lower() in (".zst", ".bz2", ".xz", ".zip", ".7z", ".tar", ".lz4"):
        return "decompress it first"
    return f"text is read from {', '.join(SUFFIXES)} files, so convert it or rename it"


def _files_in(folder: Path, split: str) -> list[Path]:
    """The texts of a folder and its subfolders, in order, without what systems, editors and tools leave there."""
    files = []

    def refuse(error: OSError) -> None:
        raise CatsError(f"could not read the folder {error.filename}: {error.strerror}.") from error

    for parent, subfolders, names in os.walk(folder, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not _is_junk(name)]
        files += [Path(parent, name) for name in names if not _is_junk(name)]
    # a .json file in a folder is about the data, as a rule; a compressed copy is no second text
    texts = {file for file in files if _suffix(file) in SUFFIXES}
    texts = {file for file in texts if file.suffix.lower() != _GZIP or file.with_suffix("") not in texts}
    if not texts:
        raise CatsError(f"the folder {folder} holds no {', '.join(SUFFIXES)} file.")
    return _of_split(folder, sorted(texts), split)


def _is_junk(name: str) -> bool:
    return name.startswith((".", "~", "__MACOSX")) or name.endswith("~")


def _of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """Of several splits, whose files bear the names that the hub gives, the one asked for."""
    shards = {file: match["split"] for file in files if (match := _SHARD.fullmatch(file.name))}
    splits = sorted(set(shards.values()))
    if len(splits) < 2:
        return files
    if split not in splits:
        raise CatsError(f"{folder} has no split {split!r}, only {', '.join(splits)}; pass --split.")
    return [file for file in files if shards.get(file, split) == split]


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn what can go wrong with a file into one sentence."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise CatsError(f"{file} is not UTF-8 text ({_place_of_bad_byte(file)}); convert it first.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CatsError(f"{file} is no gzip file, or it is damaged; download it again.") from error
    except OSError as error:
        raise CatsError(f"could not read {file}: {error.strerror or error}.") from error


def _refuse_pointer(file: Path) -> None:
    with file.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise CatsError(f"{file} is only a pointer to the file, which is kept by git-lfs; fetch it: git lfs pull.")


def _place_of_bad_byte(file: Path) -> str:
    start = 0
    with _opener(file)(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"byte {start + error.start}, in line {number}"
            start += len(line)
    return "it changed while it was read"


def _opener(file: Path) -> Any:
    return gzip.open if file.suffix.lower() == _GZIP else open


def _open(file: Path) -> TextIO:
    """The file as UTF-8 text without a byte order mark, every line ended by a line feed."""
    with _opener(file)(file, "rb") as stream:
        head = stream.read(4096)
    for mark, truth in _NO_TEXT.items():
        if head.startswith(mark):
            raise CatsError(f"{file} is not UTF-8 text but {truth}.")
    if 4 * head.count(0) > len(head):
        raise CatsError(f"{file} is not UTF-8 text: it is full of zero bytes, as UTF-16 and binary files are.")
    return cast("TextIO", _opener(file)(file, "rt", encoding="utf-8-sig"))


def _read_txt(file: Path, columns: Sequence[str] | None, tally: Tally) -> Iterator[Row]:
    """Documents without the white space around them.

    One that is longer than `_LONGEST_DOCUMENT` is cut between two lines, a line that is between two words: no file
    must fill the memory.
    """
    parts: list[str] = []
    size, number, begun = 0, 1, 1
    whole = True  # whether the part before ended its line
    with _open(file) as stream:
        while part := stream.readline(_LONGEST_DOCUMENT + 1):
            ends = whole and part.strip() == SEPARATOR
            whole = len(part) <= _LONGEST_DOCUMENT or part.endswith("\n")
            number += whole
            if not ends:
                parts.append(part)
                size += len(part)
            if ends or size >= _LONGEST_DOCUMENT:
                text = "".join(parts)
                cut = len(text) if whole else _last_space(text)
                yield f"the document at line {begun} of {file}", text[:cut].strip()
                parts, size, begun = [text[cut:]], len(text) - cut, number
    yield f"the document at line {begun} of {file}", "".join(parts).strip()


def _last_space(text: str) -> int:
    """Where the last word begins, with the white space before it; the end, where no white space is near."""
    end = len(text) - 1
    return next((i for i in range(end, max(0, end - 65536), -1) if text[i].isspace()), len(text))


def pieces(text: str) -> Iterator[str]:
    """A text in pieces that join to it, so that no tokenizer works on too much at a time; most texts are one."""
    begin = 0
    while len(text) - begin > 2 * _LONGEST_DOCUMENT:
        piece = text[begin : begin + _LONGEST_DOCUMENT]
        piece = piece[: _last_space(piece)]
        yield piece
        begin += len(piece)
    yield text[begin:] if begin else text


def _read_jsonl(file: Path, columns: Sequence[str] | None, tally: Tally) -> Iterator[Row]:
    def rows() -> Iterator[Row]:
        for number, line in enumerate(stream, 1):
            line = line.lstrip("\ufeff")  # where files were joined
            if line.strip():
                where = f"line {number} of {file}"
                yield where, _parse(line, where, tally)

    with _open(file) as stream:
        yield from _table(rows(), columns)


def _read_json(file: Path, columns: Sequence[str] | None, tally: Tally) -> Iterator[Row]:
    """A list of rows, or in truth JSON lines."""
    with _open(file) as stream:
        if next((line for line in stream if line.strip()), "").lstrip()[:1] != "[":
            yield from _read_jsonl(file, columns, tally)
            return
        stream.seek(0)
        rows = _parse(stream.read(), str(file), tally)
    yield from _table(((f"row {number} of {file}", row) for number, row in enumerate(rows, 1)), columns)


def _parse(text: str, where: str, tally: Tally) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise CatsError(f"{where} is not JSON: {error.msg}; mend it, or write one row a line.") from error
    except (ValueError, RecursionError) as error:  # numbers too long, lists too deep
        raise CatsError(f"{where} is no JSON that can be read: {error}.") from error
    if "\\ud" in text or "\\uD" in text:
        mended = _mended(value)
        if mended != value:
            tally.count_mended(where)
        return mended
    return value


def _mended(value: Any) -> Any:
    """The JSON value with U+FFFD for every half of a surrogate pair, which no UTF-8 text can hold."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_mended(item) for item in value]
    if isinstance(value, dict):
        return {_mended(key): _mended(item) for key, item in value.items()}
    return value


def _table(rows: Iterable[Row], columns: Sequence[str] | None) -> Iterator[Row]:
    """JSON rows as those of a table: what one lacks of the columns before it has no value."""
    known: dict[str, None] = {}
    for where, row in rows:
        if not isinstance(row, dict):
            lacks = f", so it has no text in the column {columns[0]!r}" if columns else ""
            raise CatsError(f"{where} is no JSON object but a {type(row).__name__}{lacks}.")
        yield where, known | row
        known.update(dict.fromkeys(row))


def _read_parquet(file: Path, columns: Sequence[str] | None, tally: Tally) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise CatsError("reading .parquet files needs pyarrow: pip install 'cats-llm[data]'.") from error
    number = 0
    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            chosen = [name for name in names if columns is None or name in columns]
            if not chosen:
                raise missing_column(dict.fromkeys(names), (columns or ["text"])[0], str(file))
            data = sum(table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups))
            size = max(1, min(_ROWS, _BYTES * table.metadata.num_rows // max(1, data)))
            for batch in table.iter_batches(batch_size=size, columns=chosen):
                for i in range(batch.num_rows):
                    number += 1
                    yield f"row {number} of {file}", {name: batch.column(name)[i].as_py() for name in chosen}
    except UnicodeDecodeError as error:
        raise CatsError(f"row {number} of {file} is not UTF-8 text; convert it first.") from error
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        behind = f"it is damaged after row {number}" if number else "is not a parquet file, or it is damaged"
        raise CatsError(f"{file}{': ' if number else ' '}{behind}; download or write it again.") from error


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}


def missing_column(row: dict[str, Any], column: str, where: str) -> CatsError:
    """The error of a row that has none of the columns which are read."""
    return CatsError(
        f"{where} has no text in the column {column!r} (it has: {', '.join(map(str, row)) or 'nothing'}); "
        "pass --text-column."
    )


def _read_dataset(
    name: str, columns: Sequence[str] | None, config: str | None, split: str, tally: Tally
) -> Iterator[Row]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CatsError(
            f"there is no file {name}; to read it as a dataset from the hub, pip install 'cats-llm[data]'."
        ) from error
    try:
        rows = iter(load_dataset(name, config, split=split, streaming=True))
    except Exception as error:  # datasets raises many kinds, for what is one thing to a user
        raise CatsError(
            f"{name} is no file, and as a dataset of the hub it cannot be loaded: {first_line(error)}."
        ) from error
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # as above; and it is read over the network
            raise CatsError(
                f"the dataset {name} cannot be read after row {tally.rows}: {first_line(error)}."
            ) from error
        tally.rows += 1
        tally.where = f"row {tally.rows} of the dataset {name}"
        yield tally.where, row
