"""Which instruction set is chosen, and what happens without the library."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cats_llm.kernels import cpu
from cats_llm.kernels.cpu import library
from cats_llm.kernels.operators import linear
from kernel_cases import use_isa
from marks import needs_kernels

FLAGS = {
    "avx512_bf16": {"avx512_bf16", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"},
    "avx2": {"avx2", "fma", "f16c"},
    "neon": {"asimd"},
}


@needs_kernels
def test_the_best_instruction_set_of_this_cpu_is_chosen():
    text = Path("/proc/cpuinfo").read_text()
    flags = set(next(line for line in text.splitlines() if line.startswith(("flags", "Features"))).split())
    runs = [name for name, needed in FLAGS.items() if needed <= flags] + ["portable"]
    assert cpu.available_isas() == runs[::-1]
    if library.ISA_VARIABLE not in os.environ:
        assert cpu.isa() == runs[0]


@needs_kernels
@pytest.mark.parametrize("name", cpu.available_isas()[1:])
def test_each_instruction_set_is_faster_than_plain_code(name, one_thread):
    # catches a "version" that in truth runs scalar code
    x, w = torch.randn(4, 1024).bfloat16(), torch.randn(256, 1024).bfloat16()

    def seconds(isa: str) -> float:
        with use_isa(isa):
            return min(timed(lambda: linear(x, w)) for _ in range(30))

    assert 2 * seconds(name) < seconds("portable")


def timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@needs_kernels
def test_use_isa_switches_and_returns():
    before = cpu.isa()
    with use_isa("portable"):
        assert cpu.isa() == "portable"
    assert cpu.isa() == before
    with pytest.raises(ValueError, match=r"does not run 'sse9'; it runs portable"):
        cpu.set_isa("sse9")
    assert cpu.isa() == before


@needs_kernels
@pytest.mark.parametrize(
    ("wanted", "chosen", "said"), [("portable", "portable", ""), ("sse9", None, "CATS_CPU_ISA ignored")]
)
def test_the_environment_overrides(wanted, chosen, said):
    code = "from cats_llm.kernels import cpu; print(cpu.isa())"
    env = {**os.environ, library.ISA_VARIABLE: wanted}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (chosen or cpu.available_isas()[-1])
    assert said in done.stderr


def test_a_missing_library_is_reported_and_survived(caplog, tmp_path):
    assert library._load([str(tmp_path)]) is None
    assert "installed without its CPU kernels" in caplog.text


def test_a_broken_library_is_reported_and_survived(caplog, tmp_path):
    (tmp_path / "_C.so").write_bytes(b"not a library")
    assert library._load([str(tmp_path)]) is None
    assert "cannot be loaded" in caplog.text


def test_without_the_library_nothing_breaks(monkeypatch):
    monkeypatch.setattr(library, "_library", None)
    assert not library.available()
    assert library.isa() == "none"
    assert library.available_isas() == []
    with pytest.raises(ValueError, match="it runs none"):
        library.set_isa("avx2")
