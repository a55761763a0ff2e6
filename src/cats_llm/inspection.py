"""What a model is made of and what sparsity saves, as `cats inspect` shows it."""

from dataclasses import dataclass
from typing import Any

from cats_llm import bundled
from cats_llm.calibration.sampling import Sampling
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.evaluation.sparsity import measure_sparsity
from cats_llm.integrations.transformers import load_vectors
from cats_llm.loading import ModelSource
from cats_llm.model.structure import activation_name, find_gated_mlps, quantization_of
from cats_llm.model.weight_traffic import bytes_per_token, sparsity_of
from cats_llm.options import Panel, option
from cats_llm.progress import Track, untracked


@dataclass(frozen=True)
class InspectConfig:
    """Which model, and whether and on what its sparsity is measured."""

    source: ModelSource
    sampling: Sampling = Sampling(samples=8, seq_length=256)
    measure: bool = option(
        True,
        help="Run text through a CATS model to measure its sparsity; otherwise no weights are read.",
        panel=Panel.MEASURING,
    )
    text: str | None = option(
        None, metavar="FILE|DATASET", help="Text to measure on. Default: some English prose.", panel=Panel.DATA
    )


def inspect_model(inspection: InspectConfig, *, track: Track = untracked) -> dict[str, Any]:
    """A model's gated MLPs, thresholds, sparsity, and the bytes that decoding one token reads.

    Args:
        inspection: a dense or CATS model; only of a CATS model is the sparsity measured.
        track: shows how much of the text is done.

    Returns:
        Plain values for JSON.

    Raises:
        CatsError: the model has no gated MLP, or from loading and reading text.
    """
    source = inspection.source
    skeleton = source.skeleton()
    stored, _ = quantization_of(skeleton)
    config = None
    if stored is not None:
        config = stored if isinstance(stored, CatsConfig) else CatsConfig.from_dict(dict(stored))
        load_vectors(config, source.model, revision=source.revision)
    measured: dict[int, float] = {}
    if inspection.measure and config is not None:
        model = source.load()
        text = inspection.text or str(bundled.heldout_text())
        batches = list(inspection.sampling.batches(text, source.tokenizer(), model))
        measured = measure_sparsity(model, track(batches, "measuring"))
    return {"model": source.model, **_facts(skeleton, config, measured)}


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
            "fused": mlp.roles.fused,
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
