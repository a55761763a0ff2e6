"""What a run of fine-tuning depends on, each option once; the defaults are the paper's."""

from dataclasses import dataclass, fields
from pathlib import Path

from cats_llm.checkpoint.config import parse_sparsity
from cats_llm.errors import CatsError, UsageError
from cats_llm.loading import ModelSource
from cats_llm.options import Panel, option
from cats_llm.text import RowFormat

TUNING_METHODS = ("cats", "relu", "dense")
SCHEDULES = ("constant", "linear", "cosine")
LOSSES = ("cross-entropy", "distillation")
PARAMETERS = ("lora", "mlp")
_LORA = ("rank", "alpha", "dropout", "targets")
LOG = "finetune.json"
"""The log, in the folder of the result."""


@dataclass(frozen=True)
class DataConfig:
    """How examples are read from the training data, and what is measured and calibrated on."""

    heldout: str | None = option(
        None,
        metavar="FILE|DATASET",
        help="Measured at intervals.",
        default_text="set aside from the data",
        panel=Panel.MEASURING,
    )
    calibration: str | None = option(
        None,
        metavar="FILE|DATASET",
        help="Text for thresholds without a profile.",
        default_text="set aside from the data",
        panel=Panel.SPARSITY,
    )
    seq_length: int = option(1024, minimum=2, help="Tokens a sequence.", panel=Panel.DATA)
    samples: int | None = option(
        None, minimum=1, help="At most so many examples.", default_text="what the steps need", panel=Panel.DATA
    )
    heldout_samples: int = option(32, minimum=1, help="At most so many held-out examples.", panel=Panel.MEASURING)
    calibration_samples: int = option(
        64, minimum=1, help="At most so many examples for thresholds.", panel=Panel.SPARSITY
    )
    rows: RowFormat = RowFormat()


@dataclass(frozen=True)
class TrainingConfig:
    """What decides what a run computes. Two runs with the same one and the same data take the same steps.

    Attributes:
        targets: None finds the layers by structure.
        bf16: compute in bfloat16 where that is safe (autocast); what is trained and the optimizer stay in float32. It
            follows from the dtype of the model.
    """

    panel = Panel.TRAINING

    method: str = option(
        "cats",
        help="cats, relu (ReLU in place of the activation) or dense (training as usual).",
        panel=Panel.SPARSITY,
    )
    loss: str = option(
        "cross-entropy",
        help="cross-entropy, of the text; or distillation, the KL divergence from the dense model's predictions.",
    )
    parameters: str = option(
        "lora", help="What is trained: lora (adapters) or mlp (all weights of the gated MLPs, and no others)."
    )
    steps: int | None = option(
        None, minimum=1, help="Optimizer steps.", default_text="350 on text, --epochs on instructions"
    )
    epochs: float | None = option(None, minimum=0, help="Passes over the data.", default_text="1 on instructions")
    learning_rate: float = option(1e-5, flags=("--learning-rate", "--lr"), minimum=0, help="Of AdamW.")
    schedule: str = option("constant", help="Of the learning rate: constant, linear or cosine.")
    warmup_steps: int = option(0, minimum=0, help="Steps until the full learning rate.")
    weight_decay: float = option(0.01, minimum=0, help="Of AdamW.")
    max_grad_norm: float = option(1.0, minimum=0, help="Clip the gradient; 0: never.")
    batch_size: int = option(16, minimum=1, help="Examples a step, over all GPUs.")
    micro_batch: int = option(4, minimum=1, help="Examples computed at a time on a GPU.")
    rank: int = option(64, flags=("--lora-rank",), minimum=1, help="Rank of the adapters.", panel=Panel.LORA)
    alpha: int = option(
        16, flags=("--lora-alpha",), minimum=1, help="Adapters count alpha / rank times.", panel=Panel.LORA
    )
    dropout: float = option(
        0.1, flags=("--lora-dropout",), minimum=0, maximum=0.99, help="On the adapters' input.", panel=Panel.LORA
    )
    targets: tuple[str, ...] | None = option(
        None,
        flags=("--lora-targets",),
        metavar="NAME,...",
        help="Linear layers that get adapters.",
        default_text="q_proj, v_proj, gate_proj, up_proj, down_proj, or what the model has in their place",
        panel=Panel.LORA,
    )
    seed: int = option(0, minimum=0, help="Of the adapters' start, the order of the data and dropout.")
    eval_every: int = option(50, minimum=1, help="Steps between measurements on held-out data.", panel=Panel.MEASURING)
    refresh_every: int = option(
        0,
        flags=("--refresh-thresholds",),
        metavar="N",
        minimum=0,
        help="Calibrate again every N steps; 0: never, as in the paper.",
        panel=Panel.SPARSITY,
    )
    bf16: bool = False
    gradient_checkpointing: bool = option(False, help="Save memory: compute each layer twice.")

    def __post_init__(self) -> None:
        for name, known in (
            ("method", TUNING_METHODS),
            ("schedule", SCHEDULES),
            ("loss", LOSSES),
            ("parameters", PARAMETERS),
        ):
            value = getattr(self, name)
            if value not in known:
                are = "are" if name == "parameters" else "is"
                raise CatsError(f"the {name} {value!r} {are} unknown; choose from {', '.join(known)}.")
        if self.refresh_every and self.method != "cats":
            raise CatsError(f"only the method cats has thresholds to refresh; leave that out for {self.method}.")

    @property
    def lora_options(self) -> list[str]:
        """Names of the options of adapters that are not as they are by default."""
        return [f.name for f in fields(self) if f.name in _LORA and getattr(self, f.name) != f.default]

    def accumulation(self, processes: int) -> int:
        """Micro-batches of each process in a step.

        Raises:
            CatsError: the batch cannot be divided so.
        """
        together = self.micro_batch * processes
        if self.batch_size % together:
            raise CatsError(
                f"a batch of {self.batch_size} cannot be divided into micro-batches of {self.micro_batch} on "
                f"{processes} process{'es' * (processes > 1)}; choose a micro-batch that divides it."
            )
        return self.batch_size // together


