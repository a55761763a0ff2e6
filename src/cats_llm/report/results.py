"""Result files of `cats eval` as typed values. Reading is strict in what the report needs and blind to the rest."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cats_llm.checkpoint.token_policy import TokenPolicy
from cats_llm.errors import CatsError
from cats_llm.formats import EVALUATION, EVALUATION_VERSION
from cats_llm.report.wording import short_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

DENSE = "dense"


@dataclass(frozen=True)
class EvalVariant:
    """One row of an evaluation: a method with its settings.

    Attributes:
        name: unique in its file.
        method: "dense", "cats", "relu" ...
        sparsity: the gate sparsity asked for; None where the method takes none.
        coverage: which tokens are sparse, if not all, in words.
        thresholds: by layer index.
        calibration_sparsity: gate sparsity of the thresholds on the calibration tokens, by layer.
    """

    name: str
    method: str
    sparsity: float | None
    coverage: str = ""
    thresholds: dict[int, float] = field(default_factory=dict)
    calibration_sparsity: dict[int, float] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The name, and which tokens are sparse if it does not say so."""
        return f"{self.name} ({self.coverage})" if self.coverage and self.coverage not in self.name else self.name


@dataclass(frozen=True)
class EvalTask:
    """What was measured on which data. ``kind`` is "lm_eval", "perplexity" or "mean"."""

    name: str
    kind: str
    data: str
    documents: int | None


@dataclass(frozen=True)
class Difference:
    """A variant's value minus the dense model's on the same documents, with a 95 % interval from low to high."""

    value: float
    low: float
    high: float
    p: float | None
    test: str


@dataclass(frozen=True)
class EvalRow:
    """One number. ``gate``, ``ffn`` and ``model`` are the three sparsities on this task's data.

    Methods that skip inputs, not neurons, have no ``gate``.
    """

    variant: str
    task: str
    metric: str
    higher_is_better: bool
    value: float | None
    stderr: float | None
    n: int
    difference: Difference | None
    gate: float | None
    ffn: float | None
    model: float | None
    layer_sparsity: dict[int, float] = field(default_factory=dict)
    tokens: int | None = None

    @property
    def skips_inputs(self) -> bool:
        """What was skipped is known, and is no share of neurons."""
        return self.gate is None and self.model is not None


@dataclass(frozen=True)
class EvalResult:
    """A result file, or several of the same model.

    Attributes:
        label: what figures and tables call the model.
        commands: what made the result.
    """

    label: str
    model: str
    dtype: str
    device: str
    versions: dict[str, str]
    created: str
    commands: list[str]
    variants: list[EvalVariant]
    tasks: list[EvalTask]
    rows: list[EvalRow]

    def task(self, name: str) -> EvalTask:
        """The task of that name, which must exist."""
        return next(task for task in self.tasks if task.name == name)

    def variant(self, name: str) -> EvalVariant:
        """The variant of that name, which must exist."""
        return next(variant for variant in self.variants if variant.name == name)

    def row(self, variant: str, task: str, metric: str) -> EvalRow | None:
        """The number of a variant, if it was measured."""
        return next((r for r in self.rows if (r.variant, r.task, r.metric) == (variant, task, metric)), None)

    @property
    def sparse(self) -> list[EvalVariant]:
        """All variants but the dense one."""
        return [variant for variant in self.variants if variant.name != DENSE]


def is_eval(values: Any) -> bool:
    """Whether this JSON says of itself that it is a result of `cats eval`."""
    return isinstance(values, dict) and values.get("format") == EVALUATION


def read_eval(values: Mapping[str, Any], path: Path) -> EvalResult:
    """The content of a result file.

    Args:
        values: its JSON.
        path: for errors.

    Raises:
        CatsError: the file is of a newer version or damaged.
    """
    top = _Fields(values, path, "")
    version = top.integer("version")
    if version > EVALUATION_VERSION:
        raise CatsError(f"{path} is an evaluation result of version {version}; upgrade cats-llm to read it.")
    variants = [_variant(item) for item in top.items("variants")]
    tasks = [_task(item) for item in top.items("tasks")]
    rows = [_row(item) for item in top.items("results")]
    for what, names in (("variants", [v.name for v in variants]), ("tasks", [t.name for t in tasks])):
        if len(set(names)) < len(names):
            raise top.wrong(what, "names that differ")
    for i, row in enumerate(rows):
        if row.variant not in {v.name for v in variants} or row.task not in {t.name for t in tasks}:
            raise top.wrong(f"results[{i}]", "a variant and a task that the file lists")
    keys = [(row.variant, row.task, row.metric) for row in rows]
    if len(set(keys)) < len(keys):
        raise top.wrong("results", "one row a variant, task and metric")
    model = top.text("model")
    return EvalResult(
        label=short_name(model),
        model=model,
        dtype=top.text("dtype", ""),
        device=top.text("device", ""),
        versions={str(k): str(v) for k, v in top.mapping("versions").items()},
        created=top.text("created", ""),
        commands=[command] if (command := top.text("command", "")) else [],
        variants=variants,
        tasks=tasks,
        rows=rows,
    )


