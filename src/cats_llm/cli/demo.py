"""`cats demo`: the whole job on the bundled model, or another, and real text."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from cats_llm.cli.output import Results, quiet_libraries, show, show_progress, table, track
from cats_llm.demo import DemoConfig, run_demo
from cats_llm.number_format import MISSING, change, fixed, percent, target
from cats_llm.outputs import command_line


def command(
    *,
    results: Results,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")] = Path("cats-demo"),
    config: DemoConfig,
) -> None:
    """Calibrate, sparsify, save, reload, evaluate and generate with the bundled model, or another, and write a report.

    With the bundled model it needs no network and about a minute on two cores. Everything ends in the folder OUT: the
    profile, three CATS checkpoints, results.json (as `cats eval` writes it) and report.html. Of another model the
    checkpoints' weights are hard links to the model's own files, where the disk links. The texts are always the
    bundled books; `cats calibrate` and `cats eval` take your own.

    Example: **cats demo --out cats-demo**, **cats demo --model model.Q4_K_M.gguf**
    """
    results.check(out)
    quiet_libraries()
    started = time.perf_counter()
    result = run_demo(out, config, force=results.force, command=command_line(), track=track, progress=show_progress)
    results.write(result)
    _show(result, config.model)
    show("The reloaded checkpoints give the logits of the models they were saved from, to the bit.")
    show(f"Written to {out} in {time.perf_counter() - started:.0f} s; open {out / 'report.html'} in a browser.")


def _show(result: dict[str, Any], model: str | None) -> None:
    rows = {(row["variant"], row["metric"]): row for row in result["results"]}
    dense = rows["dense", "perplexity"]["value"]
    if model is not None:
        calibrated = result["variants"][1]["calibration"]["tokens"]
        show(f"{model}: {result['architecture']}, {result['dtype']}")
        show(f"Thresholds from {calibrated} tokens of old books, quality on others: on other text it differs")
    show(f"Gate sparsity asked for and achieved; quality on {result['tasks'][0]['tokens']} held-out tokens")
    columns = ("calibration", "held-out", "of all weights", "perplexity", "change", "KL (nats)", "top-1")
    shown = table("model", *columns)
    shown.add_row("dense", *[MISSING] * 3, fixed(dense, 3), *[MISSING] * 3)
    for variant in result["variants"][1:]:
        name, k = variant["name"], variant["sparsity"]
        row, calibration = rows[name, "perplexity"], variant["layer_sparsity"]
        shown.add_row(
            f"CATS {target(k)}",
            _with_worst_layer(sum(calibration.values()) / len(calibration), calibration, k),
            _with_worst_layer(row["sparsity"]["gate"], row["layer_sparsity"], k),
            percent(row["sparsity"]["model"], 1),
            fixed(row["value"], 3),
            change(row["value"], dense),
            fixed(rows[name, "kl"]["value"]),
            percent(rows[name, "top1_agreement"]["value"], 1),
        )
    show(shown)
    if model is None:
        show("± is the worst layer's distance, in points, from the sparsity asked for. Speed says nothing here, for")
        show("a model this small fits the caches: cats bench decode measures it at the size of real models.\n")
    else:
        show("± is the worst layer's distance, in points, from the sparsity asked for. For speed: cats bench decode.\n")
    for prompt, texts in result["continuations"].items():
        for variant in result["variants"][:2]:
            show(Text.assemble((variant["name"], "bold"), f": {prompt}", (texts[variant["name"]], "italic")))
        show("")


def _with_worst_layer(mean: float, layer_sparsity: dict[str, float], k: float) -> str:
    return f"{percent(mean)} ± {100 * max(abs(share - k) for share in layer_sparsity.values()):.2f}"
