"""An entry of a JSON object put in and taken out as text, so that all else stays as it is to the byte."""

import json
import re
from typing import Any, NamedTuple

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class _Entry(NamedTuple):
    key: str
    start: int
    end: int


def remove_entry(text: str, key: str) -> str:
    """The text of a JSON object without the entry ``key``, if it has one."""
    entries = _entries(text)
    for i, entry in reversed(list(enumerate(entries))):
        if entry.key != key:
            continue
        if i + 1 < len(entries):
            text = text[: entry.start] + text[entries[i + 1].start :]
        else:
            start = entries[i - 1].end if i else text.index("{") + 1
            text = text[:start] + text[entry.end :]
        entries = _entries(text)
    return text


def set_entry(text: str, key: str, value: Any) -> str:
    """The text of a JSON object with the entry ``key``; `remove_entry` gives the same text back.

    It comes last, or, where the keys are sorted as transformers sorts them, to its place in their order.
    """
    text = remove_entry(text, key)
    entries = _entries(text)
    if not entries:
        after = text.index("{") + 1
        return f"{text[:after]}{_dump(key, value)}{text[after:]}"
    keys = [entry.key for entry in entries]
    later = [entry for entry in entries if entry.key > key] if keys == sorted(keys) else []
    if later:
        start = later[0].start
        return f"{text[:start]}{_dump(key, value)},{_space_before(text, start)}{text[start:]}"
    end = entries[-1].end
    return f"{text[:end]},{_space_before(text, entries[-1].start)}{_dump(key, value)}{text[end:]}"


def _dump(key: str, value: Any) -> str:
    return f"{json.dumps(key)}: " + json.dumps(value, indent=2, sort_keys=True).replace("\n", "\n  ")


def _space_before(text: str, position: int) -> str:
    return text[len(text[:position].rstrip(" \t\n\r")) : position]


def _entries(text: str) -> list[_Entry]:
    """Where the entries of a JSON object begin and end in its text."""
    position = _skip(text, text.index("{") + 1)
    entries = []
    while text[position] != "}":
        key, end = _DECODER.raw_decode(text, position)
        colon = _skip(text, end)
        _, end = _DECODER.raw_decode(text, _skip(text, colon + 1))
        entries.append(_Entry(key, position, end))
        position = _skip(text, end)
        if text[position] == ",":
            position = _skip(text, position + 1)
    return entries


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()
