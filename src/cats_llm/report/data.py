"""What a report is made of: plain numbers and text, which any part of the package can fill in and JSON can hold.

A measurement that is not there is None. NaN and infinity are allowed, shown as "–", and become null in JSON, which
has no word for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

_T = TypeVar("_T", "LayerDistribution", "Variant", "Continuation", "Report")


@dataclass(frozen=True)
class LayerDistribution:
    """How many activations |act(gate)| of one layer have which magnitude, over the calibration tokens.

    Attributes:
        layer: index of the layer.
        edges: ascending magnitudes; group i holds those from ``edges[i]`` up to ``edges[i + 1]``, the last one those
            up to ``maximum``. A group that begins at 0 holds zeros, or what is too small to tell from them.
        counts: how many activations each group holds.
        maximum: the largest magnitude.
    """

    layer: int
    edges: list[float]
    counts: list[int]
    maximum: float

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.edges, self.edges[1:], strict=False))
        inside = not self.edges or (self.edges[0] >= 0 and self.edges[-1] <= self.maximum < math.inf)
        if len(self.edges) != len(self.counts) or not ascending or not inside or any(n < 0 for n in self.counts):
            raise ValueError(
                f"the distribution of layer {self.layer} needs ascending edges from 0 to its maximum and one count, "
                "0 or more, for each."
            )

    @property
    def total(self) -> int:
        """How many activations there are."""
        return sum(self.counts)

    def to_json(self) -> dict[str, Any]:
        """As plain lists, dicts, numbers and text."""
        return _to_json(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LayerDistribution:
        """The inverse of `to_json`."""
        return _from_json(cls, values)


@dataclass(frozen=True)
class Variant:
    """One model that was evaluated: the dense one, or one with thresholds.

    Attributes:
        name: what tables and legends call it.
        target_sparsity: the gate sparsity asked for, 0 to 1; None for the dense model.
        thresholds: by layer index.
        calibration_sparsity: gate sparsity achieved on the calibration tokens, by layer index.
        measured_sparsity: gate sparsity achieved on the evaluation text, by layer index.
        gate_sparsity, ffn_sparsity, model_sparsity: the three meanings, measured on the evaluation text.
        perplexity: on the evaluation text, a token.
        kl: mean KL divergence of the next-token distribution from the dense model's, in nats.
        top1_agreement: share of tokens where it and the dense model find the same next token most likely.
    """

    name: str
    target_sparsity: float | None
    thresholds: dict[int, float]
    calibration_sparsity: dict[int, float]
    measured_sparsity: dict[int, float]
    gate_sparsity: float | None
    ffn_sparsity: float | None
    model_sparsity: float | None
    perplexity: float | None
    kl: float | None
    top1_agreement: float | None

    @property
    def is_dense(self) -> bool:
        """Whether this is the model as it was before."""
        return self.target_sparsity is None and not self.thresholds

    def to_json(self) -> dict[str, Any]:
        """As plain lists, dicts, numbers and text."""
        return _to_json(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Variant:
        """The inverse of `to_json`."""
        by_layer = {
            name: {int(layer): math.nan if value is None else value for layer, value in values[name].items()}
            for name in ("thresholds", "calibration_sparsity", "measured_sparsity")
            if name in values
        }
        return _from_json(cls, {**values, **by_layer})


@dataclass(frozen=True)
class Continuation:
    """How the variants continue a prompt.

    Attributes:
        prompt: the beginning that all were given.
        texts: what each wrote after it, by the variant's name.
    """

    prompt: str
    texts: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """As plain lists, dicts, numbers and text."""
        return _to_json(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Continuation:
        """The inverse of `to_json`."""
        return _from_json(cls, values)


@dataclass(frozen=True)
class Report:
    """All that a report shows.

    Attributes:
        title: its heading.
        model, calibration, evaluation: facts, label to value.
        distributions: of the calibration activations, one a layer.
        variants: the dense model first.
        continuations: one a prompt.
        command: what to type to get this report again.
        versions: of the software, by name.
        created: date and time, as text.
    """

    title: str
    model: dict[str, str] = field(default_factory=dict)
    calibration: dict[str, str] = field(default_factory=dict)
    evaluation: dict[str, str] = field(default_factory=dict)
    distributions: list[LayerDistribution] = field(default_factory=list)
    variants: list[Variant] = field(default_factory=list)
    continuations: list[Continuation] = field(default_factory=list)
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names):
            raise ValueError(f"the variants of a report need different names, not {', '.join(names)}.")

    @property
    def dense(self) -> Variant | None:
        """What the others are compared with, if it was evaluated."""
        return self.variants[0] if self.variants and self.variants[0].is_dense else None

    @property
    def sparse(self) -> list[Variant]:
        """All variants but the one that the others are compared with."""
        return [variant for variant in self.variants if variant is not self.dense]

    def to_json(self) -> dict[str, Any]:
        """As plain lists, dicts, numbers and text."""
        return _to_json(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Report:
        """The inverse of `to_json`."""
        parts: dict[str, Callable[[Mapping[str, Any]], Any]] = {
            "distributions": LayerDistribution.from_json,
            "variants": Variant.from_json,
            "continuations": Continuation.from_json,
        }
        built = {name: [make(v) for v in values[name]] for name, make in parts.items() if name in values}
        return _from_json(cls, {**values, **built})


def _to_json(value: LayerDistribution | Variant | Continuation | Report) -> dict[str, Any]:
    return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}


def _plain(value: Any) -> Any:
    if isinstance(value, LayerDistribution | Variant | Continuation):
        return value.to_json()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _from_json(cls: type[_T], values: Mapping[str, Any]) -> _T:
    try:
        return cls(**values)
    except TypeError as error:  # a key that is missing or unknown
        raise ValueError(f"this is no {cls.__name__} of a report: {error}.") from error
