"""The CPU kernels: decoding at the speed of memory, in C++ (see README.md).

Importing this module loads the library, if it was built.
"""

import ctypes
import sys

import torch
from torch import Tensor

from cats_llm.kernels.backend import FLOAT_DTYPES, MAX_DECODE_TOKENS, Backend, Request
from cats_llm.kernels.cpu.library import available, available_isas, isa, set_isa
from cats_llm.kernels.definition import ACTIVATIONS

__all__ = ["BACKEND", "available", "available_isas", "isa", "set_isa"]

_HUGE_PAGE = 1 << 21
_MADV_HUGEPAGE = 14


class CPUBackend(Backend):
    """The C++ kernels."""

    name = "cpu"
    built = available()

    def supports(self, request: Request) -> bool:
        """Up to `MAX_DECODE_TOKENS` tokens."""
        gate, up, down = request.w_gate, request.w_up, request.w_down
        return (
            request.tokens <= MAX_DECODE_TOKENS
            and gate.is_cpu
            and up.is_cpu
            and down.is_cpu
            and gate.dtype in FLOAT_DTYPES
            and gate.dtype == up.dtype == down.dtype
            and request.activation in ACTIVATIONS
            and (gate.stride(1) == up.stride(1) == down.stride(0) == 1 or gate.shape[1] == 1)
            and not torch.is_grad_enabled()
            and self.built
        )

    def supports_linear(self, x: Tensor, w: Tensor) -> bool:
        """Up to `MAX_DECODE_TOKENS` tokens."""
        return (
            self.built
            and x.is_cpu
            and w.is_cpu
            and x.dtype == w.dtype
            and x.dtype in FLOAT_DTYPES
            and (type(w) is Tensor or type(w) in self.weight_types)
            and 0 < x.numel() <= MAX_DECODE_TOKENS * w.shape[1]
            and w.stride(1) == 1
        )

    def _copy_neuron_major(self, weight: Tensor) -> Tensor:
        copy = torch.empty_like(weight.t(), memory_format=torch.contiguous_format)
        _advise_huge_pages(copy)
        return copy.copy_(weight.t()).t()


def _advise_huge_pages(fresh: Tensor) -> None:
    """Ask Linux for huge pages, before the memory is first written; where they are not given, nothing changes.

    Rows that are read here and there touch more pages of 4 kB than the processor keeps track of.
    """
    if not sys.platform.startswith("linux"):
        return
    begin = -(-fresh.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    end = (fresh.data_ptr() + fresh.nbytes) // _HUGE_PAGE * _HUGE_PAGE
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_HUGEPAGE)


BACKEND = CPUBackend()
