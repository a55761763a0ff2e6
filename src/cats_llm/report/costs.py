"""What each variant costs: the numbers of an evaluation that a decision needs, and sentences that say them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cats_llm.report.results import DENSE, Difference, EvalResult, EvalRow, EvalTask, EvalVariant
from cats_llm.report.wording import MISSING, SPACE, number, percent, signed, target

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# of a normal distribution: 95 % lie within
_Z95 = 1.959963984540054
_SHARES = ("acc", "exact_match", "em", "f1", "pass@", "top1_agreement")
_NAMES = {
    "acc": "accuracy",
    "acc_norm": "length-normalised accuracy",
    "exact_match": "exact match",
    "kl": "KL divergence from dense, nats",
    "top1_agreement": "top-1 agreement with dense",
}
# what is said first if it was measured
_FIRST = ("acc", "perplexity", "word_perplexity", "byte_perplexity")
_BRACKETS = (
    f"What each setting costs, beside the dense model; in brackets the 95{SPACE}% interval of the change on the same "
    "documents:"
)
# already a distance to the dense model: nothing to compare
DISTANCES = ("kl", "top1_agreement")


@dataclass(frozen=True)
class Measure:
    """A task and one of its metrics.

    Attributes:
        label: for titles, "accuracy, mean of 8 tasks".
        share: values are shares of one, shown in percent.
    """

    task: EvalTask
    metric: str
    share: bool

    @property
    def metric_label(self) -> str:
        """The metric for people."""
        return _NAMES.get(self.metric, self.metric.replace("_", " "))

    @property
    def label(self) -> str:
        """Metric and data for people."""
        return f"{self.metric_label}, {self.task.name}"

    def value(self, value: float | None) -> str:
        """A value of it."""
        return percent(value, 2) if self.share else number(value)

    def error(self, value: float | None) -> str:
        """A standard error of it."""
        if value is None:
            return MISSING
        return f"{100 * value:.2f}{SPACE}points" if self.share else number(value, 2)

    def change(self, value: float | None, unit: bool = True) -> str:
        """A difference of two of its values."""
        if value is None:
            return MISSING
        return signed(value * 100, 2) + f"{SPACE}points" * unit if self.share else signed(value)


@dataclass(frozen=True)
class Cost:
    """A measure of a variant beside the dense model's. ``dense`` is None if that was not measured."""

    measure: Measure
    variant: EvalVariant
    row: EvalRow
    dense: EvalRow | None

    @property
    def distinguishable(self) -> bool:
        """Whether the 95 % interval of the difference leaves out zero."""
        difference = self.row.difference
        return difference is not None and not difference.low <= 0 <= difference.high

    def interval(self) -> str:
        """The 95 % interval of the difference."""
        difference = self.row.difference
        if difference is None:
            return MISSING
        return f"{self.measure.change(difference.low, False)} to {self.measure.change(difference.high, False)}"


def with_mean(result: EvalResult) -> EvalResult:
    """Add the mean accuracy of the tasks that every variant has, unless the file holds one or there are fewer than two.

    Tasks weigh the same. Their errors are independent, so standard errors add in squares.
    """
    if any(task.kind == "mean" for task in result.tasks):
        return result
    measured = {(row.variant, row.task): row for row in result.rows if row.metric == "acc" and row.value is not None}
    tasks = [task for task in result.tasks if all((v.name, task.name) in measured for v in result.variants)]
    if len(tasks) < 2:
        return result
    data = "the mean of " + ", ".join(task.name for task in tasks)
    mean = EvalTask(f"mean of {len(tasks)} tasks", "mean", data, sum(task.documents or 0 for task in tasks) or None)
    rows = [_mean([measured[v.name, task.name] for task in tasks], mean.name) for v in result.variants]
    return replace(result, tasks=[*result.tasks, mean], rows=[*result.rows, *rows])


