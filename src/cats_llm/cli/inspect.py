"""`cats inspect`: what a model is made of, and what sparsity saves."""

from typing import Annotated, Any

from cats_llm.checkpoint.layer_tensors import FILE
from cats_llm.cli.output import Results, quiet_libraries, show, table, track
from cats_llm.cli.signature import Change
from cats_llm.inspection import InspectConfig, inspect_model
from cats_llm.number_format import fixed, percent, size


def command(config: Annotated[InspectConfig, Change(without=("batch_size", "seed"))], results: Results) -> None:
    """Show a model's gated MLPs, thresholds, sparsity, and the bytes that decoding one token reads.

    Example: **cats inspect mistral-cats50**
    """
    results.check()
    quiet_libraries()
    facts = inspect_model(config, track=track)
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
    parts = {"MLPs": (read["mlp_dense"], read["mlp_sparse"]), "whole model": (read["dense"], read["sparse"])}
    saved = [(part, size(dense), size(sparse), f"{dense / sparse:.2f} x") for part, (dense, sparse) in parts.items()]
    show(table("bytes of weights read a token", "dense", "sparse", "bound on the speed-up", rows=saved))
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
