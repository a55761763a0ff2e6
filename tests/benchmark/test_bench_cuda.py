"""The GPU benchmarks' structure and arithmetic, with a CPU and its clock in the GPU's place; never how fast it is."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from cats_llm.benchmark import cuda
from cats_llm.benchmark.config import DecodeBench, MLPBench
from cats_llm.benchmark.cuda_decode import MODES, bench_cuda_decode
from cats_llm.benchmark.mlp import DENSE, bench_cuda_mlp
from cats_llm.benchmark.models import SHAPES, MLPs, Shape, copy_sharing_weights, random_model
from cats_llm.benchmark.tables import CUDA_DECODE, CUDA_MLP, table
from cats_llm.benchmark.timing import speed
from cats_llm.cli.main import main
from cats_llm.model.sparsify import sparse_mlps, thresholds
from cats_llm.model.structure import find_gated_mlps
from cats_llm.report import ReportInputs, render_page
from cats_llm.report.bench import read_bench
from cats_llm.report.bench_figures import latency, throughput, write_figure
from marks import needs_kernels

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
TINY = Shape("64,96", 64, 96, layers=2, heads=2, kv_heads=1, head_dim=32, vocab_size=128)
TORCH_COMPILE = torch.compile
BOUND = "#c2410c"
COPY = 1e9  # bytes a second

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def clock(monkeypatch):
    """The few calls that need a GPU, on a CPU."""
    monkeypatch.setattr(cuda, "mark", time.perf_counter)
    monkeypatch.setattr(cuda, "elapsed", lambda start, end: end - start)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(cuda, "captured", lambda work: work)
    monkeypatch.setattr(cuda, "kernel_times", lambda work: (work(), {"a kernel": 8e-6})[1])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def test_a_row_by_hand():
    seconds = {"dense": [4e-4, 6e-4, 5e-4], "k = 0.0": [2e-4, 6e-4, 4e-4], "k = 0.5": [1e-4, 3e-4, 2e-4]}
    row = speed(seconds, "k = 0.5", 200e6, 300e6, {"x": "dense", "own": "k = 0.0", "other": "absent"})
    assert row == {
        "ms": pytest.approx({"median": 0.2, "low": 0.15, "high": 0.25}),
        "bytes": 200_000_000,
        "gb_per_s": pytest.approx(1000),  # 200 MB in 0.2 ms
        "x": pytest.approx({"median": 2.5, "low": 2.25, "high": 3.25}),  # of 4, 2 and 2.5
        "own": {"median": 2.0, "low": 2.0, "high": 2.0},
        "other": None,
        "byte_bound": 1.5,
    }


def test_bandwidths_count_what_a_copy_reads_and_writes(monkeypatch):
    durations = iter([9.0, 9.0, 2.0, 2.0, 2.0, 9.0, 9.0, 0.5, 0.5, 0.5])  # the first two of each warm up
    monkeypatch.setattr(cuda, "eager", lambda work: lambda turn: (work(), next(durations))[1])
    assert cuda.bandwidths("cpu", numbers=1000, rounds=3) == {"copy": 2 * 4000 / 2, "read": 4000 / 0.5}


def test_a_replay_hides_the_launch_of_the_one_that_counts(monkeypatch):
    log = []
    monkeypatch.setattr(cuda, "captured", lambda work: work)
    monkeypatch.setattr(cuda, "mark", lambda: log.append("mark") or len(log))
    monkeypatch.setattr(cuda, "elapsed", lambda start, end: float(end - start))
    assert cuda.replayed(lambda: log.append("work"), parts=4)(0) == 2 / 4
    assert log == ["work", "mark", "work", "mark"]


@needs_kernels
@pytest.mark.usefixtures("clock")
def test_mlp_rows():
    rows = bench_cuda_mlp(MLPBench(shape="64,1000", sparsities=(0.0, 0.5, 0.9), rounds=2), COPY)
    names = ["torch dense", "torch dense, eager", "k = 0.0", "k = 0.5", "k = 0.9"]
    assert [row["contestant"] for row in rows] == [*names, "k = 0.0, eager", "k = 0.5, eager", "k = 0.9, eager"]
    matrix = 64 * 1000 * 2
    for row, k in zip(rows, [0, 0, 0, 0.5, 0.9, 0, 0.5, 0.9], strict=True):
        assert row["bytes"] == pytest.approx(matrix * (1 + 2 * (1 - k)), rel=0.01)
        seconds = row["ms"]["median"] / 1e3
        assert row["share_of_copy_bandwidth"] == pytest.approx(row["bytes"] / seconds / COPY)
        assert row["tflops"] == pytest.approx(2 * 3 * 64 * 1000 / seconds / 1e12)
        assert row["kernel"] == ("cpu" if row["contestant"].startswith("k =") else None)
    assert rows[0]["speedup_over_torch"]["median"] == rows[1]["speedup_over_torch_eager"]["median"] == 1
    assert rows[2]["speedup_over_own_dense"]["median"] == rows[5]["speedup_over_own_dense"]["median"] == 1


@pytest.mark.usefixtures("clock")
def test_prefill_is_dense_and_reads_all_weights():
    rows = bench_cuda_mlp(MLPBench("float32", (0.5,), shape=TINY.name, rounds=1), COPY, tokens=17)
    assert {row["kernel"] for row in rows[2:]} == {DENSE}
    assert {row["bytes"] for row in rows} == {3 * 64 * 96 * 4}
    assert rows[2]["speedup_over_own_dense"] is None


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("retune", [False, True])
def test_decode_rows(retune):
    model = random_model(TINY, 2, torch.float32)
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    said = []
    config = DecodeBench("float32", (0.5, 0.9), model="tiny", tokens=5, rounds=1)
    result = bench_cuda_decode(config, model, COPY, retune=retune, announce=said.append)
    rows = {row["contestant"]: row for row in result["rows"]}
    every = [what + of for of in ("", ", graph_decode", ", one step") for what in ("stock", "k = 0.0", "k = 0.9")]
    alone = [f"k = {k}, MLP only" for k in (0.0, 0.5, 0.9)]
    assert {*every, *alone, "stock, eager", "k = 0.0, eager", "k = 0.5, eager"} <= set(rows)
    assert "k = 0.9, eager" not in rows
    assert {row["mode"] for row in rows.values()} == set(MODES)
    dense = sum(p.numel() * 4 for name, p in model.named_parameters() if "embed" not in name)
    for name, row in rows.items():
        k = float(name.split(",")[0][4:]) if name.startswith("k") else 0.0
        assert row["bytes"] == pytest.approx(dense - 2 * 2 * 64 * 96 * 4 * k, rel=0.05), name
        assert row["floor_ms"] == pytest.approx(1e3 * row["bytes"] / COPY)
        assert row["share_of_copy_bandwidth"] == pytest.approx(row["floor_ms"] / row["ms_per_step"]["median"])
        assert row["byte_bound"] == pytest.approx(dense / row["bytes"])
        if name.startswith("stock"):
            assert row["speedup_over_stock"]["median"] == 1
        if k == 0 and name.startswith("k"):
            assert row["speedup_over_own_dense"]["median"] == 1, "compared with k = 0 of the same mode and part"
    assert result["tuned_for"] == (None if retune else 0.5)
    # 8 us in all of the five steps
    assert result["kernels"] == {name: {"a kernel": 8e-6 / 5} for name in ("stock", "k = 0.0", "k = 0.5")}
    assert sum(text.startswith("preparing") for text in said) == len(rows)
    assert thresholds(model) == {}
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0], name
        assert torch.equal(parameter, before[name][1]), name


def test_copies_share_weights_but_no_compiled_form():
    model = random_model(TINY, 1, torch.float32)
    model._compiled_call = model._cats_compiled_step = lambda: "the original's"
    for but_down in (False, True):
        copied = copy_sharing_weights(model, but_down)
        assert not {"_compiled_call", "_cats_compiled_step"} & set(vars(copied))
        own = {
            name
            for (name, p), q in zip(model.named_parameters(), copied.parameters(), strict=True)
            if p.data_ptr() != q.data_ptr()
        }
        assert own == ({"model.layers.0.mlp.down_proj.weight"} if but_down else set())


def test_the_stack_of_mlps_is_found_and_shared():
    stack = MLPs(TINY, 3, torch.float32, "cpu")
    assert [mlp.layer for mlp in find_gated_mlps(stack)] == [0, 1, 2]
    assert sparse_mlps(stack) == {}
    assert len(stack(torch.zeros(1, 64))) == 3


def saved_rows():
    spread = {"median": 0.08, "low": 0.07, "high": 0.09}
    once = {"median": 1.0, "low": 1.0, "high": 1.0}
    common = {
        "device": "a GPU",
        "gb_per_s": 3000.0,
        "share_of_copy_bandwidth": 0.75,
        "byte_bound": 1.5,
        "speedup_over_own_dense": once,
    }
    mlp = {"ms": spread, "kernel": "gpu", "speedup_over_torch": once, "speedup_over_torch_eager": None} | common
    step = {
        "ms_per_step": {n: 100 * v for n, v in spread.items()},
        "batch": 1,
        "tokens": 64,
        "floor_ms": 3.35,
        "tokens_per_second": 125.0,
    }
    decode = step | common | {"sparsity_decoded": None, "speedup_over_stock": once}
    return (
        [
            mlp | {"contestant": name, "shape": "mistral-7b", "dtype": dtype, "tokens": tokens}
            for dtype, tokens in (("bfloat16", 1), ("bfloat16", 16), ("float32", 1))
            for name in ("torch dense", "k = 0.5")
        ],
        [decode | {"contestant": "k = 0.5" + MODES[mode], "mode": mode} for mode in MODES],
    )


def test_tables():
    mlp, decode = saved_rows()
    lines = table(mlp, CUDA_MLP)
    assert lines[1][:9] == ["torch dense", "mistral-7b", "bfloat16", "1", "gpu", "80.0", "70.0 to 90.0", "3.00", "75%"]
    assert lines[1][9:] == ["1.00", "-", "1.00", "1.50"]
    lines = table(decode, CUDA_DECODE)
    assert lines[1] == ["k = 0.5", "1", "-", "8.00", "7.00 to 9.00", "3.35", "3.00", "75%", "1.00", "1.00", "1.50"]


def test_figures(tmp_path):
    mlp, decode = saved_rows()
    figure = latency("mlp", mlp)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "bfloat16, 1 token at a time",
        "bfloat16, 16 tokens at a time",
        "float32, 1 token at a time",
    ]
    assert figure._supxlabel.get_text() == "µs a call"
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx([80, 80])
    figure = latency("decode", decode)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [f"{mode}, 1 token at a time" for mode in MODES]
    assert figure._supxlabel.get_text() == "ms a step"
    write_figure("decode", decode, tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text(encoding="utf-8")


def marks(figure):
    """Where the marks of what the bytes allow stand, in the order of the bars."""
    return [line.get_xdata()[0] for axes in figure.axes for line in axes.lines if line.get_color() == BOUND]


def test_the_mark_is_our_own_dense_path_of_the_same_kind():
    _, (row, *_) = saved_rows()
    times = {"k = 0.0": 8.0, "k = 0.5": 6.0, "k = 0.0, MLP only": 9.0, "k = 0.5, MLP only": 7.0}
    rows = [
        row
        | {
            "contestant": name,
            "ms_per_step": dict.fromkeys(("median", "low", "high"), ms),
            "tokens_per_second": 1000 / ms,
            "byte_bound": bound,
            "speedup_over_own_dense": {"median": dense / ms},
        }
        for (name, ms), bound, dense in zip(times.items(), [1.0, 1.6, 1.0, 1.5], [8.0, 8.0, 9.0, 9.0], strict=True)
    ]
    assert marks(latency("decode", rows)) == pytest.approx([8, 5, 9, 6])
    assert marks(throughput("decode", rows)) == pytest.approx([1000 / 8, 1000 / 5, 1000 / 9, 1000 / 6])
    # other ones do not move it, and without a comparison there is none
    assert marks(latency("decode", rows[1:2])) == pytest.approx([5])
    assert marks(latency("decode", [rows[1] | {"speedup_over_own_dense": None}])) == []


def test_results_of_a_gpu_go_into_the_report(tmp_path):
    for kind, rows in zip(("mlp", "decode"), saved_rows(), strict=True):
        values = {"benchmark": kind, "rows": rows, "machine": {"cpu": "a CPU"}}
        (found,) = read_bench(values, tmp_path / "gpu.json")
        assert found.place == "a GPU"
        html = render_page(ReportInputs(benches=[found]))
        assert "a GPU" in html
        assert "None" not in html


def test_the_commands_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, said in (
        (["mlp", "--device", "cuda"], "'cuda' was asked for, but PyTorch finds no CUDA GPU here."),
        (["decode", "--shape", "mistral-7b", "--device", "cuda"], "PyTorch finds no CUDA GPU here."),
        (["mlp", "--device", "auto"], "name one"),
        (["mlp", "--device", "tpu9"], "no device"),
    ):
        assert main(["bench", *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_threads_are_for_the_cpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["bench", "mlp", "--device", "cuda", "--threads", "2"]) == 2
    assert "--threads is for the CPU" in capsys.readouterr().err


def test_the_script_needs_little():
    """Its help comes without typer, rich, Jinja, matplotlib, pytest and the package being installed."""
    blocked = "typer", "rich", "jinja2", "matplotlib", "pytest", "hypothesis", "datasets", "peft"
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({blocked})); "
        f"sys.argv = ['gpu.py', '--help']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2] / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "--only" in done.stdout


@pytest.fixture
def script(monkeypatch, clock):
    """The script, with tiny shapes and a CPU in the GPU's place."""
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module.cuda, "bandwidths", lambda device: {"copy": COPY, "read": COPY})
    monkeypatch.setattr(module, "SHAPES", {"mistral-7b": TINY, "other": Shape("64,128", 64, 128), "twin": TINY})
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "random_model", lambda shape, layers, dtype, device: random_model(TINY, layers, dtype))
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_check_passes_what_is_right(script, dtype, tokens):
    rows = script.check_mlp(Shape("t", 64, 1000), dtype, [0.0, 0.5, 0.9], tokens)
    assert [row["sparsity"] for row in rows] == [0.0, 0.5, 0.9]
    assert all(row["right"] for row in rows), rows


