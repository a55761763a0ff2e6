"""Result files of `cats eval` as typed values. Reading is strict in what the report needs and blind to the rest."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from typing import Any

from cats_llm.checkpoint.token_policy import TokenPolicy
from cats_llm.errors import CatsError
from cats_llm.formats import EVALUATION, EVALUATION_VERSION
from cats_llm.report.labels import short_name
from cats_llm.report.typed_json import WrongValueError, from_json

DENSE = "dense"
_FACTS = ("model", "architecture", "dtype", "device", "created")


@dataclass(frozen=True)
class EvalVariant:
    """One row of an evaluation: a method with its settings.

    Attributes:
        name: unique in its file.
        method: "dense", "cats", "relu" ...
        sparsity: the gate sparsity asked for; None where the method takes none.
        coverage: which tokens are sparse.
        thresholds: by layer index.
        layer_sparsity: gate sparsity of the thresholds on the calibration tokens, by layer.
    """

    name: str
    method: str
    sparsity: float | None = None
    coverage: TokenPolicy = field(default_factory=TokenPolicy)
    thresholds: dict[int, float] = field(default_factory=dict)
    layer_sparsity: dict[int, float] = field(default_factory=dict)

    @property
    def tokens(self) -> str:
        """Which tokens are sparse, if not all, in words."""
        return "" if self.coverage.all_tokens else str(self.coverage)

    @property
    def title(self) -> str:
        """The name, and which tokens are sparse if it does not say so."""
        return f"{self.name} ({self.tokens})" if self.tokens and self.tokens not in self.name else self.name


@dataclass(frozen=True)
class EvalTask:
    """What was measured on which data.

    Attributes:
        kind: "lm_eval", "perplexity" or "mean".
        documents: how many; windows, for perplexity.
        tokens: how many were predicted, for perplexity.
    """

    name: str
    kind: str
    data: str = ""
    documents: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Difference:
    """A variant's value minus the dense model's on the same documents, with a 95 % interval from low to high."""

    value: float
    low: float
    high: float
    p: float | None = None


@dataclass(frozen=True)
class Skipped:
    """The shares that were skipped: of neurons (None for methods that skip inputs), MLP weights, all linear weights."""

    gate: float | None = None
    ffn: float | None = None
    model: float | None = None


@dataclass(frozen=True)
class EvalRow:
    """One number, and what was skipped on this task's data; ``tokens`` were computed."""

    variant: str
    task: str
    metric: str
    higher_is_better: bool
    value: float | None
    n: int
    stderr: float | None = None
    difference: Difference | None = None
    sparsity: Skipped = field(default_factory=Skipped)
    layer_sparsity: dict[int, float] = field(default_factory=dict)
    tokens: int | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What is unique in a result."""
        return self.variant, self.task, self.metric

    @property
    def skips_inputs(self) -> bool:
        """What was skipped is known, and is no share of neurons."""
        return self.sparsity.gate is None and self.sparsity.model is not None


@dataclass(frozen=True)
class EvalResult:
    """A result file, or several of the same model.

    Attributes:
        label: what figures and tables call the model.
        facts: what ran, label to value: model, dtype, device ...
        commands: what made the result.
        continuations: by prompt and variant's name, what the variant wrote after the prompt.
    """

    label: str
    model: str
    facts: dict[str, str]
    versions: dict[str, str]
    commands: list[str]
    variants: list[EvalVariant]
    tasks: list[EvalTask]
    rows: list[EvalRow]
    continuations: dict[str, dict[str, str]] = field(default_factory=dict)

    def task(self, name: str) -> EvalTask:
        """The task of that name, which must exist."""
        return next(task for task in self.tasks if task.name == name)

    def variant(self, name: str) -> EvalVariant:
        """The variant of that name, which must exist."""
        return next(variant for variant in self.variants if variant.name == name)

    def row(self, variant: str, task: str, metric: str) -> EvalRow | None:
        """The number of a variant, if it was measured."""
        return next((row for row in self.rows if row.key == (variant, task, metric)), None)

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

    def member(kind: Any, name: str, default: Any = MISSING) -> Any:
        value = values.get(name, MISSING)
        return default if default is not MISSING and value in (None, MISSING) else from_json(kind, value, name)

    try:
        if member(int, "version") > EVALUATION_VERSION:
            raise CatsError(
                f"{path} is an evaluation result of version {values['version']}; upgrade cats-llm to read it."
            )
        model, command = member(str, "model"), member(str, "command", "")
        result = EvalResult(
            label=short_name(model),
            model=model,
            facts={name: text for name in _FACTS if (text := member(str, name, ""))},
            versions=member(dict[str, str], "versions", {}),
            commands=[command] if command else [],
            variants=member(list[EvalVariant], "variants"),
            tasks=member(list[EvalTask], "tasks"),
            rows=member(list[EvalRow], "results"),
            continuations=member(dict[str, dict[str, str]], "continuations", {}),
        )
        _check(result, values)
    except WrongValueError as error:
        raise CatsError(f"{path} is a damaged evaluation result: {error}; run cats eval again.") from error
    return result


def _check(result: EvalResult, values: Mapping[str, Any]) -> None:
    """What belongs together does.

    Raises:
        WrongValueError: it does not.
    """
    names = {"variants": [v.name for v in result.variants], "tasks": [t.name for t in result.tasks]}
    for member, of_member in names.items():
        if len(set(of_member)) < len(of_member):
            raise WrongValueError(member, values[member], "names that differ")
    for i, row in enumerate(result.rows):
        if row.variant not in names["variants"] or row.task not in names["tasks"]:
            raise WrongValueError(f"results[{i}]", values["results"][i], "of a variant and task that the file lists")
        if row.difference is not None and not row.difference.low <= row.difference.high:
            raise WrongValueError(f"results[{i}].difference.low", row.difference.low, "a number not above high")
    if len({row.key for row in result.rows}) < len(result.rows):
        raise WrongValueError("results", values["results"], "one row a variant, task and metric")


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
    distinct = _distinguish([result for _, result in merged], [f"({path.stem})" for path, _ in merged])
    # files of the same name in two folders
    return _distinguish(distinct, [str(i + 1) for i in range(len(merged))])


def _distinguish(results: list[EvalResult], marks: list[str]) -> list[EvalResult]:
    """Add the marks to labels that are not unique."""
    labels = [result.label for result in results]
    return [
        replace(result, label=f"{result.label} {mark}") if labels.count(result.label) > 1 else result
        for result, mark in zip(results, marks, strict=True)
    ]


def _join(a: EvalResult, b: EvalResult) -> EvalResult | None:
    """Both in one, or None if they are of different models or contradict each other."""
    same_model = a.model == b.model and a.facts.get("dtype") == b.facts.get("dtype")
    variants = {v.name: v for v in a.variants} | {v.name: v for v in b.variants}
    tasks = {t.name: t for t in a.tasks} | {t.name: t for t in b.tasks}
    rows = {row.key: row for row in [*a.rows, *b.rows]}
    agree = (
        all(variants[v.name] == v for v in a.variants)
        and all(tasks[t.name] == t for t in a.tasks)
        and all(rows[row.key] == row for row in a.rows)
    )
    if not (same_model and agree):
        return None
    facts = {name: ", ".join(dict.fromkeys(f[name] for f in (a.facts, b.facts) if name in f)) for name in _FACTS}
    return replace(
        a,
        facts={name: text for name, text in facts.items() if text},
        versions={**b.versions, **a.versions},
        commands=list(dict.fromkeys([*a.commands, *b.commands])),
        variants=list(variants.values()),
        tasks=list(tasks.values()),
        rows=list(rows.values()),
        continuations={
            prompt: a.continuations.get(prompt, {}) | b.continuations.get(prompt, {})
            for prompt in [*a.continuations, *b.continuations]
        },
    )
