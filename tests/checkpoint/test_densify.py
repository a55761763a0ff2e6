"""`cats densify`: the dense folder back from a CATS checkpoint, to the byte."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import cats_llm
from cats_llm import CatsConfig, CatsError, LayerTensors
from cats_llm.checkpoint.json_text import remove_entry, set_entry
from cats_llm.checkpoint.write import write_checkpoint, write_dense_checkpoint
from cats_llm.cli.main import main
from cats_llm.model.relufy import relufy
from families import logits

pytestmark = pytest.mark.usefixtures("one_thread")

VECTORS = {0: LayerTensors(compensation=torch.ones(64))}
CONFIGS = {"plain": CatsConfig({0: 0.1, 1: 0.2}, 0.5), "vectors": CatsConfig({0: 0.1, 1: 0.2}, vectors=VECTORS)}


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def dense(llama, tmp_path):
    folder = Path(shutil.copytree(llama.dense_folder, tmp_path / "dense"))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def sparse(dense, tmp_path):
    write_checkpoint(dense, tmp_path / "sparse", CONFIGS["plain"])
    return tmp_path / "sparse"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("link", [False, True])
def test_there_and_back_is_the_same_folder(dense, tmp_path, name, link):
    write_checkpoint(dense, tmp_path / "sparse", CONFIGS[name])
    assert (tmp_path / "sparse" / "cats.safetensors").is_file() == (name == "vectors")
    written = write_dense_checkpoint(tmp_path / "sparse", tmp_path / "again", link=link)
    assert content(tmp_path / "again") == content(dense)
    assert written.linked == link
    assert written.weights == {"model.safetensors": (dense / "model.safetensors").stat().st_size}
    assert list(written.left_out) == ["cats.safetensors"] * (name == "vectors")
    assert os.path.samefile(tmp_path / "sparse" / "model.safetensors", tmp_path / "again" / "model.safetensors") == link
    # what one edits by hand is never shared
    assert not os.path.samefile(tmp_path / "sparse/generation_config.json", tmp_path / "again/generation_config.json")


@pytest.mark.parametrize(
    "text",
    [
        '{"b": 1, "model_type": "llama", "a": [{"quantization_config": 1}]}',
        '{\r\n\t"z": "}{,",\r\n\t"a": NaN,\r\n\t"b": 1e400\r\n}\r\n\r\n',
        '{\n  "a": 1,\n  "z": "\\ud800 \u00fc"\n}',
        '{"zz":1}',
    ],
)
def test_config_json_keeps_its_keys_their_order_and_its_form(dense, tmp_path, text):
    (dense / "config.json").write_bytes(text.encode())
    write_checkpoint(dense, tmp_path / "sparse", CONFIGS["plain"])
    before, after = json.loads(text), json.loads((tmp_path / "sparse" / "config.json").read_bytes())
    entry = after.pop("quantization_config")
    assert CatsConfig.from_dict(entry) == CONFIGS["plain"]
    assert json.dumps(after) == json.dumps(before)  # in this order; NaN equals nothing
    write_checkpoint(tmp_path / "sparse", tmp_path / "other", CONFIGS["vectors"])  # new thresholds
    for source in ("sparse", "other"):
        write_dense_checkpoint(tmp_path / source, tmp_path / "again", force=True)
        assert (tmp_path / "again" / "config.json").read_bytes() == text.encode()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=5,
)


@given(
    st.dictionaries(st.text(max_size=3) | st.sampled_from("kmz"), json_values, max_size=4),
    st.sampled_from([None, 0, 2, "\t"]),
    st.sampled_from([(", ", ": "), (",", ":"), (" ,", " : ")]),
    st.booleans(),
    st.booleans(),
)
def test_any_object_gets_an_entry_and_loses_it_again(values, indent, separators, sort_keys, ascii_only):
    values.pop("l", None)
    text = json.dumps(values, indent=indent, separators=separators, sort_keys=sort_keys, ensure_ascii=ascii_only)
    with_entry = set_entry(text, "l", {"a": [1, 2]})
    assert remove_entry(with_entry, "l") == text
    assert json.dumps(json.loads(with_entry), sort_keys=True) == json.dumps(
        values | {"l": {"a": [1, 2]}}, sort_keys=True
    )
    keys = list(json.loads(with_entry))
    assert [key for key in keys if key != "l"] == list(values if not sort_keys else sorted(values))
    assert set_entry(with_entry, "l", {"a": [1, 2]}) == with_entry


def test_what_save_pretrained_wrote_becomes_dense(llama, tmp_path):
    write_dense_checkpoint(llama.sparse_folder, tmp_path / "dense")
    assert content(tmp_path / "dense") == content(llama.dense_folder)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert cats_llm.thresholds(model) == {}
    assert torch.equal(logits(model, llama.ids), llama.dense_logits)


def test_a_relufied_model_stays_one(llama, tmp_path):
    relufied = relufy(llama.dense_copy())
    relufied.save_pretrained(tmp_path / "relu")
    write_dense_checkpoint(tmp_path / "relu", tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert model.config.hidden_act == "relu"
    assert cats_llm.thresholds(model) == {}
    torch.testing.assert_close(logits(model, llama.ids), logits(relufied, llama.ids), rtol=0, atol=1e-5)


def test_a_checkpoint_whose_vectors_are_lost_becomes_dense_still(dense, tmp_path):
    write_checkpoint(dense, tmp_path / "sparse", CONFIGS["vectors"])
    (tmp_path / "sparse" / "cats.safetensors").unlink()
    write_dense_checkpoint(tmp_path / "sparse", tmp_path / "again")
    assert content(tmp_path / "again") == content(dense)


def test_where_the_disk_does_not_link_files_are_copied(dense, sparse, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert main(["densify", str(sparse), str(tmp_path / "again"), "--link"]) == 0
    assert "copied" in capsys.readouterr().out
    assert content(tmp_path / "again") == content(dense)


class TestCommand:
    def test_writes_and_reports(self, dense, sparse, tmp_path, capsys):
        (sparse / "optimizer.pt").write_bytes(b"123")
        facts = tmp_path / "facts.json"
        assert main(["densify", str(sparse), str(tmp_path / "again"), "--json", str(facts)]) == 0
        out = capsys.readouterr().out
        assert "left out, no part of the model: optimizer.pt (3 B)" in out
        assert "the dense model" in out
        assert content(tmp_path / "again") == content(dense)
        sizes = {"model.safetensors": (dense / "model.safetensors").stat().st_size}
        written = {"out": str(tmp_path / "again"), "weights": sizes, "linked": False, "left_out": {"optimizer.pt": 3}}
        assert json.loads(facts.read_text()) == written

    def test_refusals(self, dense, sparse, tmp_path, capsys):
        (tmp_path / "old").mkdir()
        (tmp_path / "old" / "mine").write_text("mine")
        awq = Path(shutil.copytree(dense, tmp_path / "awq"))
        (awq / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
        before = content(tmp_path)
        for message, *arguments in (
            ("is no CATS checkpoint: its config.json has no quantization_config", dense, "out"),
            ("is no CATS checkpoint: it is quantised with awq", awq, "out"),
            ("old exists already", sparse, "old"),
            ("is the model itself", sparse, "sparse", "--force"),
            ("lies inside", sparse, "sparse/dense"),
            ("has no config.json", tmp_path / "old", "out"),
            ("there is no folder", tmp_path / "nothing", "out"),
        ):
            source, out, *options = arguments
            assert main(["densify", str(source), str(tmp_path / out), *options]) == 1
            error = capsys.readouterr().err
            assert message in error
            assert error.count("\n") == 1
        assert content(tmp_path) == before
        assert main(["densify", str(sparse), str(tmp_path / "old"), "--force"]) == 0
        assert content(tmp_path / "old") == content(dense)


def test_the_error_names_config_as_it_is(dense, tmp_path):
    (dense / "config.json").write_text('{"quantization_config": "cats"}')
    with pytest.raises(CatsError, match="is no CATS checkpoint"):
        write_dense_checkpoint(dense, tmp_path / "out")
