"""Published numbers beside measured ones."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cats_llm.recipes.recipe import Expected

# where the rows of `cats bench` keep what people publish
BENCH_MEASURES: dict[str, dict[str, tuple[str, ...]]] = {
    "mlp": {"ms": ("ms", "median"), "speedup_over_torch": ("speedup_over_torch", "median")},
    "decode": {
        "ms_per_step": ("ms_per_step", "median"),
        "tokens_per_second": ("tokens_per_second",),
        "speedup_over_stock": ("speedup_over_stock", "median"),
        "speedup_over_own_dense": ("speedup_over_own_dense", "median"),
    },
}

TRAINING_MEASURES = ("perplexity_over_relu", "ahead_of_relu")
"""Of a run of fine-tuning beside ReLU's: its last held-out perplexity as a share of ReLU's, and the share of the
measurements after the first step at which its perplexity is the lower one."""


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


def compare(
    expected: Sequence[Expected],
    *,
    result: Mapping[str, Any] | None = None,
    thresholds: Mapping[int, float] | None = None,
    bench: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> list[Comparison]:
    """Every published number with ours.

    Args:
        expected: of a recipe.
        result: of `cats eval`.
        thresholds: by layer.
        bench: of `cats bench`.
        training: logs of `cats finetune`, under ``runs``.
    """
    return [_compare(item, result, thresholds, bench, training) for item in expected]


def _compare(
    item: Expected,
    result: Mapping[str, Any] | None,
    thresholds: Mapping[int, float] | None,
    bench: Mapping[str, Any] | None,
    training: Mapping[str, Any] | None,
) -> Comparison:
    if training is not None:
        return Comparison(item, _trained(item, training))
    if item.layer is not None:
        return Comparison(item, (thresholds or {}).get(item.layer))
    if item.contestant is not None:
        return Comparison(item, _benched(item, bench or {"rows": []}))
    rows = [row for row in (result or {"results": []})["results"] if (row["variant"], row["task"]) == _place(item)]
    unit, _, what = str(item.metric).rpartition("_")
    if what == "sparsity" and unit in ("gate", "ffn", "model"):
        return Comparison(item, rows[0]["sparsity"][unit] if rows else None)
    found = next((row for row in rows if row["metric"] == item.metric), None)
    return Comparison(item, found["value"], found["stderr"]) if found is not None else Comparison(item, None)


def _place(item: Expected) -> tuple[str | None, str | None]:
    return item.variant, item.task


def _benched(item: Expected, bench: Mapping[str, Any]) -> float | None:
    found = []
    for row in bench["rows"]:
        if row["contestant"] == item.contestant and item.tokens in (None, row["tokens"]):
            value: Any = row
            for step in BENCH_MEASURES[bench["benchmark"]][str(item.measure)]:
                value = value[step]
            found.append(float(value))
    return math.exp(sum(math.log(value) for value in found) / len(found)) if found else None


def _trained(item: Expected, training: Mapping[str, Any]) -> float | None:
    """Of the run and ReLU's, both measured at the same steps; None where a perplexity is not finite."""
    curves = {
        log["name"]: {entry["step"]: entry["perplexity"] for entry in log["evaluations"]} for log in training["runs"]
    }
    ours, relu = curves.get(item.variant), curves.get("relu")
    if ours is None or relu is None:
        return None
    pairs = [(ours[step], relu[step]) for step in sorted(ours.keys() & relu.keys()) if step > 0]
    if not pairs or any(value is None for pair in pairs for value in pair):
        return None
    if item.measure == "perplexity_over_relu":
        return float(pairs[-1][0] / pairs[-1][1])
    return float(sum(a < b for a, b in pairs) / len(pairs))
