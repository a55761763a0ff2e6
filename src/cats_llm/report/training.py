"""Fine-tuning logs: reading them, quality and sparsity against steps, and what they say."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cats_llm.errors import CatsError
from cats_llm.formats import FINETUNING, FINETUNING_RUNS, FINETUNING_VERSION
from cats_llm.number_format import known, number, percent
from cats_llm.report.labels import label, short_name
from cats_llm.report.page_figure import PageFigure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Point(NamedTuple):
    """A measurement on held-out text; None where there was none, or no finite one."""

    step: int
    perplexity: float | None
    gate: float | None


@dataclass(frozen=True)
class TrainingRun:
    """One run of `cats finetune`.

    Attributes:
        name: the method and its sparsity.
        group: what runs are drawn together under.
        points: in the order of steps, at least one.
    """

    name: str
    group: str
    model: str
    heldout: str
    learning_rate: float
    points: list[Point]
    command: str


def is_training(values: Any) -> bool:
    """Whether it is a log of `cats finetune`, or several in one file."""
    return isinstance(values, dict) and values.get("format") in (FINETUNING, FINETUNING_RUNS)


def read_training(values: dict[str, Any], path: Path) -> list[TrainingRun]:
    """The runs of a file.

    Raises:
        CatsError: it is damaged, or of a newer version.
    """
    if values.get("version") != FINETUNING_VERSION:
        raise CatsError(
            f"{path} is a fine-tuning log of version {values.get('version')!r}; upgrade cats-llm to read it."
        )
    try:
        if values["format"] == FINETUNING_RUNS:  # whose names set them apart
            runs = [_run(log, values, str(log["name"])) for log in values["runs"]]
        else:
            runs = [_run(values, values, values["name"] + _changes(values["settings"]))]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CatsError(f"{path} is a fine-tuning log that is damaged; train again, or take it from OUT.") from error
    if not runs or not all(run.points for run in runs):
        raise CatsError(f"{path} is a fine-tuning log without any measurement.")
    return runs


def _changes(settings: dict[str, Any]) -> str:
    """What sets a run apart from one with the paper's settings, beside its method."""
    usual = (("parameters", "lora"), ("loss", "cross-entropy"))
    return "".join(f", {settings[key]}" for key, value in usual if settings.get(key, value) != value)


def _run(log: dict[str, Any], file: dict[str, Any], name: str) -> TrainingRun:
    points = [
        Point(
            int(entry["step"]),
            None if entry["perplexity"] is None else float(entry["perplexity"]),
            float(entry["sparsity"]["gate"]) if "sparsity" in entry else None,
        )
        for entry in log["evaluations"]
    ]
    rate = float(log["settings"]["learning_rate"])
    model = str(log.get("model") or file.get("model") or "a model")
    return TrainingRun(
        name,
        str(log.get("group") or short_name(model)),
        model,
        str(log["data"]["heldout"]),
        rate,
        sorted(points),
        str(log.get("command") or file.get("command") or ""),
    )


def figures(runs: Sequence[TrainingRun]) -> list[PageFigure]:
    """One of all runs, if there are any."""
    caption = (
        "Each line is one model while it is trained; step 0 is the model before. Perplexity is better when lower. "
        "Sparsity drifts where its line is not level."
    )
    return [PageFigure("training", "Fine-tuning", [caption], partial(curves, runs))] if runs else []


def curves(runs: Sequence[TrainingRun], wide: bool = True) -> "Figure":
    """Held-out perplexity, and below it gate sparsity, against optimizer steps: a column a group, a line a run."""
    # here, so that logs can be read without matplotlib
    from cats_llm.report import style

    groups = list(dict.fromkeys(run.group for run in runs))
    names = list(dict.fromkeys(run.name for run in runs))
    looks = {"dense": style.DENSE} | style.looks([name for name in names if name != "dense"])
    measures = [("held-out perplexity", "perplexity", 1)]
    if any(point.gate is not None for run in runs for point in run.points):
        measures.append(("gate sparsity on it, %", "gate", 100))
    with style.style():
        columns = len(groups) if wide else 1
        figure, panels = style.panels(len(measures) * len(groups), columns, wide, height=2.6 if wide else 2.2)
        # in rows when there is room, else all of a group together
        order = [(m, g) for m in measures for g in groups] if wide else [(m, g) for g in groups for m in measures]
        for axes, ((title, member, scale), group) in zip(panels, order, strict=True):
            heights = []
            for run in (run for run in runs if run.group == group):
                points = [(p.step, v) for p in run.points if known(v := getattr(p, member))]
                values = [min(scale * value, style.HIGHEST) for _, value in points]
                axes.plot([step for step, _ in points], values, **looks[run.name].marked, markersize=3.5)
                heights += values
            style.value_axis(axes, heights, from_zero=False)
            axes.set_title(title + (f": {label(group)}" if len(groups) > 1 else ""))
        figure.supxlabel("optimizer steps", fontsize=9)
        style.legend(figure, {name: looks[name].marked for name in names})
        return figure


def finding(runs: Sequence[TrainingRun]) -> str:
    """The run that ends best among the sparse ones, in a sentence."""
    sparse = [(run.points[-1].perplexity, run) for run in runs if run.points[-1].gate is not None]
    ended = [(value, run) for value, run in sparse if known(value)]
    if not ended:
        return "None of the fine-tuned models of these files is sparse and of finite perplexity."
    value, run = min(ended, key=lambda item: item[0])
    last, first = run.points[-1], run.points[0]
    return (
        f"Fine-tuning for {last.step} steps takes {run.name} from a held-out perplexity of "
        f"{number(first.perplexity)} to {number(value)} at {percent(last.gate, 1)} gate sparsity"
        + (", the lowest of the sparse models here." if len(ended) > 1 else ".")
    )
