"""When a kernel may compute with a module's weights in the place of calling it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def plain_weights(
    linears: Sequence[nn.Linear], x: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]] | None:
    """Weights and biases of gate, up and down, or None where calling the modules means more than using these.

    Args:
        linears: gate_proj, up_proj and down_proj, or gate_up_proj and down_proj.
        x: what the first of them would be called with.
    """
    if torch.is_autocast_enabled(x.device.type) or not all(_is_plain(linear, x) for linear in linears):
        return None
    weights: list[Tensor] = [linear.weight for linear in linears]
    biases: list[Tensor | None] = [linear.bias for linear in linears]
    if len(linears) == 2:
        weights[:1] = weights[0].chunk(2)
        biases[:1] = (None, None) if biases[0] is None else biases[0].chunk(2)
    return tuple(weights), tuple(biases)


def _is_plain(linear: nn.Module, x: Tensor) -> bool:
    return (
        type(linear) is nn.Linear
        and "forward" not in linear.__dict__  # accelerate's hooks replace the method of the instance
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and type(linear.weight) is nn.Parameter  # not a DTensor, nor a quantised tensor
        and linear.weight.device == x.device
        and linear.weight.dtype == x.dtype
    )
