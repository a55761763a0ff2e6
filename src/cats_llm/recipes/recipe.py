"""What a recipe is. Its sections are dataclasses of options, so that YAML files are read by them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from cats_llm.calibration.sampling import Sampling
from cats_llm.checkpoint.config import parse_sparsity
from cats_llm.dtypes import DTYPE_NAMES, DTYPES
from cats_llm.errors import CatsError
from cats_llm.evaluation.task import TaskOptions
from cats_llm.loading import parse_device
from cats_llm.options import Panel, option
from cats_llm.text import RowFormat
from cats_llm.training.classification_data import TASKS
from cats_llm.training.config import TUNING_METHODS, DataConfig, TrainingConfig

# of what the rows of `cats bench` hold
BENCH_MEASURES = {
    "mlp": ("ms", "speedup_over_torch"),
    "decode": ("ms_per_step", "tokens_per_second", "speedup_over_stock", "speedup_over_own_dense"),
}

TRAINING_MEASURES = ("perplexity_over_relu", "ahead_of_relu")
"""Of a run of fine-tuning beside ReLU's: its last held-out perplexity as a share of ReLU's, and the share of the
measurements after the first step at which its perplexity is the lower one."""

Choices = Mapping[str, tuple[Any, ...] | None]
"""Names of the members of a `Quantity` with the values that they may have; None: any."""

Results = Mapping[str, Any]
"""The measurements in full, as `cats eval`, `cats bench` and `cats finetune` write them, under ``result``, ``bench`` or
``training``; or ``thresholds``, by layer."""

Measured = tuple[float | None, float | None]
"""A value, None if it was not measured, and its standard error, None if it is unknown."""

# what every plan with several sparsities says of them
_SPARSITIES: dict[str, Any] = {
    "parse": parse_sparsity,
    "expected": "a list of different gate sparsities, each from 0 up to (not including) 1",
    "help": "Gate sparsities.",
}


@dataclass(frozen=True)
class CalibrationSection:
    """The text that thresholds come from; as the options of `cats calibrate`."""

    data: str = option(help="A file, folder or dataset.", expected="a file, folder or dataset")
    sampling: Sampling = Sampling()
    rows: RowFormat = RowFormat()


@dataclass(frozen=True)
class Quantity:
    """What a published number is of; every plan has its own members (``quantity``)."""

    variant: str | None = option(None, help="dense, a method, or a method with k=0.5.")
    task: str | None = option(None, help="A task or set of tasks.")
    metric: str | None = option(None, help="A metric, or gate_, ffn_ or model_sparsity.")
    layer: int | None = option(None, minimum=0, help="The index of a layer.")
    contestant: str | None = option(None, help="What was timed.")
    measure: str | None = option(None, help="What was measured of it.")
    tokens: int | None = option(None, minimum=1, help="One of the lengths of generation.")

    @property
    def label(self) -> str:
        """What it is of, for people."""
        if self.layer is not None:
            return f"threshold of layer {self.layer}"
        if self.contestant is not None:
            length = f", {self.tokens} tokens" if self.tokens is not None else ""
            return f"{self.contestant}{length}: {self.measure}"
        if self.measure is not None:
            return f"{self.variant}: {self.measure}"
        return f"{self.variant}, {self.task}: {self.metric}"


@dataclass(frozen=True)
class EvaluationPlan:
    """Variants of the model on tasks; as the options of `cats eval`. The dense variant is always there."""

    tasks: tuple[str, ...] = option(help="Names of tasks and sets of tasks.", expected="a list of different names")
    sparsities: tuple[float, ...] = option(**_SPARSITIES)
    methods: tuple[str, ...] = option(("cats",), help="As cats eval takes them.", expected="a list of different names")
    task_options: TaskOptions = TaskOptions()

    quantity: ClassVar[Choices] = {"variant": None, "task": None, "metric": None}

    def measured(self, of: Quantity, results: Results) -> Measured:
        """Of the ``result`` of `cats eval`."""
        rows = [row for row in results["result"]["results"] if (row["variant"], row["task"]) == (of.variant, of.task)]
        unit, _, kind = str(of.metric).rpartition("_")
        if kind == "sparsity" and unit in ("gate", "ffn", "model"):
            return (rows[0]["sparsity"][unit] if rows else None), None
        return next(((row["value"], row["stderr"]) for row in rows if row["metric"] == of.metric), (None, None))


@dataclass(frozen=True)
class ThresholdPlan:
    """The thresholds of the model at one gate sparsity."""

    sparsity: float = option(
        parse=parse_sparsity, expected="a gate sparsity from 0 up to (not including) 1", help="Gate sparsity."
    )

    quantity: ClassVar[Choices] = {"layer": None}

    def measured(self, of: Quantity, results: Results) -> Measured:
        """Of the ``thresholds`` by layer."""
        return results["thresholds"].get(of.layer), None


@dataclass(frozen=True)
class BenchPlan:
    """Times of one MLP or of whole tokens; as the options of `cats bench`.

    Attributes:
        kind: "mlp", which needs a shape, or "decode", which needs the recipe's model.
        tokens: see ``lengths``.
    """

    kind: str = option(choices=("mlp", "decode"), expected="mlp or decode", help="What is timed.")
    sparsities: tuple[float, ...] = option(**_SPARSITIES)
    dtype: str = option("float32", choices=tuple(DTYPES), help="Of the weights.")
    shape: str | None = option(None, help="Of the MLP, as cats bench knows it.")
    batch: int = option(1, minimum=1, help="Tokens computed at a time.")
    tokens: tuple[int, ...] = option(
        (), minimum=3, expected="a list of different whole numbers, 3 or more", help="Lengths of generation."
    )
    rounds: int = option(7, minimum=1, help="Turns of each contestant.")

    def __post_init__(self) -> None:
        if (self.shape is None) != (self.kind == "decode"):
            raise CatsError(f"shape {'is missing' if self.shape is None else 'has no meaning for decode'}.")
        if self.tokens and self.kind == "mlp":
            raise CatsError("tokens has no meaning for mlp.")

    @property
    def quantity(self) -> Choices:
        """What a number of this plan is of; without tokens the geometric mean over all of them."""
        baseline = "torch dense" if self.kind == "mlp" else "stock transformers"
        contestants = (baseline, *(f"k = {k}" for k in self.sparsities))
        return {"contestant": contestants, "measure": BENCH_MEASURES[self.kind], "tokens": self.lengths}

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of generation, each measured by itself."""
        return () if self.kind == "mlp" else self.tokens or (16,)

    def measured(self, of: Quantity, results: Results) -> Measured:
        """Of the ``bench`` of `cats bench`."""
        values = []
        for row in results["bench"]["rows"]:
            if row["contestant"] == of.contestant and of.tokens in (None, row["tokens"]):
                value = row[of.measure]
                values.append(float(value["median"] if isinstance(value, dict) else value))
        return (math.exp(sum(map(math.log, values)) / len(values)) if values else None), None


