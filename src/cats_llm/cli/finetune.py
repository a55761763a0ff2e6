"""`cats finetune`: LoRA through the thresholds, and a checkpoint of what comes out."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cats_llm.cli import options
from cats_llm.cli.output import percent, quiet_libraries, show
from cats_llm.errors import CatsError
from cats_llm.outputs import check_output, command_line, write_json

_LEAST_STEPS = 350  # of the paper's runs on text


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(name="finetune")(command)


def command(
    model: options.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE|DATASET",
            help="Text as for cats calibrate, or instructions: rows with prompt and completion, or messages.",
            show_default=False,
        ),
    ],
    sparsity: Annotated[
        float | None,
        typer.Option(
            parser=options.parse_sparsity,
            metavar="K",
            help="For the method cats: share of MLP neurons to skip. A CATS model may keep its thresholds without it.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="cats, relu (ReLU in place of the activation) or dense (training as usual).")
    ] = "cats",
    heldout: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DATASET",
            help="Measured at intervals. Default: set aside from the data.",
            show_default=False,
        ),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Thresholds of the base model, from cats calibrate.", show_default=False)
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DATASET",
            help="Text for thresholds without a profile. Default: set aside from the data.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Optimizer steps. Default: 350 on text, --epochs on instructions.", show_default=False
        ),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(min=0.0, help="Passes over the data. Default: 1 on instructions.", show_default=False),
    ] = None,
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr", min=0.0, help="Of AdamW.")] = 1e-5,
    schedule: Annotated[str, typer.Option(help="Of the learning rate: constant, linear or cosine.")] = "constant",
    warmup_steps: Annotated[int, typer.Option(min=0, help="Steps until the full learning rate.")] = 0,
    weight_decay: Annotated[float, typer.Option(min=0.0, help="Of AdamW.")] = 0.01,
    max_grad_norm: Annotated[float, typer.Option(min=0.0, help="Clip the gradient; 0: never.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a step, over all GPUs.")] = 16,
    micro_batch: Annotated[int, typer.Option(min=1, help="Examples computed at a time on a GPU.")] = 4,
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 64,
    lora_alpha: Annotated[int, typer.Option(min=1, help="Adapters count alpha / rank times.")] = 16,
    lora_dropout: Annotated[float, typer.Option(min=0.0, max=0.99, help="On the adapters' input.")] = 0.1,
    lora_targets: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Linear layers that get adapters. Default: q_proj, v_proj, gate_proj, up_proj, down_proj, or what the "
            "model has in their place.",
            show_default=False,
        ),
    ] = None,
    refresh_thresholds: Annotated[
        int, typer.Option(metavar="N", min=0, help="Calibrate again every N steps; 0: never, as in the paper.")
    ] = 0,
    eval_every: Annotated[int, typer.Option(min=1, help="Steps between measurements on held-out data.")] = 50,
    save_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints to resume from; 0: none.")] = 100,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.training, if there is one.")
    ] = False,
    keep_adapters: Annotated[
        bool,
        typer.Option(
            "--keep-adapters/--merge",
            help="Keep the adapters beside their base model, or merge them into its weights.",
        ),
    ] = False,
    seq_length: options.SeqLength = 1024,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many examples. Default: what the steps need.", show_default=False),
    ] = None,
    heldout_samples: Annotated[int, typer.Option(min=1, help="At most so many held-out examples.")] = 32,
    calibration_samples: Annotated[int, typer.Option(min=1, help="At most so many examples for thresholds.")] = 64,
    text_column: options.TextColumn = "text",
    dataset_config: options.DatasetConfig = None,
    split: options.Split = "train",
    seed: Annotated[int, typer.Option(min=0, help="Of the adapters' start, the order of the data and dropout.")] = 0,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Save memory: compute each layer twice.")
    ] = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    device: options.Device = None,
    dtype: Annotated[
        str,
        typer.Option(help="Of the base model: bfloat16 or float32; auto: bfloat16 on a GPU that has it, else float32."),
    ] = "auto",
    json: options.JsonFile = None,
    force: options.Force = False,
) -> None:
    """Recover quality: train LoRA adapters on a CATS, ReLUfied or dense model, and write the result as a checkpoint.

    The defaults are the paper's settings. For several GPUs, start it with `accelerate launch -m cats_llm.cli.main
    finetune ...` or torchrun; the batch is divided among them.

    Example: **cats finetune mistralai/Mistral-7B-v0.1 mistral-cats70 --sparsity 0.7 --data tiiuae/falcon-refinedweb
    --text-column content**
    """
    for path in (out, json):
        if path is not None:
            check_output(path, force)
    _check_usage(method, sparsity, profile, calibration, steps, epochs)
    # these import much
    import torch.distributed as dist

    from cats_llm import distributed
    from cats_llm.calibration.batches import check_runs
    from cats_llm.calibration.profile import Profile
    from cats_llm.loading import default_device, load_model, load_skeleton, load_tokenizer
    from cats_llm.model.architecture import check_predicts_tokens
    from cats_llm.model.tokens import check_tokens
    from cats_llm.text import RowFormat, check_length
    from cats_llm.training import prepare, run, trainer, write
    from cats_llm.training.adapters import adaptable
    from cats_llm.training.settings import Settings

    quiet_libraries()
    device = device or default_device()
    dtype = _dtype(dtype, device)
    sources = prepare.Sources(
        data,
        heldout,
        calibration,
        seq_length,
        samples,
        heldout_samples,
        calibration_samples,
        RowFormat(text_column, dataset_config, split),
    )
    if steps is None and epochs is None and not sources.instructions(data):
        steps = _LEAST_STEPS
    settings = Settings(
        method=method,
        steps=steps,
        epochs=epochs or 1.0,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        batch_size=batch_size,
        micro_batch=min(micro_batch, batch_size),
        rank=lora_rank,
        alpha=lora_alpha,
        dropout=lora_dropout,
        targets=tuple(lora_targets.split(",")) if lora_targets is not None else None,
        seed=seed,
        eval_every=eval_every,
        refresh_every=refresh_thresholds,
        bf16=dtype == "bfloat16",
        gradient_checkpointing=gradient_checkpointing,
    )
    given = Profile.load(profile) if profile is not None else None
    # before gigabytes of weights are read
    skeleton = load_skeleton(model, revision, trust_remote_code)
    check_predicts_tokens(skeleton, "fine-tuning")
    run.check_base(skeleton.config, model)
    adaptable(skeleton, settings.targets)
    check_length(seq_length, skeleton.config)
    if given is not None:
        given.check_model(skeleton)
    work = out.with_name(f"{out.name}.training")
    arguments = trainer.arguments(settings, work, device, save_every, sys.stderr.isatty())
    try:
        facts = {
            "model": model,
            "revision": revision,
            "dtype": dtype,
            "sparsity": sparsity,
            "profile": str(profile) if profile is not None else None,
            "settings": settings.to_dict(),
            "sources": asdict(sources),
            "processes": arguments.world_size,
        }
        resumed = prepare.begin(work, facts, resume, force)
        arguments.eval_on_start = resumed is None
        tokenizer = load_tokenizer(model, revision, trust_remote_code)
        if samples is None and steps is not None and epochs is None:
            sources = sources.enough_for(steps * batch_size)
        needed = method == "cats" and (refresh_thresholds > 0 or (sparsity is not None and given is None))
        examples = sources.read(tokenizer, seed, needed)
        for example in [*examples.train, *examples.heldout, *examples.aside]:
            check_tokens(skeleton, example["input_ids"], tokenizer)

        def load(where: str) -> Any:
            return load_model(model, dtype, where, revision, trust_remote_code)

        loaded = load(str(arguments.device))
        check_runs(loaded)
        config = None
        if method == "cats":
            before = run.resumed_config(resumed[1], loaded) if resumed is not None else None
            config = before or prepare.choose_thresholds(loaded, examples, sparsity, given, settings.micro_batch)
        run.apply_method(loaded, method, config)
        log = run.train(
            loaded,
            examples,
            settings,
            arguments,
            resumed[0] if resumed is not None else None,
            show,
            {"model": model, "dtype": dtype, "device": str(arguments.device), "command": command_line()},
        )
        if log["evaluations"][-1]["loss"] is None:
            raise CatsError(
                f"the training diverged: the held-out loss is no number; choose a smaller --learning-rate than "
                f"{learning_rate:g} (the log is {work / trainer.LOG_FILE})."
            )
        if distributed.rank() == 0:
            del loaded
            base = load("cpu")
            run.apply_method(base, method, run.final_config(log, base))
            write.write_result(base, work / run.ADAPTER, tokenizer, out, log, not keep_adapters, force)
            prepare.finish(work)
            if json is not None:
                write_json(json, log, force)
            _summarise(out, log, keep_adapters)
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def _check_usage(
    method: str,
    sparsity: float | None,
    profile: Path | None,
    calibration: str | None,
    steps: int | None,
    epochs: float | None,
) -> None:
    if steps is not None and epochs is not None:
        raise typer.BadParameter("pass --steps or --epochs, not both.")
    if profile is not None and calibration is not None:
        raise typer.BadParameter("pass --profile or --calibration, not both.")
    if method != "cats" and (sparsity is not None or profile is not None or calibration is not None):
        raise typer.BadParameter(f"--sparsity, --profile and --calibration have no meaning for the method {method}.")
    if sparsity is None and profile is not None:
        raise typer.BadParameter("--profile gives thresholds only together with --sparsity.")


def _dtype(dtype: str, device: str) -> str:
    import torch

    if device not in ("cpu", "cuda"):
        raise CatsError(f"training takes --device cpu or cuda, not {device}; choose GPUs with CUDA_VISIBLE_DEVICES.")
    if dtype == "auto":
        return "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if dtype not in ("bfloat16", "float32"):
        raise CatsError(f"training takes --dtype bfloat16 or float32, not {dtype}, whose range is too small.")
    return dtype


def _summarise(out: Path, log: dict[str, Any], kept: bool) -> None:
    first, last = log["evaluations"][0], log["evaluations"][-1]

    def told(found: dict[str, Any]) -> str:
        perplexity = "not finite" if found["perplexity"] is None else f"{found['perplexity']:.4g}"
        sparsity = f" at {percent(found['sparsity']['gate'])} gate sparsity" if "sparsity" in found else ""
        return f"{perplexity}{sparsity}"

    show(f"{log['name']}: held-out perplexity {told(first)} before, {told(last)} after {last['step']} steps")
    kind = "adapters, and their model in base/," if kept else "the merged model"
    show(f"{out}: {kind} and the log, finetune.json")
