"""`cats calibrate`: text through the dense model, to a profile."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from cats_llm import distributed
from cats_llm.calibration.calibrate import calibrate
from cats_llm.calibration.profile import Profile
from cats_llm.cli import options
from cats_llm.cli.output import quiet_libraries, show, table, track
from cats_llm.loading import load_model, load_skeleton, load_tokenizer
from cats_llm.model.architecture import check_reads_text
from cats_llm.model.structure import find_gated_mlps
from cats_llm.outputs import check_output, write_json
from cats_llm.text import RowFormat, TextSource, batched, check_length, load_sequences

Data = Annotated[
    str,
    typer.Option(
        metavar="FILE|DATASET", help="A .txt, .jsonl or .parquet file, a folder, or a hub dataset.", show_default=False
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="At most so many sequences.")]


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(name="calibrate")(command)


def command(
    model: options.Model,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile to write.", show_default=False)],
    samples: Samples = 256,
    seq_length: options.SeqLength = 1024,
    batch_size: options.BatchSize = 4,
    text_column: options.TextColumn = "text",
    dataset_config: options.DatasetConfig = None,
    split: options.Split = "train",
    seed: options.Seed = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    json: options.JsonFile = None,
    force: options.Force = False,
) -> None:
    """Record how large a model's gate activations are, for thresholds at any sparsity.

    Example: **cats calibrate mistralai/Mistral-7B-v0.1 --data tiiuae/falcon-refinedweb --text-column content
    -o mistral.safetensors**
    """
    for path in (output, json):
        if path is not None:
            check_output(path, force)
    quiet_libraries()
    # before gigabytes of weights are read
    skeleton = load_skeleton(model, revision, trust_remote_code)
    check_reads_text(skeleton)
    find_gated_mlps(skeleton)
    profile = run(
        load_model(model, dtype, device, revision, trust_remote_code),
        load_tokenizer(model, revision, trust_remote_code),
        TextSource(data, RowFormat(text_column, dataset_config, split)),
        samples=samples,
        length=seq_length,
        batch_size=batch_size,
        seed=seed,
    )
    profile.save(output, force)
    summary = summarise(profile)
    if json is not None:
        write_json(json, summary, force)
    show(f"thresholds of {model}")
    rows = table("layer", *(f"t at {k}" for k in summary["thresholds"]))
    for layer in profile.layers:
        rows.add_row(str(layer), *(f"{values[layer]:.4f}" for values in summary["thresholds"].values()))
    show(rows)
    show(f"{profile.record['tokens']} tokens in {profile.record['sequences']} sequences; profile written to {output}")


def run(
    model: Any,
    tokenizer: Any,
    data: TextSource | str,
    *,
    samples: int,
    length: int,
    batch_size: int,
    seed: int | None = None,
) -> Profile:
    """Calibrate on a text source, with a progress bar. Of several processes each takes its share."""
    sequences = _sequences(model, tokenizer, data, samples, length, seed)
    batches = batched(track(sequences, "calibrating", samples), batch_size)
    return calibrate(model, batches, TextSource.of(data).path, tokenizer)


def load_batches(
    model: Any,
    tokenizer: Any,
    data: TextSource | str,
    *,
    samples: int,
    length: int,
    batch_size: int,
    seed: int | None = None,
) -> list[Tensor]:
    """The same text as `run` takes, for what goes over it several times."""
    return list(batched(_sequences(model, tokenizer, data, samples, length, seed), batch_size))


def _sequences(
    model: Any, tokenizer: Any, data: TextSource | str, samples: int, length: int, seed: int | None
) -> Iterator[Tensor]:
    check_length(length, model.config)
    sequences = load_sequences(data, tokenizer, length, samples=samples, seed=seed)
    return islice(sequences, distributed.rank(), None, distributed.world_size())


def summarise(profile: Profile) -> dict[str, Any]:
    """The record, and thresholds at the paper's sparsities."""
    configs = {k: profile.config(k) for k in (0.5, 0.7, 0.9)}
    return {
        "record": profile.record,
        "thresholds": {str(k): config.thresholds for k, config in configs.items()},
        "layer_sparsity": {str(k): config.layer_sparsity for k, config in configs.items()},
    }
