"""Fine-tuning as one function: from a model and data to the folder of the trained model and its log."""

from dataclasses import asdict, replace
from typing import Any

import torch

from cats_llm import distributed
from cats_llm.calibration.batches import check_runs
from cats_llm.calibration.profile import Profile
from cats_llm.errors import CatsError
from cats_llm.loading import BASE, default_device
from cats_llm.model.architecture import check_predicts_tokens
from cats_llm.model.tokens import check_tokens
from cats_llm.number_format import number, percent
from cats_llm.outputs import check_output, write_folder, write_json
from cats_llm.text import TextSource, check_length
from cats_llm.training import run_folder
from cats_llm.training.config import LOG, FinetuneConfig, TrainingConfig
from cats_llm.training.data import Data, is_instructions, read_data
from cats_llm.training.methods import apply_method, check_base, choose_thresholds, final_config, resumed_config
from cats_llm.training.parameters import check_trainable, make_teacher, trained_model
from cats_llm.training.trainer import LOG_FILE, Notify, train, trainer_arguments

_TEXT_STEPS = 350  # the least of the paper's runs on text


def finetune(
    config: FinetuneConfig,
    *,
    force: bool = False,
    notify: Notify = lambda _: None,
    command: str = "",
    progress_bar: bool = False,
) -> dict[str, Any]:
    """Train through the thresholds, write the model to ``config.out``, and return the log.

    With several processes, as `accelerate launch` starts them, each takes its share of the work, and the first writes;
    `cats_llm.distributed.leave` ends their connection, when the caller has no more use for it.

    Args:
        force: replace what is there.
        notify: told of every measurement, and of the result.
        command: what started the run, for the log.
        progress_bar: draw one on stderr.

    Returns:
        The log, as in ``out/finetune.json`` (docs/finetuning.md says what is in it).

    Raises:
        CatsError: the model cannot be trained so, the data cannot be read, an output is in the way, a run cannot be
            resumed, or the training diverged.
    """
    check_output(config.out, force)
    device = config.source.device or default_device()
    source = replace(config.source, device=device, dtype=_training_dtype(config.source.dtype, device))
    training = _settled(config, source.dtype)
    profile = Profile.load(config.profile) if config.profile is not None else None
    skeleton = source.skeleton()
    _check(skeleton, config, profile)
    arguments = trainer_arguments(training, config.work, device, config.save_every, progress_bar)
    facts = {
        "model": source.model,
        "revision": source.revision,
        "dtype": source.dtype,
        "sparsity": config.sparsity,
        "profile": str(config.profile) if config.profile is not None else None,
        "settings": asdict(training),
        "sources": {"data": config.data, **asdict(config.reading)},
        "processes": arguments.world_size,
    }
    checkpoint = run_folder.begin(config.work, facts, config.resume, force)
    arguments.eval_on_start = checkpoint is None
    tokenizer = source.tokenizer()
    data = _read(config, training, skeleton, tokenizer)
    model = replace(source, device=str(arguments.device)).load()
    check_runs(model)
    thresholds = None
    if training.method == "cats":
        thresholds = resumed_config(checkpoint.history, model) if checkpoint is not None else None
        thresholds = thresholds or choose_thresholds(model, data, config.sparsity, profile, training.micro_batch)
    teacher = make_teacher(model, training) if training.loss == "distillation" else None
    apply_method(model, training.method, thresholds)
    record = {"model": source.model, "dtype": source.dtype, "device": str(arguments.device), "command": command}
    log = train(model, data, training, arguments, checkpoint.folder if checkpoint else None, notify, record, teacher)
    if log["evaluations"][-1]["loss"] is None:
        raise CatsError(
            f"the training diverged: the held-out loss is no number; choose a smaller --learning-rate than "
            f"{training.learning_rate:g} (the log is {config.work / LOG_FILE})."
        )
    if distributed.rank() == 0:
        del model, teacher
        base = replace(source, device="cpu").load()
        apply_method(base, training.method, final_config(log, base))
        _export(base, tokenizer, config, log, force)
        run_folder.finish(config.work)
        first, last = log["evaluations"][0], log["evaluations"][-1]
        notify(
            f"{log['name']}: held-out perplexity {_quality(first)} before, {_quality(last)} after {last['step']} steps"
        )
        merged = "the merged model" if training.parameters == "lora" else "the trained model"
        kind = "adapters, and their model in base/," if config.keep_adapters else merged
        notify(f"{config.out}: {kind} and the log, {LOG}")
    return log


