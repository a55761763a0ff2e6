"""`cats inspect`: what a model is made of, and what sparsity saves."""

from typing import Annotated, Any

import typer

from cats_llm import bundled
from cats_llm.calibration.sampling import Sampling
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.checkpoint.layer_tensors import FILE
from cats_llm.cli import options
from cats_llm.cli.output import percent, quiet_libraries, show, size, table, track
from cats_llm.evaluation.sparsity import measure_sparsity
from cats_llm.integrations.transformers import load_vectors
from cats_llm.loading import load_model, load_skeleton, load_tokenizer
from cats_llm.model.structure import activation_name, find_gated_mlps
from cats_llm.model.weight_traffic import bytes_per_token, sparsity_of
from cats_llm.outputs import check_output, write_json


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(name="inspect")(command)


def command(
    model: options.Model,
    measure: Annotated[
        bool, typer.Option(help="Run text through a CATS model to measure its sparsity; otherwise no weights are read.")
    ] = True,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DATASET", help="Text to measure on. Default: some English prose.", show_default=False
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="At most so many sequences.")] = 8,
    seq_length: options.SeqLength = 256,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    json: options.JsonFile = None,
    force: options.Force = False,
) -> None:
    """Show a model's gated MLPs, thresholds, sparsity, and the bytes that decoding one token reads.

    Example: **cats inspect mistral-cats50**
    """
    if json is not None:
        check_output(json, force)
    quiet_libraries()
    skeleton = load_skeleton(model, revision, trust_remote_code)
    stored = getattr(skeleton.config, "quantization_config", None)
    config = None
    if stored is not None:
        config = stored if isinstance(stored, CatsConfig) else CatsConfig.from_dict(dict(stored))
        load_vectors(config, model, revision=revision)
    measured: dict[int, float] = {}
    if measure and config is not None:
        loaded = load_model(model, dtype, device, revision, trust_remote_code)
        tokenizer = load_tokenizer(model, revision, trust_remote_code)
        source = text or str(bundled.heldout_text())
        batches = list(Sampling(samples, seq_length).batches(source, tokenizer, loaded))
        measured = measure_sparsity(loaded, track(batches, "measuring"))
    facts = _facts(skeleton, config, measured)
    if json is not None:
        write_json(json, {"model": model, **facts}, force)
    _show(model, facts)


def _facts(skeleton: Any, config: CatsConfig | None, measured: dict[int, float]) -> dict[str, Any]:
    expected = config.layer_sparsity if config else {}
    shares = measured or expected
    vectors = (config.vectors if config else None) or {}
    layers = [
        {
            "layer": mlp.layer,
            "name": mlp.name,
            "hidden_size": mlp.hidden_size,
            "intermediate_size": mlp.intermediate_size,
            "fused": mlp.fused,
            "activation": activation_name(mlp.activation) or type(mlp.activation).__name__,
            "threshold": config.thresholds.get(mlp.layer) if config else None,
            "vectors": vectors[mlp.layer].sizes() if mlp.layer in vectors else {},
            "expected_sparsity": expected.get(mlp.layer),
            "measured_sparsity": measured.get(mlp.layer),
        }
        for mlp in find_gated_mlps(skeleton)
    ]
    return {
        "class": type(skeleton).__name__,
        "sparse": config is not None,
        "target_sparsity": config.sparsity if config else None,
        "sparsity": vars(sparsity_of(skeleton, shares)),
        "sparsity_is": "measured" if measured else "expected" if expected else "none",
        "bytes_per_token": vars(bytes_per_token(skeleton, shares, vectors)),
        "criterion": (config.criterion or None) if config else None,
        "calibration": config.calibration if config else None,
        "coverage": config.coverage.to_dict() if config else None,
        "tokens": str(config.coverage) if config else None,
        "layers": layers,
    }


def _show(name: str, facts: dict[str, Any]) -> None:
    kind = "CATS checkpoint" if facts["sparse"] else "dense model"
    show(f"{name}: {facts['class']}, {kind}")
    rows = table("layer", "MLP", "act", "threshold", "expected", "measured")
    for layer in facts["layers"]:
        threshold = "-" if layer["threshold"] is None else f"{layer['threshold']:.5f}"
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