@dataclass(frozen=True)
class FinetuningPlan:
    """Runs of `cats finetune` that differ in nothing but the method and its sparsity; with its options.

    Attributes:
        data: a text; None where ``instructions`` says what is trained on.
        instructions: name of a task with the answers yes and no: trained on its train split, measured on validation.
    """

    methods: tuple[str, ...] = option(help="As cats finetune takes them.", expected="a list of different names")
    sparsities: tuple[float, ...] = option(**_SPARSITIES)
    data: str | None = option(None, help="A file, folder or dataset.", expected="a file, folder or dataset")
    instructions: str | None = option(None, help="The name of a task.")
    reading: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()

    def __post_init__(self) -> None:
        training = self.training
        if (self.data is None) == (self.instructions is None):
            raise CatsError("data or instructions is needed, and not both.")
        if (training.steps is None) == (training.epochs is None):
            raise CatsError("steps or epochs is needed, and not both.")
        for name, number in (("learning_rate", training.learning_rate), ("epochs", training.epochs)):
            if number == 0:
                raise CatsError(f"{name} is '0' and should be a number above 0.")
        for method in self.methods:
            if method not in TUNING_METHODS:
                known = ", ".join(TUNING_METHODS)
                raise CatsError(f"methods: {method!r} is no method of training; choose from {known}.")
        if self.instructions not in (None, *TASKS):
            raise CatsError(f"instructions: {self.instructions!r} is no task; choose from {', '.join(TASKS)}.")

    @property
    def runs(self) -> dict[str, tuple[TrainingConfig, float | None]]:
        """Training and sparsity of every run, by the name that its log gives it."""
        runs: dict[str, tuple[TrainingConfig, float | None]] = {}
        for method in self.methods:
            if method == "cats":
                runs |= {f"cats k={k:g}": (replace(self.training, method="cats"), k) for k in self.sparsities}
            else:
                runs[method] = (replace(self.training, method=method, refresh_every=0), None)
        return runs

    @property
    def quantity(self) -> Choices:
        """What a number of this plan is of."""
        return {"variant": tuple(self.runs), "measure": TRAINING_MEASURES}

    def measured(self, of: Quantity, results: Results) -> Measured:
        """Of the logs in ``training`` of this run and ReLU's; None where a perplexity is not finite."""
        logs = results["training"]["runs"]
        curves = {log["name"]: {entry["step"]: entry["perplexity"] for entry in log["evaluations"]} for log in logs}
        ours, relu = curves.get(of.variant, {}), curves.get("relu", {})
        # both measured at the same steps
        pairs = [(ours[step], relu[step]) for step in sorted(ours.keys() & relu.keys()) if step > 0]
        if not pairs or any(value is None for pair in pairs for value in pair):
            return None, None
        if of.measure == "perplexity_over_relu":
            return float(pairs[-1][0] / pairs[-1][1]), None
        return float(sum(a < b for a, b in pairs) / len(pairs)), None


