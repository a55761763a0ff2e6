"""What sparsity saves: shares of weights, and bytes that decoding one token reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from cats_llm.checkpoint.layer_tensors import LayerTensors
from cats_llm.model.structure import decoder_of, find_gated_mlps, unwrap


@dataclass(frozen=True)
class Sparsity:
    """One measurement in the three units of the literature, each a share from 0 to 1.

    Attributes:
        gate: neurons skipped, the mean over layers (CATS); None for methods that skip inputs instead.
        ffn: MLP weights skipped: two thirds of ``gate``, since gate_proj is always read.
        model: linear weights of the decoder skipped, without embeddings and lm_head.
    """

    gate: float | None
    ffn: float
    model: float


def sparsity_of(model: nn.Module, layer_sparsity: Mapping[int, float]) -> Sparsity:
    """The three units, from the gate sparsity of each layer (missing layers are dense)."""
    mlps = find_gated_mlps(model)
    shares = [layer_sparsity.get(mlp.layer, 0.0) for mlp in mlps]
    neurons = [mlp.hidden_size * mlp.intermediate_size for mlp in mlps]
    skipped = sum(2 * n * share for n, share in zip(neurons, shares, strict=True))
    return Sparsity(sum(shares) / len(shares), skipped / (3 * sum(neurons)), skipped / _linear_numel(model))


def input_sparsity_of(model: nn.Module, linear_sparsity: Mapping[str, float]) -> Sparsity:
    """The units of it, from the share of its inputs that each linear layer skips (by path; missing ones are dense).

    A skipped input saves a column of the weight.
    """
    base: Any = unwrap(model)
    mlps = find_gated_mlps(model)
    skipped = {name: share * base.get_submodule(name).weight.numel() for name, share in linear_sparsity.items()}
    inside = tuple(f"{mlp.name}." for mlp in mlps)
    ffn = sum(number for name, number in skipped.items() if name.startswith(inside))
    weights = 3 * sum(mlp.hidden_size * mlp.intermediate_size for mlp in mlps)
    return Sparsity(None, ffn / weights, sum(skipped.values()) / _linear_numel(model))


def _linear_numel(model: nn.Module) -> int:
    """Linear weights of the decoder."""
    embedding = _input_embedding(model)
    matrices = sum(p.numel() for p in decoder_of(model).parameters() if p.dim() == 2)
    return matrices - (0 if embedding is None else embedding.numel())


@dataclass(frozen=True)
class BytesPerToken:
    """Bytes of weights that decoding one token reads, at batch 1."""

    dense: int
    sparse: int
    mlp_dense: int
    mlp_sparse: int


def bytes_per_token(
    model: nn.Module, layer_sparsity: Mapping[int, float], vectors: Mapping[int, LayerTensors] | None = None
) -> BytesPerToken:
    """Weights read for one token, dense and at the given gate sparsity of each layer.

    All of the decoder and the lm_head, but of the input embedding only one row (not counted). The sparse model also
    reads its vectors: thresholds in float32, compensation in the weights' dtype.
    """
    base: Any = unwrap(model)
    total = sum(p.numel() * p.element_size() for p in decoder_of(model).parameters())
    embedding = _input_embedding(model)
    if embedding is not None:
        total -= embedding.numel() * embedding.element_size()
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is not None:
        total += head.weight.numel() * head.weight.element_size()
    mlp_dense = mlp_skipped = 0.0
    for mlp in find_gated_mlps(model):
        size = mlp.down_linear.weight.element_size()
        matrix = mlp.hidden_size * mlp.intermediate_size * size
        mlp_dense += 3 * matrix
        mlp_skipped += 2 * matrix * layer_sparsity.get(mlp.layer, 0.0)
        numbers = (vectors or {}).get(mlp.layer, LayerTensors()).sizes()
        mlp_skipped -= 4 * numbers.get("thresholds", 0) + size * numbers.get("compensation", 0)
    return BytesPerToken(total, round(total - mlp_skipped), round(mlp_dense), round(mlp_dense - mlp_skipped))


def _input_embedding(model: nn.Module) -> Any:
    decoder: Any = decoder_of(model)
    return decoder.get_input_embeddings().weight if hasattr(decoder, "get_input_embeddings") else None
