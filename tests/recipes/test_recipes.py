"""Recipes: the published numbers they hold, what is wrong with a wrong one, and that each runs from end to end."""

import copy
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files

import pytest
import yaml

from cats_llm.cli.main import main
from cats_llm.errors import CatsError
from cats_llm.evaluation.tasks import TASK_SETS
from cats_llm.options import option_fields
from cats_llm.recipes import load, reproduce
from cats_llm.recipes.recipe import (
    BenchPlan,
    CalibrationSection,
    Comparison,
    EvaluationPlan,
    Expected,
    FinetuningPlan,
    Quantity,
    ThresholdPlan,
)
from cats_llm.text import RowFormat
from cats_llm.training.classification_data import TASKS
from cats_llm.training.config import DataConfig, TrainingConfig
from marks import needs_kernels

# copied by hand from where they were published, digit by digit
QUALITY = {"mistral-7b": (0.6994, 0.6890), "llama-2-7b": (0.6589, 0.6433), "llama-2-13b": (0.6870, 0.6805)}
SHARES = {"mistral-7b": 0.27, "llama-2-7b": 0.22}
MLP = {
    "llama-2-7b": (0.888, {0.54: (0.604, 1.47), 0.66: (0.544, 1.63), 0.808: (0.475, 1.87)}),
    "mistral-7b": (1.125, {0.54: (0.754, 1.49), 0.66: (0.679, 1.66), 0.808: (0.588, 1.91)}),
}
GENERATION = {
    "llama-2-7b": ({256: (22.95, 27.67), 2048: (20.15, 23.85)}, 1.18),
    "mistral-7b": ({256: (23.04, 27.89), 2048: (22.12, 26.86)}, 1.21),
}
FINETUNING = {
    "finetune-mistral-7b": None,
    "finetune-cola-mistral-7b": "cola",
    "finetune-sst2-mistral-7b": "sst2",
    "finetune-boolq-mistral-7b": "boolq",
}
THRESHOLDS = (
    ".0231 .0311 .0451 .0552 .0712 .0832 .0913 .0993 .1033 .1073 .1113 .1153 .1194 .1234 .1354 .1474 .1635 .1735 .1856 "
    ".1976 .2116 .2277 .2257 .2337 .2377 .2377 .2357 .2357 .2357 .2337 .2357 .2437"
)


def numbers(name):
    """What a recipe expects, without its sources."""
    made = load.find(name)
    assert all(item.source for item in made.expected)
    return {item.of.label: item.value for item in made.expected}


@pytest.mark.parametrize("model", QUALITY)
def test_published_quality(model):
    dense, half = QUALITY[model]
    expected = {"dense, paper8: acc": dense, "cats k=0.5, paper8: acc": half}
    if model in SHARES:
        expected["cats k=0.5, paper8: model_sparsity"] = SHARES[model]
    assert numbers(f"quality-{model}") == expected
    plan = load.find(f"quality-{model}").plan
    assert plan == EvaluationPlan(("paper8",), (0.5, 0.7, 0.9), ("cats", "relu"))


def test_published_model_sparsity_follows_from_the_models_sizes():
    # hidden size, neurons, size of keys and values; all 32 layers are alike
    for model, (d, f, kv) in {"mistral-7b": (4096, 14336, 1024), "llama-2-7b": (4096, 11008, 4096)}.items():
        linear = 3 * d * f + 2 * d * d + 2 * d * kv
        assert 2 * d * f * 0.5 / linear == pytest.approx(SHARES[model], abs=0.005)


@pytest.mark.parametrize("model", MLP)
def test_published_latency(model):
    dense, rows = MLP[model]
    expected = {"torch dense: ms": dense}
    for k, (ms, ratio) in rows.items():
        expected |= {f"k = {k}: ms": ms, f"k = {k}: speedup_over_torch": ratio}
        assert dense / ms == pytest.approx(ratio, abs=0.006)
    assert numbers(f"mlp-latency-{model}") == expected


