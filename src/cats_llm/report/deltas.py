"""What each variant of an evaluation loses or gains beside the dense model, and sentences that say it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cats_llm.number_format import MISSING, Z95, number, percent, signed, target
from cats_llm.report.results import DENSE, Difference, EvalResult, EvalRow, EvalTask, EvalVariant, Skipped

_SHARES = ("acc", "exact_match", "em", "f1", "pass@", "top1_agreement")
_NAMES = {
    "acc": "accuracy",
    "acc_norm": "length-normalised accuracy",
    "exact_match": "exact match",
    "kl": "KL divergence from dense, nats",
    "top1_agreement": "top-1 agreement with dense",
}
_PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity")


@dataclass(frozen=True)
class Measure:
    """A task and one of its metrics.

    Attributes:
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
        """Metric and data for people, as "accuracy, mean of 8 tasks"."""
        return f"{self.metric_label}, {self.task.name}"

    @property
    def is_distance(self) -> bool:
        """Whether it is a distance to the dense model already: there is nothing to compare."""
        return self.metric in ("kl", "top1_agreement")

    def value(self, value: float | None) -> str:
        """A value of it."""
        return percent(value) if self.share else number(value)

    def error(self, value: float | None) -> str:
        """A standard error of it."""
        if value is None:
            return MISSING
        return f"{100 * value:.2f} points" if self.share else number(value, 2)

    def change(self, value: float, unit: bool = True) -> str:
        """A difference of two of its values."""
        return signed(value * 100, 2) + " points" * unit if self.share else signed(value)


@dataclass(frozen=True)
class Delta:
    """A measure of a variant beside the dense model's value, which is None if that was not measured."""

    measure: Measure
    variant: EvalVariant
    row: EvalRow
    dense: float | None

    @property
    def distinguishable(self) -> bool:
        """Whether the 95 % interval of the difference leaves out zero."""
        difference = self.row.difference
        return difference is not None and not difference.low <= 0 <= difference.high

    def change(self) -> str:
        """The change to dense; for what is no share, in percent of the dense value too."""
        value, dense = self.row.value, self.dense
        if self.variant.name == DENSE or self.measure.is_distance or value is None or dense is None:
            return MISSING
        text = self.measure.change(value - dense)
        return text if self.measure.share or dense <= 0 else f"{text} ({signed(100 * (value / dense - 1), 1)} %)"

    def interval(self) -> str:
        """The 95 % interval of the change."""
        difference = self.row.difference
        if difference is None:
            return MISSING
        return f"{self.measure.change(difference.low, False)} to {self.measure.change(difference.high, False)}"

    def probability(self) -> str:
        """The p of the paired test."""
        p = self.row.difference.p if self.row.difference is not None else None
        if p is None:
            return MISSING
        return "< 0.001" if p < 0.001 else f"{p:.3f}"


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
    count = len(rows)
    errors = [row.stderr for row in rows if row.stderr is not None]
    differences = [row.difference for row in rows if row.difference is not None]
    difference = None
    if len(differences) == count:
        value = sum(d.value for d in differences) / count
        half = Z95 * math.hypot(*((d.high - d.low) / (2 * Z95) for d in differences)) / count
        difference = Difference(value, value - half, value + half)
    weights = [row.tokens or 1 for row in rows]
    skipped = [vars(row.sparsity).values() for row in rows]
    layers = set.intersection(*(set(row.layer_sparsity) for row in rows))
    return replace(
        rows[0],
        task=task,
        value=sum(row.value or 0.0 for row in rows) / count,
        stderr=math.hypot(*errors) / count if len(errors) == count else None,
        n=sum(row.n for row in rows),
        difference=difference,
        sparsity=Skipped(*(_weighted(shares, weights) for shares in zip(*skipped, strict=True))),
        layer_sparsity={i: _weighted([row.layer_sparsity[i] for row in rows], weights) or 0.0 for i in sorted(layers)},
        tokens=sum(weights),
    )


