"""cats report: what stands in result files is what the page, the figures and the tables say."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
from bs4 import BeautifulSoup

import cats_llm
import profiles
from cats_llm.cli.main import main
from cats_llm.number_format import Z95
from cats_llm.report import ReportInputs, bench, markdown, quality_figures, read_files, render_page
from cats_llm.report.bench_figures import latency, throughput
from cats_llm.report.deltas import findings, main_measures, with_mean
from cats_llm.report.page import headline, page_figures
from cats_llm.report.results import merge, read_eval
from eval_files import BENCHES, PAPER8, eval_file, row, write
from pages import HOSTILE, check_page, shown_number


def result(values, path="a.json"):
    return read_eval(values, Path(path))


def inputs(*values, profiles=(), benches=()):
    results = [(Path(f"{chr(97 + i)}.json"), result(v)) for i, v in enumerate(values)]
    return ReportInputs.of(results, profiles, benches, files=[path.name for path, _ in results])


@pytest.fixture
def profile(tmp_path):
    """A profile of four layers, saved."""
    made = profiles.profile()
    made.save(tmp_path / "profile.safetensors")
    return made


# reading


def test_a_file_is_read_to_the_last_number():
    values = eval_file(tasks=("piqa",), sparsities=(0.5,), relu=False)
    read_back = result(values)
    assert [v.name for v in read_back.variants] == ["dense", "cats k=0.5"]
    assert read_back.variant("cats k=0.5").thresholds == {i: pytest.approx(0.15 + 0.01 * i) for i in range(4)}
    for raw, found in zip(values["results"], read_back.rows, strict=True):
        assert (found.variant, found.task, found.metric) == (raw["variant"], raw["task"], raw["metric"])
        assert (found.value, found.stderr, found.n) == (raw["value"], raw["stderr"], raw["n"])
        assert vars(found.sparsity) == raw["sparsity"]
        if raw["difference"]:
            assert found.difference.low == raw["difference"]["low"]
            assert found.difference.high == raw["difference"]["high"]
        else:
            assert found.difference is None


def damage(values, *path, to=...):
    """A copy with one member changed, or removed."""
    made = copy.deepcopy(values)
    place = made
    for step in path[:-1]:
        place = place[step]
    if to is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return made


@pytest.mark.parametrize(
    ("path", "to", "says"),
    [
        (["version"], "1", 'version is "1"'),
        (["version"], 9, "of version 9; upgrade"),
        (["model"], ..., "model is missing"),
        (["variants"], [], "variants is \\[\\]"),
        (["variants", 1, "name"], "dense", "names that differ"),
        (["variants", 1, "thresholds"], {"x": 1}, "variants\\[1\\].thresholds.x"),
        (["variants", 1, "thresholds", "0"], None, "variants\\[1\\].thresholds.0"),
        (["tasks"], 5, "tasks is 5"),
        (["results", 0, "value"], "high", 'results\\[0\\].value is "high"'),
        (["results", 0, "value"], ..., "results\\[0\\].value is missing"),
        (["results", 0, "value"], True, "results\\[0\\].value is true"),
        (["results", 0, "n"], -1, "results\\[0\\].n is -1"),
        (["results", 0, "variant"], "other", "results\\[0\\]"),
        (["results", 1, "higher_is_better"], 1, "results\\[1\\].higher_is_better"),
        (["results", 2, "difference", "low"], 1e9, "results\\[2\\].difference.low"),
        (["results", 2, "sparsity"], [0.5], "results\\[2\\].sparsity"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_damage_is_one_sentence_that_names_the_place(tmp_path, capsys, path, to, says):
    file = write(tmp_path / "bad.json", damage(eval_file(tasks=("piqa",), sparsities=(0.5,), relu=False), *path, to=to))
    assert main(["report", str(file), "-o", str(tmp_path / "x.html")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "bad.json" in error
    assert re.search(says, error), error
    assert [p.name for p in tmp_path.iterdir()] == ["bad.json"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b"{", "is not JSON, or it is damaged"),
        ("a.json", b"\xff\xfe", "is not JSON"),
        ("a.json", b"[" * 100_000, "is not JSON"),
        ("a.json", b"{}", "no result of cats eval, cats bench or cats finetune"),
        ("a.json", b"[1]", "no result of cats eval"),
        ("a.json", b'{"benchmark": "new", "rows": [{}]}', "the unknown kind 'new'"),
        ("a.json", b'{"benchmark": "mlp", "rows": []}', "without rows"),
        ("a.json", b'{"benchmark": "mlp", "rows": [{"contestant": "x"}]}', "rows\\[0\\] has no usable tokens"),
        ("a.safetensors", b"nothing", "is not a calibration profile"),
        ("a.txt", b"words", "is not JSON"),
        ("missing.json", None, "does not exist"),
    ],
)
def test_other_files_are_one_sentence(tmp_path, capsys, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["report", str(tmp_path / name), "-o", str(tmp_path / "x.html")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert name in error
    assert re.search(says, error), error


@pytest.mark.parametrize("member", ["contestant", "threads", "batch", "ms_per_step", "byte_bound", "tokens_per_second"])
@pytest.mark.parametrize("to", ["x", None, -1, True])
def test_a_damaged_benchmark_is_refused(member, to):
    values = json.loads(next(f for f in BENCHES if f.stem.startswith("decode")).read_text())
    if member == "contestant" and to == "x":
        return
    with pytest.raises(cats_llm.errors.CatsError, match=rf"rows\[3\] has no usable {member}"):
        bench.read_bench(damage(values, "rows", 3, member, to=to), Path("b.json"))


# joining


def test_files_of_one_model_that_complete_each_other_are_joined():
    whole = eval_file(tasks=("piqa", "sciq"))
    parts = []
    for wanted in ("piqa", "sciq"):
        part = copy.deepcopy(whole)
        part["tasks"] = [t for t in whole["tasks"] if t["name"] == wanted]
        part["results"] = [r for r in whole["results"] if r["task"] == wanted]
        parts.append((Path(f"{wanted}.json"), result(part)))
    (joined,) = merge(parts)
    assert joined.label == "Some-Model-7B"
    assert [(r.variant, r.task, r.value) for r in joined.rows if r.variant == "dense"] == [
        ("dense", "piqa", 0.75),
        ("dense", "sciq", 0.72),
    ]
    assert with_mean(joined).rows[-1].task == "mean of 2 tasks"
    # the same file twice adds nothing
    assert merge([parts[0], parts[0]]) == [parts[0][1]]


def test_files_that_contradict_each_other_stay_apart():
    first, second = (result(eval_file(sparsities=(0.5,), shift=shift)) for shift in (0.0, -0.1))
    a, b = merge([(Path("x/before.json"), first), (Path("x/after.json"), second)])
    assert (a.label, b.label) == ("Some-Model-7B (before)", "Some-Model-7B (after)")
    a, b = merge([(Path("x/r.json"), first), (Path("y/r.json"), second)])
    assert a.label != b.label
    other = result(eval_file(model="org/Other"))
    assert [r.label for r in merge([(Path("a"), first), (Path("b"), other)])] == ["Some-Model-7B", "Other"]


def test_the_mean_is_numpys():
    values = eval_file()
    made = with_mean(result(values))
    for v in made.variants:
        rows = [r for r in values["results"] if r["metric"] == "acc" and r["variant"] == v.name]
        found = made.row(v.name, "mean of 8 tasks", "acc")
        assert found.value == pytest.approx(np.mean([r["value"] for r in rows]))
        assert found.stderr == pytest.approx(np.sqrt(np.sum([r["stderr"] ** 2 for r in rows])) / 8)
        assert found.n == 8 * 500
        if v.name != "dense":
            errors = [r["difference"]["stderr"] for r in rows]
            half = 1.96 * np.sqrt(np.sum(np.square(errors))) / 8
            assert found.difference.value == pytest.approx(np.mean([r["difference"]["value"] for r in rows]))
            assert found.difference.high - found.difference.value == pytest.approx(half, rel=1e-3)
            assert found.sparsity.gate == pytest.approx(rows[0]["sparsity"]["gate"])


def test_a_mean_in_the_file_is_believed():
    values = eval_file()
    values["tasks"].append({"name": "paper8", "kind": "mean", "data": "the mean of all", "members": list(PAPER8)})
    values["results"].append(row("dense", "paper8", "acc", 0.6994))
    made = with_mean(result(values))
    assert made == result(values)
    assert main_measures(made)[0].task.name == "paper8"


def test_there_is_no_mean_over_tasks_that_a_variant_lacks():
    values = eval_file(tasks=("piqa", "sciq"), sparsities=(0.5,), relu=False)
    values["results"] = [r for r in values["results"] if (r["variant"], r["task"]) != ("cats k=0.5", "sciq")]
    assert with_mean(result(values)) == result(values)


# what is said


def test_findings():
    values = eval_file(sparsities=(0.5, 0.9), relu=False)
    said = findings([with_mean(result(values))])
    assert said[0] == (
        "At 50 % gate sparsity Some-Model-7B’s accuracy (mean of 8 tasks) falls from 64.50 % to 63.95 %: "
        "−0.55 points (95 % interval −0.97 to −0.12 points)."
    )
    assert said[1].endswith("in brackets the 95 % interval of the change on the same documents:")
    del said[1]
    assert said[1].startswith("cats k=0.5: 49.6 % of the MLP neurons, 26.8 % of all linear weights skipped; accuracy")
    assert "perplexity 16.26, +1.7 % (−0.2 to +3.5 %, so it cannot be told from no change)" in said[1]
    assert said[2].startswith("cats k=0.9: 89.6 % of the MLP neurons")
    assert said[3].endswith("loses less than one point of accuracy on this data is 50 %.")
    hard = with_mean(result(eval_file(sparsities=(0.9,), relu=False)))
    assert "No sparsity tested surely keeps accuracy within one point" in findings([hard])[-1]


def test_few_documents_promise_nothing():
    """Not one of 25 answers changed: the normal interval has no width, but one change in eight is still likely."""
    values = eval_file(tasks=("piqa",), sparsities=(0.9,), relu=False)
    values["results"] = [
        row("dense", "piqa", "acc", 0.4, n=25),
        row("cats k=0.9", "piqa", "acc", 0.4, 0.4, half=0.0, gate=0.9, n=25),
    ]
    said = findings([result(values)])
    assert said[0].endswith("stays at 40.00 %: +0.00 points (no score changed on these 25 documents).")
    assert said[-1] == "No sparsity tested surely keeps accuracy within one point of dense on this data."
    for raw in values["results"]:
        raw["n"] = 1000
    assert findings([result(values)])[-1].endswith("accuracy on this data is 90 %.")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"dense": 0.7, "value": 0.7}, "stays at 70.00 %: +0.00 points (95 % interval −1.20 to +1.20 points, so it"),
        ({"dense": 0.7, "value": 0.72}, "rises from 70.00 % to 72.00 %: +2.00 points"),
        ({"dense": None, "value": 0.72}, "is 72.00 %; the dense model’s was not measured."),
        ({"dense": 0.7, "value": 0.69, "difference": None}, "−1.00 points (not tested)"),
    ],
)
def test_headline_of_one_task(values, says):
    base = values.pop("dense")
    made = eval_file(tasks=(), sparsities=(0.5,), relu=False)
    made["tasks"] = [{"name": "piqa", "kind": "lm_eval", "data": "", "documents": 5}]
    changes = {"difference": None} if "difference" in values else {}
    made["results"] = [row("cats k=0.5", "piqa", "acc", values["value"], base, gate=0.5, **changes)]
    if base is not None:
        made["results"].append(row("dense", "piqa", "acc", base))
    assert says in findings([result(made)])[0]


def test_coverage_is_told():
    values = eval_file(sparsities=(0.5,), relu=False)
    values["variants"][1]["coverage"] = {"dense_prefill": False, "dense_first_tokens": 4, "last_fraction": 0.5}
    said = findings([with_mean(result(values))])[2]
    assert said.startswith("cats k=0.5 (first 4 dense, last 0.5 of a prompt sparse): ")
    assert result(eval_file()).variant("cats k=0.5").tokens == ""


# the page


def tables(html, kind):
    soup = BeautifulSoup(html, "html.parser")
    return [
        [[cell.get_text(" ").strip() for cell in line.find_all(["th", "td"])] for line in found.select("tbody tr")]
        for found in soup.select(f"table.{kind}")
    ]


def test_the_short_table_says_what_each_sparsity_costs():
    values = eval_file()
    (lines,) = tables(render_page(inputs(values)), "costs")
    assert [line[0] for line in lines] == ["dense", "cats k=0.5", "cats k=0.7", "cats k=0.9", "relu"]
    for line, v in zip(lines, values["variants"], strict=True):
        rows = [r for r in values["results"] if r["variant"] == v["name"] and r["metric"] == "acc"]
        assert shown_number(line[1]) == pytest.approx(100 * rows[0]["sparsity"]["gate"], abs=0.05)
        assert shown_number(line[3]) == pytest.approx(100 * rows[0]["sparsity"]["model"], abs=0.05)
        assert shown_number(line[4]) == pytest.approx(100 * np.mean([r["value"] for r in rows]), abs=0.005)
        if v["name"] != "dense":
            change = np.mean([r["difference"]["value"] for r in rows])
            assert shown_number(line[5].replace("points", "")) == pytest.approx(100 * change, abs=0.005)
            low, high = (shown_number(part) for part in line[6].split(" to "))
            assert low < 100 * change < high
    # only the perplexity at 50 % has an interval with zero in it
    assert [line[0] for line in lines if line[9].endswith("*")] == ["cats k=0.5"]


def test_all_numbers_are_in_the_page_and_in_markdown():
    values = eval_file()
    made = inputs(values)
    html, text = render_page(made), markdown(made)
    for raw in values["results"]:
        assert f'<data value="{raw["value"]}">' in html
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.count(" | ") for line in lines}) == 1
    assert len(lines) == 2 + len(values["results"]) + len(values["variants"])
    assert "| accuracy, arc_easy | cats k=0.5 | 71.45 % | −0.55 points | −1.75 to +0.65 | 0.500 | 49.6 % |" in text
    assert "\xa0" not in text


def test_the_page_is_self_contained_and_deterministic(profile):
    made = inputs(eval_file(), profiles=[profile], benches=[read_files([f]).benches[0] for f in BENCHES])
    html = render_page(made)
    soup = check_page(html)
    assert html == render_page(made)
    names = [d.name for d in page_figures(made)]
    assert names == [
        "accuracy",
        "perplexity",
        "sparsity-by-layer",
        "histograms",
        "thresholds",
        "latency-1",
        "throughput-1",
        "latency-2",
    ]
    assert len(soup.select("figure")) == len(names)
    assert len(soup.select("table.speed")) == 2
    assert "cats eval org/Some-Model-7B --tasks paper8" in soup.get_text()


@pytest.mark.parametrize(
    "values",
    [
        eval_file(tasks=()),
        eval_file(tasks=("piqa",)),
        eval_file(sparsities=()),
        eval_file(sparsities=(), relu=False),
        eval_file(sparsities=tuple(k / 20 for k in range(1, 20))),
        eval_file(tasks=[f"task{i}" for i in range(60)]),
        eval_file(layers=1),
        {**eval_file(tasks=("piqa",)), "results": [row("relu", "piqa", "acc", None)]},
        {**eval_file(tasks=("piqa",)), "results": [row("relu", "piqa", "acc_norm", 0.0, sparsity=None)]},
        {**eval_file(tasks=("piqa",)), "results": [row("dense", "heldout", "word_perplexity", 1e300)]},
        {**eval_file(tasks=("piqa",)), "results": [row("dense", "piqa", "rougeL", 31.5)]},
    ],
    ids=range(11),
)
def test_whatever_is_missing_the_rest_is_shown(values, tmp_path):
    made = inputs(values)
    check_page(render_page(made))
    assert markdown(made)
    assert headline(made)


def test_hostile_names_are_text(tmp_path):
    values = json.loads(json.dumps(eval_file(model=HOSTILE, tasks=("a|b", HOSTILE))))
    for v in values["variants"][1:]:
        old, v["name"] = v["name"], HOSTILE + v["name"]
        for r in values["results"]:
            r["variant"] = v["name"] if r["variant"] == old else r["variant"]
    values["command"] = HOSTILE
    made = inputs(values)
    check_page(render_page(made))
    text = markdown(made)
    assert "<script" not in text.replace("\\<script", "")
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")}) == 1


# figures


def test_curves_plot_the_numbers():
    values = eval_file()
    panels = quality_figures.accuracy_panels([with_mean(result(values))])
    assert [panel.measure.task.name for panel in panels] == ["mean of 8 tasks", *PAPER8]
    figure = quality_figures.quality_curves(panels)
    for axes, task in zip(figure.axes[1:], PAPER8, strict=True):
        rows = [r for r in values["results"] if r["task"] == task and r["variant"] != "relu"]
        cats, relu = axes.containers
        np.testing.assert_allclose(cats.lines[0].get_xdata().astype(float), [100 * r["sparsity"]["gate"] for r in rows])
        np.testing.assert_allclose(cats.lines[0].get_ydata().astype(float), [100 * r["value"] for r in rows])
        segments = cats.lines[2][0].get_segments()
        for segment, r in zip(segments, rows, strict=True):
            assert segment[1][1] - segment[0][1] == pytest.approx(100 * 2 * Z95 * r["stderr"])
        assert relu.lines[0].get_xdata().tolist() == [0, 62]
    panels = quality_figures.text_panels([result(values)])
    assert [panel.measure.metric for panel in panels] == ["perplexity", "kl", "top1_agreement"]
    assert panels[1].series["cats"][0] == (0, 0, 0)
    assert panels[2].series["cats"][0] == (0, 1, 0)


def inputs_beside_neurons():
    """An evaluation with a method that skips inputs: it has no gate sparsity."""
    values = eval_file(sparsities=(0.5, 0.9), relu=False)
    for v in values["variants"]:
        if v["name"] == "cats k=0.9":
            v |= {"name": "teal k=0.9 (equal bytes)", "method": "teal", "sparsity": 0.49, "thresholds": None}
            v |= {"unit": "inputs", "layer_sparsity": {}}
    for r in values["results"]:
        if r["variant"] == "cats k=0.9":
            r |= {"variant": "teal k=0.9 (equal bytes)", "layer_sparsity": {}}
            r["sparsity"] = {"gate": None, "ffn": 0.45, "model": 0.47}
    return values


def test_methods_that_skip_inputs_are_compared_by_weights():
    values = inputs_beside_neurons()
    panels = quality_figures.accuracy_panels([with_mean(result(values))])
    rows = {r["variant"]: r for r in values["results"] if r["task"] == "piqa"}
    panel = next(panel for panel in panels if panel.measure.task.name == "piqa")
    assert [point.x for point in panel.series["cats"]] == [0, rows["cats k=0.5"]["sparsity"]["model"]]
    assert [point.x for point in panel.series["teal"]] == [0, 0.47]
    label = quality_figures.quality_curves(panels).get_supxlabel()
    assert label == "share of all linear weights skipped, measured on the same data"
    only = quality_figures.quality_curves(quality_figures.accuracy_panels([result(eval_file())]))
    assert only.get_supxlabel() == "gate sparsity, measured on the same data"


def test_methods_that_skip_inputs_have_no_gate_sparsity():
    values = inputs_beside_neurons()
    said = findings([with_mean(result(values))])
    assert any(s.startswith("teal k=0.9 (equal bytes): 47.0 % of all linear weights skipped; accuracy") for s in said)
    (lines,) = tables(render_page(inputs(values)), "costs")
    line = next(line for line in lines if line[0].startswith("teal"))
    assert not re.search(r"\d|None|nan", line[1]), line[1]
    assert shown_number(line[3]) == pytest.approx(47)
    assert "| 47.0 % |" in markdown(inputs(values))
    values["variants"] = [v for v in values["variants"] if v["method"] != "cats"]
    values["results"] = [r for r in values["results"] if not r["variant"].startswith("cats")]
    said = findings([with_mean(result(values))])
    assert said[0].startswith("With teal k=0.9 (equal bytes) Some-Model-7B’s accuracy")


def test_models_before_and_after_are_lines_of_one_panel():
    before, after = (result(eval_file(model=m, shift=s)) for m, s in (("before", 0.0), ("after", -0.05)))
    lines = quality_figures.layer_lines([before, after])
    assert set(lines) == {"cats k=0.5", "cats k=0.7", "cats k=0.9", "relu"}
    assert lines["cats k=0.5"]["before"].mean == pytest.approx({i: 0.496 + 0.004 * i for i in range(4)})
    assert lines["cats k=0.5"]["after"].mean == pytest.approx({i: 0.446 + 0.004 * i for i in range(4)})
    figure = quality_figures.sparsity_by_layer([before, after])
    axes = figure.axes[0]
    drawn = [line for line in axes.lines if len(line.get_xdata()) == 4]
    np.testing.assert_allclose(drawn[0].get_ydata(), [49.6, 50.0, 50.4, 50.8])
    np.testing.assert_allclose(drawn[1].get_ydata(), [44.6, 45.0, 45.4, 45.8])
    low, high = axes.get_ylim()
    assert low < 44.6 < 50.8 < high
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == ["before", "after", "asked for"]


def test_a_band_spans_the_tasks():
    values = eval_file(tasks=("piqa", "sciq"), sparsities=(0.5,), relu=False)
    for r in values["results"]:
        if (r["variant"], r["task"]) == ("cats k=0.5", "sciq"):
            r["layer_sparsity"] = dict.fromkeys("0123", 0.6)
            r["tokens"] = 30_000
    line = quality_figures.layer_lines([with_mean(result(values))])["cats k=0.5"]["Some-Model-7B"]
    assert line.high[0] == 0.6
    assert line.low[0] == pytest.approx(0.496)
    assert line.mean[0] == pytest.approx((2 * 0.496 + 3 * 0.6) / 5)


def test_histograms_show_the_thresholds_that_were_evaluated(profile):
    (shown,) = inputs(eval_file(), profiles=[profile]).profiles
    assert shown.thresholds["cats k=0.5"] == result(eval_file()).variant("cats k=0.5").thresholds
    (alone,) = inputs(profiles=[profile]).profiles
    assert alone.thresholds["cats k=0.5"] == profile.config(0.5).thresholds
    (other,) = inputs(eval_file(model="other"), profiles=[profile]).profiles
    assert other.thresholds == alone.thresholds


@pytest.mark.parametrize("file", BENCHES, ids=lambda f: f.stem)
def test_bars_are_the_measurements(file):
    made = read_files([file]).benches[0]
    figures = [latency] + [throughput] * (made.kind == "decode")
    for draw in figures:
        for wide in (True, False):
            figure = draw(made.kind, made.rows, wide=wide)
            widths = [patch.get_width() for axes in figure.axes for patch in axes.patches]
            rows = sorted(made.rows, key=lambda r: 0)
            if draw is latency:
                expected = [bench.facts(made.kind, r)[2]["median"] for r in rows]
            else:
                expected = [r["tokens_per_second"] for r in rows]
            np.testing.assert_allclose(sorted(widths), sorted(expected))


def test_speed_is_told():
    made = ReportInputs(benches=[read_files([file]).benches[0] for file in BENCHES])
    said = headline(made)
    assert "takes 8.77 ms on 1 thread of AMD EPYC, 2.37 times as fast as PyTorch" in said[1]
    assert "its bytes allow 1.50 times" in said[1]


# the command


def test_the_command_writes_everything(tmp_path, capsys, profile):
    files = [write(tmp_path / "a.json", eval_file()), tmp_path / "profile.safetensors", *BENCHES]
    out, figures, text = tmp_path / "r.html", tmp_path / "figures", tmp_path / "t.md"
    arguments = ["report", *map(str, files), "-o", str(out), "--figures", str(figures), "--markdown", str(text)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "falls from 64.50 % to 63.95 %" in printed
    assert check_page(out.read_text(encoding="utf-8"))
    assert text.read_text(encoding="utf-8").startswith("**Some-Model-7B** (bfloat16, cpu)")
    names = [f"{d.name}.{ending}" for d in page_figures(read_files(files)) for ending in ("svg", "png")]
    assert sorted(p.name for p in figures.iterdir()) == sorted(names)
    for path in figures.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
    # nothing is overwritten
    before = out.read_bytes()
    assert main([*arguments[:-2]]) == 1
    assert "--force" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    assert out.read_bytes() == before


def test_markdown_on_stdout_is_all_there_is(tmp_path, capsys):
    file = write(tmp_path / "a.json", eval_file())
    assert main(["report", str(file), "-o", str(tmp_path / "r.html"), "--markdown", "-"]) == 0
    assert capsys.readouterr().out == markdown(read_files([file]))


def test_without_the_extra(tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "jinja2", None)
    file = write(tmp_path / "a.json", eval_file())
    assert main(["report", str(file), "-o", str(tmp_path / "r.html")]) == 1
    assert "pip install 'cats-llm[report]'" in capsys.readouterr().err
