"""Any mix of result files, and the figures that can be drawn from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from cats_llm.report.costs import with_mean
from cats_llm.report.data import LayerDistribution, Report, Variant
from cats_llm.report.results import EvalResult, merge
from cats_llm.report.wording import short_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from matplotlib.figure import Figure

    from cats_llm.report.bench import Bench
    from cats_llm.report.curves import Panel
    from cats_llm.report.training import TrainingRun


@dataclass(frozen=True)
class ProfileData:
    """A calibration profile as plain data.

    Attributes:
        label: what titles call the model.
        facts: what was calibrated on what, label to value.
        distributions: one a layer.
        variants: thresholds to draw: by name, the gate sparsity asked for and the threshold of each layer.
    """

    label: str
    facts: dict[str, str]
    distributions: list[LayerDistribution]
    variants: dict[str, tuple[float | None, dict[int, float]]]


@dataclass(frozen=True)
class Collection:
    """What a report of result files is made of.

    Attributes:
        files: the files' names.
    """

    results: list[EvalResult] = field(default_factory=list)
    profiles: list[ProfileData] = field(default_factory=list)
    benches: list[Bench] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    trainings: list[TrainingRun] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        results: Sequence[tuple[Path, EvalResult]],
        profiles: Sequence[ProfileData],
        benches: Sequence[Bench],
        files: Sequence[str],
        trainings: Sequence[TrainingRun] = (),
    ) -> Collection:
        """Join what belongs together: files of one model, and thresholds that were evaluated with their profile."""
        merged = [with_mean(result) for result in merge(results)]
        return cls(
            merged, [_evaluated(profile, merged) for profile in profiles], list(benches), list(files), [*trainings]
        )


def _evaluated(profile: ProfileData, results: Sequence[EvalResult]) -> ProfileData:
    """Show the thresholds that were evaluated, if any were, in place of the usual ones."""
    layers = {distribution.layer for distribution in profile.distributions}
    found = {
        variant.name: (variant.sparsity, variant.thresholds)
        for result in results
        if short_name(result.model) == profile.label
        for variant in result.sparse
        if variant.thresholds.keys() == layers
    }
    return ProfileData(profile.label, profile.facts, profile.distributions, found or profile.variants)


class Drawing(NamedTuple):
    """A figure that can be drawn: ``draw(wide=...)``. ``name`` serves for files and ids."""

    name: str
    title: str
    captions: list[str]
    draw: Callable[..., Figure]


def drawings(collection: Collection) -> list[Drawing]:
    """The figures for which there is data, in the order of the page."""
    from cats_llm.report import curves, training

    results = collection.results
    made = []
    if panels := curves.accuracy_panels(results):
        made.append(
            Drawing(
                "accuracy",
                "Quality of answers against sparsity",
                [
                    "Each point is one model; further right, more is skipped on that task. Higher is better. "
                    "Bars are 95 % intervals of each value alone. Whether a model differs from the dense one is told "
                    "more sharply by the paired differences in the tables, since both answered the same questions.",
                    *_left_out(panels),
                ],
                partial(curves.cost_curves, panels),
            )
        )
    if panels := curves.text_panels(results):
        made.append(
            Drawing(
                "perplexity",
                "Prediction of text against sparsity",
                [
                    "Perplexity says how surprised a model is by a text, KL divergence how far its next-token "
                    "probabilities are from the dense model’s; both are better when lower. Top-1 agreement is how "
                    "often both find the same next token most likely. Where a line turns, each further point costs "
                    "more than the one before. Bars are 95 % intervals.",
                    *_left_out(panels),
                ],
                partial(curves.cost_curves, panels),
            )
        )
    if curves.layer_lines(results):
        several = len(results) > 1
        made.append(
            Drawing(
                "sparsity-by-layer",
                "Sparsity of each layer" + (", model beside model" if several else ""),
                [
                    "The share of neurons that each layer skipped, over all data of the evaluation; the band spans its "
                    "lowest and highest task. "
                    + (
                        "One line a model: where two models share their thresholds, as before and after fine-tuning, "
                        "the distance between the lines is what the training changed."
                        if several
                        else "A layer far from the dashed line sees text unlike what its threshold was calibrated on."
                    )
                ],
                partial(curves.sparsity_by_layer, results),
            )
        )
    if collection.trainings:
        made.append(
            Drawing(
                "training",
                "Fine-tuning",
                [
                    "Each line is one model while adapters are trained on it; step 0 is the model before. Perplexity "
                    "is better when lower. Sparsity drifts where its line is not level."
                ],
                partial(training.curves, collection.trainings),
            )
        )
    made += _threshold_drawings(collection)
    made += _bench_drawings(collection)
    return made


def _left_out(panels: Sequence[Panel]) -> list[str]:
    from cats_llm.report.curves import MAX_PANELS

    return [f"{MAX_PANELS} of {len(panels)} are drawn; the tables have all."] if len(panels) > MAX_PANELS else []


def _threshold_drawings(collection: Collection) -> list[Drawing]:
    from cats_llm.report import captions, figures

    made = []
    for i, profile in enumerate(collection.profiles):
        report = _report(profile.distributions, profile.variants)
        of = f": {profile.label}"
        end = f"-{i + 1}" if len(collection.profiles) > 1 else ""
        made.append(
            Drawing(
                f"histograms{end}",
                captions.HISTOGRAMS + of,
                captions.histograms(report),
                partial(figures.histograms, report),
            )
        )
    shown = [(profile.label, profile.variants) for profile in collection.profiles]
    known = {profile.label for profile in collection.profiles}
    shown += [
        (result.label, {v.name: (v.sparsity, v.thresholds) for v in result.sparse if v.thresholds})
        for result in collection.results
        if short_name(result.model) not in known
    ]
    shown = [(label, variants) for label, variants in shown if variants]
    for i, (label, variants) in enumerate(shown):
        end = f"-{i + 1}" if len(shown) > 1 else ""
        draw = partial(figures.thresholds_by_layer, _report([], variants))
        made.append(Drawing(f"thresholds{end}", f"{captions.THRESHOLDS}: {label}", captions.thresholds(), draw))
    return made


def _report(
    distributions: list[LayerDistribution], variants: dict[str, tuple[float | None, dict[int, float]]]
) -> Report:
    made = [
        Variant(name, sparsity, thresholds, {}, {}, None, None, None, None, None, None)
        for name, (sparsity, thresholds) in variants.items()
    ]
    return Report("", distributions=distributions, variants=made)


def _bench_drawings(collection: Collection) -> list[Drawing]:
    from cats_llm.report import bench as figures

    made = []
    for i, bench in enumerate(collection.benches):
        end = f"-{i + 1}" if len(collection.benches) > 1 else ""
        caption = (
            f"On {bench.place}. Bars are medians, whiskers quartiles; k is the gate sparsity, k = 0 our own kernel "
            "without any. "
        )
        if any(row.get("speedup_over_own_dense") for row in bench.rows):
            caption += (
                "The upright marks are our k = 0 changed by the share of weights that need not be read: what sparsity "
                "alone allows. "
            )
        if bench.kind == "mlp" and any(row["contestant"].endswith(", eager") for row in bench.rows):
            caption += "Those named eager are launched by Python, the others from a CUDA graph. "
        if bench.kind == "decode" and any(figures.facts(bench.kind, row)[1] > 1 for row in bench.rows):
            caption += "With several sequences at a time their neurons are read together, so that less can be skipped."
        latency = partial(figures.latency, bench.kind, bench.rows)
        made.append(Drawing(f"latency{end}", f"Latency: {bench.subject}", [caption], latency))
        if bench.kind == "decode":
            speed = partial(figures.throughput, bench.kind, bench.rows)
            made.append(
                Drawing(f"throughput{end}", f"Throughput: {bench.subject}", ["The same runs, longer is better."], speed)
            )
    return made
