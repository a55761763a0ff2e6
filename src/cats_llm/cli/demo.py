"""`cats demo`: the whole job on the bundled model and real text."""

import time
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.text import Text

from cats_llm import bundled
from cats_llm.calibration.calibrate import calibrate
from cats_llm.calibration.profile import Profile
from cats_llm.calibration.sampling import Sampling
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.checkpoint.write import write_checkpoint
from cats_llm.cli import options
from cats_llm.cli.output import percent, quiet_libraries, show, table, track
from cats_llm.continuation import Decoding, continue_prompt
from cats_llm.errors import CatsError
from cats_llm.evaluation.evaluate import Evaluation, evaluate
from cats_llm.loading import load_model, load_tokenizer
from cats_llm.model.sparsify import densify, sparsify
from cats_llm.model.weight_traffic import sparsity_of
from cats_llm.outputs import check_output, write_folder, write_json
from cats_llm.report import data as report_data
from cats_llm.report.extra import require_extra
from cats_llm.report.html import write_html
from cats_llm.text import batched, load_sequences

SPARSITIES = (0.5, 0.7, 0.9)
PROMPTS = (
    "Once upon a time there was a little girl who",
    "The king looked at the fox and said,",
    "It was a cold winter night, and the wind",
)
_SEQ_LENGTH = 512


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(name="demo")(command)


def command(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")] = Path("cats-demo"),
    samples: Annotated[int, typer.Option(min=1, help="Sequences of 512 tokens to calibrate and to evaluate on.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the continuations.")] = 60,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    json: options.JsonFile = None,
    force: options.Force = False,
) -> None:
    """Calibrate, sparsify, save, reload, evaluate and generate with the bundled model, and write a report.

    Needs no network and about a minute on two cores. Everything ends in the folder OUT: the profile, three CATS
    checkpoints, results.json and report.html.

    Example: **cats demo --out cats-demo**
    """
    for path in (out, json):
        if path is not None:
            check_output(path, force)
    try:
        require_extra()
    except ImportError as error:
        raise CatsError(str(error)) from error
    quiet_libraries()
    started = time.perf_counter()
    source = str(bundled.model_path())
    dense = load_model(source, dtype, device)
    tokenizer = load_tokenizer(source)
    # a seed, so that all of the books are drawn from
    sampling = Sampling(samples, _SEQ_LENGTH, batch_size=8, seed=0)
    text = str(bundled.calibration_text())
    batches = track(sampling.batches(text, tokenizer, dense), "calibrating", sampling.most_batches())
    profile = calibrate(dense, batches, text, tokenizer)
    texts: dict[str, dict[str, str]] = {prompt: {} for prompt in PROMPTS}
    runs = [_run("dense", None, dense, None, tokenizer, texts, samples, max_new_tokens)]
    with write_folder(out, force) as folder:
        profile.save(folder / "profile.safetensors")
        for k in SPARSITIES:
            name, config = f"cats-{100 * k:.0f}", profile.config(k)
            write_checkpoint(Path(source), folder / name, config)
            sparse = load_model(str(folder / name), dtype, device)
            _check_reloaded(sparse, dense, config, tokenizer)
            runs.append(_run(name, config, sparse, dense, tokenizer, texts, samples, max_new_tokens))
        write_html(_report(dense, profile, runs, texts), folder / "report.html")
        results = _results(profile, runs, texts)
        write_json(folder / "results.json", results)
    if json is not None:
        write_json(json, results, force)
    _show(runs, texts)
    show("The reloaded checkpoints give the logits of the models they were saved from, to the bit.")
    show(f"Written to {out} in {time.perf_counter() - started:.0f} s; open {out / 'report.html'} in a browser.")


@dataclass(frozen=True)
class _Run:
    """One model of the table; ``config`` is None for the dense one."""

    name: str
    config: CatsConfig | None
    evaluation: Evaluation


def _run(
    name: str,
    config: CatsConfig | None,
    model: Any,
    reference: Any,
    tokenizer: Any,
    texts: dict[str, dict[str, str]],
    samples: int,
    max_new_tokens: int,
) -> _Run:
    """Evaluate a model and let it continue every prompt, into ``texts``."""
    heldout = str(bundled.heldout_text())
    sequences = load_sequences(heldout, tokenizer, _SEQ_LENGTH, samples=samples)
    evaluation = evaluate(model, batched(track(sequences, "evaluating", samples), 8), reference)
    for prompt, continuations in texts.items():
        result = continue_prompt(model, tokenizer, prompt, Decoding(max_new_tokens))
        continuations[name] = str(result["text"])
    return _Run(name, config, evaluation)


