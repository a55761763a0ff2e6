"""What a recipe is."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Calibration:
    """The text that thresholds come from; as the options of `cats calibrate`."""

    data: str
    text_column: str = "text"
    dataset_config: str | None = None
    split: str = "train"
    samples: int = 256
    seq_length: int = 1024
    seed: int | None = None


@dataclass(frozen=True)
class EvaluationPlan:
    """Variants of the model on tasks; as the options of `cats eval`. The dense variant is always there."""

    tasks: tuple[str, ...]
    sparsities: tuple[float, ...]
    methods: tuple[str, ...] = ("cats",)
    num_fewshot: int | None = None


@dataclass(frozen=True)
class ThresholdPlan:
    """The thresholds of the model at one gate sparsity."""

    sparsity: float


@dataclass(frozen=True)
class BenchPlan:
    """Times of one MLP or of whole tokens; as the options of `cats bench`.

    Attributes:
        kind: "mlp", which needs a shape, or "decode", which needs the recipe's model.
        tokens: generated in each turn of "decode"; each number is measured by itself.
        rounds: turns of each contestant.
    """

    kind: str
    sparsities: tuple[float, ...]
    dtype: str = "float32"
    shape: str | None = None
    batch: int = 1
    tokens: tuple[int, ...] = (16,)
    rounds: int = 7


@dataclass(frozen=True)
class FinetuningPlan:
    """Runs of `cats finetune` that differ in nothing but the method and its sparsity; as its options.

    Attributes:
        data: a text; None where ``instructions`` says what is trained on.
        instructions: name of a task with the answers yes and no: trained on its train split, measured on validation.
        steps, epochs: one of them.
    """

    methods: tuple[str, ...]
    sparsities: tuple[float, ...]
    data: str | None = None
    text_column: str = "text"
    dataset_config: str | None = None
    split: str = "train"
    instructions: str | None = None
    steps: int | None = None
    epochs: float | None = None
    learning_rate: float = 1e-5
    seq_length: int = 1024
    batch_size: int = 16
    heldout_samples: int = 32
    eval_every: int = 50
    seed: int = 0

    @property
    def runs(self) -> dict[str, tuple[str, float | None]]:
        """Method and sparsity of every run, by the name that its log gives it."""
        found: dict[str, tuple[str, float | None]] = {}
        for method in self.methods:
            if method == "cats":
                found |= {f"cats k={k:g}": ("cats", k) for k in self.sparsities}
            else:
                found[method] = (method, None)
        return found


Plan = EvaluationPlan | ThresholdPlan | BenchPlan | FinetuningPlan


@dataclass(frozen=True)
class Expected:
    """A published number and what it is of.

    Attributes:
        value: the number, or the lowest and highest of a range.
        source: who published it where.
        variant, task, metric: of a number of an evaluation; the metric may be a sparsity: gate_sparsity,
            ffn_sparsity or model_sparsity.
        layer: of a threshold.
        contestant, measure, tokens: of a number of a benchmark. A number without tokens, where several are measured,
            is the geometric mean over them.
        variant, measure: of a number of fine-tuning (`cats_llm.recipes.compare.TRAINING_MEASURES`).
    """

    value: float | tuple[float, float]
    source: str
    variant: str | None = None
    task: str | None = None
    metric: str | None = None
    layer: int | None = None
    contestant: str | None = None
    measure: str | None = None
    tokens: int | None = None

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
class Recipe:
    """An experiment.

    Attributes:
        name: of the file, without its ending.
        title: in one line.
        about: what is compared with what, and what differs from the original.
        plan: what is run.
        model: a folder or a name on the hub; None where the plan needs none.
        dtype: of the model; auto is the checkpoint's own.
        calibration: None where the plan needs none.
        expected: published numbers.
    """

    name: str
    title: str
    about: str
    plan: Plan
    model: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    calibration: Calibration | None = None
    expected: tuple[Expected, ...] = field(default=())
