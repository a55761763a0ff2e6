"""`cats eval`: variants of a model on texts and tasks, in one table."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cats_llm import distributed
from cats_llm.calibration.calibrate import calibrate
from cats_llm.calibration.profile import Profile
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.checkpoint.token_policy import TokenPolicy
from cats_llm.cli import options
from cats_llm.cli.output import percent, progress_console, quiet_libraries, show, table, track
from cats_llm.errors import CatsError
from cats_llm.evaluation.cache import Cache, digest_model
from cats_llm.evaluation.evaluate import Evaluation, evaluate
from cats_llm.evaluation.methods import METHODS, Variant, make_variants
from cats_llm.evaluation.perplexity import PerplexityTask
from cats_llm.evaluation.run import Progress, run_evaluation
from cats_llm.evaluation.tasks import TASK_SETS, build_tasks
from cats_llm.loading import load_model, load_tokenizer
from cats_llm.model.sparsify import thresholds
from cats_llm.outputs import check_output, command_line, write_json
from cats_llm.text import RowFormat, TextSource, batched, check_length, load_sequences, same_text

if TYPE_CHECKING:
    from cats_llm.evaluation.task import Task

# sequences to calibrate on, where a text is given instead of a profile
_CALIBRATION_SAMPLES = 256


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(name="eval")(command)


def _sparsities(text: str) -> list[float]:
    return [options.parse_sparsity(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def command(
    model: options.Model,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|DATASET",
            help="Measure perplexity on a .txt, .jsonl or .parquet file, a folder, or a hub dataset. Repeatable.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help=f"Tasks of lm-eval, YAML files, or sets: {', '.join(TASK_SETS)}.",
            show_default=False,
        ),
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            metavar="K,...",
            help="Shares to skip, as 0,0.5,0.7,0.9: of neurons, or of inputs for methods that skip those; 0 is dense.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(metavar="NAME,...", help=f"Of {', '.join(METHODS)}; or criteria, as cats sparsify takes them."),
    ] = "cats",
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER", help="A saved checkpoint to evaluate beside MODEL. Repeatable.", show_default=False
        ),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="From cats calibrate, for the thresholds.", show_default=False)
    ] = None,
    calibration: options.CalibrationText = None,
    equal_bytes: Annotated[
        bool,
        typer.Option(
            "--equal-bytes",
            help="Let methods that skip inputs (teal, teal-greedy, wina) skip as many weights as CATS at the same K.",
        ),
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="BASE",
            show_default=False,
            help="The dense model to compare with. Default: MODEL's own weights without thresholds.",
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with the tasks' data, where there is no hub: TASK.jsonl.", show_default=False),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many documents a task.", show_default=False)
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompts. Default: each task's own.", show_default=False)
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put the tasks' prompts into the chat template.")
    ] = False,
    dense_prefill: options.DensePrefill = False,
    dense_first_tokens: options.DenseFirstTokens = 0,
    last_fraction: options.LastFraction = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="At most so many windows of a text. Default: all.", show_default=False)
    ] = None,
    seq_length: options.SeqLength = 1024,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens from the start of a window of text to that of the next. Default: no overlap.",
            show_default=False,
        ),
    ] = None,
    batch_size: options.BatchSize = 4,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Where measurements are kept, so that a stopped run goes on. Default: in CATS_CACHE or ~/.cache.",
            show_default=False,
        ),
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Measure everything again, and keep nothing.")] = False,
    text_column: options.TextColumn = "text",
    dataset_config: options.DatasetConfig = None,
    split: options.Split = "test",
    seed: options.Seed = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    json: options.JsonFile = None,
    force: options.Force = False,
) -> None:
    """Measure what sparsity costs: perplexity, distance to the dense model, accuracy on tasks, sparsity achieved.

    All variants see the same data, and differences to the dense model come with a paired test. A stopped run goes on
    where it was. Several GPUs: accelerate launch -m cats_llm.cli.main eval ..., or --device auto for one large model.

    Example: **cats eval mistralai/Mistral-7B-v0.1 --sparsity 0,0.5,0.7,0.9 --method cats,relu --profile p.safetensors
    --tasks paper8 --text heldout.txt --json result.json**
    """
    if json is not None:
        check_output(json, force)
    if not text and not tasks:
        raise typer.BadParameter("there is nothing to measure: pass --text, --tasks or both.")
    if profile is not None and calibration is not None:
        raise typer.BadParameter("pass either --profile or --calibration, not both.")
    asked = _sparsities(sparsity) if sparsity is not None else []
    methods = _names(method)
    coverage = TokenPolicy(dense_prefill, dense_first_tokens, last_fraction)
    quiet_libraries()
    device = distributed.join(device)
    loaded_profile = Profile.load(profile) if profile is not None else None
    _check_held_out(calibration or (loaded_profile.record.get("data") if loaded_profile else None), text or [], split)
    rows = RowFormat(text_column, dataset_config, split)
    work: list[Task] = [
        PerplexityTask(TextSource(source, rows), name, seq_length, stride, samples, seed)
        for name, source in _text_names(text or []).items()
    ]
    made, means = build_tasks(_names(tasks or ""), data_dir, limit, num_fewshot, apply_chat_template)
    work += made

    def load(name: str) -> Any:
        return load_model(name, dtype, device, revision if name == model else None, trust_remote_code)

    base = load(against or model)
    if text:
        check_length(seq_length, base.config)
    tokenizer = load_tokenizer(against or model, trust_remote_code=trust_remote_code)
    batches = None
    if calibration is not None:
        check_length(seq_length, base.config)
        source = TextSource(calibration, replace(rows, split="train"))
        sequences = list(load_sequences(source, tokenizer, seq_length, samples=_CALIBRATION_SAMPLES, seed=0))
        mine = sequences[distributed.rank() :: distributed.world_size()]
        tracked = batched(track(mine, "calibrating", len(mine)), batch_size)
        loaded_profile = calibrate(base, tracked, data=calibration)
        batches = list(batched(sequences, batch_size))
    variants = make_variants(
        base, methods if asked or methods != ["cats"] else [], asked, loaded_profile, coverage, batches, equal_bytes
    )
    own = _own_variant(base, against or model, coverage)
    if own is not None and against is None and len(variants) == 1:
        variants.append(own)
    for name in [*([model] if against is not None else []), *(checkpoint or [])]:
        variants.append(_from_checkpoint(load(name), base, name, coverage))
    result = run_evaluation(
        base,
        tokenizer,
        _unique(variants),
        work,
        name=model,
        batch_size=batch_size,
        cache=None if no_cache else Cache(cache or default_cache()),
        means=means,
        progress=show_progress,
        notify=notify,
        command=command_line(),
    )
    if distributed.rank() == 0:
        if json is not None:
            write_json(json, result, force)
        _show(result)


def _check_held_out(calibration: str | None, texts: list[str], split: str) -> None:
    """Refuse to report results on the text that thresholds were chosen on."""
    for text in texts:
        if calibration is not None and same_text(calibration, text) and (Path(text).exists() or split == "train"):
            raise CatsError(
                f"{text} is the text that the thresholds come from; results on it would be too good, so evaluate on "
                "another one."
            )


def _text_names(texts: list[str]) -> dict[str, str]:
    """A name for each text; "perplexity" if there is only one without a better name."""
    names: dict[str, str] = {}
    for text in texts:
        name = Path(text).stem or text
        while name in names:
            name += "'"
        names[name] = text
    return names


def _own_variant(base: Any, name: str, coverage: TokenPolicy) -> Variant | None:
    """The variant that a CATS checkpoint is by itself."""
    if not thresholds(base):
        return None
    return _cats_variant(base.config.quantization_config, name, coverage)


def _cats_variant(config: CatsConfig, name: str, coverage: TokenPolicy, model: Any = None) -> Variant:
    if not coverage.all_tokens:
        config = config.with_coverage(coverage)
    suffix = "" if config.coverage.all_tokens else f" ({config.coverage})"
    return Variant(Path(name).name + suffix, "cats", config, model)


def _from_checkpoint(model: Any, base: Any, name: str, coverage: TokenPolicy) -> Variant:
    """A saved checkpoint as a variant; one with the weights of the base model needs none of its own."""
    same = digest_model(model) == digest_model(base)
    if thresholds(model):
        return _cats_variant(model.config.quantization_config, name, coverage, None if same else model)
    return Variant(Path(name).name, "dense", None, None if same else model)


def _unique(variants: list[Variant]) -> list[Variant]:
    names: set[str] = set()
    unique = []
    for variant in variants:
        name = variant.name
        while name in names:
            name += "'"
        names.add(name)
        unique.append(replace(variant, name=name))
    return unique


def default_cache() -> Path:
    """Where measurements are kept if the user names no place."""
    root = os.environ.get("CATS_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "cats-llm") / "eval"


def notify(message: str) -> None:
    """Tell the user, once for all processes."""
    if distributed.rank() == 0:
        progress_console.print(message)


def show_progress(step: Progress) -> None:
    """Tell the user what was measured, and what time is left."""
    first = step.measurement.metrics[0] if step.measurement.metrics else None
    value = f"{first.name} {_number(first.value)}" if first is not None else "no metric"
    how = "known already" if step.cached else f"{step.seconds:.0f} s"
    left = "" if not step.left else f", about {_duration(step.left)} left"
    notify(f"[{step.done}/{step.total}] {step.variant} on {step.task}: {value} ({how}){left}")


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def run(
    model: Any,
    tokenizer: Any,
    text: TextSource | str,
    *,
    reference: Any = None,
    samples: int | None = None,
    length: int = 1024,
    batch_size: int = 4,
) -> Evaluation:
    """Evaluate one model on a text source, with a progress bar."""
    check_length(length, model.config)
    sequences = load_sequences(text, tokenizer, length, samples=samples)
    return evaluate(model, batched(track(sequences, "evaluating", samples), batch_size), reference)


def _show(result: dict[str, Any]) -> None:
    show(f"{result['model']}, {result['dtype']} on {result['device']}")
    columns = ("variant", "value", "± stderr", "minus dense", "95 %", "p", "gate", "FFN", "model")
    for task in result["tasks"]:
        rows = [row for row in result["results"] if row["task"] == task["name"]]
        unit = "windows" if task["kind"] == "perplexity" else "documents"
        number = f", {task['documents']} {unit}" if "documents" in task else ""
        show(
            f"\n{task['name']} ({task['data']}{number}); sparsity achieved on it: of neurons, MLP weights, all weights"
        )
        shown = table("measure", *columns)
        for metric in dict.fromkeys(row["metric"] for row in rows):
            for row in rows:
                if row["metric"] == metric:
                    shown.add_row(metric, *_cells(row))
            shown.add_section()
        show(shown)
    _show_layers(result)
    for sentence in _units(result["variants"]):
        show(sentence)
    show("minus dense: on the same documents; p is of a paired test, its kind is in the JSON file.")


def _cells(row: dict[str, Any]) -> list[str]:
    difference = row["difference"]
    if difference is None:
        compared = ["-"] * 3
    else:
        p = f"{difference['p']:.4f}" if difference["p"] >= 1e-4 else "< 0.0001"
        compared = [f"{difference['value']:+.4f}", f"{difference['low']:+.4f} to {difference['high']:+.4f}", p]
    shares = row["sparsity"]
    sparse = ["-"] * 3 if row["variant"] == "dense" else [percent(shares[k]) for k in ("gate", "ffn", "model")]
    return [row["variant"], _number(row["value"]), _number(row["stderr"]), *compared, *sparse]


def _units(variants: list[dict[str, Any]]) -> list[str]:
    """What k means, where not all variants mean the same by it."""
    inputs = [variant for variant in variants if variant["unit"] == "inputs"]
    names = ", ".join(dict.fromkeys(variant["method"] for variant in inputs))
    equal = dict.fromkeys((v["equal_bytes"], v["sparsity"]) for v in inputs if v["equal_bytes"] is not None)
    if equal:
        shares = ", ".join(f"{percent(share)} for k={k:g}" for k, share in equal)
        return [
            f"At equal bytes: {names} skip that share of the inputs of all linear layers that saves as many weights as "
            f"CATS at gate sparsity k ({shares}). Simulated."
        ]
    if inputs:
        return [
            f"At equal k, not equal bytes: for {names} k is the share of the inputs of all linear layers, for the "
            "others of the neurons of every MLP; compare the column model, or pass --equal-bytes. Simulated."
        ]
    return []


def _show_layers(result: dict[str, Any]) -> None:
    """Thresholds and sparsity a layer of the variants that have thresholds, on the first task."""
    first = result["tasks"][0]["name"]
    for variant in result["variants"]:
        if variant["thresholds"] is None:
            continue
        row = next(r for r in result["results"] if r["task"] == first and r["variant"] == variant["name"])
        show(f"\n{variant['name']} on {first}, layer by layer")
        layers = table("layer", "threshold", "sparsity at calibration", "measured here")
        for layer, threshold in variant["thresholds"].items():
            expected = variant["layer_sparsity"].get(layer)
            layers.add_row(layer, f"{threshold:.5f}", percent(expected), percent(row["layer_sparsity"].get(layer)))
        show(layers)
