"""The CPU kernels: decoding at the speed of memory, in C++ (see README.md).

Importing this module loads the library and registers its kernel; without the library it registers nothing.
"""

import torch
from torch import Tensor, nn

from cats_llm.kernels import registry
from cats_llm.kernels.cpu.library import available, available_isas, isa, set_isa, use_isa
from cats_llm.kernels.cpu.pages import neuron_major
from cats_llm.kernels.definition import ACTIVATIONS

__all__ = [
    "available",
    "available_isas",
    "gated_mlp",
    "isa",
    "linear",
    "neuron_major",
    "read",
    "set_isa",
    "supports",
    "supports_linear",
    "use_isa",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    """`definition.gated_mlp`, reading only the weights of neurons that survive for some token. No gradient.

    A neuron whose masked activation is zero is skipped, so an infinity in its other weights does not show.
    ``w_down`` must be stored neuron-major: ``w_down.t()`` has adjacent columns.
    """
    out: Tensor = torch.ops.cats_llm.gated_mlp(x, w_gate, w_up, w_down, threshold, activation, b_gate, b_up, b_down)
    return out


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` for few tokens, accumulated in float32 and rounded once. No gradient."""
    out: Tensor = torch.ops.cats_llm.linear(x, w, bias)
    return out


def read(x: Tensor) -> int:
    """A checksum of every byte of ``x``: its time is the machine's read bandwidth with torch's threads."""
    checksum: int = torch.ops.cats_llm.read(x)
    return checksum


def supports(request: registry.Request) -> bool:
    """Whether `gated_mlp` can and should serve the request."""
    gate, up, down = request.w_gate, request.w_up, request.w_down
    return (
        request.tokens <= registry.MAX_DECODE_TOKENS
        and gate.device.type == up.device.type == down.device.type == "cpu"
        and gate.dtype in _DTYPES
        and gate.dtype == up.dtype == down.dtype
        and request.activation in ACTIVATIONS
        and (gate.stride(1) == up.stride(1) == down.stride(0) == 1 or gate.shape[1] == 1)
        and not torch.is_grad_enabled()
    )


def supports_linear(x: Tensor, w: Tensor) -> bool:
    """Whether `linear` can and should compute ``F.linear(x, w)``."""
    return (
        available()
        and x.device.type == w.device.type == "cpu"
        and x.dtype == w.dtype
        and x.dtype in _DTYPES
        and type(w) in (Tensor, nn.Parameter)  # not sharded or quantised
        and 0 < x.numel() <= registry.MAX_DECODE_TOKENS * w.shape[1]
        and w.stride(1) == 1
    )


def _gated_mlp_fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _linear_fake(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], w.shape[0])


if available():
    torch.library.register_fake("cats_llm::gated_mlp", _gated_mlp_fake)
    torch.library.register_fake("cats_llm::linear", _linear_fake)
    registry.register(registry.Kernel("cpu", gated_mlp, supports, priority=10))
