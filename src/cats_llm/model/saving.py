"""`save_pretrained` of a model with vectors writes their file too: transformers has no hook that knows the folder."""

import inspect
from pathlib import Path
from typing import Any

from torch import nn

from cats_llm.checkpoint.config import CatsConfig
from cats_llm.checkpoint.vectors import write_vectors

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
        usual = getattr(type(self.model), _METHOD)
        kwargs |= zip(list(inspect.signature(usual).parameters)[2:], args, strict=False)
        if kwargs.pop("push_to_hub", False):
            hub = {"repo_id": Path(save_directory).name} | {key: kwargs[key] for key in _HUB if key in kwargs}
            for key in ("repo_id", "commit_message", "private", "create_pr"):
                kwargs.pop(key, None)
        else:
            hub = {}
        (self.replaced or usual.__get__(self.model))(save_directory, **kwargs)
        config = getattr(self.model.config, "quantization_config", None)
        adapters_only = getattr(self.model, "_hf_peft_config_loaded", False)
        here = kwargs.get("is_main_process", True) and Path(save_directory).is_dir() and not adapters_only
        if here and isinstance(config, CatsConfig) and config.vectors:
            write_vectors(Path(save_directory), config.vectors)
        if hub:
            self.model.push_to_hub(**hub)


def save_vectors(model: nn.Module, enabled: bool) -> None:
    """Let the model's `save_pretrained` write its vectors, or be what it was before."""
    own = vars(model).get(_METHOD)
    if enabled and not isinstance(own, _SavePretrained) and hasattr(model, _METHOD):
        setattr(model, _METHOD, _SavePretrained(model))
    elif not enabled and isinstance(own, _SavePretrained):
        delattr(model, _METHOD)
        if own.replaced is not None:
            setattr(model, _METHOD, own.replaced)
