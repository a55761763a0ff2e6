"""JSON as dataclasses. What is not of the type that a member declares is an error that names its place."""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from cats_llm.errors import CatsError

_EXPECTED = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


class WrongValueError(ValueError):
    """A value that is missing or of another type; the message names place, value and what it should be."""

    def __init__(self, place: str, value: Any, expected: str) -> None:
        text = "missing" if value is MISSING else json.dumps(value)[:60]
        super().__init__(f"{place} is {text} and should be {expected}")


def from_json(kind: Any, value: Any, place: str = "") -> Any:
    """A value of a type: a dataclass whose members are text, numbers, flags, or lists, dicts and dataclasses of these.

    Members that the dataclass does not have are passed over; null is as good as missing where there is a default. An
    optional dataclass that lacks a member it needs is None. Numbers are finite, whole ones 0 or more; no list is empty.

    Args:
        kind: the type.
        value: from `json.loads`.
        place: what errors call the value.

    Raises:
        WrongValueError: the value is not of the type.
    """
    if isinstance(kind, UnionType):
        kind = get_args(kind)[0]
        if value is None or (is_dataclass(kind) and isinstance(value, dict) and _lacks(kind, value)):
            return None
    if get_origin(kind) is list:
        if not isinstance(value, list) or not value:
            raise WrongValueError(place, value, "a list of objects")
        return [from_json(get_args(kind)[0], item, f"{place}[{i}]") for i, item in enumerate(value)]
    if get_origin(kind) is dict or is_dataclass(kind):
        if not isinstance(value, dict):
            raise WrongValueError(place, value, "an object")
        inside = f"{place}." if place else ""
        return _object(kind, value, place, inside) if is_dataclass(kind) else _dict(kind, value, inside)
    right = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
    if not right or (kind is int and value < 0) or (kind is float and not math.isfinite(value)):
        raise WrongValueError(place, value, _EXPECTED[kind])
    return kind(value)


def _object(kind: Any, value: Mapping[str, Any], place: str, inside: str) -> Any:
    hints = get_type_hints(kind)
    members = {
        member.name: from_json(hints[member.name], value.get(member.name, MISSING), f"{inside}{member.name}")
        for member in fields(kind)
        if _needed(member) or value.get(member.name) is not None
    }
    try:
        return kind(**members)
    except CatsError as error:
        raise WrongValueError(place, value, f"right: {error}".rstrip(".")) from error


def _dict(kind: Any, value: Mapping[str, Any], inside: str) -> dict[Any, Any]:
    key_type, item_type = get_args(kind)
    for key in value:
        if key_type is int and not key.isdecimal():
            raise WrongValueError(f"{inside}{key}", value[key], "by the index of a layer")
    return {key_type(key): from_json(item_type, item, f"{inside}{key}") for key, item in value.items()}


def _needed(member: Field[Any]) -> bool:
    return member.default is MISSING and member.default_factory is MISSING


def _lacks(kind: Any, value: Mapping[str, Any]) -> bool:
    return any(_needed(member) and value.get(member.name) is None for member in fields(kind))
