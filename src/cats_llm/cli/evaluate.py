"""`cats eval`: perplexity, distance to the dense model, achieved sparsity."""

from typing import Annotated, Any

import typer

from cats_llm.checkpoint.files import check_output, write_json
from cats_llm.cli import options
from cats_llm.cli.output import percent, quiet_libraries, show, table, track
from cats_llm.evaluation.evaluate import Evaluation, evaluate
from cats_llm.loading import load_model, load_tokenizer
from cats_llm.model.surgery import thresholds
from cats_llm.text import batched, load_sequences


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(name="eval")(command)


def command(
    model: options.Model,
    text: Annotated[
        str,
        typer.Option(
            metavar="FILE|DATASET",
            help="A .txt, .jsonl or .parquet file, a folder, or a hub dataset.",
            show_default=False,
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="BASE",
            show_default=False,
            help="The model to compare with. Default for a CATS model: its own weights without thresholds.",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="At most so many sequences. Default: all.", show_default=False)
    ] = None,
    seq_length: options.SeqLength = 1024,
    batch_size: options.BatchSize = 4,
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
    """Measure perplexity, the distance to the dense model, and the sparsity achieved on a text.

    Sequences follow each other without overlap; every token but a sequence's first is predicted, all computed sparsely.

    Example: **cats eval mistral-cats50 --text heldout.txt --json result.json**
    """
    if json is not None:
        check_output(json, force)
    quiet_libraries()
    loaded = load_model(model, dtype, device, revision, trust_remote_code)
    tokenizer = load_tokenizer(model, revision, trust_remote_code)
    reference = None
    if against is not None:
        reference = load_model(against, dtype, device, trust_remote_code=trust_remote_code)
    elif thresholds(loaded):
        reference = loaded
    result = run(
        loaded,
        tokenizer,
        text,
        reference=reference,
        samples=samples,
        length=seq_length,
        batch_size=batch_size,
        seed=seed,
        text_column=text_column,
        dataset_config=dataset_config,
        split=split,
    )
    compared = against or ("its own weights without thresholds" if reference is not None else None)
    if json is not None:
        facts = {
            "model": model,
            "against": compared,
            "text": text,
            "seq_length": seq_length,
            "dtype": str(loaded.dtype),
        }
        write_json(json, facts | result.to_dict(), force)
    _show(result, loaded, model, text, compared)


def run(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    reference: Any = None,
    samples: int | None = None,
    length: int = 1024,
    batch_size: int = 4,
    **reading: Any,
) -> Evaluation:
    """Evaluate on a text source, with a progress bar. ``reading`` goes to `load_sequences`."""
    options.check_length(length, model.config)
    sequences = load_sequences(text, tokenizer, length, samples=samples, **reading)
    return evaluate(model, batched(track(sequences, "evaluating", samples), batch_size), reference)


def _show(result: Evaluation, model: Any, name: str, text: str, compared: str | None) -> None:
    show(f"{name} on {text}, {result.tokens} tokens")
    facts = table("measure", "value")
    facts.add_row("perplexity", f"{result.perplexity:.4f}")
    if result.kl is not None:
        facts.add_row(f"KL to {compared}, nats a token", f"{result.kl:.5f}")
        facts.add_row("top-1 agreement with it", percent(result.top1_agreement))
    if not result.layer_sparsity:
        facts.add_row("sparsity", "dense model")
        show(facts)
        return
    facts.add_row("gate sparsity (neurons skipped)", percent(result.sparsity.gate))
    facts.add_row("FFN sparsity (MLP weights skipped)", percent(result.sparsity.ffn))
    facts.add_row("model sparsity (linear weights skipped)", percent(result.sparsity.model))
    show(facts)
    layers = table("layer", "threshold", "sparsity at calibration", "measured here")
    config = model.config.quantization_config
    for layer, threshold in config.thresholds.items():
        expected = config.layer_sparsity.get(layer)
        layers.add_row(str(layer), f"{threshold:.5f}", percent(expected), percent(result.layer_sparsity[layer]))
    show(layers)
