"""The page: alone, the same everywhere, and whatever text goes in is text."""

import json
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from cats_llm.cli import report as command
from cats_llm.cli.main import main
from cats_llm.cli.output import Results
from cats_llm.report import (
    MissingExtraError,
    ReportInputs,
    bench_figures,
    quality_figures,
    render_page,
    require_extra,
    write_figures,
)
from cats_llm.report.deltas import findings
from cats_llm.report.labels import clean, label
from cats_llm.report.results import read_eval
from eval_files import eval_file, write
from pages import HOSTILE, check_page, parse, shown_number
from profiles import profile

CONTINUATIONS = {"Once upon a time": {"dense": "there was", "cats k=0.5": "there were"}}


def result(continuations=CONTINUATIONS, **changes):
    """As `cats demo` writes it: perplexity and distances on a text, and continuations."""
    values = eval_file(tasks=(), relu=False) | {"continuations": continuations, "architecture": "Demo, 8 M parameters"}
    return read_eval(values | changes, Path("results.json"))


def inputs(**changes):
    return ReportInputs.of([(Path("results.json"), result(**changes))], [profile()], files=["results.json"])


def test_page_is_self_contained_and_deterministic():
    html = render_page(inputs())
    soup = check_page(html)
    assert html == render_page(inputs())
    titles = [figure.h3.get_text() for figure in soup.find_all("figure")]
    assert titles == [
        "Prediction of text against sparsity",
        "Sparsity of each layer, asked for and achieved",
        "Where the thresholds cut: Some-Model-7B",
        "The thresholds: Some-Model-7B",
    ]
    assert len(soup.find_all("svg")) == 8
    # text in the figures is text
    assert "layer 3" in soup.find_all("svg")[4].get_text(" ")


def test_page_is_the_same_in_another_process(tmp_path):
    file = write(tmp_path / "results.json", eval_file())
    script = "import sys; from pathlib import Path; from cats_llm.report import *; "
    script += "sys.stdout.buffer.write(render_page(read_files([Path(sys.argv[1])])).encode())"
    script += "; assert 'matplotlib.pyplot' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script, file], capture_output=True, check=True)
    values = read_eval(json.loads(file.read_text(encoding="utf-8")), file)
    assert done.stdout.decode() == render_page(ReportInputs.of([(file, values)], files=["results.json"]))


def test_without_tasks_the_table_has_the_distances_to_dense():
    made = result()
    rows = parse(render_page(inputs())).select("table.costs tbody tr")
    cells = [[cell.get_text().strip() for cell in row.find_all(["th", "td"])] for row in rows]
    assert [row[0] for row in cells] == [variant.name for variant in made.variants]
    for row, variant in zip(cells, made.variants, strict=True):
        measured = {r.metric: r for r in made.rows if r.variant == variant.name}
        for text, share in zip(row[1:4], vars(measured["perplexity"].sparsity).values(), strict=True):
            assert shown_number(text) == pytest.approx(100 * share, abs=0.0501)
        assert shown_number(row[4]) == pytest.approx(measured["perplexity"].value, rel=5e-4)
        if variant.name == "dense":
            assert row[5:] == ["–"] * 4
            continue
        assert f"({100 * (measured['perplexity'].value / 16 - 1):+.1f} %)" in row[5].replace("−", "-")
        assert shown_number(row[7].split()[0]) == pytest.approx(measured["kl"].value, rel=5e-3)
        assert shown_number(row[8]) == pytest.approx(100 * measured["top1_agreement"].value, abs=0.005)
    assert findings([made])[2] == (
        "cats k=0.5: 49.6 % of the MLP neurons, 26.8 % of all linear weights skipped; perplexity 16.26, +1.7 % "
        "(−0.2 to +3.5 %, so it cannot be told from no change); KL divergence from dense 0.01641 nats; top-1 agreement "
        "with dense 99.45 %."
    )


def test_figures_plot_the_numbers():
    made = result()
    by_metric = {m: [r for r in made.rows if r.metric == m] for m in ("perplexity", "kl")}
    for axes, variant in zip(quality_figures.sparsity_by_layer([made]).axes, made.sparse, strict=True):
        _, calibration, heldout = axes.lines
        measured = made.row(variant.name, "heldout", "perplexity").layer_sparsity
        np.testing.assert_allclose(calibration.get_ydata(), [100 * x for x in variant.layer_sparsity.values()])
        np.testing.assert_allclose(heldout.get_ydata(), [100 * x for x in measured.values()])
        low, high = axes.get_ylim()
        assert low <= min(heldout.get_ydata())
        assert max(heldout.get_ydata()) <= high
    perplexity, kl, _ = quality_figures.quality_curves(quality_figures.text_panels([made])).axes
    (_, values), (shares, divergences) = (axes.lines[0].get_data() for axes in (perplexity, kl))
    assert list(values) == pytest.approx([r.value for r in by_metric["perplexity"]])
    assert list(divergences) == pytest.approx([0, *(r.value for r in by_metric["kl"])])
    assert list(shares) == pytest.approx([0, *(100 * r.sparsity.gate for r in by_metric["kl"])])


