"""benchmarks/quality.py: what it compares, that workers and a stopped run lose nothing, its rounding and its table."""

import json
import os
import subprocess
import sys
from concurrent.futures import Executor, Future
from pathlib import Path

import pytest
import torch

from cats_llm import bundled
from cats_llm.errors import CatsError
from cats_llm.report.results import read_eval

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WORDS = [
    "--calibration", "books=books.txt", "--text", "story=story.txt", "--draws", "0", "--samples", "4",
    "--seq-length", "32", "--window", "48", "--windows", "3",
    "--sparsity", "0.5,0.9", "--equal", "bytes,share", "--int8",
]  # fmt: skip
RUN = [*WORDS, "--sparsity", "0.5", "--criteria", "cats,norm", "--baselines", "relu,teal"]


@pytest.fixture(scope="module")
def quality():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import quality
        import quality_cells
        import quality_table

        yield quality, quality_cells, quality_table
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in ("quality", "quality_cells", "quality_table"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What two workers measured."""
    folder = tmp_path_factory.mktemp("quality")
    text = bundled.heldout_text().read_text(encoding="utf-8")
    (folder / "books.txt").write_text(text[:2000], encoding="utf-8")
    (folder / "story.txt").write_text(text[5000:7000], encoding="utf-8")
    out = folder / "out"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "quality.py"), *RUN, "--out", str(out), "--workers", "2"],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, json.loads((out / "quality.json").read_text(encoding="utf-8"))


def test_the_plan_is_every_method_at_every_sparsity(quality):
    words = [
        *WORDS,
        "--criteria",
        "cats,norm",
        "--baselines",
        "relu,wina",
        "--out",
        "x",
        "--calibration",
        "b=b.txt,c.txt",
    ]
    cells = quality[1].plan(quality[0].arguments(words))
    assert [cell.name for cell in cells] == [
        "dense", "dense int8",
        "cats k=0.5, books", "cats k=0.9, books", "norm k=0.5, books", "norm k=0.9, books",
        "cats k=0.5, b", "cats k=0.9, b", "norm k=0.5, b", "norm k=0.9, b",
        "relu", "wina k=0.5", "wina k=0.9", "wina k=0.5 (equal bytes)", "wina k=0.9 (equal bytes)",
    ]  # fmt: skip
    assert len({cell.folder for cell in cells if cell.k}) == len([cell for cell in cells if cell.k])
    # the row of plain CATS that each is compared with has the same bytes
    assert {cell.name: cell.gate_sparsity for cell in cells if cell.method == "wina"} == {
        "wina k=0.5": None, "wina k=0.9": None, "wina k=0.5 (equal bytes)": 0.5, "wina k=0.9 (equal bytes)": 0.9,
    }  # fmt: skip


def test_two_texts_without_names_are_one_sentence(quality):
    with pytest.raises(SystemExit, match="names of their own"):
        quality[1].calibration_files(["a.txt", "b.txt"])


def test_what_existing_results_were_made_with_is_still_the_default(quality):
    words = ["--calibration", "books.txt", "--out", "x", "--rivals", "teal"]
    cells = quality[1].plan(quality[0].arguments(words))
    of_draw = {draw: [cell for cell in cells if cell.draw == draw and cell.method != "dense"] for draw in range(3)}
    assert [len(of_draw[draw]) for draw in range(3)] == [3 * 11, 3 * 4, 3 * 4]
    assert of_draw[0][0].name == "cats k=0.5"
    assert of_draw[0][-1].name == "teal k=0.9 (equal bytes)"
    assert of_draw[2][0].name == "cats k=0.5, draw 2"


class Recorder(Executor):
    """Notes what is submitted; every fit of the method norm fails."""

    def __init__(self):
        self.calls = []

    def submit(self, function, /, name, value):
        self.calls.append((name, value))
        future = Future()
        if name == "fit" and value[0].method == "norm":
            future.set_exception(CatsError("no text."))
        else:
            future.set_result("it")
        return future


def test_every_cell_is_measured_once_after_it_was_fitted(quality, capsys):
    words = [*WORDS, "--criteria", "cats,norm", "--baselines", "teal-greedy,wina", "--out", "x"]
    cells = quality[1].plan(quality[0].arguments(words))
    recorder = Recorder()
    quality[0].measure_all(recorder, cells)
    fitted = [cell for name, group in recorder.calls if name == "fit" for cell in group]
    assert sorted(fitted, key=cells.index) == cells
    good = [cell for cell in cells if cell.method != "norm"]
    assert sorted((cell for name, cell in recorder.calls if name == "measure"), key=cells.index) == good
    # what shares its search is fitted by one worker, and first since it takes long
    assert [cell.method for cell in recorder.calls[0][1]] == ["teal-greedy"] * 4
    told = capsys.readouterr()
    assert "FAILED norm k=0.5: no text\n" in told.out
    assert "14/14" in told.out
    assert "CatsError: no text." in told.err


def test_workers_measure_everything_and_assembling_computes_nothing(quality, measured, monkeypatch, tmp_path):
    out, result = measured
    names = [variant["name"] for variant in result["variants"]]
    assert names == [cell.name for cell in quality[1].plan(quality[0].arguments([*RUN, "--out", str(out)]))]
    rows = {row["variant"]: row for row in result["results"] if row["metric"] == "perplexity"}
    assert list(rows) == names
    assert all(row["difference"] for name, row in rows.items() if name != "dense")
    # plain CATS is compared with what has its bytes, at its sparsity
    against = {(row["variant"], row["k"]) for row in result["against_cats"]}
    assert against == {("norm k=0.5", 0.5), ("teal k=0.5 (equal bytes)", 0.5)}

    def measure(*_):
        raise AssertionError("something is computed")

    monkeypatch.chdir(out.parent)
    monkeypatch.setattr("cats_llm.evaluation.run._measure", measure)
    quality[0].main([*RUN, "--out", str(out), "--assemble"])
    again = json.loads((out / "quality.json").read_text(encoding="utf-8"))
    for key in ("variants", "tasks", "results", "against_cats"):
        assert again[key] == result[key]
    with pytest.raises(CatsError, match="lacks a measurement; run the same command without --assemble"):
        quality[0].main([*RUN, "--out", str(tmp_path), "--assemble"])


def test_a_brief_result_is_still_one(quality, measured, tmp_path):
    out, result = measured
    whole, short = out / "quality.json", tmp_path / "brief.json"
    quality[2].main([str(whole), "--table", str(tmp_path / "whole.md"), "--brief", str(short)])
    quality[2].main([str(short), "--table", str(tmp_path / "short.md")])
    assert (tmp_path / "short.md").read_text() == (tmp_path / "whole.md").read_text()
    assert short.stat().st_size < whole.stat().st_size / 2
    assert f" {out} " in f" {result['command']} "
    assert str(out.parent) not in short.read_text(encoding="utf-8")
    read = read_eval(json.loads(short.read_text(encoding="utf-8")), short)
    assert [variant.name for variant in read.variants] == [variant["name"] for variant in result["variants"]]
    assert read.row("norm k=0.5", "story", "perplexity").difference.p is not None


def test_int8_is_the_nearest_of_255_values_a_row(quality):
    torch.manual_seed(0)
    weight = torch.randn(7, 64) * torch.logspace(-4, 3, 7)[:, None]
    weight[3] = 0
    rounded = quality[1].round_int8(weight).double()
    exact = weight.double()
    scale = exact.abs().amax(1, keepdim=True) / 127
    grid = scale[:, :, None] * torch.arange(-127, 128, dtype=torch.float64)
    best = (grid - exact[:, :, None]).abs().amin(-1)
    assert ((rounded - exact).abs() <= best + 2e-5 * scale).all()
    steps = rounded / scale.where(scale > 0, 1)
    assert (steps - steps.round()).abs().max() < 1e-4
    assert (rounded[3] == 0).all()


def test_int8_rounds_the_linear_layers_of_a_copy_and_nothing_else(quality):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(bundled.model_path(), dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rounded = quality[1].int8_copy(model).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    changed = {name for name, tensor in rounded.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "_proj.weight" in name}


def _result(quality, tmp_path):
    def row(variant, task, metric, value, difference=None, gate=None, share=0.0):
        return {
            "variant": variant, "task": task, "metric": metric, "value": value, "difference": difference,
            "sparsity": {"gate": gate, "ffn": share, "model": share},
        }  # fmt: skip

    def difference(value, low, high, p):
        return {"value": value, "low": low, "high": high, "p": p}

    def variant(name, method, sparsity=None, unit=None, equal=None, rounded=False):
        return {
            "name": name, "method": method, "sparsity": sparsity, "unit": unit, "equal_bytes": equal,
            "rounded": rounded, "source": "books", "draw": 0,
        }  # fmt: skip

    values = {
        "variants": [
            variant("dense", "dense"), variant("dense int8", "dense", rounded=True),
            variant("cats k=0.5", "cats", 0.5, "neurons"),
            variant("teal k=0.5 (equal bytes)", "teal", 0.25, "inputs", 0.5),
            variant("relu", "relu", 0.0, "neurons"),
        ],
        "tasks": [{"name": "wiki", "kind": "perplexity"}, {"name": "piqa", "kind": "lm_eval"}],
        "results": [
            row("dense", "wiki", "perplexity", 20.0), row("dense", "piqa", "acc", 0.65),
            row("dense int8", "wiki", "perplexity", 20.1, difference(0.1, 0.06, 0.14, 1e-4)),
            row("dense int8", "piqa", "acc", 0.65, difference(0.0, 0.0, 0.0, 1.0)),
            row("cats k=0.5", "wiki", "perplexity", 25.0, difference(5.0, 4.0, 6.0, 1e-4), 0.49, 0.245),
            row("cats k=0.5", "wiki", "kl", 0.25, None, 0.49, 0.245),
            row("cats k=0.5", "piqa", "acc", 0.60, difference(-0.05, -0.07, -0.03, 1e-5), 0.5, 0.25),
            row("teal k=0.5 (equal bytes)", "wiki", "perplexity", 20.2, difference(0.2, 0.1, 0.3, 1e-4), None, 0.25),
            row("teal k=0.5 (equal bytes)", "piqa", "acc", 0.64, difference(-0.01, -0.03, 0.01, 0.34), None, 0.25),
            row("relu", "wiki", "perplexity", 9000.0, difference(8980.0, 8000.0, 9900.0, 1e-4), 0.6, 0.3),
        ],
        "against_cats": [
            {"variant": "teal k=0.5 (equal bytes)", "task": "piqa", "metric": "acc",
             "difference": difference(0.04, 0.02, 0.06, 0.012)},
        ],
    }  # fmt: skip
    file = tmp_path / "quality.json"
    file.write_text(json.dumps(values), encoding="utf-8")
    return file


def test_the_table_says_what_was_measured(quality, tmp_path):
    file = _result(quality, tmp_path)
    quality[2].main([str(file), "--table", str(tmp_path / "table.md"), "--figure", str(tmp_path / "figure.svg")])
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines == [
        "| | gate sparsity | bytes skipped | wiki | piqa |",
        "|---|---|---|---|---|",
        "| `dense` | – | – | 20.00 | 65.0 % |",
        "| `teal k=0.5 (equal bytes)` | – | 25.0 % | +1.00 % (0.50 to 1.50) "
        "| 64.0 % (−1.0, p = 0.34; CATS p = 0.012) |",
        "| `cats k=0.5` | 49.0 % | 24.5 % | +25.0 % (20.0 to 30.0); 0.250 | 60.0 % (−5.0, p < 0.001) |",
        "| `relu` | 60.0 % | 30.0 % | x 450 | – |",
        "| `dense int8` | – | 50.0 % | +0.50 % (0.30 to 0.70) | 65.0 % (+0.0, p = 1) |",
    ]
    assert "increase of log-perplexity" in (tmp_path / "figure.svg").read_text(encoding="utf-8")
