"""Whether the weight files in a folder are those of the model that its config.json describes, told by transformers."""

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

from cats_llm.errors import CatsError, first_line


def check_tensors(skeleton: Any, folder: Path) -> list[str]:
    """Load a model on the meta device, which reads names and shapes and no weight, and see what is missing.

    Args:
        skeleton: the model without weights; transformers' rules for its class (renamed, tied, fused weights) hold.
        folder: a model's folder without adapters.

    Returns:
        The names of tensors that the files hold and the model does not: more layers than config.json says, for example.

    Raises:
        CatsError: weights are missing, named otherwise, or have other shapes than the model's.
    """
    from transformers import GenerationConfig

    config = copy.deepcopy(skeleton.config)
    vars(config).pop("quantization_config", None)
    try:
        _, info = type(skeleton).from_pretrained(
            str(folder),
            config=config,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            generation_config=GenerationConfig(),  # the folder's own may be invalid, which is no fault of the weights
        )
    except Exception as error:  # what torch, safetensors and transformers raise of a damaged file
        raise CatsError(f"could not read the weights in {folder}: {first_line(error)}.") from error
    return check_keys(info, str(folder))


def check_keys(info: dict[str, Any], name: str) -> list[str]:
    """The tensors that the model called ``name`` did not take, from the ``output_loading_info`` of `from_pretrained`.

    Raises:
        CatsError: as `check_tensors`.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    prefix = _foreign_prefix(missing, unexpected)
    if prefix is not None:
        raise CatsError(
            f"the weights in {name} are named {prefix}{missing[-1]} where the model has {missing[-1]}; a wrapper was "
            f"saved in place of the model: save its inner model, or take {prefix!r} off the names."
        )
    if missing:
        others = f"; it has {unexpected[0]}, which the model has not" if unexpected else ""
        raise CatsError(
            f"{name} lacks {len(missing)} weight{'s' * (len(missing) > 1)} of the model ({missing[0]}"
            f"{', ...' * (len(missing) > 1)}{others}); download it again, or mend its config.json."
        )
    if info["mismatched_keys"]:
        weight, stored, wanted = min(info["mismatched_keys"], key=lambda key: str(key[0]))
        raise CatsError(
            f"{weight} in {name} has the shape {tuple(stored)}, but config.json asks for {tuple(wanted)} "
            f"({len(info['mismatched_keys'])} weights differ); the two belong to different models."
        )
    return unexpected


def _foreign_prefix(missing: list[str], unexpected: Collection[str]) -> str | None:
    """What stands before the names of the model in those of the files, for example ``module.``."""
    stored = set(unexpected)
    for name in missing[-1:]:
        for other in sorted(stored):
            prefix = other.removesuffix(name)
            # not of all: a tied weight is missing without being in the file
            if other.endswith(f".{name}") and 2 * sum(prefix + weight in stored for weight in missing) > len(missing):
                return prefix
    return None
