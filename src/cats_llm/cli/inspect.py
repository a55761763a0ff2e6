"""`cats inspect`: what a model is made of, and what sparsity saves."""

from typing import Annotated, Any

import typer

from cats_llm.calibration.sampling import Sampling
from cats_llm.checkpoint.layer_tensors import FILE
from cats_llm.cli.options import Results
from cats_llm.cli.output import quiet_libraries, show, table, track
from cats_llm.cli.signature import Change
from cats_llm.inspection import SAMPLING, inspect_model
from cats_llm.loading import ModelSource
from cats_llm.number_format import fixed, percent, size
from cats_llm.options import Panel, values_of


def command(
    source: ModelSource,
    sampling: Annotated[Sampling, Change(defaults=values_of(SAMPLING), without=("batch_size", "seed"))],
    *,
    measure: Annotated[
        bool,
        typer.Option(
            help="Run text through a CATS model to measure its sparsity; otherwise no weights are read.",
            rich_help_panel=Panel.MEASURING,
        ),
    ] = True,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DATASET",
            help="Text to measure on. Default: some English prose.",
            show_default=False,
            rich_help_panel=Panel.DATA,
        ),
    ] = None,
    results: Results,
) -> None:
    """Show a model's gated MLPs, thresholds, sparsity, and the bytes that decoding one token reads.

    Example: **cats inspect mistral-cats50**
    """
    results.check()
    quiet_libraries()
    facts = inspect_model(source, text, sampling, measure=measure, track=track)
    results.write(facts)
    _show(facts)


def _show(facts: dict[str, Any]) -> None:
    kind = "CATS checkpoint" if facts["sparse"] else "dense model"
    show(f"{facts['model']}: {facts['class']}, {kind}")
    rows = table("layer", "MLP", "act", "threshold", "expected", "measured")
    for layer in facts["layers"]:
        threshold = fixed(layer["threshold"], 5)
        shape = f"{layer['hidden_size']} x {layer['intermediate_size']}" + (" fused" if layer["fused"] else "")
        rows.add_row(
            str(layer["layer"]),
            shape,
            layer["activation"],
            threshold,
            percent(layer["expected_sparsity"]),
            percent(layer["measured_sparsity"]),
        )
    show(rows)
    read, shares = facts["bytes_per_token"], facts["sparsity"]
    bytes_table = table("bytes of weights read a token", "dense", "sparse", "bound on the speed-up")
    for label, dense, sparse in (
        ("MLPs", read["mlp_dense"], read["mlp_sparse"]),
        ("whole model", read["dense"], read["sparse"]),
    ):
        bytes_table.add_row(label, size(dense), size(sparse), f"{dense / sparse:.2f} x")
    show(bytes_table)
    if facts["sparse"]:
        show(
            f"sparsity {facts['sparsity_is']}: {percent(shares['gate'])} of neurons (gate), {percent(shares['ffn'])} "
            f"of MLP weights (FFN), {percent(shares['model'])} of linear weights (model)"
        )
        show(f"sparse tokens: {facts['tokens']}")
        criterion = dict(facts["criterion"] or {})
        if criterion:
            name = criterion.pop("name", "not named")
            settings = ", ".join(f"{key} {value}" for key, value in criterion.items())
            show(f"criterion: {name}" + (f" ({settings})" if settings else ""))
        for part, meaning in (("thresholds", "a threshold a neuron"), ("compensation", "compensation of the output")):
            layers = [layer["layer"] for layer in facts["layers"] if part in layer["vectors"]]
            if layers:
                show(f"{meaning} in {len(layers)} of {len(facts['layers'])} layers ({FILE})")
