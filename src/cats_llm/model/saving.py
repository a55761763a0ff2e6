"""A `save_pretrained` of its own for a model that transformers' alone would not save whole.

Vectors stand in a file of their own, and transformers has no hook that knows the folder. Weights that several MLPs
share are laid out for decoding, and transformers finds out what is shared only where rows are contiguous.
"""

import inspect
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cats_llm.checkpoint.config import CatsConfig
from cats_llm.checkpoint.layer_tensors import write_layer_tensors
from cats_llm.model.structure import quantization_of

_METHOD = "save_pretrained"
# its arguments that `push_to_hub` takes
_HUB = ("repo_id", "commit_message", "private", "token", "create_pr", "max_shard_size")


class _SavePretrained:
    """Takes the place of one model's `save_pretrained`, with the same arguments."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.replaced = vars(model).get(_METHOD)  # somebody else may have had the same idea

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the model, then its vectors; then push both, since transformers pushes only what it wrote itself."""
        shared = shared_weights(self.model)
        usual = getattr(type(self.model), _METHOD)
        kwargs |= zip(list(inspect.signature(usual).parameters)[2:], args, strict=False)
        hub = {}
        if kwargs.pop("push_to_hub", False):
            hub = {"repo_id": Path(save_directory).name} | {key: kwargs[key] for key in _HUB if key in kwargs}
            for key in ("repo_id", "commit_message", "private", "create_pr"):
                kwargs.pop(key, None)
        if shared and kwargs.get("state_dict") is None:
            kwargs["state_dict"] = _row_by_row(self.model, shared)
        (self.replaced or usual.__get__(self.model))(save_directory, **kwargs)
        config, _ = quantization_of(self.model)
        adapters_only = getattr(self.model, "_hf_peft_config_loaded", False)
        here = kwargs.get("is_main_process", True) and Path(save_directory).is_dir() and not adapters_only
        if here and isinstance(config, CatsConfig) and config.vectors:
            write_layer_tensors(Path(save_directory), config.vectors)
        if hub:
            self.model.push_to_hub(**hub)


def shared_weights(model: nn.Module) -> set[int]:
    """The ids of the parameters that several modules own and that are not laid out row by row."""
    owners = Counter(
        id(p) for module in model.modules() for p in module.parameters(recurse=False) if not p.is_contiguous()
    )
    return {key for key, number in owners.items() if number > 1}


def _row_by_row(model: nn.Module, shared: set[int]) -> dict[str, Tensor]:
    """The state dict, in which shared weights are laid out row by row and still shared."""
    copies = {p.data_ptr(): p.detach().contiguous() for p in model.parameters() if id(p) in shared}
    return {name: copies.get(tensor.data_ptr(), tensor) for name, tensor in model.state_dict().items()}


def use_own_saving(model: nn.Module, enabled: bool) -> None:
    """Let the model's `save_pretrained` write all there is to write, or be what it was before."""
    current = vars(model).get(_METHOD)
    if enabled and not isinstance(current, _SavePretrained) and hasattr(model, _METHOD):
        setattr(model, _METHOD, _SavePretrained(model))
    elif not enabled and isinstance(current, _SavePretrained):
        delattr(model, _METHOD)
        if current.replaced is not None:
            setattr(model, _METHOD, current.replaced)
