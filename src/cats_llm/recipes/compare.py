"""Published numbers beside measured ones."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cats_llm.recipes.recipe import Expected, Quantity


@dataclass(frozen=True)
class Comparison:
    """A published number and ours. ``measured`` is None if it was not measured, ``stderr`` if it is unknown."""

    expected: Expected
    measured: float | None
    stderr: float | None = None

    @property
    def difference(self) -> float | None:
        """Measured minus expected; for a range, from its nearer end, and 0 inside."""
        if self.measured is None:
            return None
        value = self.expected.value
        low, high = value if isinstance(value, tuple) else (value, value)
        return self.measured - low if self.measured < low else max(0.0, self.measured - high)


def compare(expected: Sequence[Expected], **results: Any) -> list[Comparison]:
    """Every published number with ours.

    Args:
        expected: of a recipe.
        results: what was measured: ``result`` of `cats eval`, ``bench`` of `cats bench`, ``training``, logs of
            `cats finetune` under ``runs``, or ``thresholds`` by layer.
    """
    ((kind, found),) = results.items()
    if kind == "result":
        return [Comparison(number, *_evaluated(number.of, found)) for number in expected]
    measured: Mapping[str, Callable[[Quantity, Any], float | None]]
    measured = {"bench": _timed, "training": _trained, "thresholds": _threshold}
    return [Comparison(number, measured[kind](number.of, found)) for number in expected]


def _evaluated(of: Quantity, result: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """The value and its standard error."""
    rows = [row for row in result["results"] if (row["variant"], row["task"]) == (of.variant, of.task)]
    unit, _, kind = str(of.metric).rpartition("_")
    if kind == "sparsity" and unit in ("gate", "ffn", "model"):
        return (rows[0]["sparsity"][unit] if rows else None), None
    return next(((row["value"], row["stderr"]) for row in rows if row["metric"] == of.metric), (None, None))


def _timed(of: Quantity, bench: Mapping[str, Any]) -> float | None:
    values = []
    for row in bench["rows"]:
        if row["contestant"] == of.contestant and of.tokens in (None, row["tokens"]):
            value = row[of.measure]
            values.append(float(value["median"] if isinstance(value, dict) else value))
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def _trained(of: Quantity, training: Mapping[str, Any]) -> float | None:
    """Of the run and ReLU's, both measured at the same steps; None where a perplexity is not finite."""
    curves = {
        log["name"]: {entry["step"]: entry["perplexity"] for entry in log["evaluations"]} for log in training["runs"]
    }
    ours, relu = curves.get(of.variant), curves.get("relu")
    if ours is None or relu is None:
        return None
    pairs = [(ours[step], relu[step]) for step in sorted(ours.keys() & relu.keys()) if step > 0]
    if not pairs or any(value is None for pair in pairs for value in pair):
        return None
    if of.measure == "perplexity_over_relu":
        return float(pairs[-1][0] / pairs[-1][1])
    return float(sum(a < b for a, b in pairs) / len(pairs))


def _threshold(of: Quantity, thresholds: Mapping[int, float]) -> float | None:
    return thresholds.get(of.layer) if of.layer is not None else None
