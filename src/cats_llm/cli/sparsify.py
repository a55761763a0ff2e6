"""`cats sparsify`: a CATS checkpoint from a dense one."""

from pathlib import Path
from typing import Annotated

import typer

from cats_llm.calibration.profile import Profile
from cats_llm.calibration.sampling import Sampling
from cats_llm.calibration.search import Choice, find_config
from cats_llm.calibration.target import SparsityTarget
from cats_llm.checkpoint.tensors import check_tensors
from cats_llm.checkpoint.write import check_source, write_checkpoint
from cats_llm.cli import options
from cats_llm.cli.output import percent, progress_console, quiet_libraries, show, show_left_out, table, track
from cats_llm.cli.signature import with_options
from cats_llm.loading import ModelSource
from cats_llm.model.architecture import check_reads_text
from cats_llm.model.structure import find_gated_mlps
from cats_llm.model.weight_traffic import sparsity_of
from cats_llm.outputs import check_output, write_json
from cats_llm.text import RowFormat, TextSource


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(name="sparsify")(with_options(command))


def command(
    source: ModelSource,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    target: SparsityTarget,
    sampling: Sampling,
    rows: RowFormat,
    profile: Annotated[
        Path | None, typer.Option(help="From cats calibrate; then no text is needed.", show_default=False)
    ] = None,
    data: options.CalibrationText = None,
    json: options.JsonFile = None,
    force: options.Force = False,
) -> None:
    """Write a CATS checkpoint: the model's own files, and thresholds in config.json.

    The weights are copied byte for byte; --device and --dtype matter only for calibration. Hidden and backup files,
    states of training and weights in other formats are left out, and named. A criterion other than the paper's costs
    less quality at the same speed, takes longer to calibrate, and adds a small file, cats.safetensors.

    Example: **cats sparsify mistralai/Mistral-7B-v0.1 mistral-cats50 --sparsity 0.5 --profile mistral.safetensors**
    """
    if (profile is None) == (data is None):
        raise typer.BadParameter("pass either --profile, or --data to calibrate on.")
    for path in (out, json):
        if path is not None:
            check_output(path, force)
    quiet_libraries()
    # before gigabytes of weights are read
    skeleton = source.skeleton()
    check_reads_text(skeleton)
    find_gated_mlps(skeleton)
    folder = source.folder()
    check_source(folder, out)
    unused = check_tensors(skeleton, folder)
    if unused:
        names = f"{unused[0]}{', ...' * (len(unused) > 1)}"
        show(f"copied, but no part of the model that config.json describes: {len(unused)} weights ({names})")
    # a wrong number of bytes too
    target.gate_sparsity(skeleton)
    if profile is not None:
        choice = find_config(skeleton, Profile.load(profile), target)
    else:
        model, tokenizer = source.load(), source.tokenizer()
        batches = sampling.batches(TextSource(str(data), rows), tokenizer, model)
        if target.profile_is_enough:
            batches = track(batches, "calibrating", sampling.most_batches())
            choice = find_config(model, batches, target, data=data, tokenizer=tokenizer)
        else:
            with progress_console.status("calibrating") as status:
                choice = find_config(model, batches, target, data=data, tokenizer=tokenizer, notify=status.update)
    config = choice.config
    written = write_checkpoint(folder, out, config, force)
    achieved = sparsity_of(skeleton, config.layer_sparsity)
    if choice.measured:
        _show_measured(choice, by_divergence=target.max_perplexity_increase is None)
    if json is not None:
        facts = {"out": str(out), "config": config.to_dict(), "sparsity": vars(achieved), "left_out": written.left_out}
        write_json(json, facts | ({"measured": choice.measured} if choice.measured else {}), force)
    show_left_out(written.left_out)
    shares = config.layer_sparsity.values()
    layers = (
        f"; layers from {percent(min(shares))} to {percent(max(shares))}" if max(shares) - min(shares) > 0.01 else ""
    )
    show(
        f"{out}: {percent(achieved.gate)} gate sparsity on the calibration tokens ({percent(achieved.ffn)} of MLP and "
        f"{percent(achieved.model)} of all linear weights{layers})"
    )


def _show_measured(choice: Choice, by_divergence: bool) -> None:
    rows = table("tried", "KL to dense, text held back" if by_divergence else "perplexity, text held back")
    for name, value in choice.measured.items():
        rows.add_row(name, f"{value:.4f}" if by_divergence else f"{'+' if value >= 0 else ''}{percent(value)}")
    show(rows)
