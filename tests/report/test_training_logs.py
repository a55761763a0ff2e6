"""Fine-tuning logs in `cats report`: what is drawn, what is said, and damage."""

import copy
import json

import pytest
from bs4 import BeautifulSoup

from cats_llm import CatsError
from cats_llm.cli.main import main
from cats_llm.report import style, training
from cats_llm.report.tables import training_table


def log(name="cats k=0.7", start=20.0, end=18.0, gate=0.7, **changes):
    evaluations = [
        {"step": step, "perplexity": start + (end - start) * step / 100}
        | ({} if gate is None else {"sparsity": {"gate": gate - step / 1000, "ffn": 0.4, "model": 0.3}})
        for step in (100, 0, 50)  # in any order
    ]
    return {
        "format": "cats-finetune",
        "version": 1,
        "name": name,
        "model": "some/Model",
        "settings": {"learning_rate": 1e-3},
        "data": {"heldout": "heldout.txt"},
        "command": "cats finetune ...",
        "evaluations": evaluations,
    } | changes


def several(*logs):
    return {"format": "cats-finetune-runs", "version": 1, "model": "bundled", "command": "python x", "runs": [*logs]}


def read(values, tmp_path):
    return training.read_training(values, tmp_path / "log.json")


def test_the_page_shows_curves_and_ends(tmp_path, capsys):
    files = []
    for i, made in enumerate((log(), log("relu", 30.0, 25.0, 0.67), log("dense", 17.0, 16.5, None))):
        files.append(tmp_path / f"{i}.json")
        files[-1].write_text(json.dumps(made))
    out = tmp_path / "x.html"
    line = ["report", *map(str, files), "-o", str(out), "--figures", str(tmp_path / "f"), "--markdown", "-"]
    assert main(line) == 0
    page = BeautifulSoup(out.read_text(encoding="utf-8"), "html.parser")
    assert page.title.text == "CATS on Model"
    assert "takes cats k=0.7 from a held-out perplexity of 20.00 to 18.00 at 60.0" in page.select_one(".headline").text
    cells = [[cell.text for cell in row.find_all(["th", "td"])] for row in page.select("table.speed tbody tr")]
    assert [row[0] for row in cells] == ["cats k=0.7", "relu", "dense"]
    assert cells[0][1:5] == ["0.001", "100", "20.000", "18.000"]
    assert cells[0][6:] == ["70.0 %", "60.0 %"]
    assert cells[2][6:] == ["–", "–"]
    assert "cats finetune ..." in page.text
    assert {f.name for f in (tmp_path / "f").iterdir()} == {"training.svg", "training.png"}
    assert "| relu | 0.001 | 100 |" in capsys.readouterr().out


def test_runs_of_one_method_are_told_apart(tmp_path):
    usual = {"learning_rate": 1e-3, "parameters": "lora", "loss": "cross-entropy"}
    for changes, name in (
        ({}, "cats k=0.7"),
        ({"parameters": "mlp"}, "cats k=0.7, mlp"),
        ({"parameters": "mlp", "loss": "distillation"}, "cats k=0.7, mlp, distillation"),
    ):
        made = log(settings=usual | changes)
        assert [run.name for run in read(made, tmp_path)] == [name]
        # a benchmark has given its runs names of its own
        assert [run.name for run in read(several(made), tmp_path)] == ["cats k=0.7"]


@pytest.mark.parametrize("wide", [True, False])
def test_the_curves_are_the_measurements(tmp_path, wide):
    groups = [log(group="chosen"), log("relu", 30.0, 25.0, 0.6, group="chosen"), log(end=19.0, group="paper's")]
    runs = read(several(*groups), tmp_path)
    figure = training.curves(runs, wide)
    perplexity = [axes for axes in figure.axes if axes.get_title("left").startswith("held-out perplexity")]
    assert len(figure.axes) == 4
    drawn = [[line.get_xydata().tolist() for line in axes.get_lines()] for axes in perplexity]
    assert drawn[0] == [[[0, 20], [50, 19], [100, 18]], [[0, 30], [50, 27.5], [100, 25]]]
    assert drawn[1] == [[[0, 20], [50, 19.5], [100, 19]]]
    sparsity = next(axes for axes in figure.axes if axes.get_title("left").startswith("gate sparsity"))
    assert sparsity.get_lines()[0].get_ydata() == pytest.approx([70, 65, 60])
    colours = {axes.get_lines()[0].get_color() for axes in figure.axes}
    assert len(colours) == 1, "one method has one colour in all panels"


def test_a_diverged_run_is_drawn_as_far_as_it_goes(tmp_path):
    broken = log()
    broken["evaluations"][0]["perplexity"] = None  # of the last step
    (run,) = read(broken, tmp_path)
    with style.style():
        (axes, _) = training.curves([run]).axes
    assert axes.get_lines()[0].get_xdata().tolist() == [0, 50]
    assert training_table([run]).rows[0][4] == "–"
    assert "None of the fine-tuned models" in training.finding([run])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda values: values.pop("evaluations"), "is damaged"),
        (lambda values: values["evaluations"].clear(), "without any measurement"),
        (lambda values: values["evaluations"][1].update(step="x"), "is damaged"),
        (lambda values: values.update(settings=3), "is damaged"),
        (lambda values: values.update(version=2), "version 2; upgrade"),
    ],
)
def test_damage_is_one_sentence(tmp_path, change, says):
    values = copy.deepcopy(log())
    change(values)
    with pytest.raises(CatsError, match=rf"log.json .*{says}"):
        read(values, tmp_path)
