"""Outputs appear whole or not at all: written beside their place, then renamed into it."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cats_llm.errors import CatsError


def check_output(path: Path, force: bool) -> None:
    """Refuse, before any long work, an output that could not be written at the end.

    Raises:
        CatsError: it exists and ``force`` is False, or its parent folder does not exist.
    """
    if path.exists() and not force:
        raise CatsError(f"{path} exists already; choose another name, or pass --force to replace it.")
    if path.is_symlink() and not path.exists():
        raise CatsError(f"{path} is a link to nothing; remove it, or choose another name.")
    if not path.resolve().parent.is_dir():
        raise CatsError(f"the folder {path.resolve().parent} does not exist; create it first.")


def check_space(path: Path, needed: int) -> None:
    """Refuse, before anything is written, an output of ``needed`` bytes that its disk has no room for.

    Raises:
        CatsError: it has not.
    """
    free = shutil.disk_usage(next(parent for parent in path.resolve().parents if parent.exists())).free
    if needed > free:
        raise CatsError(
            f"could not write {path}: No space left on device: it needs {needed / 1e6:,.1f} MB, and "
            f"{free / 1e6:,.1f} MB are free; nothing was changed."
        )


@contextmanager
def write_file(path: str | Path, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block ends well, rename it to ``path``.

    Raises:
        CatsError: ``path`` exists and ``force`` is False, or the disk refused (it says why). Nothing is left behind.
    """
    path = Path(path)
    check_output(path, force)
    if path.is_dir():
        raise CatsError(f"{path} is a folder; give the name of a file.")
    with _disk_errors(path), temporary_folder(path) as folder:
        temporary = folder / path.name
        yield temporary
        _to_disk(temporary)
        temporary.replace(path)


@contextmanager
def write_folder(path: str | Path, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; when the block ends well, rename it to ``path``.

    An existing folder is moved aside only then, and deleted last.

    Raises:
        CatsError: as `write_file`.
    """
    path = Path(path)
    check_output(path, force)
    if path.exists() and not path.is_dir():
        raise CatsError(f"{path} is a file; give the name of a folder.")
    with _disk_errors(path), temporary_folder(path) as folder:
        temporary, old = folder / "new", folder / "old"
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            _to_disk(file)
        if path.exists():
            path.rename(old)
        try:
            temporary.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise


def write_json(path: str | Path, value: Any, force: bool = False) -> None:
    """Write ``value`` as indented JSON."""
    with write_file(path, force) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def command_line() -> str:
    """How this program was called, for the record beside a result."""
    return " ".join(["cats", *sys.argv[1:]])


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A new folder beside ``path``, hidden, that is removed at the end of the block."""
    # beside its place: a rename works only within one file system
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.resolve().parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CatsError(f"could not write {path}: {error.strerror or error}; nothing was changed.") from error


def _to_disk(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())