def _weighted(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    products = [value * weight for value, weight in zip(values, weights, strict=True) if value is not None]
    return sum(products) / sum(weights) if len(products) == len(values) else None


def measures(result: EvalResult) -> list[Measure]:
    """Everything that was measured, means first, in the order of the file."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in result.rows:
        values.setdefault((row.task, row.metric), []).extend([] if row.value is None else [row.value])
    every = [
        Measure(result.task(task), metric, metric.startswith(_SHARES) and all(0 <= v <= 1 for v in numbers))
        for (task, metric), numbers in values.items()
    ]
    return sorted(every, key=lambda measure: measure.task.kind != "mean")


def main_measures(result: EvalResult) -> list[Measure]:
    """What a decision starts from: accuracy, the mean where there is one, and perplexity.

    Without accuracies the distances to the dense model stand beside perplexity.
    """
    every = measures(result)
    accuracy = [m for m in every if m.metric == "acc"][:1]
    perplexity = [m for metric in _PERPLEXITIES for m in every if m.metric == metric][:1]
    distances = [m for m in every if m.is_distance and perplexity and m.task == perplexity[0].task]
    other = [m for m in every if not m.is_distance]
    return [*accuracy, *perplexity, *([] if accuracy else distances)] or other[:1] or every[:1]


def deltas(result: EvalResult, measure: Measure) -> list[Delta]:
    """Of every variant that was measured, in the order of the file."""
    dense = result.row(DENSE, measure.task.name, measure.metric)
    rows = [(v, result.row(v.name, measure.task.name, measure.metric)) for v in result.variants]
    base = dense.value if dense is not None else None
    return [Delta(measure, variant, row, base) for variant, row in rows if row is not None]


def findings(results: Sequence[EvalResult]) -> list[str]:
    """What the evaluations say: the main sentence, then what each variant costs, then what to choose."""
    sentences: list[str] = []
    headline = ""
    for result in results:
        by_variant: dict[str, list[Delta]] = {variant.name: [] for variant in result.sparse}
        for delta in (d for measure in main_measures(result) for d in deltas(result, measure)):
            if delta.row.value is not None and delta.variant.name != DENSE:
                by_variant[delta.variant.name].append(delta)
        measured = [known for known in by_variant.values() if known]
        if measured and not headline:
            # half of the neurons is the setting the method is known for
            main = min(measured, key=lambda d: (d[0].variant.method != "cats", abs(_sparsity(d[0].variant) - 0.5)))
            headline = _headline(result, main[0])
        of = f"{result.label}, " if len(results) > 1 else ""
        sentences += [of + _line(known) for known in measured]
        sentences += _advice(result, f" of {result.label}" if len(results) > 1 else "")
    if not headline:
        return ["No sparse model was evaluated."] if results else []
    brackets = "in brackets the 95 % interval of the change on the same documents:"
    return [headline, f"What each setting costs, beside the dense model; {brackets}", *sentences]


def _sparsity(variant: EvalVariant, row: EvalRow | None = None) -> float:
    """What variants are ordered by: the sparsity asked for, or else measured."""
    if variant.sparsity is not None:
        return variant.sparsity
    return row.sparsity.gate if row is not None and row.sparsity.gate is not None else 0.0


def _headline(result: EvalResult, delta: Delta) -> str:
    measure, variant, value, dense = delta.measure, delta.variant, delta.row.value, delta.dense
    of_neurons = variant.sparsity is not None and not delta.row.skips_inputs
    setting = f"At {target(variant.sparsity)} gate sparsity" if of_neurons else f"With {variant.name}"
    name = f"{setting} {result.label}’s {measure.metric_label} ({measure.task.name})"
    if value is None or dense is None:
        return f"{name} is {measure.value(value)}; the dense model’s was not measured."
    if measure.value(value) == measure.value(dense):
        return f"{name} stays at {measure.value(value)}: {_change(delta)}."
    verb = "falls" if value < dense else "rises"
    return f"{name} {verb} from {measure.value(dense)} to {measure.value(value)}: {_change(delta)}."


def _line(known: list[Delta]) -> str:
    """All main measures of a variant."""
    row, effects = known[0].row, []
    for delta in known:
        name, _, unit = delta.measure.metric_label.partition(", ")
        effect = f"{name} {delta.measure.value(delta.row.value)} {unit}".rstrip()
        effects.append(effect if delta.measure.is_distance else f"{effect}, {_change(delta, brief=True)}")
    skipped = "" if row.sparsity.model is None else f"{percent(row.sparsity.model, 1)} of all linear weights skipped; "
    if skipped and row.sparsity.gate is not None:
        skipped = f"{percent(row.sparsity.gate, 1)} of the MLP neurons, {skipped}"
    return f"{known[0].variant.title}: {skipped}{'; '.join(effects)}."


def _change(delta: Delta, brief: bool = False) -> str:
    """The change to dense with its interval, relative where the measure is no share."""
    measure, value, dense, difference = delta.measure, delta.row.value, delta.dense, delta.row.difference
    if value is None or dense is None:
        return "not compared with dense"
    relative = not measure.share and dense > 0

    def text(change: float, unit: bool = True) -> str:
        return signed(100 * change / dense, 1) + " %" * unit if relative else measure.change(change, unit)

    if difference is None:
        return f"{text(value - dense)} (not tested)"
    if difference.low == difference.high:
        # an interval without width claims more than these documents can know
        return f"{text(value - dense)} (no score changed on these {delta.row.n} documents)"
    doubt = "" if delta.distinguishable else ", so it cannot be told from no change"
    name = "" if brief else "95 % interval "
    return f"{text(value - dense)} ({name}{text(difference.low, False)} to {text(difference.high)}{doubt})"


def _advice(result: EvalResult, of: str) -> list[str]:
    """The highest sparsity that surely keeps the accuracy within a point of the dense model's."""
    measure = next((m for m in main_measures(result) if m.metric == "acc"), None)
    if measure is None:
        return []
    tested = [
        (delta, delta.row.difference)
        for delta in deltas(result, measure)
        if delta.variant.method == "cats" and delta.row.difference is not None
    ]
    if not tested:
        return []
    # besides the interval, what no document showed yet may still happen (the rule of three)
    good = [delta for delta, d in tested if min(d.low, d.value - 3 / max(delta.row.n, 1)) >= -0.01]
    if not good:
        return [f"No sparsity tested{of} surely keeps {measure.metric_label} within one point of dense on this data."]
    best = max(_sparsity(delta.variant, delta.row) for delta in good)
    return [
        f"The highest sparsity tested{of} that surely (at 95 %) loses less than one point of {measure.metric_label} on "
        f"this data is {target(best)}."
    ]
