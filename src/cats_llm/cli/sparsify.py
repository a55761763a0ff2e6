"""`cats sparsify`: a CATS checkpoint from a dense one."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from cats_llm.calibration.criteria.search import Choice
from cats_llm.calibration.sparsify_model import SparsifyConfig, sparsify_model
from cats_llm.cli.output import Results, progress_console, quiet_libraries, show, show_left_out, table, track
from cats_llm.number_format import fixed, percent, signed


def command(
    config: SparsifyConfig,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    results: Results,
) -> None:
    """Write a CATS checkpoint: the model's own files, and thresholds in config.json.

    The weights are copied byte for byte; --device and --dtype matter only for calibration. Hidden and backup files,
    states of training and weights in other formats are left out, and named. A criterion other than the paper's costs
    less quality at the same speed, takes longer to calibrate, and adds a small file, cats.safetensors.

    Example: **cats sparsify mistralai/Mistral-7B-v0.1 mistral-cats50 --sparsity 0.5 --profile mistral.safetensors**
    """
    results.check(out)
    quiet_libraries()
    with ExitStack() as stack:
        notify = None
        if not config.target.profile_is_enough:
            notify = stack.enter_context(progress_console.status("calibrating")).update
        model = sparsify_model(config, out, force=results.force, notify=notify, track=track)
    if model.unused:
        names = f"{model.unused[0]}{', ...' * (len(model.unused) > 1)}"
        show(f"copied, but no part of the model that config.json describes: {len(model.unused)} weights ({names})")
    if model.choice.measured:
        _show_measured(model.choice, by_divergence=config.target.max_perplexity_increase is None)
    cats = model.choice.config
    facts = {
        "out": str(out),
        "config": cats.to_dict(),
        "sparsity": vars(model.sparsity),
        "left_out": model.written.left_out,
    }
    results.write(facts | ({"measured": model.choice.measured} if model.choice.measured else {}))
    show_left_out(model.written.left_out)
    shares = cats.layer_sparsity.values()
    layers = (
        f"; layers from {percent(min(shares))} to {percent(max(shares))}" if max(shares) - min(shares) > 0.01 else ""
    )
    show(
        f"{out}: {percent(model.sparsity.gate)} gate sparsity on the calibration tokens ({percent(model.sparsity.ffn)} "
        f"of MLP and {percent(model.sparsity.model)} of all linear weights{layers})"
    )


def _show_measured(choice: Choice, by_divergence: bool) -> None:
    measure = "KL to dense" if by_divergence else "perplexity"
    values = {k: fixed(v) if by_divergence else f"{signed(100 * v, 2)} %" for k, v in choice.measured.items()}
    show(table("tried", f"{measure}, text held back", rows=values.items()))
