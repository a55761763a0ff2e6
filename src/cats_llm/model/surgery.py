"""Make a model sparse in place, change its thresholds, make it dense again."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from cats_llm.checkpoint.config import CatsConfig
from cats_llm.checkpoint.coverage import Coverage
from cats_llm.checkpoint.vectors import LayerVectors
from cats_llm.errors import CatsError
from cats_llm.model.coverage import set_coverage
from cats_llm.model.decode_linear import use_decode_linears
from cats_llm.model.saving import shared_weights, use_own_saving
from cats_llm.model.sparse_mlp import STATE, SparseMLP
from cats_llm.model.structure import (
    GatedMLP,
    activation_name,
    check_function,
    execution_device,
    find_gated_mlps,
    unwrap,
)

Model = TypeVar("Model", bound=nn.Module)

# |relu(g)| is below it only where relu(g) is zero
_SMALLEST = torch.finfo(torch.float32).tiny
# where configs name the activation of their MLPs
_ACTIVATION_KEYS = ("hidden_act", "hidden_activation")


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
    existing = getattr(getattr(base, "config", None), "quantization_config", None)
    if existing is not None and not isinstance(existing, CatsConfig):
        method = existing.get("quant_method") if isinstance(existing, dict) else existing.quant_method
        raise CatsError(
            f"this model is already quantised with {getattr(method, 'value', method)}; a checkpoint has room for one "
            "method, so start from the unquantised model."
        )
    mlps = find_gated_mlps(base)
    _check_layers(mlps, config)
    for mlp in mlps:
        if not isinstance(mlp.module, SparseMLP):
            check_function(mlp)
            _check_names(mlp)
    replace_mlps(mlps)
    configure(base, config)
    prepare_decode(base, config)
    if hasattr(base, "config"):
        base.config.quantization_config = config
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.quantization_config = config
    return model


def _check_names(mlp: GatedMLP) -> None:
    taken = sorted(STATE & {name for name, _ in mlp.module.named_children()})
    if taken:
        raise CatsError(
            f"{mlp.name} ({type(mlp.module).__name__}) has a part called {taken[0]}, which is the name of something "
            "else in a sparse MLP; rename it in the model's code."
        )


def _check_layers(mlps: list[GatedMLP], config: CatsConfig) -> None:
    layers = [mlp.layer for mlp in mlps]
    if sorted(config.thresholds) != layers:
        raise CatsError(
            f"the CATS config has thresholds for {_layers(sorted(config.thresholds))}, but the model's gated MLPs are "
            f"in {_layers(layers)}; calibrate this model."
        )
    for mlp in mlps:
        needed = {"thresholds": mlp.intermediate_size, "compensation": mlp.hidden_size}
        for name, size in (config.vectors or {}).get(mlp.layer, LayerVectors()).sizes().items():
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


def replace_mlps(mlps: list[GatedMLP]) -> None:
    """Put a `SparseMLP` in the place of every dense gated MLP; its threshold is 0 until it is set."""
    for mlp in mlps:
        if not isinstance(mlp.module, SparseMLP):
            threshold = torch.zeros((), dtype=torch.float32, device=execution_device(mlp.down_linear))
            sparse = SparseMLP(mlp, threshold)
            for parent, name in mlp.parents:
                setattr(parent, name, sparse)


def prepare(model: nn.Module, config: CatsConfig) -> None:
    """Replace the gated MLPs of a model whose weights are not loaded yet (it may be on the meta device).

    Raises:
        CatsError: no gated MLP, or another number of layers than the config's.
    """
    mlps = find_gated_mlps(model)
    _check_layers(mlps, config)
    replace_mlps(mlps)


def relu_config(model: nn.Module) -> CatsConfig:
    """What a ReLUfied model is as a CATS model: the neurons that ReLU zeroes are those below the smallest threshold."""
    return CatsConfig(thresholds=dict.fromkeys((mlp.layer for mlp in find_gated_mlps(model)), _SMALLEST))


def relufy(model: Model) -> Model:
    """Put ReLU in the place of the activation, in place and in the config, with no shift (ReLUfication).

    `save_pretrained` afterwards writes a CATS checkpoint whose config.json says ReLU, so that it decodes as fast as its
    zeros allow, and is a correct ReLU model for programs that know nothing of CATS.

    Returns:
        The same model.

    Raises:
        CatsError: as `sparsify`, or the model's config has no entry that chooses the activation.
    """
    base: Any = unwrap(model)
    config = copy.deepcopy(base.config)
    vars(config).pop("quantization_config", None)
    _name_relu(config)
    with torch.device("meta"):
        saved = find_gated_mlps(type(base)(config))
    if any(activation_name(mlp.activation) != "relu" for mlp in saved):
        raise CatsError(
            f"the config of {type(base).__name__} has no entry that makes its MLPs use ReLU, so a ReLUfied model could "
            "not be saved; choose another method or model."
        )
    sparsify(model, relu_config(model))
    for mlp in sparse_mlps(model).values():
        mlp.use_activation(nn.ReLU())
    _name_relu(base.config)
    return model


def _name_relu(config: Any) -> None:
    text = config.get_text_config(decoder=True)
    for key in _ACTIVATION_KEYS:
        if getattr(text, key, None) is not None:
            setattr(text, key, "relu")


def prepare_decode(model: nn.Module, config: CatsConfig) -> None:
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
    base = unwrap(model)
    use_decode_linears(base, False)
    set_coverage(base, Coverage())
    use_own_saving(base, False)
    for parent in list(base.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves out a child that it has named
            if isinstance(child, SparseMLP):
                setattr(parent, name, child.dense_module())
    _forget_config(base)
    return model


def _forget_config(base: nn.Module) -> None:
    config = getattr(base, "config", None)
    if config is not None and isinstance(getattr(config, "quantization_config", None), CatsConfig):
        del config.quantization_config
        vars(base).pop("hf_quantizer", None)


def sparse_mlps(model: nn.Module) -> dict[int, SparseMLP]:
    """The sparse MLPs by layer index; empty for a dense model."""
    return {module.layer: module for module in model.modules() if isinstance(module, SparseMLP)}


def thresholds(model: nn.Module) -> dict[int, float]:
    """The threshold of every sparse layer by its index; empty for a dense model.

    Where a layer has a threshold a neuron, the number is the one of the criterion's score, as in its config.
    """
    found = {}
    for layer, mlp in sparse_mlps(model).items():
        found[layer] = mlp.threshold.item() if mlp.score is None else mlp.score
    return found


def set_thresholds(
    model: nn.Module, values: Mapping[int, float], vectors: Mapping[int, LayerVectors] | None = None
) -> None:
    """Set the thresholds of a sparse model and its vectors, in place, without touching its config.

    Args:
        model: sparse.
        values: a threshold for every layer.
        vectors: of layers that have any; the others have none afterwards.
    """
    for layer, mlp in sparse_mlps(model).items():
        value, own = values[layer], (vectors or {}).get(layer, LayerVectors())
        if own.thresholds is None:
            mlp.set_tensors(torch.tensor(value, dtype=torch.float32, device="cpu"), own.compensation)
        else:
            mlp.set_tensors(own.thresholds, own.compensation, score=value)


def configure(model: nn.Module, config: CatsConfig) -> None:
    """Give a model that has sparse MLPs the thresholds, vectors and tokens of a config, in place."""
    set_thresholds(model, config.thresholds, config.vectors)
    tokens = set_coverage(model, config.coverage)
    for mlp in sparse_mlps(model).values():
        mlp.token_mask = tokens


@contextmanager
def dense_function(model: nn.Module) -> Iterator[None]:
    """Let a sparse model compute the dense function while the context lasts. A dense model is left alone."""
    mlps = list(sparse_mlps(model).values())
    before = [mlp.sparse for mlp in mlps]
    try:
        for mlp in mlps:
            mlp.sparse = False
        yield
    finally:
        for mlp, sparse in zip(mlps, before, strict=True):
            mlp.sparse = sparse


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Leave the model as it was found, dense or with its own thresholds, whatever is done to it in between."""
    config = getattr(unwrap(model), "config", None)
    config = getattr(config, "quantization_config", None) if sparse_mlps(model) else None
    before = {module: module.sparse for module in sparse_mlps(model).values()}
    try:
        yield
    finally:
        for module, sparse in before.items():
            module.sparse = sparse
        if isinstance(config, CatsConfig):
            sparsify(model, config)
        else:
            densify(model)


def sparse_for_calibration(model: nn.Module) -> list[GatedMLP]:
    """The model's gated MLPs, all of them sparse modules that compute the dense function."""
    replace_mlps(find_gated_mlps(model))
    mlps = find_gated_mlps(model)
    for mlp in mlps:
        sparse_module(mlp).sparse = False
    return mlps


def sparse_module(mlp: GatedMLP) -> SparseMLP:
    """The module of a gated MLP that is sparse already."""
    assert isinstance(mlp.module, SparseMLP)
    return mlp.module