def test_check_finds_what_is_wrong(script, monkeypatch):
    forward = MLPs.forward
    monkeypatch.setattr(MLPs, "forward", lambda self, x: [y * 1.001 for y in forward(self, x)])
    assert not any(row["right"] for row in script.check_mlp(TINY, torch.float32, [0.5], 1))


@needs_kernels
def test_check_finds_other_bits(script, monkeypatch):
    forward, calls = MLPs.forward, iter(range(100))
    monkeypatch.setattr(MLPs, "forward", lambda self, x: [y * (1 + 2e-7 * (next(calls) % 2)) for y in forward(self, x)])
    rows = script.check_mlp(TINY, torch.float32, [0.5], 1)
    assert [(row["same_bits"], row["right"]) for row in rows] == [(False, False)]


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
    return module.main()


def test_the_script_from_start_to_end(script, tmp_path, monkeypatch, capsys):
    only = "check,mlp,prefill,decode"
    assert run(script, monkeypatch, "--out", tmp_path, "--only", only, "--layers", 1, "--quick") == 0
    results = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert results["errors"] == {}
    assert results["check_passed"] is True
    assert {row["tokens"] for row in results["prefill"]} == {512, 2048}
    assert {row["mode"] for row in results["decode"]} == set(MODES)
    assert set(results["seconds"]) == {*only.split(","), "figures"}
    for section in ("mlp", "prefill", "decode"):
        assert (tmp_path / f"gpu-{section}.svg").stat().st_size > 1000
        assert (tmp_path / f"gpu-{section}.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "k = 0.5, MLP only" in printed
    assert "0 failed" in printed


def test_a_failed_section_costs_no_other(script, tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(script, "bench_cuda_mlp", broken)
    arguments = ("--out", tmp_path, "--only", "mlp,decode", "--layers", 1, "--quick", "--modes", "one step")
    assert run(script, monkeypatch, *arguments) == 1
    results = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert results["errors"] == {"mlp": "RuntimeError: no kernel image"}
    assert {row["mode"] for row in results["decode"]} == {"one step"}
    assert "mlp FAILED" in capsys.readouterr().out


def test_ways_to_decode_are_left_out_when_time_is_up(script, tmp_path, monkeypatch, capsys):
    arguments = ("--out", tmp_path, "--only", "decode", "--layers", 1, "--quick", "--minutes", 0)
    assert run(script, monkeypatch, *arguments) == 0
    results = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert results["left_out"] == [f"decode: {mode}" for mode in MODES]
    assert "left out for time" in capsys.readouterr().out


def test_tables_for_a_terminal(script):
    assert script.as_text([["name", "x"], ["a", "10.0"]]) == "name     x\na     10.0"


def test_every_shape_is_measured_once(script, monkeypatch):
    monkeypatch.setattr(script, "SHAPES", SHAPES)
    shapes, same = script.shapes_once()
    assert [shape.name for shape in shapes] == ["mistral-7b", "llama2-7b", "qwen3-8b"]
    assert same == {"llama3-8b": "mistral-7b"}


def test_the_script_refuses_what_it_does_not_know(script, monkeypatch, capsys):
    for wrong in (["--only", "everything"], ["--modes", "fast"]):
        with pytest.raises(SystemExit):
            run(script, monkeypatch, *wrong)
        assert "some of" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_sparsities_share_what_was_compiled(clock, monkeypatch):
    """Thresholds are data: one compilation serves all sparsities and rounds, in one graph without a break."""
    counter = CompileCounter()
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: TORCH_COMPILE(function, backend=counter, fullgraph=True)
    )
    torch.compiler.reset()
    model = random_model(TINY, 2, torch.float32)
    config = DecodeBench("float32", (0.5, 0.9), model="tiny", tokens=4, rounds=2)
    bench_cuda_decode(config, model, COPY, modes=("one step",))
    assert counter.frame_count == 2, "stock and ours"
    torch.compiler.reset()