@dataclass(frozen=True)
class FinetuneConfig:
    """All of a run, from the model to the folder that is written.

    Attributes:
        data: a text as for `cats calibrate`, or instructions.
    """

    source: ModelSource
    out: Path = option(metavar="OUT", positional=True, help="The folder to write.")
    data: str = option(
        metavar="FILE|DATASET",
        help="Text as for cats calibrate, or instructions: rows with prompt and completion, or messages.",
        panel=Panel.DATA,
    )
    sparsity: float | None = option(
        None,
        parse=parse_sparsity,
        metavar="K",
        expected="a gate sparsity from 0 up to (not including) 1",
        help="For the method cats: share of MLP neurons to skip. A CATS model may keep its thresholds without it.",
        panel=Panel.SPARSITY,
    )
    profile: Path | None = option(None, help="Thresholds of the base model, from cats calibrate.", panel=Panel.SPARSITY)
    training: TrainingConfig = TrainingConfig()
    reading: DataConfig = DataConfig()
    save_every: int = option(
        100, minimum=0, help="Steps between checkpoints to resume from; 0: none.", panel=Panel.OUTPUT
    )
    resume: bool = option(
        False, help="Go on from the last checkpoint in OUT.training, if there is one.", panel=Panel.OUTPUT
    )
    keep_adapters: bool = option(
        False,
        flags=("--keep-adapters/--merge",),
        help="Keep the adapters beside their base model, or merge them into its weights.",
        panel=Panel.OUTPUT,
    )

    def __post_init__(self) -> None:
        method = self.training.method
        thresholds_given = any(value is not None for value in (self.sparsity, self.profile, self.reading.calibration))
        if self.training.steps is not None and self.training.epochs is not None:
            raise UsageError("pass --steps or --epochs, not both.")
        if self.profile is not None and self.reading.calibration is not None:
            raise UsageError("pass --profile or --calibration, not both.")
        if method != "cats" and thresholds_given:
            raise UsageError(f"--sparsity, --profile and --calibration have no meaning for the method {method}.")
        if self.training.parameters != "lora":
            if self.keep_adapters:
                raise UsageError(f"--keep-adapters has no meaning for --parameters {self.training.parameters}.")
            for name in self.training.lora_options:
                raise UsageError(f"--lora-{name} has no meaning for --parameters {self.training.parameters}.")
        if self.sparsity is None and self.profile is not None:
            raise UsageError("--profile gives thresholds only together with --sparsity.")

    @property
    def work(self) -> Path:
        """The folder of the run while it is unfinished: OUT.training."""
        return self.out.with_name(f"{self.out.name}.training")
