"""Figures, tables and sentences of what benchmarks/gpu.py measured: rows cut from its results on one H200."""

import copy
import re
from pathlib import Path

import pytest

from cats_llm.cli.main import main
from cats_llm.errors import CatsError
from cats_llm.report import ReportInputs, markdown, read_files, render_page
from cats_llm.report.bench import facts, is_bench, read_bench
from cats_llm.report.bench_figures import latency, throughput, write_figure
from cats_llm.report.page import headline, page_figures
from cats_llm.report.tables import bench_table

RESULTS = Path(__file__).parents[2] / "benchmarks"
BOUND = "#c2410c"


def spread(values):
    return None if values is None else dict(zip(("median", "low", "high"), values, strict=True))


def mlp_row(contestant, tokens, ms, gb_per_s, over_torch, over_own_dense, bound=1.0, shape="mistral-7b"):
    ratios = {"speedup_over_torch": spread(over_torch), "speedup_over_own_dense": spread(over_own_dense)}
    made = {"contestant": contestant, "shape": shape, "dtype": "bfloat16", "tokens": tokens}
    return made | {"ms": spread(ms), "gb_per_s": gb_per_s, **ratios, "byte_bound": bound}


def decode_row(contestant, mode, tokens_per_second, ms, gb_per_s, over_stock, over_own_dense, bound=1.0):
    ratios = {"speedup_over_stock": spread(over_stock), "speedup_over_own_dense": spread(over_own_dense)}
    made = {"contestant": contestant, "mode": mode, "batch": 1, "tokens": 64, "tokens_per_second": tokens_per_second}
    made |= {"ms_per_step": spread(ms), "gb_per_s": gb_per_s, **ratios, "byte_bound": bound}
    return made | {"layers": 32, "dtype": "bfloat16", "shape": "mistral-7b"}


GPU = {
    "benchmark": "gpu",
    "machine": {"cpu": "Intel(R) Xeon(R) Processor", "gpus": ["NVIDIA H200"]},
    "command": "benchmarks/gpu.py",
    "mlp": [
        mlp_row("torch dense", 1, (0.09617, 0.0961, 0.09622), 3664.0, (1.0, 1.0, 1.0), (0.9644, 0.9627, 0.9664)),
        mlp_row("k = 0.5", 1, (0.06774, 0.06743, 0.06788), 3469.0, (1.42, 1.415, 1.427), (1.371, 1.365, 1.376), 1.499),
        mlp_row("torch dense", 16, (0.09724, 0.09712, 0.1001), 3623.0, (1.0, 1.0, 1.0), (0.979, 0.9765, 0.9803)),
        mlp_row("k = 0.5", 16, (0.09502, 0.09492, 0.09867), 3708.0, (1.022, 1.02, 1.024), (1.001, 0.9985, 1.002)),
        mlp_row(
            "k = 0.5, eager",
            1,
            (0.07858, 0.07565, 0.08414),
            2297.0,
            (1.009, 0.9416, 1.047),
            (1.153, 1.085, 1.262),
            1.499,
            shape="llama2-7b",
        ),
    ],
    "prefill": [
        mlp_row("torch dense", 512, (0.3038, 0.3015, 0.3043), 1160.0, (1.0, 1.0, 1.0), None),
        mlp_row("k = 0.5", 512, (0.2933, 0.2915, 0.2948), 1201.0, (1.032, 1.031, 1.038), None),
        mlp_row("torch dense", 2048, (1.128, 1.123, 1.162), 312.4, (1.0, 1.0, 1.0), None),
        mlp_row("k = 0.5", 2048, (1.093, 1.091, 1.129), 322.5, (1.029, 1.028, 1.033), None),
    ],
    "decode": [
        decode_row(
            "stock",
            "generate, compiled",
            150.7,
            (6.637, 6.543, 6.703),
            2143.0,
            (1.0, 1.0, 1.0),
            (0.8903, 0.8854, 0.896),
        ),
        decode_row(
            "k = 0.5",
            "generate, compiled",
            193.3,
            (5.174, 5.075, 5.194),
            2022.0,
            (1.296, 1.285, 1.302),
            (1.165, 1.143, 1.167),
            1.359,
        ),
        decode_row(
            "k = 0.5, MLP only",
            "generate, compiled",
            178.8,
            (5.593, 5.589, 5.603),
            1870.0,
            (1.189, 1.171, 1.197),
            (1.156, 1.154, 1.162),
            1.359,
        ),
        decode_row(
            "k = 0.5, graph_decode",
            "graph_decode",
            261.8,
            (3.82, 3.819, 3.82),
            2739.0,
            (1.383, 1.382, 1.383),
            (1.21, 1.21, 1.211),
            1.359,
        ),
        decode_row(
            "k = 0.5, eager",
            "generate, eager",
            39.86,
            (25.09, 24.97, 33.34),
            417.0,
            (0.8816, 0.7183, 0.9069),
            (1.01, 0.8224, 1.034),
            1.359,
        ),
    ],
}


