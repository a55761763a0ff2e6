"""Make a model sparse in place, set what it computes with, make it dense again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from cats_llm.checkpoint.config import CatsConfig
from cats_llm.checkpoint.layer_tensors import LayerTensors
from cats_llm.checkpoint.token_policy import TokenPolicy
from cats_llm.errors import CatsError
from cats_llm.model.decode_linear import use_decode_linears
from cats_llm.model.saving import shared_weights, use_own_saving
from cats_llm.model.sparse_mlp import STATE, SparseMLP
from cats_llm.model.structure import (
    GatedMLP,
    check_function,
    execution_device,
    find_gated_mlps,
    quantization_of,
    unwrap,
)
from cats_llm.model.token_mask import set_token_mask

Model = TypeVar("Model", bound=nn.Module)


def sparsify(model: Model, config: CatsConfig) -> Model:
    """Make the model's gated MLPs sparse, in place, without copying a weight.

    A model that is sparse already gets the new thresholds. `save_pretrained` afterwards writes a CATS checkpoint.

    Args:
        model: a causal language model with gated MLPs, also inside a PEFT wrapper.
        config: one threshold a layer, and maybe vectors.

    Returns:
        The same model.

    Raises:
        CatsError: no gated MLP, another number of layers than the config's, vectors of another model or not read yet,
            or a model that is already quantised. The model is then as it was.
    """
    if not isinstance(config, CatsConfig):
        raise CatsError(
            f"sparsify takes a CatsConfig, not a {type(config).__name__}; make one with "
            "calibrate(model, batches).config(sparsity=0.5)."
        )
    base: Any = unwrap(model)
    existing, method = quantization_of(base)
    if existing is not None and not isinstance(existing, CatsConfig):
        raise CatsError(
            f"this model is already quantised with {method}; a checkpoint has room for one method, so start from the "
            "unquantised model."
        )
    mlps = find_gated_mlps(base)
    check_layers(mlps, config)
    for mlp in mlps:
        if not isinstance(mlp.module, SparseMLP):
            check_function(mlp)
            _check_names(mlp)
    swap_mlps(mlps)
    set_config(base, config)
    lay_out_for_decode(base, config)
    return model


def _check_names(mlp: GatedMLP) -> None:
    taken = sorted(STATE & {name for name, _ in mlp.module.named_children()})
    if taken:
        raise CatsError(
            f"{mlp.name} ({type(mlp.module).__name__}) has a part called {taken[0]}, which is the name of something "
            "else in a sparse MLP; rename it in the model's code."
        )


def check_layers(mlps: list[GatedMLP], config: CatsConfig) -> None:
    """Make sure that a config is of the model that has these MLPs.

    Raises:
        CatsError: another number of layers, or vectors of other sizes.
    """
    layers = [mlp.layer for mlp in mlps]
    if sorted(config.thresholds) != layers:
        raise CatsError(
            f"the CATS config has thresholds for {_layers(sorted(config.thresholds))}, but the model's gated MLPs are "
            f"in {_layers(layers)}; calibrate this model."
        )
    for mlp in mlps:
        needed = {"thresholds": mlp.intermediate_size, "compensation": mlp.hidden_size}
        for name, size in (config.vectors or {}).get(mlp.layer, LayerTensors()).sizes().items():
            if size != needed[name]:
                raise CatsError(
                    f"the CATS config was made for another model: its {name} of layer {mlp.layer} are {size} numbers, "
                    f"but the model needs {needed[name]}; calibrate this model."
                )


def _layers(indices: list[int]) -> str:
    if not indices:
        return "no layer"
    if indices == list(range(indices[0], indices[0] + len(indices))) and len(indices) > 1:
        return f"{len(indices)} layers ({indices[0]} to {indices[-1]})"
    return f"{len(indices)} layer{'s' * (len(indices) > 1)} ({', '.join(map(str, indices))})"


def swap_mlps(mlps: list[GatedMLP]) -> None:
    """Put a `SparseMLP` in the place of every dense gated MLP; its threshold is 0 until it is set."""
    for mlp in mlps:
        if not isinstance(mlp.module, SparseMLP):
            threshold = torch.zeros((), dtype=torch.float32, device=execution_device(mlp.down_linear))
            sparse = SparseMLP(mlp, threshold)
            for parent, name in mlp.parents:
                setattr(parent, name, sparse)


def set_config(model: nn.Module, config: CatsConfig) -> None:
    """Give a model that has sparse MLPs the thresholds, vectors and tokens of a config, which is saved with it."""
    base: Any = unwrap(model)
    set_thresholds(base, config.thresholds, config.vectors)
    token_mask = set_token_mask(base, config.coverage)
    for mlp in sparse_mlps(base).values():
        mlp.token_mask = token_mask
    if hasattr(base, "config"):
        base.config.quantization_config = config
    if getattr(base, "hf_quantizer", None) is not None:
        base.hf_quantizer.quantization_config = config


def lay_out_for_decode(model: nn.Module, config: CatsConfig) -> None:
    """Bring a sparse model's loaded weights into the form that decodes fastest, without a second copy."""
    for layer, mlp in sparse_mlps(model).items():
        mlp.expected_sparsity = config.layer_sparsity.get(layer, config.sparsity or 0.0)
        mlp.store_neuron_major()
    use_decode_linears(model)
    use_own_saving(model, config.vectors is not None or bool(shared_weights(model)))


