"""`cats eval`: variants of a model on texts and tasks, in one table."""

from typing import Any

from cats_llm import distributed
from cats_llm.cli.output import Results, notify, quiet_libraries, show, show_progress, table, track
from cats_llm.evaluation.config import EvaluationConfig
from cats_llm.evaluation.evaluate_model import evaluate_model
from cats_llm.number_format import MISSING, fixed, percent
from cats_llm.outputs import command_line


def command(config: EvaluationConfig, results: Results) -> None:
    """Measure what sparsity costs: perplexity, distance to the dense model, accuracy on tasks, sparsity achieved.

    All variants see the same data, and differences to the dense model come with a paired test. A stopped run goes on
    where it was. Several GPUs: accelerate launch -m cats_llm.cli.main eval ..., or --device auto for one large model.

    Example: **cats eval mistralai/Mistral-7B-v0.1 --sparsity 0,0.5,0.7,0.9 --method cats,relu --profile p.safetensors
    --tasks paper8 --text heldout.txt --json result.json**
    """
    results.check()
    quiet_libraries()
    result = evaluate_model(config, progress=show_progress, notify=notify, track=track, command=command_line())
    if distributed.rank() == 0:
        results.write(result)
        _show(result)


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
        compared = [MISSING] * 3
    else:
        p = f"{difference['p']:.4f}" if difference["p"] >= 1e-4 else "< 0.0001"
        compared = [f"{difference['value']:+.4f}", f"{difference['low']:+.4f} to {difference['high']:+.4f}", p]
    shares = row["sparsity"]
    sparse = [MISSING] * 3 if row["variant"] == "dense" else [percent(shares[k]) for k in ("gate", "ffn", "model")]
    return [row["variant"], fixed(row["value"]), fixed(row["stderr"]), *compared, *sparse]


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
            layers.add_row(layer, fixed(threshold, 5), percent(expected), percent(row["layer_sparsity"].get(layer)))
        show(layers)
