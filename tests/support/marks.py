"""Marks that several files use."""

import pytest

from cats_llm.kernels import cpu

needs_kernels = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels are not built here")
