"""Neuron-major storage of W_down, in huge pages where Linux has them.

Rows that are read here and there touch more pages of 4 kB than the processor keeps track of; pages of 2 MB cost nothing
if they are asked for before the memory is first written.
"""

import ctypes
import sys

import torch
from torch import Tensor

_HUGE_PAGE = 1 << 21
_MADV_HUGEPAGE = 14


def copy_neuron_major(weight: Tensor) -> Tensor:
    """A copy of ``weight``, (d, f), of the same shape, in which the d numbers of a neuron are adjacent."""
    copy = torch.empty_like(weight.t(), memory_format=torch.contiguous_format)
    _advise_huge_pages(copy)
    return copy.copy_(weight.t()).t()


def _advise_huge_pages(fresh: Tensor) -> None:
    """Advice only: where it cannot be followed, nothing changes."""
    if not sys.platform.startswith("linux"):
        return
    begin = -(-fresh.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    end = (fresh.data_ptr() + fresh.nbytes) // _HUGE_PAGE * _HUGE_PAGE
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_HUGEPAGE)
