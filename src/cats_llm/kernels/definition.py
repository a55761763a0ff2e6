"""The definition of CATS in plain PyTorch. Every kernel is tested against this file.

Symbols: n tokens, d hidden size, f intermediate size (neurons).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
"""The activations a kernel may be asked for, by the name it is asked with."""


def gate_activation(gate: Tensor, activation: Activation) -> Tensor:
    """``a = act(gate)``, evaluated in float32 (in float64 for a float64 model).

    ``gate`` is the output of gate_proj in the model's dtype: a kernel that accumulates in float32 rounds to that dtype
    first. From there on nothing is rounded before the threshold is compared. In bfloat16 a rounded ``a`` would take so
    few values (up to 7 % of all activations share one near SiLU's minimum) that most sparsities could not be reached.
    """
    return activation(gate.to(torch.promote_types(gate.dtype, torch.float32)))


def keep_mask(a: Tensor, threshold: Tensor) -> Tensor:
    """True where the neuron is computed: ``|a| >= t``, compared in float32. NaN is kept, so that it propagates.

    Args:
        a: activations, (..., f).
        threshold: float32, one for the layer () or one a neuron (f,).
    """
    return ~(a.abs().float() < threshold)


def cats_activation(gate: Tensor, threshold: Tensor, activation: Activation) -> Tensor:
    """``CATS_t(act(gate))``: the activation where ``|act(gate)| >= t``, zero elsewhere (paper, section 3.2).

    Args:
        gate: output of gate_proj, (..., f), any floating dtype.
        threshold: float32, () or (f,).
        activation: element-wise function.

    Returns:
        A tensor like ``gate``. The gradient is that of the activation where it is kept and zero elsewhere.
    """
    a = gate_activation(gate, activation)
    return torch.where(keep_mask(a, threshold), a, 0.0).to(gate.dtype)


def gated_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    threshold: Tensor,
    activation: str = "silu",
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
) -> Tensor:
    """``y = (CATS_t(act(x W_gate)) * (x W_up)) W_down``: the whole MLP of a CATS model.

    Args:
        x: inputs, (..., d).
        w_gate, w_up: (f, d). w_down: (d, f). Same dtype as ``x``.
        threshold: float32, () or (f,).
        activation: a key of `ACTIVATIONS`.
        b_gate, b_up: (f,). b_down: (d,).

    Returns:
        (..., d), in the dtype of ``x``.
    """
    a = cats_activation(F.linear(x, w_gate, b_gate), threshold, ACTIVATIONS[activation])
    return F.linear(a * F.linear(x, w_up, b_up), w_down, b_down)
