"""One run of fine-tuning, from a loaded model to its log and trained adapters."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PrinterCallback, TrainingArguments, set_seed

from cats_llm.checkpoint.config import QUANT_METHOD, CatsConfig
from cats_llm.errors import CatsError
from cats_llm.model.decode_linear import use_decode_linears
from cats_llm.model.relufy import relu_config, relufy
from cats_llm.model.sparsify import densify, set_config, sparse_mlps, sparsify
from cats_llm.model.structure import unwrap
from cats_llm.training.adapters import add_adapters
from cats_llm.training.data import Example
from cats_llm.training.settings import Settings
from cats_llm.training.trainer import (
    LOG_FILE,
    CatsTrainer,
    KeepLog,
    Notify,
    RefreshThresholds,
    split_history,
    tensorboard,
)
from cats_llm.versions import versions

FORMAT = "cats-finetune"
VERSION = 1
ADAPTER = "adapter"
"""The folder of the trained adapters, inside the folder of a run."""


@dataclass(frozen=True)
class Data:
    """What a run trains on and measures on; the same in every process.

    Attributes:
        train: see `cats_llm.training.data`.
        heldout: measured at intervals; never trained on.
        aside: for calibrating thresholds; never trained on where it comes from the training data.
        collate: makes batches, see `collator`.
        record: what it is, for the log.
    """

    train: list[Example]
    heldout: list[Example]
    aside: list[Example]
    collate: Callable[[Sequence[Example]], dict[str, Tensor]]
    record: dict[str, Any]

    def calibration_batches(self, size: int) -> list[dict[str, Tensor]]:
        """The examples set aside, in batches without labels."""
        batches = [self.collate(self.aside[i : i + size]) for i in range(0, len(self.aside), size)]
        return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]


def check_base(config: Any, name: str) -> None:
    """Refuse a base model whose weights are quantised.

    Raises:
        CatsError: they are.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    values = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = values.get("quant_method")
    if method != QUANT_METHOD:
        raise CatsError(
            f"{name} is quantised with {getattr(method, 'value', method)}, and adapters cannot be merged into such "
            "weights; start from the unquantised model."
        )


def apply_method(model: Any, method: str, config: CatsConfig | None = None) -> None:
    """Bring a loaded model, dense or CATS, into the form that is trained: the method's function, plain weights.

    Args:
        config: the thresholds, for the method cats; for relu what `final_config` says, if it is known yet.

    Raises:
        CatsError: the model cannot be made sparse, or cannot be ReLUfied.
    """
    if method == "dense":
        densify(model)
    elif method == "relu":
        relufy(model)
        if config is not None:
            set_config(model, config)
    else:
        assert config is not None
        if config.coverage.dense_prefill:
            raise CatsError(
                "with dense_prefill no token of a training text is sparse, so training would not see the thresholds; "
                "make the CATS model without --dense-prefill."
            )
        sparsify(model, config)
    # what decodes fastest is not what trains fastest, nor what FSDP can shard
    for mlp in sparse_mlps(model).values():
        mlp.store_neuron_major(False)
    use_decode_linears(model, False)


def label(method: str, config: CatsConfig | None) -> str:
    """The name of a run in tables: as `cats eval` names variants."""
    k = config.sparsity if method == "cats" and config is not None else None
    return method if k is None else f"{method} k={k:g}"


def train(
    model: Any,
    data: Data,
    settings: Settings,
    arguments: TrainingArguments,
    resume: Path | None = None,
    notify: Notify = lambda _: None,
    record: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train adapters on a model that `apply_method` prepared, and leave them in the run's folder.

    Args:
        model: gets adapters in place; its own weights are not trained.
        arguments: see `cats_llm.training.trainer.arguments`.
        resume: a checkpoint of the same run, to go on from.
        notify: told of every measurement.
        record: more for the log: the model's name, the command, the machine.

    Returns:
        The log (docs/finetuning.md says what is in it). The trained adapters are in ``arguments.output_dir/adapter``.

    Raises:
        CatsError: the layers for adapters are not found, or thresholds are to be refreshed that cannot be.
    """
    started = time.perf_counter()
    folder = Path(arguments.output_dir)
    set_seed(settings.seed)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = add_adapters(model, settings)
    trainer = CatsTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.heldout,
        data_collator=data.collate,
    )
    if settings.refresh_every:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise CatsError("thresholds cannot be refreshed while weights are sharded; leave out --refresh-thresholds.")
        asked: Any = unwrap(model).config
        if asked.quantization_config.sparsity is None:
            raise CatsError(
                "this CATS model's thresholds were not calibrated for a sparsity, so there is none to hold; pass "
                "--sparsity, or leave out --refresh-thresholds."
            )
        batches = data.calibration_batches(settings.micro_batch)
        trainer.add_callback(RefreshThresholds(trainer, batches, settings.refresh_every))
    trainer.add_callback(KeepLog(trainer, folder / LOG_FILE, notify))
    board = tensorboard(folder / "tensorboard") if trainer.is_world_process_zero() else None
    if board is not None:
        trainer.add_callback(board)
    # it would print every step where there is no progress bar
    trainer.pop_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(resume) if resume is not None else None)
    history = trainer.state.log_history
    if not any("evaluation" in entry and entry["step"] == trainer.state.global_step for entry in history):
        trainer.evaluate()
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder / ADAPTER))
    trained, total = model.get_nb_trainable_parameters()
    config = getattr(unwrap(model).config, "quantization_config", None)
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": label(settings.method, config),
        "method": settings.method,
        "sparsity": config.sparsity if config is not None else None,
        "settings": settings.to_dict(),
        "data": data.record,
        "processes": arguments.world_size,
        "parameters": {"trained": trained, "all": total},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions() | _peft(),
        "seconds": round(time.perf_counter() - started, 1),
        **(record or {}),
        **split_history(history),
    }


def resumed_config(history: list[dict[str, Any]], model: Any) -> CatsConfig | None:
    """The thresholds that held when a checkpoint was written.

    Args:
        model: the base model as it is loaded; vectors, which a log has no room for, are its own.

    Raises:
        CatsError: the run was begun with other vectors than the model has now.
    """
    found = [entry["thresholds"] for entry in history if "thresholds" in entry]
    if not found:
        return None
    config = CatsConfig(**found[-1])
    if config.vectors_are_loaded:
        return config
    own = getattr(unwrap(model).config, "quantization_config", None)
    if not isinstance(own, CatsConfig) or own != config:
        raise CatsError("the model has other thresholds than when the run was begun; begin again with --force.")
    return own


def final_config(log: dict[str, Any], model: Any) -> CatsConfig | None:
    """What a finished run's checkpoint says: the thresholds that it ended with.

    Args:
        model: the base model; of a ReLUfied one the sparsity that was measured goes into the config.
    """
    if log["method"] != "relu":
        return resumed_config(log["thresholds"], model)
    ended = relu_config(model)
    ended.layer_sparsity = log["evaluations"][-1]["layer_sparsity"]
    ended.calibration = {"model": log.get("model"), "data": log["data"]["heldout"], "versions": log["versions"]}
    return ended


def _peft() -> dict[str, str]:
    import peft

    return {"peft": peft.__version__}
