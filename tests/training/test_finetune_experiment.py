"""benchmarks/finetune.py: what it compares, that nothing it reports on was trained on, and what it needs."""

import json
import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from cats_llm import bundled

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "finetune.py"
METHODS = ["dense", "cats k=0.5", "cats k=0.7", "cats k=0.9", "relu"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A tiny run on 23 documents, of which one holds a passage of the held-out text."""
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
    heldout = bundled.heldout_text().read_text(encoding="utf-8")
    documents.insert(5, documents[0] + " " + " ".join(heldout.split()[5000:5020]) + " " + documents[1])
    joined = "\n<|endoftext|>\n".join(documents)
    (folder / "text.txt.xz").write_bytes(lzma.compress(joined.encode()))
    done = subprocess.run(
        [
            sys.executable, str(SCRIPT), "--out", str(folder / "out"), "--data", str(folder / "text.txt.xz"), "--model",
            str(folder / "model"), "--device", "cpu", "--steps", "4", "--batch-size", "2", "--seq-length", "32",
            "--rates", "1e-6", "1e-2", "--heldout-samples", "4", "--final-samples", "6",
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "out", json.loads((folder / "out" / "finetune.json").read_text(encoding="utf-8"))


def test_every_method_runs_with_the_same_steps_and_data(result):
    _, values = result
    runs = [(log["group"], log["name"]) for log in values["runs"]]
    assert runs == [(group, name) for name in METHODS for group in ("chosen rate", "paper's rate")]
    for log in values["runs"]:
        steps = list(range(1, 5 if log["group"] == "chosen rate" else 2))
        assert [step["step"] for step in log["steps"]] == steps
        assert [entry["step"] for entry in log["evaluations"]] == [0, *steps]
        assert log["settings"]["batch_size"] == 2
    # before any step a method is one model, whatever the rate
    for chosen, paper in zip(values["runs"][::2], values["runs"][1::2], strict=True):
        assert chosen["evaluations"][0] == paper["evaluations"][0]


def test_the_rate_is_the_best_on_the_validation_text(result):
    _, values = result
    assert [(entry["name"], entry["learning_rate"], entry["steps"]) for entry in values["search"]] == [
        (name, rate, 1) for name in METHODS for rate in (1e-6, 1e-2)
    ]
    for name in METHODS:
        tried = {e["learning_rate"]: e["validation_perplexity"] for e in values["search"] if e["name"] == name}
        rates = {log["group"]: log["settings"]["learning_rate"] for log in values["runs"] if log["name"] == name}
        assert rates == {"chosen rate": min(tried, key=tried.get), "paper's rate": 1e-5}


def test_what_shares_a_passage_with_the_heldout_text_is_left_out(result):
    _, values = result
    data = values["data"]
    assert data["documents"] == 22
    assert [value for key, value in data.items() if key.startswith("documents left out")] == [1]
    assert data["tokens"] == {"train": 4 * 2 * 32, "validation": 4 * 32, "final": 6 * 32}


def test_comparisons_are_paired_with_relu_and_dense(result):
    _, values = result
    pairs = {(c["group"], c["name"], c["to"]): c for c in values["comparisons"]}
    assert len(pairs) == 2 * (4 + 4)
    final = {(log["group"], log["name"]): log["final"]["perplexity"] for log in values["runs"]}
    for (group, name, other), found in pairs.items():
        assert found["value"] == pytest.approx(final[group, name] - final[group, other], rel=1e-9)
        assert found["low"] <= found["value"] <= found["high"]


def test_table_and_figure(result):
    out, values = result
    table = (out / "finetune.md").read_text(encoding="utf-8").splitlines()
    assert len(table) == 2 + 10
    assert {line.count("|") for line in table} == {9}
    assert (out / "finetune.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert str(out.parent) not in json.dumps(values), "a path of this machine is in the result"


def test_the_script_needs_little():
    """Its help comes without typer, rich, matplotlib, datasets and the package being installed."""
    blocked = "typer", "rich", "matplotlib", "pytest", "hypothesis", "lm_eval"
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({blocked})); "
        f"sys.argv = ['finetune.py', '--help']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2] / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "--rates" in done.stdout
