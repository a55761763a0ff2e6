"""stdin, stdout and stderr as they come: in any encoding, closed early, full."""

import errno
import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from cats_llm.cli.output import progress_console
from cats_llm.errors import CatsError

CLOSED_PIPE = 141
"""The exit code of a command whose reader went away, as shells report it of a program that SIGPIPE ends."""


def print_any_text() -> None:
    r"""Let stdout and stderr write what their encoding lacks as \xe9 or \u65e5, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_error(message: str) -> None:
    """Print an error to stderr, if there is one."""
    with suppress(OSError):
        progress_console.print(f"error: {message}", soft_wrap=True)


def finish(code: int) -> int:
    """Write what waits to be written to stdout and stderr. Returns the exit code, given that of the command."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError) as error:
            # Python would try again when it ends, and complain
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            code = code or _unwritten(error)
    return code


def _unwritten(error: Exception) -> int:
    if isinstance(error, BrokenPipeError):
        return CLOSED_PIPE
    if isinstance(error, OSError) and error.errno not in (errno.EBADF, None):
        print_error(f"could not print: {error.strerror}.")
        return 1
    return 0  # closed from the beginning, as by >&-


def read_prompt(prompt: str) -> str:
    """The prompt; of - what stdin holds.

    Raises:
        CatsError: it is no text in the encoding that the system is set to.
    """
    if prompt == "-":
        stdin: Any = sys.stdin
        if stdin is None:
            raise CatsError("stdin is closed, so there is no prompt to read from it; pass the text with --prompt.")
        try:
            prompt = stdin.read().removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise CatsError(
                f"the prompt on stdin is not {str(stdin.encoding).upper()} text (byte {error.start}); convert it."
            ) from error
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:  # what Python makes of bytes that it cannot decode
        raise CatsError(f"the prompt is not UTF-8 text (from character {error.start + 1} on); convert it.") from error
    return prompt


@contextmanager
def show_log() -> Iterator[None]:
    """Print the warnings of this package's log to stderr."""
    handler = _Handler(logging.WARNING)
    logger = logging.getLogger("cats_llm")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # of several processes one speaks
        if os.environ.get("RANK", "0") == "0":
            progress_console.print(f"warning: {record.getMessage()}", soft_wrap=True)
