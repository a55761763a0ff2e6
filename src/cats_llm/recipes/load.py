"""Recipes from YAML files. Whatever a recipe does not say rightly is one sentence with the file and the place."""

import math
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml

from cats_llm.errors import CatsError
from cats_llm.options import from_mapping
from cats_llm.recipes.recipe import (
    PLANS,
    BenchPlan,
    CalibrationSection,
    Expected,
    FinetuningPlan,
    Plan,
    Quantity,
    Recipe,
)

T = TypeVar("T")

_HERE = Path(__file__).resolve().parent
# by the plan's methods, by the command line, and by the recipe's calibration
_SET_ELSEWHERE = {"calibration": ("batch_size",), "finetuning": ("method", "micro_batch", "calibration")}


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(file.stem for file in _HERE.glob("*.yaml"))


def smoke_data() -> Path:
    """Folder with a few documents for each task of the recipes, in the columns of the tasks' datasets."""
    return _HERE / "smoke"


def find(name: str) -> Recipe:
    """A recipe of the package by name, or any by the path of its file.

    Raises:
        CatsError: there is none, or it is wrong.
    """
    if name in names():
        return load(_HERE / f"{name}.yaml")
    path = Path(name)
    if not path.is_file():
        near = get_close_matches(name, names(), 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names())}."
        raise CatsError(f"{name} is neither a recipe of cats-llm nor a file; {hint}")
    return load(path)


def load(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        CatsError: it is no YAML, or wrong.
    """
    try:
        with path.open(encoding="utf-8") as file:
            values = yaml.load(file, _Loader)
    except OSError as error:
        raise CatsError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise CatsError(f"{path} is no text in UTF-8; a recipe is a YAML file.") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark is not None else ""
        problem = str(getattr(error, "problem", None) or "it cannot be parsed").rstrip(".")
        raise CatsError(f"{path} is no valid YAML{place}: {problem}.") from error
    if not isinstance(values, dict):
        raise CatsError(f"{path} is no recipe; a recipe is a YAML mapping with title, about and a plan.")
    return _recipe(values, path)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML is not typed
    """YAML in which a key that stands twice is an error, not the last of the two."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", node.value[i][0].start_mark
                )
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _recipe(values: dict[Any, Any], path: Path) -> Recipe:
    place = f"{path}: "
    chosen = [name for name in PLANS if name in values]
    if len(chosen) != 1:
        raise CatsError(f"{path} needs exactly one of {', '.join(PLANS)}; it has {' and '.join(chosen) or 'none'}.")
    plan = _section(PLANS[chosen[0]], values, chosen[0], place)
    needs_model = not (isinstance(plan, BenchPlan) and plan.kind == "mlp")
    for name in ("model", "calibration"):
        if (name in values) != needs_model:
            what = "is missing" if needs_model else "has no meaning for a benchmark of one MLP"
            raise CatsError(f"{place}{name} {what}.")
    calibration = _section(CalibrationSection, values, "calibration", place) if needs_model else None
    numbers = values.get("expected", [])
    if not isinstance(numbers, list) or not all(isinstance(number, dict) for number in numbers):
        raise CatsError(f"{place}expected is {str(numbers)[:60]!r} and should be a list of mappings.")
    source = {"source": values["source"]} if "source" in values else {}
    expected = tuple(_expected(source | number, f"{place}expected[{i}].", plan) for i, number in enumerate(numbers))
    computed = {"name": path.stem, "plan": plan, "calibration": calibration, "expected": expected}
    return from_mapping(Recipe, values, place, beside=(*PLANS, "calibration", "expected"), computed=computed)


def _section(config: type[T], values: dict[Any, Any], name: str, place: str) -> T:
    if not isinstance(values[name], dict):
        raise CatsError(f"{place}{name} should be a mapping.")
    return from_mapping(config, values[name], f"{place}{name}.", without=_SET_ELSEWHERE.get(name, ()))


def _expected(values: dict[Any, Any], place: str, plan: Plan) -> Expected:
    others = {field.name for field in fields(Quantity)} - plan.quantity.keys()
    expected = from_mapping(
        Expected, values, place, without=others, beside=("value",), computed={"value": _value(values, place)}
    )
    for name, choices in plan.quantity.items():
        value = getattr(expected.of, name)
        known = "text" if choices is None else f"one of {', '.join(map(str, choices))}"
        if value is None and name != "tokens":
            raise CatsError(f"{place}{name} is missing; it should be {known}.")
        if value is not None and choices is not None and value not in choices:
            wrong = ", which bench.tokens does not have" if name == "tokens" else f" and should be {known}"
            raise CatsError(f"{place}{name} is {value!r}{wrong}.")
    if isinstance(plan, FinetuningPlan) and "relu" not in plan.runs:
        raise CatsError(f"{place}measure compares with relu, which finetuning.methods does not have.")
    return expected


def _value(values: dict[Any, Any], place: str) -> float | tuple[float, float]:
    value = values.get("value")
    numbers: list[Any] = value if isinstance(value, list) and len(value) == 2 else [value]
    right = all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
    if not right or numbers[0] > numbers[-1]:
        what = f"is {str(value)[:60]!r} and" if "value" in values else "is missing; it"
        raise CatsError(f"{place}value {what} should be a number, or a list of the lowest and the highest.")
    return (float(numbers[0]), float(numbers[1])) if isinstance(value, list) else float(numbers[0])