@pytest.fixture
def benches():
    return {bench.name: bench for bench in read_bench(GPU, Path("gpu.json"))}


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def bars(figure):
    return [bar.get_width() for axes in figure.axes for bar in axes.patches]


def marks(figure):
    return [line.get_xdata()[0] for axes in figure.axes for line in axes.lines if line.get_color() == BOUND]


def test_one_file_holds_several_tables(benches):
    assert is_bench(GPU)
    assert {name: (bench.kind, len(bench.rows)) for name, bench in benches.items()} == {
        "gpu-mlp": ("mlp", 5),
        "gpu-prefill": ("mlp", 4),
        "gpu-decode": ("decode", 5),
    }
    assert {bench.place for bench in benches.values()} == {"NVIDIA H200"}
    assert benches["gpu-mlp"].subject == "one MLP of mistral-7b/llama2-7b, bfloat16"
    assert benches["gpu-decode"].subject == "mistral-7b, whole tokens, bfloat16"
    (only,) = read_bench({"benchmark": "gpu", "decode": GPU["decode"], "mlp": []}, Path("a.json"))
    assert only.name == "a-decode"


def test_panels_are_titled_by_what_differs(benches):
    assert titles(latency("mlp", GPU["mlp"])) == [
        "mistral-7b, 1 token at a time",
        "mistral-7b, 16 tokens at a time",
        "llama2-7b, 1 token at a time",
    ]
    assert titles(latency("mlp", GPU["prefill"])) == ["512 tokens at a time", "2048 tokens at a time"]
    figure = latency("decode", GPU["decode"])
    assert titles(figure) == [
        f"{mode}, 1 token at a time" for mode in ("generate, compiled", "graph_decode", "generate, eager")
    ]
    names = [[label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes]
    assert names == [["stock", "k = 0.5", "k = 0.5, MLP only"], ["k = 0.5"], ["k = 0.5"]]
    # what is too long for a narrow panel breaks between its parts
    other = [row | {"dtype": "float32"} for row in GPU["mlp"]]
    assert titles(latency("mlp", GPU["mlp"] + other, wide=False))[0] == "mistral-7b, bfloat16,\n1 token at a time"


def test_bars_are_the_measurements_in_a_unit_that_suits():
    for section, kind, factor, unit in (
        ("mlp", "mlp", 1000, "µs a call"),
        ("prefill", "mlp", 1, "ms a call"),
        ("decode", "decode", 1, "ms a step"),
    ):
        figure = latency(kind, GPU[section])
        assert bars(figure) == pytest.approx([factor * facts(kind, row)[2]["median"] for row in GPU[section]])
        assert figure.get_supxlabel() == unit
    assert bars(throughput("decode", GPU["decode"])) == [row["tokens_per_second"] for row in GPU["decode"]]


def test_marks_are_each_row_s_own():
    ours = [row for row in GPU["mlp"] if row["contestant"].startswith("k")]
    expected = [1000 * r["ms"]["median"] * r["speedup_over_own_dense"]["median"] / r["byte_bound"] for r in ours]
    assert marks(latency("mlp", GPU["mlp"])) == pytest.approx(expected)
    assert marks(latency("mlp", GPU["prefill"])) == []
    assert latency("mlp", GPU["prefill"]).legends == []


def test_texts_of_many_panels_do_not_overlap(tmp_path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    names = "torch dense, eager", "k = 0.0", "k = 0.5", "k = 0.9, eager"
    row = GPU["mlp"][1]
    cases = [("mistral-7b", "bfloat16", tokens) for tokens in (1, 2, 4, 8, 16)]
    cases += [("mistral-7b", "float32", 1), ("mistral-7b", "float16", 1), ("llama2-7b", "bfloat16", 1)]
    cases += [("qwen3-8b", "bfloat16", 1)]
    rows = [
        row | {"contestant": name, "shape": shape, "dtype": dtype, "tokens": tokens}
        for shape, dtype, tokens in cases
        for name in names
    ]
    for wide in (True, False):
        figure = latency("mlp", rows, wide)
        assert len(figure.axes) == 9
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        texts = [t for axes in figure.axes for t in (axes._left_title, *axes.texts, *axes.get_yticklabels())]
        boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
        for i, (name, box) in enumerate(boxes):
            assert box.x0 >= 0, name
            assert box.x1 <= figure.bbox.x1, name
            for other, another in boxes[i + 1 :]:
                assert not box.overlaps(another), (name, other)


def test_the_table(benches):
    table = bench_table(benches["gpu-mlp"])
    assert table.title == "one MLP of mistral-7b/llama2-7b, bfloat16, on NVIDIA H200"
    assert table.columns[:4] == ["contestant", "shape", "tokens at a time", "µs (quartiles)"]
    assert table.rows[1][:4] == ["k = 0.5", "mistral-7b", "1", "67.74 (67.43 to 67.88)"]
    table = bench_table(benches["gpu-decode"])
    assert table.columns[:3] == ["contestant", "mode", "tokens at a time"]
    assert "threads" not in table.columns
    assert table.rows[-1][1] == "generate, eager"
    table = bench_table(benches["gpu-prefill"])
    assert table.rows[1][table.columns.index("ms (quartiles)")] == "0.293 (0.291 to 0.295)"


def test_speed_is_told(benches):
    said = headline(ReportInputs(benches=list(benches.values())))
    assert said[0].startswith(
        "At 50 % gate sparsity one MLP of mistral-7b takes 0.0677 ms on NVIDIA H200, 1.42 times as fast as PyTorch"
    )
    assert "one MLP of mistral-7b with 512 tokens at a time takes 0.293 ms on NVIDIA H200" in said[1]
    assert "one token (mistral-7b, generate, compiled) takes 5.17 ms on NVIDIA H200" in said[2]


@pytest.mark.parametrize(
    ("section", "member", "to"),
    [
        ("mlp", "tokens", None),
        ("mlp", "threads", 0),
        ("mlp", "shape", [1]),
        ("mlp", "speedup_over_own_dense", {"median": 0}),
        ("prefill", "speedup_over_torch", 2),
        ("decode", "mode", 5),
        ("decode", "tokens", [64]),
    ],
)
def test_damage_names_the_place(section, member, to):
    values = copy.deepcopy(GPU)
    values[section][1][member] = to
    says = re.escape(
        f"b.json is a damaged benchmark result: {section}[1] has no usable {member}; run benchmarks/gpu.py"
    )
    with pytest.raises(CatsError, match=says):
        read_bench(values, Path("b.json"))


@pytest.mark.parametrize("values", [{}, {"mlp": []}, {"mlp": "rows"}])
def test_a_file_without_rows(values):
    with pytest.raises(CatsError, match=r"b\.json is a benchmark without rows; run benchmarks/gpu\.py again"):
        read_bench({"benchmark": "gpu", **values}, Path("b.json"))


def test_the_committed_results(tmp_path, capsys):
    files = [RESULTS / "gpu" / f"{name}.json" for name in ("h200-mlp", "h200-decode")]
    made = read_files([*files, *sorted((RESULTS / "cpu").glob("*.json"))])
    html, text = render_page(made), markdown(made)
    assert "NVIDIA H200" in html
    assert "None" not in html + text
    for bench in made.benches:
        for row in bench_table(bench).rows:
            assert row[0] in text
    assert len(page_figures(made)) == len(made.benches) + sum(bench.kind == "decode" for bench in made.benches)
    assert main(["report", *map(str, files), "-o", str(tmp_path / "r.html"), "--figures", str(tmp_path / "f")]) == 0
    assert "on NVIDIA H200" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "f").is_dir()
    for file in files:
        bench = read_files([file]).benches[0]
        write_figure(bench.kind, bench.rows, tmp_path / f"{file.stem}.svg")
        assert "<svg" in (tmp_path / f"{file.stem}.svg").read_text(encoding="utf-8")
