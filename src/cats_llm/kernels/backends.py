"""The backend of every type of device: a new one is a file beside these, and a line here."""

import torch

from cats_llm.kernels import cpu, gpu
from cats_llm.kernels.backend import Backend

NO_KERNELS = Backend()

_BACKENDS: dict[str, Backend] = {
    "cpu": cpu.BACKEND,
    "cuda": gpu.BACKEND,
}


def backend_of(device: torch.device) -> Backend:
    """The backend of a device; `NO_KERNELS`, which supports nothing, for a type of device that has none."""
    return _BACKENDS.get(device.type, NO_KERNELS)


def names() -> list[str]:
    """Names of the backends of this installation, and of the plain definition, for records of measurements."""
    return [*(backend.name for backend in _BACKENDS.values() if backend.built), NO_KERNELS.name]
