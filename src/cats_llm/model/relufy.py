"""ReLUfication: ReLU in the place of the activation, as a CATS model."""

import copy
from typing import Any, TypeVar

import torch
from torch import nn

from cats_llm.checkpoint.config import CatsConfig
from cats_llm.errors import CatsError
from cats_llm.model.sparsify import sparse_mlps, sparsify
from cats_llm.model.structure import activation_name, find_gated_mlps, unwrap

Model = TypeVar("Model", bound=nn.Module)

# |relu(g)| is below it only where relu(g) is zero
_SMALLEST = torch.finfo(torch.float32).tiny
# where configs name the activation of their MLPs
_ACTIVATION_KEYS = ("hidden_act", "hidden_activation")


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