def _quality(evaluation: dict[str, Any]) -> str:
    sparsity = f" at {percent(evaluation['sparsity']['gate'])} gate sparsity" if "sparsity" in evaluation else ""
    return number(evaluation["perplexity"]) + sparsity


def _training_dtype(dtype: str, device: str) -> str:
    if device not in ("cpu", "cuda"):
        raise CatsError(f"training takes --device cpu or cuda, not {device}; choose GPUs with CUDA_VISIBLE_DEVICES.")
    if dtype == "auto":
        return "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if dtype not in ("bfloat16", "float32"):
        raise CatsError(f"training takes --dtype bfloat16 or float32, not {dtype}, whose range is too small.")
    return dtype


def _settled(config: FinetuneConfig, dtype: str) -> TrainingConfig:
    """The training config with what was left to the data, the batch and the dtype."""
    training = config.training
    steps = training.steps
    if steps is None and training.epochs is None and not is_instructions(TextSource(config.data, config.reading.rows)):
        steps = _TEXT_STEPS
    return replace(
        training,
        steps=steps,
        epochs=training.epochs or 1.0,
        micro_batch=min(training.micro_batch, training.batch_size),
        bf16=dtype == "bfloat16",
    )


def _check(skeleton: Any, config: FinetuneConfig, profile: Profile | None) -> None:
    """Refuse, before gigabytes of weights are read, a model that cannot be trained so."""
    check_predicts_tokens(skeleton, "fine-tuning")
    check_base(skeleton.config, config.source.model)
    check_trainable(skeleton, config.training)
    check_length(config.reading.seq_length, skeleton.config)
    if profile is not None:
        profile.check_model(skeleton)


def _read(config: FinetuneConfig, training: TrainingConfig, skeleton: Any, tokenizer: Any) -> Data:
    """No more training examples than the steps need, and what is set aside."""
    reading = config.reading
    if reading.samples is None and training.steps is not None:
        needed = training.steps * training.batch_size + reading.heldout_samples + reading.calibration_samples
        reading = replace(reading, samples=needed)
    calibrates = training.method == "cats" and (
        training.refresh_every > 0 or (config.sparsity is not None and config.profile is None)
    )
    data = read_data(config.data, reading, tokenizer, training.seed, calibrates)
    for example in (*data.train, *data.heldout, *data.aside):
        check_tokens(skeleton, example["input_ids"], tokenizer)
    return data


def _export(base: Any, tokenizer: Any, config: FinetuneConfig, log: dict[str, Any], force: bool) -> None:
    """Write the fine-tuned model as a folder, with the log of its training.

    It is an ordinary checkpoint, CATS unless the method is dense. Where adapters are kept, the folder holds them, and
    the model that they were trained on in the folder ``base`` inside it, so that a program that knows nothing of
    adapters finds no model rather than half of one.

    Args:
        base: the model as it was before training, on the CPU, brought into the form of the method.
    """
    model = trained_model(base, config.training, config.work)
    with write_folder(config.out, force) as folder:
        if config.keep_adapters:
            model.peft_config["default"].base_model_name_or_path = str(config.out.resolve() / BASE)
            model.save_pretrained(folder, save_embedding_layers=False)
            model.unload().save_pretrained(folder / BASE)
            tokenizer.save_pretrained(folder / BASE)
        else:
            (model.merge_and_unload() if config.training.parameters == "lora" else model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / LOG, log)