def merge(results: Sequence[tuple[Path, EvalResult]]) -> list[EvalResult]:
    """Join files of one model that complete each other; files that contradict each other stay apart, with other labels.

    Two files belong together if model and dtype are the same and no variant, task or number has two definitions.
    """
    merged: list[tuple[Path, EvalResult]] = []
    for path, result in results:
        for i, (first, other) in enumerate(merged):
            if joined := _join(other, result):
                merged[i] = (first, joined)
                break
        else:
            merged.append((path, result))
    labels = [result.label for _, result in merged]
    for i, (path, result) in enumerate(merged):
        if labels.count(result.label) > 1:
            merged[i] = (path, replace(result, label=f"{result.label} ({path.stem})"))
    labels = [result.label for _, result in merged]
    # files of the same name in two folders
    return [
        replace(result, label=f"{result.label} {labels[:i].count(result.label) + 1}")
        if labels.count(result.label) > 1
        else result
        for i, (_, result) in enumerate(merged)
    ]


def _join(a: EvalResult, b: EvalResult) -> EvalResult | None:
    if (a.model, a.dtype) != (b.model, b.dtype):
        return None
    variants = {v.name: v for v in a.variants}
    tasks = {t.name: t for t in a.tasks}
    rows = {(r.variant, r.task, r.metric): r for r in a.rows}
    if any(variants.get(v.name, v) != v for v in b.variants) or any(tasks.get(t.name, t) != t for t in b.tasks):
        return None
    if any(rows.get((r.variant, r.task, r.metric), r) != r for r in b.rows):
        return None
    return replace(
        a,
        device=a.device if a.device == b.device else f"{a.device}, {b.device}",
        versions={**b.versions, **a.versions},
        created=max(a.created, b.created),
        commands=list(dict.fromkeys([*a.commands, *b.commands])),
        variants=[*a.variants, *(v for v in b.variants if v.name not in variants)],
        tasks=[*a.tasks, *(t for t in b.tasks if t.name not in tasks)],
        rows=[*a.rows, *(r for r in b.rows if (r.variant, r.task, r.metric) not in rows)],
    )


def _variant(item: _Fields) -> EvalVariant:
    return EvalVariant(
        name=item.text("name"),
        method=item.text("method"),
        sparsity=item.number("sparsity"),
        coverage=_coverage(item.nested("coverage")),
        thresholds=item.layers("thresholds"),
        calibration_sparsity=item.layers("layer_sparsity"),
    )


def _coverage(item: _Fields) -> str:
    try:
        coverage = TokenPolicy(**item.values)
    except (CatsError, TypeError) as error:
        raise CatsError(f"{item.path} is a damaged evaluation result: {item.where.rstrip('.')} is wrong.") from error
    return "" if coverage.all_tokens else str(coverage)


def _task(item: _Fields) -> EvalTask:
    documents = item.number("documents")
    return EvalTask(
        item.text("name"), item.text("kind"), item.text("data", ""), None if documents is None else int(documents)
    )


def _row(item: _Fields) -> EvalRow:
    sparsity = item.nested("sparsity")
    tokens = item.number("tokens")
    return EvalRow(
        variant=item.text("variant"),
        task=item.text("task"),
        metric=item.text("metric"),
        higher_is_better=item.flag("higher_is_better"),
        value=item.number("value", required=True),
        stderr=item.number("stderr"),
        n=item.integer("n"),
        difference=_difference(item.nested("difference")),
        gate=sparsity.number("gate"),
        ffn=sparsity.number("ffn"),
        model=sparsity.number("model"),
        layer_sparsity=item.layers("layer_sparsity"),
        tokens=None if tokens is None else int(tokens),
    )


def _difference(item: _Fields) -> Difference | None:
    value, low, high = (item.number(name) for name in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return None
    if not low <= high:
        raise item.wrong("low", "a number that is not above high")
    return Difference(value, low, high, item.number("p"), item.text("test", ""))


class _Fields:
    """A JSON object whose members are asked for by name and type; a wrong one is an error that names it."""

    def __init__(self, values: Mapping[str, Any], path: Path, where: str) -> None:
        self.values = values
        self.path = path
        self.where = where

    def wrong(self, name: str, expected: str) -> CatsError:
        found = json.dumps(self.values.get(name))[:60] if name in self.values else "missing"
        is_what = f"is {found}" if name in self.values or "[" not in name else "is wrong"
        return CatsError(
            f"{self.path} is a damaged evaluation result: {self.where}{name} {is_what} and should be {expected}; run "
            "cats eval again."
        )

    def text(self, name: str, default: str | None = None) -> str:
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, "text")
        return value

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def number(self, name: str, required: bool = False) -> float | None:
        value = self.values.get(name)
        if value is None and not (required and name not in self.values):
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.wrong(name, "a number or null")
        return float(value)

    def integer(self, name: str) -> int:
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.wrong(name, "a whole number")
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self.values.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return value

    def nested(self, name: str) -> _Fields:
        return _Fields(self.mapping(name), self.path, f"{self.where}{name}.")

    def items(self, name: str) -> list[_Fields]:
        value = self.values.get(name)
        if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
            raise self.wrong(name, "a list of objects")
        return [_Fields(item, self.path, f"{self.where}{name}[{i}].") for i, item in enumerate(value)]

    def layers(self, name: str) -> dict[int, float]:
        inner = self.nested(name)
        found = {}
        for key in inner.values:
            value = inner.number(key)
            if not key.isdecimal() or value is None:
                raise inner.wrong(key, "a number, by the index of a layer")
            found[int(key)] = value
        return dict(sorted(found.items()))