def test_continuations_stand_side_by_side():
    prompts = CONTINUATIONS | {"": {}, "x": {"unknown": "y", "cats k=0.9": ""}}
    soup = check_page(render_page(inputs(continuations=prompts)))
    assert [prompt.get_text() for prompt in soup.select(".prompt")] == list(prompts)
    texts = [
        [(card.h3.get_text(), card.div.get_text()) for card in row.select(".text")] for row in soup.select(".texts")
    ]
    names = ["dense", "cats k=0.5", "cats k=0.9"]
    assert texts == [
        [*zip(names, ["there was", "there were", "–"], strict=True)],
        [(name, "–") for name in names],
        [(name, "–") for name in names],
    ]
    assert not parse(render_page(inputs(continuations={}))).select(".prompt")


def test_how_it_was_made_is_told():
    text = parse(render_page(inputs())).get_text(" ")
    for fact in (
        "cats eval org/Some-Model-7B",
        "Demo, 8 M parameters",
        "2026-01-01",
        "0.1.0",
        "heldout.txt, 64 windows",
    ):
        assert fact in text, fact


def test_nothing_at_all():
    soup = check_page(render_page(ReportInputs()))
    assert not soup.find_all("figure")


def test_hostile_text_is_text():
    line = "word" * 5000
    values = json.loads(json.dumps(eval_file(model=HOSTILE, tasks=(), relu=False)))
    values["command"] = values["created"] = values["architecture"] = HOSTILE
    for v, name in zip(values["variants"][1:], (HOSTILE, '_x" id="y" onload="z', "plain"), strict=True):
        old, v["name"] = v["name"], name
        for row in values["results"]:
            row["variant"] = name if row["variant"] == old else row["variant"]
    values["continuations"] = {HOSTILE: {HOSTILE: HOSTILE}, line: {HOSTILE: line}}
    made = [(Path("a"), read_eval(values, Path("a")))]
    soup = check_page(render_page(ReportInputs.of(made, [profile(model=HOSTILE)])))
    seen = HOSTILE.replace("\x00", "�").replace("\x1b", "�").replace("\ud800", "�")
    assert soup.find("title").get_text() == "CATS on " + seen.replace("\\", "/").rpartition("/")[2]
    assert soup.select(".prompt")[0].get_text() == seen
    assert soup.select(".prompt")[1].get_text() == line
    assert soup.select(".text div")[1].get_text() == line
    assert not [element for element in soup.find_all() if element.has_attr("onload")]
    assert "49" not in soup.select_one(".prompt").get_text()
    # in figures too
    assert "<script>alert(1)</script>" in "".join(svg.get_text() for svg in soup.find_all("svg"))


def test_names_are_made_fit():
    assert label("a\nb  c") == "a b c"
    assert label("x" * 99) == "x" * 27 + "…"
    assert label("") == "–"
    assert clean("a\x00b\ud800\n") == "a�b�\n"


def test_figures_leave_the_users_settings_alone():
    import matplotlib

    def settings():
        return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}

    before = settings()
    with matplotlib.rc_context({"lines.linewidth": 17, "svg.fonttype": "path"}):
        odd = render_page(inputs())
    assert render_page(inputs()) == odd
    assert settings() == before


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    def fail(_):
        raise OSError("disk full")

    out, file = tmp_path / "report.html", write(tmp_path / "a.json", eval_file())
    out.write_text("old")
    monkeypatch.setattr(command, "render_page", fail)
    with pytest.raises(OSError, match="disk full"):
        command.command([file], Results(force=True), output=out)
    assert out.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [file, out]


# dependencies


@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
def test_a_missing_extra_is_one_clear_sentence(monkeypatch, tmp_path, capsys, module):
    monkeypatch.setitem(sys.modules, module, None)
    message = "the report needs matplotlib and jinja2: pip install 'cats-llm[report]'"
    nothing = ReportInputs()
    for call in (require_extra, lambda: render_page(nothing), lambda: write_figures(nothing, tmp_path / "x")):
        with pytest.raises(MissingExtraError, match=f"^{re.escape(message)}$"):
            call()
    assert main(["report", str(tmp_path / "a.json"), "-o", str(tmp_path / "x")]) == 1
    assert capsys.readouterr().err.rstrip().endswith(message)
    assert list(tmp_path.iterdir()) == []
    if module == "matplotlib":
        with pytest.raises(MissingExtraError, match="a figure needs matplotlib: pip install"):
            bench_figures.write_figure("mlp", [], tmp_path / "x.svg")


def test_data_needs_no_extra():
    script = """
import sys
import cats_llm  # whose own dependencies may look for these
sys.modules.update(dict.fromkeys(["matplotlib", "jinja2"]))
from cats_llm.report import ReportInputs, markdown
from cats_llm.report.page import headline
assert headline(ReportInputs()) == [] and markdown(ReportInputs()) == ""
try:
    import cats_llm.report.quality_figures
except ImportError as error:
    assert "pip install" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_templates_are_part_of_the_package():
    assert files("cats_llm.report").joinpath("templates", "base.html").is_file()