def densify(model: Model) -> Model:
    """Put the dense modules back, in place: exactly the model before `sparsify`, with what was attached since.

    Returns:
        The same model. A dense model is returned as it is.
    """
    base: Any = unwrap(model)
    use_decode_linears(base, False)
    set_token_mask(base, TokenPolicy())
    use_own_saving(base, False)
    for parent in list(base.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves out a child that it has named
            if isinstance(child, SparseMLP):
                setattr(parent, name, child.dense_module())
    if isinstance(quantization_of(base)[0], CatsConfig):
        del base.config.quantization_config
        vars(base).pop("hf_quantizer", None)
    return model


@contextmanager
def as_dense(model: nn.Module) -> Iterator[None]:
    """Let a sparse model compute the dense function while the context lasts. A dense model is left alone."""
    before = {mlp: mlp.sparse for mlp in sparse_mlps(model).values()}
    try:
        for mlp in before:
            mlp.sparse = False
        yield
    finally:
        for mlp, sparse in before.items():
            mlp.sparse = sparse


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """Leave the model as it was found, dense or with its own thresholds, whatever is done to it in between."""
    before = {mlp: mlp.sparse for mlp in sparse_mlps(model).values()}
    config = quantization_of(model)[0] if before else None
    try:
        yield
    finally:
        for mlp, sparse in before.items():
            mlp.sparse = sparse
        if isinstance(config, CatsConfig):
            sparsify(model, config)
        else:
            densify(model)


def sparse_mlps(model: nn.Module) -> dict[int, SparseMLP]:
    """The sparse MLPs by layer index; empty for a dense model."""
    return {module.layer: module for module in model.modules() if isinstance(module, SparseMLP)}


def thresholds(model: nn.Module) -> dict[int, float]:
    """The threshold of every sparse layer by its index; empty for a dense model.

    Where a layer has a threshold a neuron, the number is the one of the criterion's score, as in its config.
    """
    mlps = sparse_mlps(model)
    return {layer: mlp.threshold.item() if mlp.score is None else mlp.score for layer, mlp in mlps.items()}


def set_thresholds(
    model: nn.Module, values: Mapping[int, float], vectors: Mapping[int, LayerTensors] | None = None
) -> None:
    """Set the thresholds of a sparse model and its vectors, in place, without touching its config.

    Args:
        model: sparse.
        values: a threshold for every layer.
        vectors: of layers that have any; the others have none afterwards.
    """
    for layer, mlp in sparse_mlps(model).items():
        value, tensors = values[layer], (vectors or {}).get(layer, LayerTensors())
        if tensors.thresholds is None:
            mlp.set_tensors(torch.tensor(value, dtype=torch.float32, device="cpu"), tensors.compensation)
        else:
            mlp.set_tensors(tensors.thresholds, tensors.compensation, score=value)
