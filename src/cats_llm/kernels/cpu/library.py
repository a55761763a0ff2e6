"""The compiled library: finding it, loading it, and which instruction set it uses."""

import ctypes
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

ISA_VARIABLE = "CATS_CPU_ISA"
"""Environment variable that names the instruction set to use instead of the fastest."""


def _load(folders: Iterable[str]) -> ctypes.CDLL | None:
    """The library in one of the package's folders (an editable install has two), its operators known to torch."""
    path = next((p for p in (Path(folder, "_C.so") for folder in folders) if p.is_file()), None)
    if path is None:
        logger.warning("cats-llm was installed without its CPU kernels; decoding on the CPU uses plain PyTorch")
        return None
    try:
        torch.ops.load_library(path)
        library = ctypes.CDLL(str(path))
    except OSError as error:
        logger.warning("cats-llm's CPU kernels cannot be loaded, decoding on the CPU uses plain PyTorch: %s", error)
        return None
    library.cats_cpu_isa.restype = library.cats_cpu_isa_at.restype = ctypes.c_char_p
    library.cats_cpu_set_isa.restype = ctypes.c_bool
    return library


_library = _load(sys.modules["cats_llm.kernels.cpu"].__path__)


def available() -> bool:
    """Whether the kernels are there."""
    return _library is not None


def isa() -> str:
    """The instruction set in use; "none" without the kernels."""
    return _library.cats_cpu_isa().decode() if _library else "none"


def available_isas() -> list[str]:
    """The instruction sets that the library holds and this CPU runs, slowest first."""
    names: list[str] = []
    while _library and (name := _library.cats_cpu_isa_at(len(names))):
        names.append(name.decode())
    return names


def set_isa(name: str) -> None:
    """Use another instruction set, in the whole process."""
    if not (_library and _library.cats_cpu_set_isa(name.encode())):
        raise ValueError(f"this CPU does not run {name!r}; it runs {', '.join(available_isas()) or 'none'}")


if _library and (_name := os.environ.get(ISA_VARIABLE)):
    try:
        set_isa(_name)
    except ValueError as error:
        logger.warning("%s ignored: %s; using %s", ISA_VARIABLE, error, isa())
