"""transformers' Trainer, with what CATS adds to it: losses, measurements, a log, and thresholds that follow weights."""

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

from cats_llm import distributed, formats
from cats_llm.calibration.calibrate import calibrate
from cats_llm.errors import CatsError
from cats_llm.model.predictions import kl_divergence
from cats_llm.model.sparsify import set_config
from cats_llm.number_format import known, number, percent
from cats_llm.outputs import write_json
from cats_llm.training.config import TrainingConfig
from cats_llm.training.data import IGNORED, Data, collate
from cats_llm.training.methods import thresholds_config
from cats_llm.training.parameters import ADAPTER, count_parameters, load_weights, make_trainable, save_weights
from cats_llm.training.validation import evaluate
from cats_llm.versions import versions

Notify = Callable[[str], None]
LOG_FILE = "log.json"
"""In the folder of a run: the log as far as it goes."""


def trainer_arguments(
    config: TrainingConfig, folder: Path, device: str, save_every: int = 0, progress_bar: bool = False
) -> TrainingArguments:
    """The Trainer's arguments. Making them starts torch.distributed where a launcher asked for it."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=device == "cpu",
        # every trained parameter gets a gradient in every step
        ddp_find_unused_parameters=False,
        max_steps=config.steps if config.steps is not None else -1,
        num_train_epochs=config.epochs or 1,
        per_device_train_batch_size=config.micro_batch,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=config.eval_every,
        eval_on_start=True,
        save_strategy="steps" if save_every else "no",
        save_steps=save_every or 1,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=not progress_bar,
        dataloader_pin_memory=device != "cpu",
        remove_unused_columns=False,
        label_names=["labels"],
    )
    # several GPUs without a launcher: one is used, not DataParallel
    arguments._n_gpu = min(arguments.n_gpu, 1)
    arguments.gradient_accumulation_steps = config.accumulation(arguments.world_size)
    return arguments


class CatsTrainer(Trainer):  # type: ignore[misc]  # transformers is not typed
    """Measures perplexity and sparsity on held-out examples where the Trainer would average the losses of batches.

    What no float can say goes into the Trainer's own history, so that it is in every checkpoint: an entry has the step
    and either ``evaluation`` (see `cats_llm.training.validation.evaluate`), or ``thresholds`` that hold from there on.

    Attributes:
        teacher: the dense model whose predictions are learned; None learns the text.
        measuring: seconds that measurements have taken.
    """

    teacher: Any = None
    measuring = 0.0

    def learn_from(self, teacher: Any) -> None:
        """Take the divergence from a dense model's predictions as the loss.

        Raises:
            CatsError: weights are sharded.
        """
        _refuse_sharding(self, "the loss distillation needs the dense model whole")
        self.teacher = teacher
        # the sum over a micro-batch is divided by the tokens of the whole batch, as that of the cross-entropy is
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The share of a micro-batch in the mean over a batch's predicted tokens."""
        if self.teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        # the last position predicts nothing that is known
        predicted = F.pad(inputs.pop("labels")[:, 1:] != IGNORED, (0, 1))
        with torch.no_grad(), self.accelerator.autocast():
            expected = self.teacher(**inputs, use_cache=False).logits
        outputs = model(**inputs, use_cache=False)
        loss = kl_divergence(predicted, outputs.logits, expected) / num_items_in_batch
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure, log, and tell the callbacks."""
        started = seconds()
        measurement = evaluate(
            self.model,
            self.eval_dataset,
            self.args.per_device_train_batch_size,
            self.accelerator.autocast,
            self.model_wrapped,
            self.teacher,
        )
        self.measuring += seconds() - started
        self.note(evaluation=measurement)
        numbers = ("loss", "perplexity", "accuracy", "kl")
        metrics = {f"eval_{name}": measurement[name] for name in numbers if measurement.get(name) is not None}
        if "sparsity" in measurement:
            metrics["eval_sparsity"] = measurement["sparsity"]["gate"]
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def note(self, **entry: Any) -> None:
        """Add an entry to the history."""
        self.state.log_history.append({"step": self.state.global_step, **entry})


class WeightsTrainer(CatsTrainer):
    """Trains weights of the model itself; its checkpoints hold only those."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save_weights(self.model, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self.model, Path(resume_from_checkpoint))


def _refuse_sharding(trainer: Trainer, what: str) -> None:
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise CatsError(
            f"{what} in every process, but FSDP and DeepSpeed shard weights; start plain data parallel processes, or "
            "train adapters with the cross-entropy."
        )