@pytest.mark.parametrize("model", GENERATION)
def test_published_generation(model):
    lengths, ratio = GENERATION[model]
    expected = {"k = 0.5: speedup_over_stock": ratio}
    for tokens, (dense, sparse) in lengths.items():
        expected[f"stock transformers, {tokens} tokens: tokens_per_second"] = dense
        expected[f"k = 0.5, {tokens} tokens: tokens_per_second"] = sparse
    assert numbers(f"generation-{model}") == expected


def test_other_published_numbers():
    assert list(numbers("thresholds-mistral-7b").values()) == [float(value) for value in THRESHOLDS.split()]
    assert numbers("generation-mistral-7b-bf16") == {
        "stock transformers: tokens_per_second": 33.1,
        "k = 0.5: tokens_per_second": (37.7, 38.9),
        "k = 0.5: speedup_over_stock": 1.16,
    }


@pytest.mark.parametrize("name", FINETUNING)
def test_fine_tuning_has_the_settings_of_the_paper(name):
    task = FINETUNING[name]
    plan = load.find(name).plan
    assert list(plan.runs) == ["dense", "cats k=0.5", "cats k=0.7", "cats k=0.9", "relu"]
    assert (plan.training.learning_rate, plan.training.batch_size, plan.reading.seq_length) == (1e-5, 16, 1024)
    assert (plan.instructions, plan.training.epochs) == (task, None if task is None else 1)
    if task is None:
        assert (plan.data, plan.reading.rows.text_column, plan.training.steps) == (
            "tiiuae/falcon-refinedweb",
            "content",
            1350,
        )
    # "CATS converges faster and ends better than ReLU", at every sparsity
    for k in (0.5, 0.7, 0.9):
        assert numbers(name)[f"cats k={k}: perplexity_over_relu"] == (0, 1)
        assert numbers(name).get(f"cats k={k}: ahead_of_relu") == (1 if task is None else None)


def test_no_recipe_is_untested():
    tested = {f"quality-{m}" for m in QUALITY} | {f"mlp-latency-{m}" for m in MLP}
    tested |= {f"generation-{m}" for m in GENERATION} | {"thresholds-mistral-7b", "generation-mistral-7b-bf16"}
    tested |= {"finetune-llama-2-7b", *FINETUNING}
    assert set(load.names()) == tested


@pytest.mark.parametrize("name", load.names())
def test_recipes_of_the_package_are_right(name):
    made = load.find(name)
    assert made.name == name
    reproduce.check(made)
    assert files("cats_llm.recipes").joinpath(f"{name}.yaml").is_file()
    if made.calibration is not None:
        assert (made.calibration.data, made.calibration.rows.text_column) == ("tiiuae/falcon-refinedweb", "content")
        assert made.calibration.sampling.seq_length == 1024


def test_documents_for_smoke_runs_are_one_of_each_answer():
    folder = load.smoke_data()
    trained_on = {f"{task}-{split}" for task in TASKS for split in ("train", "validation")}
    assert {file.stem for file in folder.iterdir()} == {*TASK_SETS["paper8"], *trained_on}
    for file in folder.iterdir():
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert len(rows) == (12 if file.stem.endswith("-train") else 4)
        keys = ("answerKey", "answer", "label", "correct_answer")
        assert len({str(next(row[key] for key in keys if key in row)) for row in rows}) > 1, file


# what is wrong with a recipe

GOOD = {
    "title": "A title",
    "about": "What it is.",
    "model": "org/name",
    "calibration": {"data": "text.txt"},
    "evaluation": {"tasks": ["piqa"], "sparsities": [0.5]},
    "source": "somebody",
    "expected": [{"variant": "cats k=0.5", "task": "piqa", "metric": "acc", "value": 0.5}],
}
DECODE = GOOD | {
    "bench": {"kind": "decode", "sparsities": [0.5], "tokens": [8, 9]},
    "expected": [{"contestant": "k = 0.5", "measure": "tokens_per_second", "value": [1, 2]}],
}
del DECODE["evaluation"]
TUNE = GOOD | {
    "finetuning": {"data": "text.txt", "methods": ["cats", "relu"], "sparsities": [0.5], "steps": 3},
    "expected": [{"variant": "cats k=0.5", "measure": "ahead_of_relu", "value": 1}],
}
del TUNE["evaluation"]


