"""`cats calibrate`: text through the dense model, to a profile."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from cats_llm import distributed
from cats_llm.calibration.calibrate import calibrate
from cats_llm.calibration.profile import Profile
from cats_llm.calibration.sampling import Sampling
from cats_llm.cli.output import Results, quiet_libraries, show, table, track
from cats_llm.loading import ModelSource
from cats_llm.model.architecture import check_reads_text
from cats_llm.model.structure import find_gated_mlps
from cats_llm.options import Panel
from cats_llm.text import RowFormat, TextSource


def command(
    source: ModelSource,
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE|DATASET",
            help="A .txt, .jsonl or .parquet file, a folder, or a hub dataset.",
            show_default=False,
            rich_help_panel=Panel.DATA,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The profile to write.", show_default=False, rich_help_panel=Panel.OUTPUT),
    ],
    sampling: Sampling,
    rows: RowFormat,
    results: Results,
) -> None:
    """Record how large a model's gate activations are, for thresholds at any sparsity.

    Several GPUs: accelerate launch -m cats_llm.cli.main calibrate ..., or --device auto for one large model.

    Example: **cats calibrate mistralai/Mistral-7B-v0.1 --data tiiuae/falcon-refinedweb --text-column content
    -o mistral.safetensors**
    """
    results.check(output)
    quiet_libraries()
    source = replace(source, device=distributed.join(source.device))
    # before gigabytes of weights are read
    skeleton = source.skeleton()
    check_reads_text(skeleton)
    find_gated_mlps(skeleton)
    model, tokenizer = source.load(), source.tokenizer()
    profile = calibrate(model, sampling.batches(TextSource(data, rows), tokenizer, model, track), data, tokenizer)
    if distributed.rank() > 0:
        return
    profile.save(output, results.force)
    summary = summarise(profile)
    results.write(summary)
    show(f"thresholds of {source.model}")
    thresholds = summary["thresholds"]
    lines = [[str(layer), *(f"{values[layer]:.4f}" for values in thresholds.values())] for layer in profile.layers]
    show(table("layer", *(f"t at {k}" for k in thresholds), rows=lines))
    show(f"{profile.record['tokens']} tokens in {profile.record['sequences']} sequences; profile written to {output}")


def summarise(profile: Profile) -> dict[str, Any]:
    """The record, and thresholds at the paper's sparsities."""
    configs = {k: profile.config(k) for k in (0.5, 0.7, 0.9)}
    return {
        "record": profile.record,
        "thresholds": {str(k): config.thresholds for k, config in configs.items()},
        "layer_sparsity": {str(k): config.layer_sparsity for k, config in configs.items()},
    }
