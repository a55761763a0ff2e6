"""Recipes from YAML files. Whatever a recipe does not say rightly is one sentence with the file and the place."""

import math
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from cats_llm.checkpoint.config import check_sparsity
from cats_llm.errors import CatsError
from cats_llm.recipes.compare import BENCH_MEASURES, TRAINING_MEASURES
from cats_llm.recipes.recipe import (
    BenchPlan,
    Calibration,
    EvaluationPlan,
    Expected,
    FinetuningPlan,
    Plan,
    Recipe,
    ThresholdPlan,
)

_HERE = Path(__file__).resolve().parent
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_PLANS = ("evaluation", "thresholds", "bench", "finetuning")


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
    path = _HERE / f"{name}.yaml"
    if name in names():
        return load(path)
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
    return _recipe(_Section(values, path, ""), path.stem)


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


class _Section:
    """A mapping whose members are taken one by one; what is left at the end is a mistake."""

    def __init__(self, values: dict[Any, Any], path: Path, where: str) -> None:
        self.values = dict(values)
        self.path = path
        self.where = where
        self.known: list[str] = []

    def wrong(self, name: str, what: str) -> CatsError:
        return CatsError(f"{self.path}: {self.where}{name} {what}.")

    def take(self, name: str, check: Callable[[Any], Any], expected: str, default: Any = ...) -> Any:
        """The member as ``check`` returns it; ``check`` raises ValueError for what is not ``expected``."""
        self.known.append(name)
        if name not in self.values:
            if default is ...:
                raise self.wrong(name, f"is missing; it should be {expected}")
            return default
        value = self.values.pop(name)
        try:
            return check(value)
        except ValueError as error:
            raise self.wrong(name, f"is {str(value)[:60]!r} and should be {expected}") from error

    def section(self, name: str) -> "_Section | None":
        self.known.append(name)
        if name not in self.values:
            return None
        value = self.values.pop(name)
        if not isinstance(value, dict):
            raise self.wrong(name, "should be a mapping")
        return _Section(value, self.path, f"{self.where}{name}.")

    def end(self) -> None:
        for name in self.values:
            near = get_close_matches(str(name), self.known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known here are {', '.join(sorted(self.known))}"
            raise self.wrong(str(name), f"is unknown; {hint}".rstrip("?."))


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    return value.strip()


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _whole(least: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError
        return value

    return check


def _one_of(*choices: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in choices:
            raise ValueError
        return str(value)

    return check


def _several(check: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def checked(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or not value:
            raise ValueError
        found = tuple(check(item) for item in value)
        if len(set(found)) < len(found):
            raise ValueError
        return found

    return checked


def _sparsity(value: Any) -> float:
    return check_sparsity(_number(value))


def _value(value: Any) -> float | tuple[float, float]:
    if not isinstance(value, list):
        return _number(value)
    low, high = (_number(item) for item in value) if len(value) == 2 else (1.0, 0.0)
    if low > high:
        raise ValueError
    return low, high


def _recipe(top: _Section, name: str) -> Recipe:
    title = top.take("title", _text, "text")
    about = top.take("about", _text, "text")
    model = top.take("model", _text, "a folder or a name on the hub", None)
    revision = top.take("revision", _text, "a branch, tag or commit", None)
    dtype = top.take("dtype", _one_of(*_DTYPES), f"one of {', '.join(_DTYPES)}", "auto")
    calibration = _calibration(top.section("calibration"))
    sections = {plan: top.section(plan) for plan in _PLANS}
    chosen = [plan for plan, section in sections.items() if section is not None]
    if len(chosen) != 1:
        raise CatsError(
            f"{top.path} needs exactly one of {', '.join(_PLANS)}; it has {' and '.join(chosen) or 'none'}."
        )
    section = sections[chosen[0]]
    assert section is not None
    readers: dict[str, Callable[[_Section], Plan]] = {
        "evaluation": _evaluation,
        "thresholds": _thresholds,
        "bench": _bench,
        "finetuning": _finetuning,
    }
    plan = readers[chosen[0]](section)
    section.end()
    needs_model = not (isinstance(plan, BenchPlan) and plan.kind == "mlp")
    for what, value in (("model", model), ("calibration", calibration)):
        if (value is not None) != needs_model:
            raise top.wrong(what, "is missing" if needs_model else "has no meaning for a benchmark of one MLP")
    source = top.take("source", _text, "text", None)
    expected = top.take("expected", _list, "a list of mappings", [])
    top.end()
    made = tuple(
        _expected(_Section(item, top.path, f"expected[{i}]."), plan, source) for i, item in enumerate(expected)
    )
    return Recipe(name, title, " ".join(about.split()), plan, model, revision, dtype, calibration, made)


def _list(value: Any) -> list[dict[Any, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError
    return value


def _calibration(section: _Section | None) -> Calibration | None:
    if section is None:
        return None
    made = Calibration(
        data=section.take("data", _text, "a file, folder or dataset"),
        text_column=section.take("text_column", _text, "text", "text"),
        dataset_config=section.take("dataset_config", _text, "text", None),
        split=section.take("split", _text, "text", "train"),
        samples=section.take("samples", _whole(1), "a whole number of sequences", 256),
        seq_length=section.take("seq_length", _whole(2), "a whole number of tokens, 2 or more", 1024),
        seed=section.take("seed", _whole(0), "a whole number", None),
    )
    section.end()
    return made


_SPARSITIES = "a list of different gate sparsities, each from 0 up to (not including) 1"


def _evaluation(section: _Section) -> EvaluationPlan:
    return EvaluationPlan(
        tasks=section.take("tasks", _several(_text), "a list of different names"),
        sparsities=section.take("sparsities", _several(_sparsity), _SPARSITIES),
        methods=section.take("methods", _several(_text), "a list of different names", ("cats",)),
        num_fewshot=section.take("num_fewshot", _whole(0), "a whole number", None),
    )


def _thresholds(section: _Section) -> ThresholdPlan:
    return ThresholdPlan(section.take("sparsity", _sparsity, "a gate sparsity from 0 up to (not including) 1"))


def _bench(section: _Section) -> BenchPlan:
    kind = section.take("kind", _one_of("mlp", "decode"), "mlp or decode")
    shape = section.take("shape", _text, "a shape that cats bench knows", None)
    if (shape is None) != (kind == "decode"):
        raise section.wrong("shape", "is missing" if shape is None else "has no meaning for decode")
    tokens = section.take("tokens", _several(_whole(3)), "a list of different whole numbers, 3 or more", None)
    if tokens is not None and kind == "mlp":
        raise section.wrong("tokens", "has no meaning for mlp")
    return BenchPlan(
        kind=kind,
        sparsities=section.take("sparsities", _several(_sparsity), _SPARSITIES),
        dtype=section.take("dtype", _one_of(*_DTYPES[1:]), f"one of {', '.join(_DTYPES[1:])}", "float32"),
        shape=shape,
        batch=section.take("batch", _whole(1), "a whole number", 1),
        tokens=tokens or (16,),
        rounds=section.take("rounds", _whole(1), "a whole number", 7),
    )


def _positive(value: Any) -> float:
    number = _number(value)
    if number <= 0:
        raise ValueError
    return number


def _finetuning(section: _Section) -> FinetuningPlan:
    plan = FinetuningPlan(
        methods=section.take("methods", _several(_text), "a list of different names"),
        sparsities=section.take("sparsities", _several(_sparsity), _SPARSITIES),
        data=section.take("data", _text, "a file, folder or dataset", None),
        text_column=section.take("text_column", _text, "text", "text"),
        dataset_config=section.take("dataset_config", _text, "text", None),
        split=section.take("split", _text, "text", "train"),
        instructions=section.take("instructions", _text, "the name of a task", None),
        steps=section.take("steps", _whole(1), "a whole number", None),
        epochs=section.take("epochs", _positive, "a number above 0", None),
        learning_rate=section.take("learning_rate", _positive, "a number above 0", 1e-5),
        seq_length=section.take("seq_length", _whole(2), "a whole number of tokens, 2 or more", 1024),
        batch_size=section.take("batch_size", _whole(1), "a whole number of examples", 16),
        heldout_samples=section.take("heldout_samples", _whole(1), "a whole number of examples", 32),
        eval_every=section.take("eval_every", _whole(1), "a whole number of steps", 50),
        seed=section.take("seed", _whole(0), "a whole number", 0),
    )
    for one, other in (("data", "instructions"), ("steps", "epochs")):
        if (getattr(plan, one) is None) == (getattr(plan, other) is None):
            raise section.wrong(one, f"or {other} is needed, and not both")
    return plan


def _expected(item: _Section, plan: Plan, source: str | None) -> Expected:
    value = item.take("value", _value, "a number, or a list of the lowest and the highest")
    own = item.take("source", _text, "text", source)
    if own is None:
        raise item.wrong("source", "is missing, here and in the recipe; a published number needs one")
    if isinstance(plan, EvaluationPlan):
        made = Expected(
            value,
            own,
            variant=item.take("variant", _text, "dense, a method, or a method with k=0.5"),
            task=item.take("task", _text, "a task or set of tasks"),
            metric=item.take("metric", _text, "a metric, or gate_, ffn_ or model_sparsity"),
        )
    elif isinstance(plan, FinetuningPlan):
        made = Expected(
            value,
            own,
            variant=item.take("variant", _one_of(*plan.runs), f"one of {', '.join(plan.runs)}"),
            measure=item.take("measure", _one_of(*TRAINING_MEASURES), f"one of {', '.join(TRAINING_MEASURES)}"),
        )
        if "relu" not in plan.runs:
            raise item.wrong("measure", "compares with relu, which finetuning.methods does not have")
    elif isinstance(plan, ThresholdPlan):
        made = Expected(value, own, layer=item.take("layer", _whole(0), "the index of a layer"))
    else:
        contestants = ["torch dense"] if plan.kind == "mlp" else ["stock transformers"]
        contestants += [f"k = {k}" for k in plan.sparsities]
        measures = BENCH_MEASURES[plan.kind]
        made = Expected(
            value,
            own,
            contestant=item.take("contestant", _one_of(*contestants), f"one of {', '.join(contestants)}"),
            measure=item.take("measure", _one_of(*measures), f"one of {', '.join(measures)}"),
            tokens=item.take("tokens", _whole(1), "a whole number", None),
        )
        if made.tokens is not None and made.tokens not in (plan.tokens if plan.kind == "decode" else ()):
            raise item.wrong("tokens", f"is {made.tokens}, which bench.tokens does not have")
    item.end()
    return made
