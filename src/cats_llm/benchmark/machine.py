"""What a measurement was taken on."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cats_llm.kernels import backends, cpu
from cats_llm.versions import versions


def facts() -> dict[str, Any]:
    """Machine, versions and kernels, for the record beside every result."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": cpu.isa(),
        "isas": cpu.available_isas(),
        "kernels": backends.names(),
        "cuda": torch.version.cuda,
        "triton": next((package.version for package in metadata.distributions(name="triton")), None),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