@torch.no_grad()
def _check_reloaded(reloaded: Any, dense: Any, config: CatsConfig, tokenizer: Any) -> None:
    """Compare the checkpoint with the model in memory, made sparse by the same config."""
    ids = torch.stack(list(islice(load_sequences(str(bundled.heldout_text()), tokenizer, _SEQ_LENGTH), 1)))
    ids = ids.to(dense.device)
    expected = sparsify(dense, config)(ids).logits
    densify(dense)
    if not torch.equal(reloaded(ids).logits, expected):
        raise CatsError(
            "the reloaded checkpoint gives other logits than the model it was saved from; please report it."
        )


def _worst(config: CatsConfig, layer_sparsity: dict[int, float]) -> float:
    """The largest deviation of a layer's sparsity from the one asked for."""
    return max(abs(share - (config.sparsity or 0.0)) for share in layer_sparsity.values())


def _show(runs: list[_Run], texts: dict[str, dict[str, str]]) -> None:
    dense = runs[0].evaluation
    show(f"Gate sparsity asked for and achieved; quality on {dense.tokens} held-out tokens")
    columns = ("calibration", "held-out", "of all weights", "perplexity", "change", "KL (nats)", "top-1")
    rows = table("model", *columns)
    for run in runs:
        result, config = run.evaluation, run.config
        if config is None:
            rows.add_row(run.name, "-", "-", "-", f"{result.perplexity:.3f}", "-", "-", "-")
            continue
        mean = sum(config.layer_sparsity.values()) / len(config.layer_sparsity)
        rows.add_row(
            f"CATS {percent(config.sparsity, 0)}",
            f"{percent(mean)} ± {100 * _worst(config, config.layer_sparsity):.2f}",
            f"{percent(result.sparsity.gate)} ± {100 * _worst(config, result.layer_sparsity):.2f}",
            percent(result.sparsity.model, 1),
            f"{result.perplexity:.3f}",
            f"{100 * (result.perplexity / dense.perplexity - 1):+.1f} %",
            f"{result.kl:.4f}",
            percent(result.top1_agreement, 1),
        )
    show(rows)
    show("± is the worst layer's distance, in points, from the sparsity asked for. Speed says nothing here, for")
    show("a model this small fits the caches: cats bench decode measures it at the size of real models.\n")
    for prompt, continuations in texts.items():
        for name in (runs[0].name, runs[1].name):
            show(Text.assemble((name, "bold"), f": {prompt}", (continuations[name], "italic")))
        show("")


def _results(profile: Profile, runs: list[_Run], texts: dict[str, dict[str, str]]) -> dict[str, Any]:
    return {
        "calibration": profile.record,
        "configs": {run.name: run.config.to_dict() for run in runs if run.config is not None},
        "evaluations": {run.name: run.evaluation.to_dict() for run in runs},
        "continuations": texts,
    }


def _report(dense: Any, profile: Profile, runs: list[_Run], texts: dict[str, dict[str, str]]) -> report_data.Report:
    variants = [
        report_data.Variant(
            name=run.name,
            target_sparsity=run.config.sparsity if run.config else None,
            thresholds=run.config.thresholds if run.config else {},
            calibration_sparsity=run.config.layer_sparsity if run.config else {},
            measured_sparsity=run.evaluation.layer_sparsity,
            gate_sparsity=run.evaluation.sparsity.gate,
            ffn_sparsity=run.evaluation.sparsity.ffn,
            model_sparsity=run.evaluation.sparsity.model,
            perplexity=run.evaluation.perplexity,
            kl=run.evaluation.kl,
            top1_agreement=run.evaluation.top1_agreement,
        )
        for run in runs
    ]
    distributions = [
        report_data.LayerDistribution(layer, d.edges.tolist(), d.counts.tolist(), d.maximum)
        for layer, d in profile.layers.items()
    ]
    record = profile.record
    parameters = sum(p.numel() for p in dense.parameters())
    return report_data.Report(
        title="CATS on the bundled model",
        model={
            "model": "the bundled demo model",
            "architecture": type(dense).__name__,
            "parameters": f"{parameters / 1e6:.2f} million",
            "dtype": record["dtype"],
            "share of linear weights in MLPs": percent(
                sparsity_of(dense, dict.fromkeys(profile.layers, 1.0)).model * 1.5
            ),
        },
        calibration={
            "text": "public-domain books (Project Gutenberg)",
            "tokens": str(record["tokens"]),
            "sequences": f"{record['sequences']} of {_SEQ_LENGTH} tokens",
            "date": record["date"],
        },
        evaluation={
            "text": "other public-domain books, never trained or calibrated on",
            "predicted tokens": str(runs[0].evaluation.tokens),
            "protocol": f"sequences of {_SEQ_LENGTH} tokens without overlap, every token sparse",
        },
        distributions=distributions,
        variants=variants,
        continuations=[report_data.Continuation(prompt, dict(found)) for prompt, found in texts.items()],
        command="cats demo",
        versions=record["versions"],
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
