"""Options as fields of dataclasses, said once: the command line, recipes and the docs are made from them.

A field that `option` makes carries its help and what it may be. `cats_llm.cli.signature` turns such dataclasses into
options of a command, `from_mapping` reads them from a section of a YAML file, and Python callers just build them.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from cats_llm.errors import CatsError

T = TypeVar("T")

_KEY = "option"


class Panel:
    """The groups that the help of a command shows its options in."""

    DATA = "Model and data"
    SPARSITY = "What is sparse"
    TRAINING = "Training"
    LORA = "LoRA"
    MEASURING = "Measuring"
    OUTPUT = "Output"


@dataclass(frozen=True)
class Option:
    """What is known of a field beside its type and default.

    Attributes:
        help: one sentence for users.
        flags: on the command line, in place of --name-of-the-field, as ``("--learning-rate", "--lr")``.
        metavar: stands for the value in the help.
        parse: from the text of one value to the value; raises CatsError or ValueError. Of a tuple: of one member.
        choices: all values that are allowed.
        minimum, maximum: of a number, both allowed.
        expected: what it should be, for error sentences ("should be ..."); otherwise made from type and range.
        default_text: shown in the help in place of the default.
        panel: the group of options that the help shows it in; None: that of the dataclass, its attribute ``panel``.
        positional: on the command line an argument, not an option.
        repeated: of a tuple: given several times on the command line; otherwise once, separated by commas.
    """

    help: str
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None
    choices: tuple[str, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None
    expected: str | None = None
    default_text: str | None = None
    panel: str | None = None
    positional: bool = False
    repeated: bool = False


def option(default: Any = MISSING, *, help: str, **more: Any) -> Any:
    """A field of a dataclass that is an option.

    Args:
        default: of the field; without one the option is required.
        help: one sentence for users.
        more: the other attributes of `Option`.
    """
    return dataclasses.field(default=default, metadata={_KEY: Option(help, **more)})


@dataclass(frozen=True)
class OptionField:
    """An option of a dataclass, or of a dataclass inside it.

    Attributes:
        name: of the field.
        type: of the value, or of one member of a tuple; without None.
        several: the field is a tuple of values of this type.
        default: MISSING for none.
        option: what else is known of it.
    """

    name: str
    type: type
    several: bool
    default: Any
    option: Option

    def parse(self, text: str) -> Any:
        """One value, or one member of a tuple, from text.

        Raises:
            CatsError, ValueError: the text is none.
        """
        return self._checked(self.option.parse(text) if self.option.parse is not None else self.type(text))

    def check(self, value: Any) -> Any:
        """A value of a YAML file as the field holds it.

        Raises:
            CatsError, ValueError: it is none.
        """
        if not self.several:
            return self._check_one(value)
        if not isinstance(value, list) or not value:
            raise ValueError
        members = tuple(self._check_one(member) for member in value)
        if len(set(members)) < len(members):
            raise ValueError
        return members

    def _check_one(self, value: Any) -> Any:
        if self.option.parse is not None and isinstance(value, str | int | float) and not isinstance(value, bool):
            return self.parse(str(value))
        if self.type is float and type(value) is int:
            value = float(value)
        if type(value) is not self.type:
            raise ValueError
        return self._checked(value.strip() if isinstance(value, str) else value)

    def _checked(self, value: Any) -> Any:
        low, high = self.option.minimum, self.option.maximum
        if self.option.choices is not None and value not in self.option.choices:
            raise ValueError
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError
        if (low is not None and value < low) or (high is not None and value > high) or value == "":
            raise ValueError
        return value

    @property
    def expected(self) -> str:
        """What a value should be, for error sentences."""
        one = self.option.expected or self._expected_one()
        return one if not self.several or self.option.expected else f"a list of different values, each {one}"

    def _expected_one(self) -> str:
        if self.option.choices is not None:
            return f"one of {', '.join(self.option.choices)}"
        kinds = {int: "a whole number", float: "a number", bool: "true or false"}
        kind, low, high = kinds.get(self.type, "text"), self.option.minimum, self.option.maximum
        if low is not None and high is not None:
            return f"{kind} from {low:g} to {high:g}"
        return kind if low is None else f"{kind}, {low:g} or more"


def option_fields(config: type) -> dict[str, OptionField]:
    """The options of a dataclass by name, those of dataclasses inside it among them.

    Raises:
        TypeError: two have one name.
    """
    fields: dict[str, OptionField] = {}
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        inner: dict[str, OptionField] = {}
        if _KEY in field.metadata:
            kind, several = _value_type(hints[field.name])
            about: Option = field.metadata[_KEY]
            about = dataclasses.replace(about, panel=about.panel or getattr(config, "panel", None))
            inner = {field.name: OptionField(field.name, kind, several, field.default, about)}
        elif dataclasses.is_dataclass(hints[field.name]):
            inside = option_fields(hints[field.name])
            given = values_of(field.default) if field.default is not MISSING else {}
            inner = {
                name: dataclasses.replace(part, default=given.get(name, part.default)) for name, part in inside.items()
            }
        twice = fields.keys() & inner.keys()
        if twice:
            raise TypeError(f"{config.__name__} has two options named {', '.join(sorted(twice))}")
        fields |= inner
    return fields


def values_of(config: Any) -> dict[str, Any]:
    """The values of the options of a dataclass instance by name, those of dataclasses inside it among them."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if _KEY in field.metadata:
            values[field.name] = value
        elif dataclasses.is_dataclass(value):
            values |= values_of(value)
    return values


