"""benchmarks/finetune.py: what it compares, that nothing it reports on was trained on, and what it needs."""

import io
import json
import lzma
import os
import runpy
import shutil
import subprocess
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

import cats_llm
from cats_llm import bundled
from cats_llm.evaluation.paired import paired_difference
from cats_llm.evaluation.task import Metric
from cats_llm.loading import load_tokenizer
from cats_llm.text import load_sequences

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "finetune.py"
METHODS = ["dense", "cats k=0.5", "cats k=0.7", "cats k=0.9", "relu"]
GROUPS = ["chosen rate", "paper's rate"]
HELDOUT = bundled.heldout_text()


def call(*words):
    """Run the script, in this process; what it printed."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        patch.syspath_prepend(str(SCRIPT.parent))
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return printed.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, and 23 documents of which one holds a passage of the held-out text."""
    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=72, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, eos_token_id=1, bos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled.model_path() / name, folder / "model")
    text = bundled.calibration_text().read_text(encoding="utf-8")
    documents = [text[i * 4000 : (i + 1) * 4000] for i in range(22)]
    passage = " ".join(HELDOUT.read_text(encoding="utf-8").split()[5000:5020])
    documents.insert(5, f"{documents[0][:3000]} {passage} {documents[1][:3000]}")
    joined = "\n<|endoftext|>\n".join(documents)
    (folder / "text.txt.xz").write_bytes(lzma.compress(joined.encode()))
    return folder


@pytest.fixture(scope="module")
def result(folder):
    """The whole comparison of the methods, in a few steps."""
    call(
        "--out", folder / "out", "--data", folder / "text.txt.xz", "--model", folder / "model", "--device", "cpu",
        "--steps", 4, "--batch-size", 2, "--seq-length", 32, "--rates", "1e-6", "1e-2", "--heldout-samples", 4,
        "--final-samples", 6, "--validation-samples", 5, "--calibration-samples", 8,
    )  # fmt: skip
    return folder / "out", json.loads((folder / "out" / "finetune.json").read_text(encoding="utf-8"))


def test_every_method_runs_with_the_same_steps_and_data(result):
    _, values = result
    runs = [(log["group"], log["name"]) for log in values["runs"]]
    assert runs == [(group, name) for group in GROUPS for name in METHODS]
    for log in values["runs"]:
        steps = list(range(1, 5 if log["group"] == "chosen rate" else 2))
        assert [step["step"] for step in log["steps"]] == steps
        assert [entry["step"] for entry in log["evaluations"]] == [0, *steps]
        assert log["settings"]["batch_size"] == 2
        assert log["tokens"] == len(steps) * 2 * 32
        assert 0 < log["training_seconds"] < log["seconds"]
    # before any step a method is one model, whatever the rate
    for chosen, paper in zip(values["runs"][:5], values["runs"][5:], strict=True):
        assert chosen["evaluations"][0] == paper["evaluations"][0]
        assert chosen["before"] == paper["before"]
    assert values["runs"][0]["before"] == values["dense"]


def test_the_rate_is_the_best_on_the_validation_text(result):
    _, values = result
    order = ["dense", "cats k=0.5", "cats k=0.7", "cats k=0.9", "relu"]
    assert [(entry["name"], entry["learning_rate"], entry["steps"]) for entry in values["search"]] == [
        (name, rate, 1) for name in order for rate in (1e-6, 1e-2)
    ]
    for name in METHODS:
        tried = {e["learning_rate"]: e["validation_perplexity"] for e in values["search"] if e["name"] == name}
        rates = {log["group"]: log["settings"]["learning_rate"] for log in values["runs"] if log["name"] == name}
        assert rates == {"chosen rate": min(tried, key=tried.get), "paper's rate": 1e-5}


def test_what_shares_a_passage_with_the_heldout_text_is_left_out(result):
    out, values = result
    data = values["data"]
    assert [value for key, value in data.items() if key.startswith("pieces")] == [22, 1]
    tensors = load_file(out / "tokens.safetensors")
    assert {name: tuple(ids.shape) for name, ids in tensors.items() if name != "train"} == {
        "validation": (5, 32), "calibration": (8, 32), "text.books": (6, 32)
    }  # fmt: skip
    tokenizer = load_tokenizer(str(bundled.model_path()))
    # what is reported on is the text itself, and nothing is in two parts
    windows = {tuple(ids.tolist()) for ids in load_sequences(str(HELDOUT), tokenizer, 32)}
    assert {tuple(ids) for ids in tensors["text.books"].tolist()} <= windows
    parts = [{tuple(ids) for ids in tensor.tolist()} for tensor in tensors.values()]
    assert len(set().union(*parts)) == sum(map(len, parts))


