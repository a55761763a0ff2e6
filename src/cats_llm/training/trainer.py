"""transformers' Trainer, with what CATS adds to it: measurements, a log, and thresholds that follow the weights."""

import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from cats_llm import distributed
from cats_llm.calibration.calibrate import calibrate
from cats_llm.errors import CatsError
from cats_llm.model.sparsify import set_config
from cats_llm.model.structure import unwrap
from cats_llm.outputs import write_json
from cats_llm.training.heldout import measure
from cats_llm.training.settings import Settings

if TYPE_CHECKING:
    from cats_llm.checkpoint.config import CatsConfig

Notify = Callable[[str], None]
LOG_FILE = "log.json"


def arguments(
    settings: Settings, folder: Path, device: str, save_every: int = 0, bar: bool = False
) -> TrainingArguments:
    """The Trainer's arguments. Making them starts torch.distributed where a launcher asked for it."""
    made = TrainingArguments(
        output_dir=str(folder),
        use_cpu=device == "cpu",
        # every trained parameter gets a gradient in every step
        ddp_find_unused_parameters=False,
        max_steps=settings.steps if settings.steps is not None else -1,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.micro_batch,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        seed=settings.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        eval_on_start=True,
        save_strategy="steps" if save_every else "no",
        save_steps=save_every or 1,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=not bar,
        dataloader_pin_memory=device != "cpu",
        remove_unused_columns=False,
        label_names=["labels"],
    )
    # several GPUs without a launcher: one is used, not DataParallel
    made._n_gpu = min(made.n_gpu, 1)
    made.gradient_accumulation_steps = settings.accumulation(made.world_size)
    return made


class CatsTrainer(Trainer):  # type: ignore[misc]  # transformers is not typed
    """Measures perplexity and sparsity on held-out examples where the Trainer would average the losses of batches.

    What no float can say goes into the Trainer's own history, so that it is in every checkpoint: an entry has the step
    and either ``evaluation`` (see `measure`), or ``thresholds`` that hold from there on.
    """

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure, log, and tell the callbacks."""
        found = measure(
            self.model,
            self.eval_dataset,
            self.data_collator,
            self.args.per_device_train_batch_size,
            self.compute_loss_context_manager,
            self.model_wrapped,
        )
        self.note(evaluation=found)
        metrics = {f"eval_{name}": found[name] for name in ("loss", "perplexity") if found[name] is not None}
        if "accuracy" in found:
            metrics["eval_accuracy"] = found["accuracy"]
        if "sparsity" in found:
            metrics["eval_sparsity"] = found["sparsity"]["gate"]
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def note(self, **entry: Any) -> None:
        """Add an entry to the history."""
        self.state.log_history.append({"step": self.state.global_step, **entry})


class KeepLog(TrainerCallback):  # type: ignore[misc]
    """Notes the thresholds, writes the history to a file, and tells the user of every measurement."""

    def __init__(self, trainer: CatsTrainer, file: Path, notify: Notify) -> None:
        self.trainer, self.file, self.notify = trainer, file, notify

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What the first steps are taken with; a resumed run has it in its history."""
        base: Any = unwrap(self.trainer.model)
        config = getattr(base.config, "quantization_config", None)
        if config is not None and not any("thresholds" in entry for entry in state.log_history):
            self.trainer.note(thresholds=config.to_dict())

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A line a measurement."""
        if not state.is_world_process_zero:
            return
        write_json(self.file, split_history(state.log_history), force=True)
        found = next(entry["evaluation"] for entry in reversed(state.log_history) if "evaluation" in entry)
        perplexity = f"{found['perplexity']:.4g}" if found["perplexity"] is not None else "not finite"
        sparsity = f", gate sparsity {100 * found['sparsity']['gate']:.2f} %" if "sparsity" in found else ""
        right = f", {100 * found['accuracy']:.2f} % of answers right" if "accuracy" in found else ""
        self.notify(f"step {state.global_step}: held-out perplexity {perplexity}{right}{sparsity}")


def tensorboard(folder: Path) -> TrainerCallback | None:
    """Writes losses and measurements for TensorBoard, if it is installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(folder)))


class RefreshThresholds(TrainerCallback):  # type: ignore[misc]
    """Calibrates again every so many steps, so that the sparsity asked for holds while the weights move."""

    def __init__(self, trainer: CatsTrainer, batches: Sequence[dict[str, Tensor]], every: int) -> None:
        self.trainer, self.batches, self.every = trainer, batches, every
        base: Any = unwrap(trainer.model)
        criterion = base.config.quantization_config.criterion
        if criterion:
            raise CatsError(
                f"thresholds of the criterion {criterion.get('name')} cannot be refreshed while training; leave out "
                "--refresh-thresholds, and fit them again afterwards with cats sparsify."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set and note new thresholds, with what the old ones had come to."""
        if state.global_step % self.every:
            return
        model = self.trainer.model
        base: Any = unwrap(model)
        before: CatsConfig = base.config.quantization_config
        assert before.sparsity is not None
        mine = self.batches[distributed.rank() :: distributed.world_size()]
        profile = calibrate(model, mine, before.calibration.get("data"))
        config = profile.config(before.sparsity).with_coverage(before.coverage)
        set_config(model, config)
        self.trainer.note(
            thresholds=config.to_dict(),
            drift={layer: profile.layers[layer].below(t) for layer, t in before.thresholds.items()},
        )


def split_history(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The Trainer's history as a log file has it."""
    keys = ("step", "epoch", "loss", "grad_norm", "learning_rate")

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None  # JSON has no NaN

    return {
        "steps": [{key: number(entry[key]) for key in keys if key in entry} for entry in history if "loss" in entry],
        "evaluations": [{"step": entry["step"], **entry["evaluation"]} for entry in history if "evaluation" in entry],
        "thresholds": [entry for entry in history if "thresholds" in entry],
    }


def last_checkpoint(folder: Path) -> tuple[Path, list[dict[str, Any]]] | None:
    """The newest checkpoint that was written whole, and its history; None if there is none."""
    found = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*")}
    for _, path in sorted(found.items(), reverse=True):
        try:
            # the Trainer writes it last
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return path, state["log_history"]
    return None