def changed(values, path, to):
    made = copy.deepcopy(values)
    place = made
    for step in path[:-1]:
        place = place[step]
    if to is None:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return made


@pytest.fixture
def recipe(tmp_path):
    def write(values):
        path = tmp_path / "mine.yaml"
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
        return str(path)

    return write


def test_a_recipe_by_path(recipe):
    made = load.find(recipe(GOOD))
    assert made.name == "mine"
    assert made.calibration == CalibrationSection("text.txt")
    assert made.expected == (Expected(0.5, "somebody", Quantity("cats k=0.5", "piqa", "acc")),)
    assert load.find(recipe(DECODE)).expected[0].value == (1.0, 2.0)


@pytest.mark.parametrize(
    ("values", "path", "to", "says"),
    [
        (GOOD, ["title"], None, "title is missing"),
        (GOOD, ["title"], 5, "title is '5' and should be text"),
        (GOOD, ["titel"], "x", "titel is unknown; did you mean title"),
        (GOOD, ["model"], None, "model is missing"),
        (GOOD, ["calibration"], None, "calibration is missing"),
        (GOOD, ["calibration", "sampels"], 5, "calibration.sampels is unknown; did you mean samples"),
        (GOOD, ["calibration", "samples"], 0, "calibration.samples is '0'"),
        (GOOD, ["calibration", "samples"], True, "calibration.samples is 'True'"),
        (GOOD, ["calibration"], ["text"], "calibration should be a mapping"),
        (GOOD, ["dtype"], "int8", "dtype is 'int8' and should be one of auto"),
        (GOOD, ["evaluation"], None, "exactly one of evaluation, thresholds, bench, finetuning; it has none"),
        (GOOD, ["thresholds"], {"sparsity": 0.5}, "it has evaluation and thresholds"),
        (GOOD, ["evaluation", "tasks"], "piqa", "evaluation.tasks is 'piqa' and should be a list"),
        (GOOD, ["evaluation", "tasks"], ["piqa", "piqa"], "a list of different names"),
        (GOOD, ["evaluation", "sparsities"], [1.0], "evaluation.sparsities is '\\[1.0\\]'"),
        (GOOD, ["evaluation", "sparsities"], [], "evaluation.sparsities"),
        (GOOD, ["evaluation", "sparsities"], [math.nan], "evaluation.sparsities"),
        (GOOD, ["source"], None, "expected\\[0\\].source is missing"),
        (GOOD, ["expected"], "none", "expected is 'none' and should be a list of mappings"),
        (GOOD, ["expected", 0, "value"], "0.5 or so", "expected\\[0\\].value is '0.5 or so'"),
        (GOOD, ["expected", 0, "value"], [2, 1], "expected\\[0\\].value is '\\[2, 1\\]'"),
        (GOOD, ["expected", 0, "layer"], 3, "expected\\[0\\].layer is unknown"),
        (GOOD, ["expected", 0, "metric"], None, "expected\\[0\\].metric is missing"),
        (DECODE, ["bench", "kind"], "gpu", "bench.kind is 'gpu' and should be mlp or decode"),
        (DECODE, ["bench", "kind"], "mlp", "bench.shape is missing"),
        (DECODE, ["bench", "shape"], "mistral-7b", "bench.shape has no meaning"),
        (
            DECODE,
            ["expected", 0, "contestant"],
            "k = 0.7",
            "expected\\[0\\].contestant is 'k = 0.7'",
        ),
        (DECODE, ["expected", 0, "measure"], "ms", "expected\\[0\\].measure is 'ms'"),
        (DECODE, ["expected", 0, "tokens"], 7, "expected\\[0\\].tokens is 7, which bench.tokens does not have"),
        (DECODE, ["model"], None, "model is missing"),
        (TUNE, ["finetuning", "data"], None, "finetuning.data or instructions is needed, and not both"),
        (TUNE, ["finetuning", "instructions"], "cola", "finetuning.data or instructions is needed, and not both"),
        (TUNE, ["finetuning", "steps"], None, "finetuning.steps or epochs is needed, and not both"),
        (TUNE, ["finetuning", "learning_rate"], 0, "finetuning.learning_rate is '0' and should be a number above 0"),
        (
            TUNE,
            ["expected", 0, "variant"],
            "cats k=0.7",
            "variant is 'cats k=0.7' and should be one of cats k=0.5, relu",
        ),
        (TUNE, ["expected", 0, "measure"], "acc", "measure is 'acc' and should be one of perplexity_over_relu"),
        (TUNE, ["finetuning", "methods"], ["cats"], "compares with relu, which finetuning.methods does not have"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, list) else None,
)
def test_what_is_wrong_is_one_sentence_with_the_place(recipe, capsys, values, path, to, says):
    assert main(["reproduce", recipe(changed(values, path, to))]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "mine.yaml" in error
    assert re.search(says, error), error


def test_a_section_takes_every_option_of_fine_tuning(recipe):
    defaults = {
        name: field.default if field.default is not None else 2
        for name, field in {**option_fields(DataConfig), **option_fields(TrainingConfig)}.items()
        if name not in ("method", "micro_batch", "calibration", "epochs")
    }
    values = defaults | {"heldout": "h.txt", "dataset_config": "en", "targets": ["q_proj"], "rank": 8}
    plan = load.find(recipe(TUNE | {"finetuning": TUNE["finetuning"] | values})).plan
    assert plan.reading == DataConfig("h.txt", rows=RowFormat(dataset_config="en"), samples=2)
    assert plan.training == TrainingConfig(steps=2, targets=("q_proj",), rank=8)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("title: [", "no valid YAML at line"),
        ("title: a\ntitle: b", "no valid YAML at line 2: the key 'title' stands twice"),
        ("- a\n- b", "is no recipe"),
        ("", "is no recipe"),
        ("title: !!python/object/apply:os.system ['true']", "no valid YAML"),
        ("? [a]\n: b", "no valid YAML"),
    ],
)
def test_what_is_no_yaml_is_one_sentence(recipe, capsys, text, says):
    assert main(["reproduce", recipe(text)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error


def test_names(capsys):
    assert main(["reproduce"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in load.names())
    assert main(["reproduce", "quality-mistral7b"]) == 1
    assert "did you mean quality-mistral-7b?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "to", "says"),
    [
        (["evaluation", "methods"], ["magic"], "'magic' is no method; choose from dense, cats, relu"),
        (["expected", 0, "variant"], "cats k=0.6", "the variant cats k=0.6, which it does not run"),
        (["expected", 0, "task"], "sciq", "the task sciq, which it does not run"),
    ],
)
def test_numbers_that_are_not_measured_are_refused_before_any_work(recipe, capsys, path, to, says):
    assert main(["reproduce", recipe(changed(GOOD, path, to))]) == 1
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"methods": ["teal", "relu"]}, "'teal' is no method of training; choose from cats, relu, dense"),
        ({"data": None, "instructions": "mnli"}, "'mnli' is no task; choose from cola, sst2, boolq"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_work(recipe, tmp_path, capsys, change, says):
    plan = {key: value for key, value in (TUNE["finetuning"] | change).items() if value is not None}
    path = recipe(TUNE | {"finetuning": plan, "expected": []})
    assert main(["reproduce", path, "--out", str(tmp_path / "out")]) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_smoke_needs_documents(recipe, capsys):
    values = changed(GOOD, ["evaluation", "tasks"], ["coqa", "piqa"])
    assert main(["reproduce", recipe(values), "--smoke"]) == 1
    assert "--smoke has no documents for coqa" in capsys.readouterr().err


# comparing


def compare(plan, items, **results):
    return [Comparison(item, *plan.measured(item.of, results)) for item in items]


def test_differences():
    rows = [{"metric": "acc", "value": 0.7, "stderr": 0.01}, {"metric": "f1", "value": 0.1, "stderr": None}]
    common = {"variant": "dense", "task": "t", "sparsity": {"model": 0.2}}
    result = {"results": [common | row for row in rows]}
    items = [Expected(0.6, "", Quantity("dense", "t", m)) for m in ("acc", "f1", "model_sparsity", "em")]
    acc, f1, share, missing = compare(EvaluationPlan(("t",), (0.5,)), items, result=result)
    assert (acc.measured, acc.stderr, acc.difference) == (0.7, 0.01, pytest.approx(0.1))
    assert (f1.measured, f1.difference) == (0.1, pytest.approx(-0.5))
    assert (share.measured, share.difference) == (0.2, pytest.approx(-0.4))
    assert (missing.measured, missing.difference) == (None, None)
    ranges = [Expected(value, "", Quantity(layer=1)) for value in ((1, 3), (3, 4), (0, 1))]
    inside, below, above = compare(ThresholdPlan(0.5), ranges, thresholds={1: 2.0})
    assert (inside.difference, below.difference, above.difference) == (0, -1, 1)


def test_a_number_over_all_lengths_is_their_geometric_mean():
    rows = [
        {"contestant": "k = 0.5", "tokens": n, "speedup_over_stock": {"median": s}, "tokens_per_second": 5.0}
        for n, s in ((8, 1.0), (9, 4.0))
    ]
    of = Quantity(contestant="k = 0.5", measure="speedup_over_stock")
    items = [Expected(2, "", replace(of, tokens=n)) for n in (None, 8, 9)]
    found = compare(BenchPlan("decode", (0.5,)), items, bench={"benchmark": "decode", "rows": rows})
    assert [item.measured for item in found] == [pytest.approx(2.0), 1.0, 4.0]


def test_fine_tuning_is_compared_with_relu_at_the_same_steps():
    def run(name, *perplexities):
        entries = [{"step": 5 * i, "perplexity": value} for i, value in enumerate(perplexities)]
        return {"name": name, "evaluations": entries}

    logs = [run("relu", 20, 15, 12, 10), run("a", 30, 14, 13, 8), run("b", 9, 8, 8, None), run("c", 7)]
    measures = ("perplexity_over_relu", "ahead_of_relu")
    items = [Expected(1, "", Quantity(variant=v, measure=m)) for v in "abcd" for m in measures]
    plan = FinetuningPlan(("relu",), (0.5,), "t", training=TrainingConfig(steps=20))
    found = [item.measured for item in compare(plan, items, training={"runs": logs})]
    assert found == [0.8, pytest.approx(2 / 3), None, None, None, None, None, None]


# from end to end


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", [n for n in load.names() if n.startswith(("mlp", "generation", "thresholds"))])
@needs_kernels
def test_smoke(name, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["reproduce", name, "--smoke", "--out", str(out), "--json", str(tmp_path / "c.json")]) == 0
    printed = capsys.readouterr().out
    assert "not to be compared" in printed
    summary = json.loads((out / "comparison.json").read_text())
    assert summary == json.loads((tmp_path / "c.json").read_text())
    made = load.find(name)
    assert [n["expected"] for n in summary["numbers"]] == json.loads(json.dumps([e.value for e in made.expected]))
    # eight layers of the bundled model stand for 32
    measured = [n["measured"] for n in summary["numbers"] if n["measured"] is not None]
    assert len(measured) == (8 if name.startswith("thresholds") else len(made.expected))
    assert all(math.isfinite(value) and value > 0 for value in measured)
    assert all(n["difference"] is None for n in summary["numbers"])
    assert "<svg" in (out / "report.html").read_text(encoding="utf-8")
    assert (out / "profile.safetensors").is_file() == (made.model is not None)
    # nothing is overwritten
    assert main(["reproduce", name, "--smoke", "--out", str(out)]) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", [n for n in load.names() if n.startswith("quality")])
def test_smoke_of_quality(name, tmp_path):
    out = tmp_path / "out"
    assert main(["reproduce", name, "--smoke", "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    by_place = {(r["variant"], r["task"], r["metric"]): r for r in result["results"]}
    assert [v["name"] for v in result["variants"]] == ["dense", "cats k=0.5", "cats k=0.7", "cats k=0.9", "relu"]
    for number, item in zip(
        json.loads((out / "comparison.json").read_text())["numbers"], load.find(name).expected, strict=True
    ):
        if item.of.metric == "acc":
            values = [by_place[item.of.variant, task, "acc"]["value"] for task in TASK_SETS["paper8"]]
            assert number["measured"] == pytest.approx(sum(values) / 8)
        else:
            # the bundled model's MLPs hold 77 % of its linear weights
            assert number["measured"] == pytest.approx(0.5 * 2 / 3 * 0.774, abs=0.01)
    assert "accuracy" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", [n for n in load.names() if n.startswith("finetune")])
def test_smoke_of_fine_tuning(name, tmp_path, capsys):
    out = tmp_path / "out"
    line = ["reproduce", name, "--smoke", "--out", str(out)]
    assert main(line) == 0
    logs = json.loads((out / "training.json").read_text())["runs"]
    assert [log["name"] for log in logs] == ["dense", "cats k=0.5", "cats k=0.7", "cats k=0.9", "relu"]
    assert len({json.dumps(log["settings"] | {"method": None}) for log in logs}) == 1
    assert len({log["data"]["tokens"] for log in logs}) == 1
    numbers = {n["what"]: n["measured"] for n in json.loads((out / "comparison.json").read_text())["numbers"]}
    end = {log["name"]: log["evaluations"][-1]["perplexity"] for log in logs}
    for k in (0.5, 0.7, 0.9):
        assert numbers[f"cats k={k}: perplexity_over_relu"] == pytest.approx(end[f"cats k={k}"] / end["relu"])
    assert "held-out perplexity" in (out / "report.html").read_text(encoding="utf-8")
    # what it leaves are models
    assert main(["inspect", str(out / "cats-k0.7")]) == 0
    # a stopped one goes on with what is finished, and changes nothing of it
    shutil.rmtree(out / "relu")
    kept = {file: file.read_bytes() for file in out.glob("cats-*/*") if file.is_file()}
    capsys.readouterr()
    assert main(line) == 1
    assert "exists already" in capsys.readouterr().err
    assert main([*line, "--resume"]) == 0
    assert "dense:" not in capsys.readouterr().out
    assert {file: file.read_bytes() for file in kept} == kept
    again = json.loads((out / "relu" / "finetune.json").read_text())
    assert again["steps"] == logs[-1]["steps"]


def test_resuming_is_of_the_same_fine_tuning(tmp_path, capsys):
    reproduce.begin(tmp_path, load.find("finetune-mistral-7b"), resume=False)
    line = ["reproduce", "finetune-cola-mistral-7b", "--smoke", "--resume", "--out", str(tmp_path)]
    assert main(line) == 1
    assert "was begun with another recipe" in capsys.readouterr().err


@pytest.mark.parametrize("line", [["thresholds-mistral-7b", "--resume"], ["finetune-mistral-7b"]])
def test_fine_tuning_needs_a_place(line, capsys):
    assert main(["reproduce", *line]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.usefixtures("one_thread")
def test_a_profile_serves_again(tmp_path, capsys):
    name, out = "thresholds-mistral-7b", tmp_path / "out"
    assert main(["reproduce", name, "--smoke", "--out", str(out)]) == 0
    first = capsys.readouterr().out.replace(f"Written to {out}.\n", "")
    assert main(["reproduce", name, "--smoke", "--profile", str(out / "profile.safetensors")]) == 0
    assert capsys.readouterr().out == first


def test_a_profile_of_another_model_is_refused(tmp_path, capsys, llama):
    llama.profile.save(tmp_path / "p.safetensors")
    assert main(["reproduce", "thresholds-mistral-7b", "--smoke", "--profile", str(tmp_path / "p.safetensors")]) == 1
    assert "made with another model" in capsys.readouterr().err


def test_where_results_go(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out, says in (("file", "exists already"), ("no/folder", "does not exist")):
        assert main(["reproduce", "thresholds-mistral-7b", "--smoke", "--out", str(tmp_path / out)]) == 1
        assert says in capsys.readouterr().err
    assert main(["reproduce", "thresholds-mistral-7b", "--smoke", "--force", "--out", str(tmp_path / "file")]) == 1
    assert "is a file; give the name of a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_recipes_are_light():
    heavy = "{'lm_eval', 'matplotlib', 'datasets'}"
    script = f"import sys, cats_llm.recipes.load; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_errors_are_for_users():
    with pytest.raises(CatsError, match="there are finetune-boolq-mistral-7b"):
        load.find("xyz")