Plan = EvaluationPlan | ThresholdPlan | BenchPlan | FinetuningPlan
PLANS: dict[str, type[Plan]] = {
    "evaluation": EvaluationPlan,
    "thresholds": ThresholdPlan,
    "bench": BenchPlan,
    "finetuning": FinetuningPlan,
}
"""By the section of a recipe that says it."""


@dataclass(frozen=True)
class Expected:
    """A published number.

    Attributes:
        value: the number, or the lowest and highest of a range.
        of: what it is of.
    """

    value: float | tuple[float, float]
    source: str = option(help="Who published it where.", expected="text, here or for the whole recipe")
    of: Quantity = Quantity()


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


@dataclass(frozen=True)
class Recipe:
    """An experiment.

    Attributes:
        name: of the file, without its ending.
        plan: what is run.
        calibration: None where the plan needs none.
        expected: published numbers.
    """

    name: str
    plan: Plan
    title: str = option(help="In one line.")
    about: str = option(help="What is compared with what, and what differs from the original.")
    model: str | None = option(
        None, help="Of all runs; None where the plan needs none.", expected="a folder or a name on the hub"
    )
    revision: str | None = option(None, help="Of a model on the hub.", expected="a branch, tag or commit")
    dtype: str = option("auto", choices=DTYPE_NAMES, help="Of the model; auto is the checkpoint's own.")
    source: str | None = option(None, help="Who published the numbers that do not say it themselves.")
    calibration: CalibrationSection | None = None
    expected: tuple[Expected, ...] = ()


@dataclass(frozen=True)
class ReproduceConfig:
    """How a recipe is run here."""

    smoke: bool = option(False, help="Run all steps in a minute, on the bundled model and a few local documents.")
    out: Path | None = option(
        None,
        flags=("--out", "-o"),
        metavar="DIR",
        help="Keep the profile, the results and a report here.",
        panel=Panel.OUTPUT,
    )
    profile: Path | None = option(None, help="A profile of the model, in place of calibrating.")
    data_dir: Path | None = option(
        None,
        help="Folder with the tasks' data, where there is no hub: TASK.jsonl, or to fine-tune on, TASK-train.jsonl "
        "and TASK-validation.jsonl.",
    )
    resume: bool = option(False, help="Fine-tuning: go on in --out, with what is finished there.", panel=Panel.OUTPUT)
    batch_size: int = option(4, minimum=1, help="Sequences computed at a time.")
    no_cache: bool = option(False, help="Measure everything again, and keep nothing.", panel=Panel.OUTPUT)
    device: str | None = option(
        None,
        parse=parse_device,
        help="cpu, cuda, cuda:1, or auto to spread over all.",
        default_text="the GPU if there is one",
    )

    def check_usage(self, recipe: Recipe) -> None:
        """Refuse options that do not go with the recipe.

        Raises:
            CatsError: they do not.
        """
        tuning = isinstance(recipe.plan, FinetuningPlan)
        if self.resume and not (tuning and self.out is not None):
            raise CatsError("--resume goes on with a recipe of fine-tuning, in its --out.")
        if tuning and self.out is None and not self.smoke:
            raise CatsError(f"{recipe.name} leaves fine-tuned models; say with --out where.")