def test_comparisons_are_paired_with_relu_and_dense(result):
    out, values = result
    pairs = {(c["group"], c["name"], c["to"]): c for c in values["comparisons"]}
    assert len(pairs) == 2 * (5 + 4 + 4)
    final = {(log["group"], log["name"]): log["after"]["books"] for log in values["runs"]}
    for (group, name, other), found in pairs.items():
        base = values["dense"]["books"] if other == "dense before" else final[group, other]
        assert found["value"] == pytest.approx(final[group, name] - base, abs=2)  # of rounded nats of each window
        assert found["low"] <= found["value"] <= found["high"]
    # one of them from the files of the runs
    files = [json.loads(file.read_text(encoding="utf-8")) for file in (out / "runs").glob("chosen_rate*.json")]
    nll = {log["name"]: log["after"]["books"]["nll"] for log in files}
    cats, relu = (
        Metric("p", torch.tensor(x).double().mean().exp().item(), None, False, 6, "perplexity", x, [1.0] * 6)
        for x in (nll["cats k=0.7"], nll["relu"])
    )
    found = pairs["chosen rate", "cats k=0.7", "relu"]
    assert found["p"] == pytest.approx(paired_difference(cats, relu).p)
    assert found["value"] == pytest.approx(cats.value - relu.value, abs=1e-2)


def test_table_and_figure(result):
    out, values = result
    table = (out / "finetune.md").read_text(encoding="utf-8").splitlines()
    assert len(table) == 2 + 10
    assert {line.count("|") for line in table} == {10}
    assert (out / "finetune.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert str(out.parent) not in json.dumps(values), "a path of this machine is in the result"


def test_runs_are_files_that_are_chosen_kept_and_not_run_twice(result, folder):
    """A second group on the same token ids: all weights of the MLPs, distillation, a criterion, minutes, seeds."""
    out = folder / "second"
    words = [
        "--out", out, "--tokens", folder / "out" / "tokens.safetensors", "--model", folder / "model", "--device", "cpu",
        "--group", "budget", "--methods", "cats-0.5", "relu", "--parameters", "mlp", "--losses", "cross-entropy",
        "distillation", "--criteria", "norm+compensate", "--rates", "1e-3", "--schedule", "cosine", "--warmup", "0.1",
        "--minutes", "0.002", "--seeds", 0, 1, "--batch-size", 2, "--keep",
    ]  # fmt: skip
    names = call(*words, "--list").split()
    assert len(names) == len(set(names)) == 2 * 2 * 2
    assert len(call(*words, "--list", "--share", "1/3").split()) == 3
    chosen = [name for name in names if "distillation" in name and name.endswith("seed1")]
    call(*words, "--only", "*distillation*seed1")
    assert sorted(file.stem for file in (out / "runs").iterdir()) == sorted(chosen)
    assert not (out / "finetune.json").exists(), "other processes may still be running"
    dates = {file: file.stat().st_mtime_ns for file in (out / "runs").iterdir()}
    assert "is there" in call(*words, "--only", "*distillation*seed1")
    assert {file: file.stat().st_mtime_ns for file in dates} == dates
    call("--out", out, "--summarise")
    values = json.loads((out / "finetune.json").read_text(encoding="utf-8"))
    assert [log["name"] for log in values["runs"]] == ["cats k=0.5, norm+compensate", "relu, cats"]
    for log in values["runs"]:
        # of the order of what was asked for, on a machine that does other things too
        assert log["settings"]["steps"] >= 1
        assert log["settings"]["warmup_steps"] == round(0.1 * log["settings"]["steps"])
        assert log["evaluations"][-1]["kl"] is not None
    assert {c["to"] for c in values["comparisons"]} == {"dense before", "relu"}
    assert "books: dense" in (out / "finetune.md").read_text(encoding="utf-8")
    # runs alone, as they come from another machine, have less to be compared with
    (out / "base.json").unlink()
    call("--out", out, "--summarise")
    assert json.loads((out / "finetune.json").read_text(encoding="utf-8"))["dense"] == {"books": None}
    assert "| books |" in (out / "finetune.md").read_text(encoding="utf-8")
    # what is kept is what was measured
    model = AutoModelForCausalLM.from_pretrained(out / "models" / next(n for n in chosen if "cats" in n))
    assert model.config.quantization_config.criterion["name"] == "norm+compensate"
    ids = load_file(folder / "out" / "tokens.safetensors")["text.books"].long()
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=ids).logits[:, :-1].double(), -1)
    perplexity = (-log_p.gather(-1, ids[:, 1:, None])).mean().exp().item()
    assert values["runs"][0]["after"]["books"] == pytest.approx(perplexity, rel=1e-5)
    assert len(cats_llm.sparse_mlps(model)) == 2


def test_the_script_needs_little():
    """Its help comes without typer, rich, matplotlib, datasets and the package being installed."""
    blocked = "typer", "rich", "matplotlib", "pytest", "hypothesis", "lm_eval"
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({blocked})); sys.path.insert(0, {str(SCRIPT.parent)!r}); "
        f"sys.argv = ['finetune.py', '--help']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2] / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "--rates" in done.stdout