def seconds() -> float:
    """The time now, when all that was asked of the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(TrainerCallback):  # type: ignore[misc]
    """How long steps take, without what is done before, between and after them: loading, measuring, saving the end."""

    def __init__(self, trainer: CatsTrainer) -> None:
        self.trainer, self.started, self.seconds = trainer, 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first step, or the measurement before it, is next."""
        self.started = seconds() - self.trainer.measuring

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All steps and measurements are done."""
        self.seconds = seconds() - self.started - self.trainer.measuring


class KeepLog(TrainerCallback):  # type: ignore[misc]
    """Notes the thresholds, writes the history to a file, and tells the user of every measurement."""

    def __init__(self, trainer: CatsTrainer, file: Path, notify: Notify) -> None:
        self.trainer, self.file, self.notify = trainer, file, notify

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What the first steps are taken with; a resumed run has it in its history."""
        config = thresholds_config(self.trainer.model)
        if config is not None and not any("thresholds" in entry for entry in state.log_history):
            self.trainer.note(thresholds=config.to_dict())

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A line a measurement."""
        if not state.is_world_process_zero:
            return
        log = split_history(state.log_history)
        write_json(self.file, log, force=True)
        measurement = log["evaluations"][-1]
        perplexity = measurement["perplexity"]
        line = f"held-out perplexity {number(perplexity) if known(perplexity) else 'not finite'}"
        if "accuracy" in measurement:
            line += f", {percent(measurement['accuracy'])} of answers right"
        if "kl" in measurement:
            line += f", KL to the dense model {number(measurement['kl']) if known(measurement['kl']) else 'not finite'}"
        if "sparsity" in measurement:
            line += f", gate sparsity {percent(measurement['sparsity']['gate'])}"
        self.notify(f"step {state.global_step}: {line}")


class RefreshThresholds(TrainerCallback):  # type: ignore[misc]
    """Calibrates again every so many steps, so that the sparsity asked for holds while the weights move.

    Raises:
        CatsError: weights are sharded, or thresholds are not of a sparsity alone.
    """

    def __init__(self, trainer: CatsTrainer, batches: Sequence[dict[str, Tensor]], every: int) -> None:
        self.trainer, self.batches, self.every = trainer, batches, every
        config = thresholds_config(trainer.model)
        assert config is not None
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise CatsError("thresholds cannot be refreshed while weights are sharded; leave out --refresh-thresholds.")
        if config.sparsity is None:
            raise CatsError(
                "this CATS model's thresholds were not calibrated for a sparsity, so there is none to hold; pass "
                "--sparsity, or leave out --refresh-thresholds."
            )
        if config.criterion:
            raise CatsError(
                f"thresholds of the criterion {config.criterion.get('name')} cannot be refreshed while training; leave "
                "out --refresh-thresholds, and fit them again afterwards with cats sparsify."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set and note new thresholds, with what the old ones had come to."""
        if state.global_step % self.every:
            return
        model = self.trainer.model
        before = thresholds_config(model)
        assert before is not None
        assert before.sparsity is not None
        with self.trainer.accelerator.autocast():
            profile = calibrate(model, distributed.share(self.batches), before.calibration.get("data"))
        config = profile.config(before.sparsity).with_coverage(before.coverage)
        set_config(model, config)
        self.trainer.note(
            thresholds=config.to_dict(),
            drift={layer: profile.layers[layer].below(t) for layer, t in before.thresholds.items()},
        )


def train(
    model: Any,
    data: Data,
    config: TrainingConfig,
    arguments: TrainingArguments,
    resume: Path | None = None,
    notify: Notify = lambda _: None,
    record: dict[str, Any] | None = None,
    teacher: Any = None,
) -> dict[str, Any]:
    """Train a model that `apply_method` prepared, and leave what was trained in the run's folder.

    Args:
        model: is trained in place.
        arguments: see `trainer_arguments`.
        resume: a checkpoint of the same run, to go on from.
        notify: told of every measurement.
        record: more for the log: the model's name, the command, the machine.
        teacher: for the loss distillation, see `make_teacher`.

    Returns:
        The log (docs/finetuning.md says what is in it). `trained_model` reads what was trained.

    Raises:
        CatsError: what is to be trained is not found, weights are sharded where they may not be, or thresholds are to
            be refreshed that cannot be.
    """
    started = time.perf_counter()
    folder = Path(arguments.output_dir)
    set_seed(config.seed)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = make_trainable(model, config)
    trainer = (CatsTrainer if config.parameters == "lora" else WeightsTrainer)(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.heldout,
        data_collator=collate,
    )
    if config.parameters != "lora":
        _refuse_sharding(trainer, f"--parameters {config.parameters} needs the weights that are trained whole")
    if config.loss == "distillation":
        trainer.learn_from(teacher)
    if config.refresh_every:
        batches = data.calibration_batches(config.micro_batch)
        trainer.add_callback(RefreshThresholds(trainer, batches, config.refresh_every))
    trainer.add_callback(KeepLog(trainer, folder / LOG_FILE, notify))
    clock = Clock(trainer)
    trainer.add_callback(clock)
    if importlib.util.find_spec("tensorboard") is not None:
        board = TensorBoardCallback()
        board.logging_dir = str(folder / "tensorboard")
        trainer.add_callback(board)
    # it would print every step where there is no progress bar
    trainer.pop_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(resume) if resume is not None else None)
    history = trainer.state.log_history
    if not any("evaluation" in entry and entry["step"] == trainer.state.global_step for entry in history):
        trainer.evaluate()
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder / ADAPTER if config.parameters == "lora" else folder))
    thresholds = thresholds_config(model)
    k = thresholds.sparsity if thresholds is not None else None
    return {
        "format": formats.FINETUNING,
        "version": formats.FINETUNING_VERSION,
        "name": config.method if k is None else f"{config.method} k={k:g}",
        "method": config.method,
        "sparsity": k,
        "settings": asdict(config),
        "data": data.record,
        "processes": arguments.world_size,
        "parameters": count_parameters(model),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions() | {"peft": version("peft")},
        "seconds": round(time.perf_counter() - started, 1),
        "training_seconds": round(clock.seconds, 2),
        **(record or {}),
        **split_history(history),
    }


def split_history(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The Trainer's history as a log file has it."""
    keys = ("step", "epoch", "loss", "grad_norm", "learning_rate")

    def finite(value: float) -> float | None:
        return value if known(value) else None  # JSON has no NaN

    return {
        "steps": [{key: finite(entry[key]) for key in keys if key in entry} for entry in history if "loss" in entry],
        "evaluations": [{"step": entry["step"], **entry["evaluation"]} for entry in history if "evaluation" in entry],
        "thresholds": [entry for entry in history if "thresholds" in entry],
    }
