"""What is trained: adapters, or all weights of the gated MLPs; and the frozen dense model that both may learn from."""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from cats_llm.errors import CatsError
from cats_llm.loading import attach_adapters
from cats_llm.model.sparsify import densify
from cats_llm.model.structure import find_gated_mlps
from cats_llm.training.adapters import adaptable, add_adapters
from cats_llm.training.config import TrainingConfig

ADAPTER = "adapter"
"""In the folder of a run: the trained adapters."""
_WEIGHTS = "trained.safetensors"


def mlp_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights and biases of gate, up and down of every gated MLP, by their path in the model."""
    parameters: dict[str, nn.Parameter] = {}
    for mlp in find_gated_mlps(model):
        for part in mlp.roles.projections:
            path = f"{mlp.name}.{part}"
            parameters |= dict(model.get_submodule(path).named_parameters(prefix=path))
    return parameters


def check_trainable(model: nn.Module, config: TrainingConfig) -> None:
    """Refuse a model that has not what is to be trained.

    Args:
        model: its structure is enough.

    Raises:
        CatsError: it has no gated MLP, or no layers for adapters.
    """
    if config.parameters == "lora":
        adaptable(model, config.targets)
    else:
        mlp_parameters(model)


def make_trainable(model: Any, config: TrainingConfig) -> Any:
    """The model, or its PEFT wrapper with fresh adapters, in which what is to be trained is float32, and only that.

    Raises:
        CatsError: see `check_trainable`; or peft is not installed.
    """
    if config.parameters == "lora":
        return add_adapters(model, config)
    model.requires_grad_(False)
    for parameter in mlp_parameters(model).values():
        # a step is often smaller than bfloat16 can tell apart
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return model


def make_teacher(model: Any, config: TrainingConfig) -> Any:
    """The dense model as it is now, in eval mode, with copies of only those weights that training will change.

    Args:
        model: is dense afterwards; not yet trainable.
    """
    densify(model)
    changing = {id(p) for p in mlp_parameters(model).values()} if config.parameters == "mlp" else set()
    shared = {id(p): p for p in model.parameters() if id(p) not in changing}
    return copy.deepcopy(model, shared).eval().requires_grad_(False)


def count_parameters(model: Any) -> dict[str, int]:
    """How many numbers are trained, and how many there are, adapters among them."""
    if hasattr(model, "get_nb_trainable_parameters"):
        trained, total = model.get_nb_trainable_parameters()  # of sharded weights too
    else:
        sizes = [(p.requires_grad, p.numel()) for p in model.parameters()]
        trained, total = sum(n for wanted, n in sizes if wanted), sum(n for _, n in sizes)
    return {"trained": trained, "all": total}


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write the weights that are trained in full, in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(trained, folder / _WEIGHTS)


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> None:
    """Take the weights that `save_weights` wrote, each in the dtype that the model has it in.

    Raises:
        CatsError: the file is damaged, or of another model.
    """
    file = folder / _WEIGHTS
    parameters = dict(model.named_parameters())
    try:
        for name, value in load_file(file).items():
            parameters[name].copy_(value)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise CatsError(f"{file} is missing, damaged or of another model; train again.") from error


def trained_model(base: Any, config: TrainingConfig, folder: Path) -> Any:
    """The model with what a run has trained: in a PEFT wrapper, or with its weights.

    Args:
        base: the model as it was before training, brought into the form of the method.
        folder: of the run.
    """
    if config.parameters == "lora":
        return attach_adapters(base, folder / ADAPTER)
    load_weights(base, folder)
    return base
