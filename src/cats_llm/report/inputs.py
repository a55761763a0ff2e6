"""What a page is made of: result files of any kind, read and joined."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cats_llm.calibration.distribution import MagnitudeDistribution
from cats_llm.calibration.profile import Profile
from cats_llm.errors import CatsError
from cats_llm.report.bench import Bench, is_bench, read_bench
from cats_llm.report.deltas import with_mean
from cats_llm.report.labels import short_name
from cats_llm.report.results import EvalResult, is_eval, merge, read_eval
from cats_llm.report.training import TrainingRun, is_training, read_training

SPARSITIES = (0.5, 0.7, 0.9)
"""What profiles show where nothing was evaluated: the paper's."""


@dataclass(frozen=True)
class CalibratedModel:
    """A calibration profile, and thresholds to draw into it.

    Attributes:
        label: what titles call the model.
        facts: what was calibrated on what, label to value.
        distributions: of |act(gate)|, by layer.
        thresholds: by variant's name and layer.
    """

    label: str
    facts: dict[str, str]
    distributions: dict[int, MagnitudeDistribution]
    thresholds: dict[str, dict[int, float]]

    @classmethod
    def of(cls, profile: Profile, results: Sequence[EvalResult]) -> "CalibratedModel":
        """A profile with the thresholds that were evaluated, or else those at `SPARSITIES`."""
        label = short_name(str(profile.record.get("model") or "a model"))
        evaluated = {
            variant.name: variant.thresholds
            for result in results
            if short_name(result.model) == label
            for variant in result.sparse
            if variant.thresholds.keys() == profile.layers.keys()
        }
        facts = {str(k): str(v) for k, v in profile.record.items() if isinstance(v, (str, int, float))}
        usual = {f"cats k={k:g}": profile.config(k).thresholds for k in SPARSITIES}
        return cls(label, facts, profile.layers, evaluated or usual)


@dataclass(frozen=True)
class ReportInputs:
    """What a page is made of.

    Attributes:
        results: one a model; models that contradict each other stand side by side.
        files: the files' names.
    """

    results: list[EvalResult] = field(default_factory=list)
    profiles: list[CalibratedModel] = field(default_factory=list)
    benches: list[Bench] = field(default_factory=list)
    trainings: list[TrainingRun] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        results: Sequence[tuple[Path, EvalResult]] = (),
        profiles: Sequence[Profile] = (),
        benches: Sequence[Bench] = (),
        trainings: Sequence[TrainingRun] = (),
        files: Sequence[str] = (),
    ) -> "ReportInputs":
        """Join what belongs together: files of one model, and thresholds that were evaluated with their profile."""
        merged = [with_mean(result) for result in merge(results)]
        calibrated = [CalibratedModel.of(profile, merged) for profile in profiles]
        return cls(merged, calibrated, [*benches], [*trainings], [*files])


def read_files(paths: Sequence[Path]) -> ReportInputs:
    """Result files of any kind, by their content.

    Raises:
        CatsError: a file is missing, damaged, or of no kind that is known.
    """
    results, profiles, benches, trainings = [], [], [], []
    paths = list(dict.fromkeys(paths))
    for path in paths:
        if path.suffix == ".safetensors":
            profiles.append(Profile.load(path))
            continue
        values = _json(path)
        if is_eval(values):
            results.append((path, read_eval(values, path)))
        elif is_bench(values):
            benches += read_bench(values, path)
        elif is_training(values):
            trainings += read_training(values, path)
        else:
            raise CatsError(
                f"{path} is JSON, but no result of cats eval, cats bench or cats finetune, which is what cats report "
                "reads beside calibration profiles (.safetensors)."
            )
    return ReportInputs.of(results, profiles, benches, trainings, [path.name for path in paths])


def _json(path: Path) -> Any:
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise CatsError(f"{path} {what}; give result files of cats eval, cats bench or cats calibrate.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CatsError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CatsError(
            f"{path} is not JSON, or it is damaged; give result files (.json) of cats eval or cats bench, or "
            "calibration profiles (.safetensors)."
        ) from error