def _mean(rows: list[EvalRow], task: str) -> EvalRow:
    errors = [row.stderr for row in rows]
    differences = [row.difference for row in rows]
    found: Difference | None = None
    if all(differences):
        known = [d for d in differences if d is not None]
        value = sum(d.value for d in known) / len(known)
        error = _Z95 * math.hypot(*((d.high - d.low) / (2 * _Z95) for d in known)) / len(known)
        found = Difference(value, value - error, value + error, None, "normal interval, tasks independent")
    weights = [row.tokens or 1 for row in rows]
    layers = set.intersection(*(set(row.layer_sparsity) for row in rows))
    return replace(
        rows[0],
        task=task,
        value=sum(row.value or 0.0 for row in rows) / len(rows),
        stderr=None if None in errors else math.hypot(*(e or 0.0 for e in errors)) / len(rows),
        n=sum(row.n for row in rows),
        difference=found,
        gate=_weighted([row.gate for row in rows], weights),
        ffn=_weighted([row.ffn for row in rows], weights),
        model=_weighted([row.model for row in rows], weights),
        layer_sparsity={i: _weighted([row.layer_sparsity[i] for row in rows], weights) or 0.0 for i in sorted(layers)},
        tokens=sum(weights),
    )


def _weighted(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    return sum(v * w for v, w in known) / sum(w for _, w in known) if len(known) == len(values) else None


def measures(result: EvalResult) -> list[Measure]:
    """Everything that was measured, means first, in the order of the file."""
    found = dict.fromkeys((row.task, row.metric) for row in result.rows)
    made = []
    for name, metric in found:
        values = [row.value for row in result.rows if (row.task, row.metric) == (name, metric)]
        share = metric.startswith(_SHARES) and all(value is None or 0 <= value <= 1 for value in values)
        made.append(Measure(result.task(name), metric, share))
    return sorted(made, key=lambda measure: measure.task.kind != "mean")


def main_measures(result: EvalResult) -> list[Measure]:
    """The one or two measures that a decision starts from: accuracy, the mean where there is one, and perplexity."""
    found = measures(result)
    accuracy = [m for m in found if m.metric == "acc"]
    perplexity = [m for name in _FIRST[1:] for m in found if m.metric == name]
    other = [m for m in found if m.metric not in DISTANCES]
    return [*accuracy[:1], *perplexity[:1]] or other[:1] or found[:1]


def costs(result: EvalResult, measure: Measure) -> list[Cost]:
    """Of every variant that was measured, in the order of the file."""
    dense = result.row(DENSE, measure.task.name, measure.metric)
    rows = [(v, result.row(v.name, measure.task.name, measure.metric)) for v in result.variants]
    return [Cost(measure, variant, row, dense) for variant, row in rows if row is not None]


def asked(variant: EvalVariant, row: EvalRow | None = None) -> float:
    """The sparsity that a variant is ordered by: the one asked for, or else measured."""
    if variant.sparsity is not None:
        return variant.sparsity
    return row.gate if row is not None and row.gate is not None else 0.0


def findings(results: Sequence[EvalResult]) -> list[str]:
    """What the evaluations say: the main sentence, then what each variant costs, then what to choose."""
    said: list[str] = []
    first = ""
    for result in results:
        known = [(variant, found) for variant in result.sparse if (found := _measured(result, variant))]
        # half of the neurons is the setting the method is known for
        main = min(known, key=lambda item: (item[0].method != "cats", abs(asked(item[0]) - 0.5)), default=None)
        if main is not None and not first:
            first = _headline(result, *main)
        said += [_line(result, variant, found, len(results) > 1) for variant, found in known]
        said += _advice(result, len(results) > 1)
    if not first:
        return ["No sparse model was evaluated."] if results else []
    return [first, _BRACKETS, *said]


def _measured(result: EvalResult, variant: EvalVariant) -> list[Cost]:
    every = [cost for measure in main_measures(result) for cost in costs(result, measure)]
    return [cost for cost in every if cost.variant == variant and cost.row.value is not None]


def _headline(result: EvalResult, variant: EvalVariant, found: list[Cost]) -> str:
    cost = found[0]
    measure, value, base = cost.measure, cost.row.value, cost.dense.value if cost.dense is not None else None
    of_neurons = variant.sparsity is not None and not cost.row.skips_inputs
    setting = f"At {target(variant.sparsity)} gate sparsity" if of_neurons else f"With {variant.name}"
    name = f"{setting} {result.label}’s {measure.metric_label} ({measure.task.name})"
    if value is None or base is None:
        return f"{name} is {measure.value(value)}; the dense model’s was not measured."
    if measure.value(value) == measure.value(base):
        return f"{name} stays at {measure.value(value)}: {_change(cost)}."
    verb = "falls" if value < base else "rises"
    return f"{name} {verb} from {measure.value(base)} to {measure.value(value)}: {_change(cost)}."


def _line(result: EvalResult, variant: EvalVariant, found: list[Cost], several: bool) -> str:
    name = f"{result.label}, {variant.title}" if several else variant.title
    effects = [f"{c.measure.metric_label} {c.measure.value(c.row.value)}, {_change(c, brief=True)}" for c in found]
    return f"{name}: {_skipped(found[0].row)}{'; '.join(effects)}."


def _change(cost: Cost, brief: bool = False) -> str:
    """The change to dense with its interval, relative where the measure is no share."""
    measure, value, base = cost.measure, cost.row.value, cost.dense.value if cost.dense is not None else None
    difference = cost.row.difference
    if value is None or base is None:
        return "not compared with dense"

    def text(change: float, unit: bool = True) -> str:
        relative = not measure.share and base > 0
        return signed(100 * change / base, 1) + f"{SPACE}%" * unit if relative else measure.change(change, unit)

    if difference is None:
        return f"{text(value - base)} (not tested)"
    if difference.low == difference.high:
        # an interval without width claims more than these documents can know
        return f"{text(value - base)} (no score changed on these {cost.row.n} documents)"
    told = "" if cost.distinguishable else ", so it cannot be told from no change"
    name = "" if brief else f"95{SPACE}% interval "
    return f"{text(value - base)} ({name}{text(difference.low, False)} to {text(difference.high)}{told})"


def _skipped(row: EvalRow) -> str:
    if row.model is None:
        return ""
    if row.gate is None:
        return f"{percent(row.model)} of all linear weights skipped; "
    return f"{percent(row.gate)} of the MLP neurons, {percent(row.model)} of all linear weights skipped; "


def _lowest(cost: Cost) -> float:
    """What a share may have lost: the low end of its interval, or what no document showed yet (the rule of three)."""
    difference = cost.row.difference
    assert difference is not None
    return min(difference.low, difference.value - 3 / max(cost.row.n, 1))


def _advice(result: EvalResult, several: bool) -> list[str]:
    """The highest sparsity that surely keeps the accuracy within a point of the dense model's."""
    measure = next((m for m in main_measures(result) if m.metric == "acc"), None)
    if measure is None:
        return []
    tested = [c for c in costs(result, measure) if c.variant.method == "cats" and c.row.difference is not None]
    good = [c for c in tested if _lowest(c) >= -0.01]
    of = f" of {result.label}" if several else ""
    if not tested:
        return []
    if not good:
        return [f"No sparsity tested{of} surely keeps {measure.metric_label} within one point of dense on this data."]
    best = max(good, key=lambda c: asked(c.variant, c.row))
    return [
        f"The highest sparsity tested{of} that surely (at 95 %) loses less than one point of {measure.metric_label} on "
        f"this data is {target(asked(best.variant, best.row))}."
    ]


def table_costs(result: EvalResult) -> Iterable[tuple[Measure, list[Cost]]]:
    """All measures with their rows, for tables."""
    return [(measure, costs(result, measure)) for measure in measures(result)]
