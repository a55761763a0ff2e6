"""How a model is fine-tuned. The defaults are the paper's."""

from dataclasses import asdict, dataclass
from typing import Any

from cats_llm.errors import CatsError

METHODS = ("cats", "relu", "dense")
RUNS_FORMAT, RUNS_VERSION = "cats-finetune-runs", 1
"""Of a file with the logs of several runs, under ``runs``."""
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Settings:
    """What decides what a run computes. Two runs with the same settings and data take the same steps.

    Attributes:
        method: cats (thresholded activation), relu (ReLU in its place), dense (training as usual).
        steps: optimizer steps; None: ``epochs`` passes over the data.
        batch_size: examples an optimizer step, over all processes.
        micro_batch: examples a process computes at a time; the rest of the batch comes by accumulation.
        rank, alpha, dropout, targets: of LoRA; targets are names of linear layers, None finds them by structure.
        eval_every: steps from one measurement on held-out text to the next.
        refresh_every: steps from one calibration of the thresholds to the next; 0: they stay.
        bf16: compute in bfloat16 where that is safe (autocast); adapters and the optimizer stay in float32.
    """

    method: str = "cats"
    steps: int | None = None
    epochs: float = 1.0
    learning_rate: float = 1e-5
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    batch_size: int = 16
    micro_batch: int = 4
    rank: int = 64
    alpha: int = 16
    dropout: float = 0.1
    targets: tuple[str, ...] | None = None
    seed: int = 0
    eval_every: int = 50
    refresh_every: int = 0
    bf16: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (("method", self.method, METHODS), ("schedule", self.schedule, SCHEDULES)):
            if value not in known:
                raise CatsError(f"the {name} {value!r} is unknown; choose from {', '.join(known)}.")
        if self.refresh_every and self.method != "cats":
            raise CatsError(f"only the method cats has thresholds to refresh; leave that out for {self.method}.")

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

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = asdict(self)
        values["targets"] = list(self.targets) if self.targets is not None else None
        return values
