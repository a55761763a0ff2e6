"""The GPU kernels: decoding at the speed of memory, in Triton (see README.md).

Importing this registers the operators and imports neither Triton nor touches a GPU; the first call on one does.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cats_llm.kernels import operators
from cats_llm.kernels.backend import FLOAT_DTYPES, MAX_DECODE_TOKENS, Backend, Request
from cats_llm.kernels.definition import ACTIVATIONS

__all__ = ["BACKEND"]


class GPUBackend(Backend):
    """The Triton kernels, for NVIDIA GPUs of compute capability 8.0 or more."""

    name = "gpu"
    built = True
    depends_on_sparsity = True
    # launched one by one, cuBLAS costs the processor less than we do
    linear_in_graphs_only = True

    _available: bool | None = None  # found out once; code that is compiled afterwards sees a constant

    def available(self) -> bool:
        """Whether there is such a GPU, and Triton."""
        if self._available is None:
            self._available = (
                importlib.util.find_spec("triton") is not None
                and torch.version.cuda is not None
                and torch.cuda.is_available()
                and torch.cuda.get_device_capability() >= (8, 0)
            )
        return self._available

    def supports(self, request: Request) -> bool:
        """As many tokens as the kernels are expected to be faster for than dense products."""
        gate, up, down = request.w_gate, request.w_up, request.w_down
        return (
            gate.is_cuda
            and gate.device == up.device == down.device
            and (request.tokens == 1 or request.tokens <= max_tokens(request.sparsity))
            and gate.dtype in FLOAT_DTYPES
            and gate.dtype == up.dtype == down.dtype
            and request.activation in ACTIVATIONS
            and gate.stride(1) == up.stride(1) == down.stride(0) == 1
            and not torch.is_grad_enabled()
            and self.available()
        )

    def supports_linear(self, x: Tensor, w: Tensor) -> bool:
        """One token, for which the kernel is faster, as measured."""
        return (
            x.is_cuda
            and x.device == w.device
            and x.numel() == w.shape[1]
            and x.dtype == w.dtype
            and x.dtype in FLOAT_DTYPES
            and (type(w) is Tensor or type(w) in self.weight_types)
            and w.stride(1) == 1
            and self.available()
        )

    def supports_act_and_mul(self, gate: Tensor, up: Tensor) -> bool:
        """Any number of tokens."""
        return (
            gate.is_cuda
            and type(gate) is type(up) is Tensor
            and gate.dtype == up.dtype
            and gate.dtype in FLOAT_DTYPES
            and gate.stride(-1) == up.stride(-1) == 1
            and self.available()
        )

    def in_graph(self) -> bool:
        """Also while a CUDA graph is captured."""
        return torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()


def max_tokens(sparsity: float) -> int:
    """Tokens up to which the kernels are faster than dense products, measured on an H200 (docs/gpu.md).

    Enough neurons must be active for no token, and more of them the more tokens there are, since tensor cores serve 16
    for the price of one and our loads do not. Tokens are taken to choose independently, which understates that share.
    """
    tokens = 1
    while tokens < MAX_DECODE_TOKENS and sparsity ** (tokens + 1) >= 0.2 + (tokens + 1) / 100:
        tokens += 1
    return tokens


def _implementation(name: str) -> Callable[..., Tensor]:
    """The function of `dispatch` with an operator's name. Triton is imported when it is first called."""

    def run(*args: Any) -> Tensor:
        from cats_llm.kernels.gpu import dispatch

        out: Tensor = getattr(dispatch, name)(*args)
        return out

    return run


for _name in ("gated_mlp", "linear", "act_and_mul"):
    operators.library.impl(_name, _implementation(_name), "CUDA")
BACKEND = GPUBackend()