def build(config: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass, and those inside it, from the values of its options by name; others keep their defaults."""
    arguments: dict[str, Any] = {}
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):  # type: ignore[arg-type]  # a dataclass, which type[T] does not say
        if _KEY not in field.metadata and dataclasses.is_dataclass(hints[field.name]):
            given = values_of(field.default) if field.default is not MISSING else {}
            arguments[field.name] = build(hints[field.name], {**given, **values})
        elif field.name in values:
            arguments[field.name] = values[field.name]
    return config(**arguments)


def from_mapping(
    config: type[T],
    values: Mapping[Any, Any],
    place: str,
    without: Collection[str] = (),
    beside: Collection[str] = (),
    computed: Mapping[str, Any] | None = None,
) -> T:
    """The dataclass from a section of a YAML file.

    Args:
        config: a dataclass with options.
        values: the section.
        place: what error sentences begin with, before the name of the key, as "recipe.yaml: finetuning.".
        without: options that the section cannot set.
        beside: other keys of the section, which are read elsewhere.
        computed: fields that are no options.

    Raises:
        CatsError: a key is unknown or missing, a value is not what it should be, or the dataclass refuses the values
            together; what it says begins with a key then.
    """
    fields = {name: field for name, field in option_fields(config).items() if name not in without}
    known = sorted({*fields, *beside})
    for key in values:
        if key not in known:
            near = get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known here are {', '.join(known)}."
            raise CatsError(f"{place}{key} is unknown; {hint}")
    read = dict(computed or {})
    for name, field in fields.items():
        if name in values:
            try:
                read[name] = field.check(values[name])
            except (CatsError, ValueError) as error:
                what = f"is {str(values[name])[:60]!r} and should be {field.expected}"
                raise CatsError(f"{place}{name} {what}.") from error
        elif field.default is MISSING:
            raise CatsError(f"{place}{name} is missing; it should be {field.expected}.")
    try:
        return build(config, read)
    except CatsError as error:
        raise CatsError(f"{place}{error}") from error


def _value_type(hint: Any) -> tuple[type, bool]:
    """The type of one value of a field, and whether the field is a tuple of several."""
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (part for part in get_args(hint) if part is not NoneType)
    if get_origin(hint) is tuple:
        return get_args(hint)[0], True
    return hint, False
