"""`cats demo --model`: the demo on another model than the bundled one."""

import json
import os
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import cats_llm
import gguf_models
from cats_llm import bundled
from cats_llm.conversion import convert_gguf
from cats_llm.demo import DemoConfig
from cats_llm.loading import load_model, load_tokenizer
from cats_llm.text import load_sequences

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = ("--samples", 2, "--max-new-tokens", 1)
CHECKPOINTS = ("cats-50", "cats-70", "cats-90")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    model = gguf_models.tiny_llama(num_hidden_layers=1)
    store = gguf_models.quantised(gguf_models.Type.Q8_0)
    return gguf_models.write(tmp_path_factory.mktemp("gguf") / "s.gguf", model, store)


@pytest.fixture(scope="module")
def converted(file, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model"
    convert_gguf(str(file), path)
    return path


@pytest.fixture
def folder(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "model")


@pytest.fixture
def no_page(monkeypatch):
    """Figures take seconds, and are tested elsewhere."""
    monkeypatch.setattr("cats_llm.demo.render_page", lambda _: "")


def inodes(out, name="model.safetensors"):
    return {(out / checkpoint / name).stat().st_ino for checkpoint in CHECKPOINTS}


def perplexity(model, sequences=2, length=512):
    """By plain PyTorch, on the first windows of the held-out books."""
    tokenizer = load_tokenizer(str(bundled.model_path()))
    windows = torch.stack(list(load_sequences(str(bundled.heldout_text()), tokenizer, length, samples=sequences)))
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].double()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).exp().item()


def test_a_gguf_file(file, run_cats, tmp_path):
    out = tmp_path / "out"
    code, said = run_cats("demo", "--model", file, "--out", out, *SHORT)
    assert code == 0, said
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "what was temporary is gone"
    result = json.loads((out / "results.json").read_text())
    assert (result["model"], result["dtype"]) == (str(file), "float32")
    lines = re.sub(r"\s+", " ", said)
    assert f"{file}: LlamaForCausalLM, 1.44 million parameters" in lines
    assert "Thresholds from 1024 tokens of old books" in lines
    assert "quality on 1022 held-out tokens" in lines
    assert "model this small" not in lines, "nobody knows how small it is"
    assert "s.gguf" in (out / "report.html").read_text(encoding="utf-8")
    dense = load_model(str(file), device="cpu").float()  # the file's own dtype, computed in another
    values = {row["variant"]: row["value"] for row in result["results"] if row["metric"] == "perplexity"}
    assert values["dense"] == pytest.approx(perplexity(dense), rel=1e-4)
    sparse = AutoModelForCausalLM.from_pretrained(out / "cats-70", dtype=torch.float32)
    assert values["cats k=0.7"] == pytest.approx(perplexity(sparse), rel=1e-4)
    assert sparse.config.quantization_config.calibration["model"] == str(file)
    assert AutoModelForCausalLM.from_pretrained(out / "cats-50", dtype="auto").dtype == torch.bfloat16, "the file's own"
    assert len(inodes(out)) == 1, "the same weights three times"
    assert torch.equal(cats_llm.densify(sparse).lm_head.weight, dense.lm_head.weight)


def test_a_folder_is_linked_to_and_left_as_it_was(folder, run_cats, no_page, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code, said = run_cats("demo", "--model", folder, "--out", tmp_path / "out", *SHORT, "--dtype", "bfloat16")
    assert code == 0, said
    assert json.loads((tmp_path / "out" / "results.json").read_text())["dtype"] == "bfloat16"
    assert inodes(tmp_path / "out") == {(folder / "model.safetensors").stat().st_ino}
    assert len(inodes(tmp_path / "out", "config.json")) == 3
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_where_the_disk_does_not_link_to_the_model_it_is_copied_once(folder, run_cats, no_page, tmp_path, monkeypatch):
    link = os.link

    def refuse(source, target):
        if str(source).startswith(str(folder)):
            raise OSError(18, "Invalid cross-device link")
        link(source, target)

    monkeypatch.setattr(os, "link", refuse)
    code, said = run_cats("demo", "--model", folder, "--out", tmp_path / "out", *SHORT)
    assert code == 0, said
    assert len(inodes(tmp_path / "out")) == 1
    assert (folder / "model.safetensors").stat().st_nlink == 1


def test_models_that_it_cannot_begin_with(folder, run_cats, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "sparse")
    model = cats_llm.sparsify(load_model(str(folder), device="cpu"), cats_llm.CatsConfig({0: 0.25}))
    model.save_pretrained(tmp_path / "sparse")
    monkeypatch.setattr("cats_llm.loading.load_model", lambda *_: pytest.fail("weights were read"))
    code, said = run_cats("demo", "--model", tmp_path / "sparse", "--out", tmp_path / "out", *SHORT)
    assert code == 1
    assert "sparse or quantised already; the demo begins with the dense model" in said
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))
    code, said = run_cats("demo", "--model", folder, "--out", tmp_path / "out", *SHORT)
    assert code == 1
    assert "the demo has no meaning for LlamaForSequenceClassification" in said
    assert not (tmp_path / "out").exists()


def test_how_much_is_computed_where_nothing_is_said():
    for config, expected in (
        (DemoConfig(device="cpu"), ("float32", 64)),
        (DemoConfig(device="cuda"), ("float32", 64)),
        (DemoConfig("m", device="cpu"), ("float32", 16)),
        (DemoConfig("m", device="cuda"), ("auto", 64)),
        (DemoConfig("m", device="cpu", dtype="bfloat16", samples=8), ("bfloat16", 8)),
    ):
        settled = config.settled()
        assert (settled.dtype, settled.samples) == expected
