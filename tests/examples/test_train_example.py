"""The training recipe learns, its output loads, a seed fixes the weights, an error is one sentence."""

import hashlib
import importlib.util
import json
import lzma
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cats_llm import bundled

SCRIPT = Path(__file__).parents[2] / "examples" / "train_demo_model.py"
TINY = shlex.split(
    "--hidden 32 --intermediate 64 --layers 2 --heads 2 --kv-heads 1 --vocab 300 --seq 32 --batch 8 "
    "--steps 60 --log-every 10 --no-compile"
)


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("train_demo_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A training file, the same compressed, and a held-out file; documents apart."""
    folder = tmp_path_factory.mktemp("texts")
    lines = bundled.calibration_text().read_text(encoding="utf-8").splitlines()
    (folder / "a.txt").write_text("\n".join([*lines[:60], "<|endoftext|>", *lines[60:120]]), encoding="utf-8")
    with lzma.open(folder / "b.txt.xz", "wt", encoding="utf-8") as f:
        f.write("\n".join(lines[120:130]) + "\n<|endoftext|>\n")
    (folder / "held.txt").write_text("\n".join(lines[200:230]), encoding="utf-8")
    (folder / "short.txt").write_text("Too short.", encoding="utf-8")
    return folder


def run(*arguments, cwd=None):
    command = [sys.executable, "-W", "error", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    """One run as a user starts it: (its folder, what it printed)."""
    out = tmp_path_factory.mktemp("out") / "deeper" / "model"
    files = ["--text", texts / "b.txt.xz", texts / "a.txt", "--heldout", texts / "held.txt", texts / "short.txt"]
    result = run(out, *files, *TINY)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def test_the_loss_goes_down(trained):
    _, printed = trained
    losses = [float(x) for x in re.findall(r"^step \d+ loss ([\d.]+)", printed, re.MULTILINE)]
    assert len(losses) == 8
    assert losses[0] == pytest.approx(5.70, abs=0.1)  # ln 300: nothing known yet
    assert losses[-1] < losses[0] - 0.5


def test_the_output_loads_and_predicts(trained, texts):
    out, _ = trained
    assert sorted(p.name for p in out.parent.iterdir()) == ["model"]  # no temporary folder is left
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert len(tokenizer) == model.config.vocab_size == 300
    text = (texts / "held.txt").read_text(encoding="utf-8")
    ids = torch.tensor([0, *tokenizer(text).input_ids, 1])
    ids = ids[: len(ids) // 32 * 32].view(-1, 32)
    with torch.no_grad():
        logp = model(ids).logits[:, :-1].double().log_softmax(-1)
    perplexity = torch.exp(-logp.gather(-1, ids[:, 1:, None]).mean()).item()
    record = json.loads((out / "training.json").read_text(encoding="utf-8"))
    assert record["heldout_perplexity"]["held.txt"] == pytest.approx(perplexity, rel=0.01)
    assert perplexity < 200  # of 300
    assert record["heldout_perplexity"]["short.txt"] is None
    assert (record["steps"], record["tokens_seen"]) == (60, 60 * 8 * 32)
    assert record["arguments"]["steps"] == 60
    assert "minutes" not in record["arguments"]


def test_the_same_seed_gives_the_same_weights(trained, texts, recipe, tmp_path, capsys):
    out, _ = trained
    files = ["--text", str(texts / "a.txt"), str(texts / "b.txt.xz")]  # the order of the files does not matter
    recipe.main([str(tmp_path / "again"), *files, *TINY])
    assert digest(tmp_path / "again") == digest(out)
    recipe.main([str(tmp_path / "again"), *files, *TINY, "--seed", "1", "--steps", "2", "--force"])
    assert digest(tmp_path / "again") != digest(out)
    assert [p.name for p in tmp_path.iterdir()] == ["again"]
    assert "train tokens" in capsys.readouterr().out


def test_minutes_end_the_run(texts, recipe, tmp_path, capsys):
    tiny = [a for a in TINY if a not in ("--steps", "60")]
    recipe.main([str(tmp_path / "out"), "--text", str(texts / "a.txt"), *tiny, "--minutes", "0.01"])
    record = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))
    assert record["steps"] > 0
    assert record["arguments"]["minutes"] == 0.01
    capsys.readouterr()


def test_muon_steps_are_nearly_orthogonal(recipe):
    torch.manual_seed(0)
    for shape in [(3, 20, 50), (2, 50, 20), (1, 16, 16)]:
        singular = torch.linalg.svdvals(recipe.orthogonalise(torch.randn(shape)).float())
        assert singular.max() < 1.3
        assert singular.median() > 0.6


def test_help_ends_with_an_example(recipe, capsys):
    with pytest.raises(SystemExit) as end:
        recipe.main(["--help"])
    assert end.value.code == 0
    assert "example: python examples/train_demo_model.py" in capsys.readouterr().out


def test_a_failure_as_a_user_sees_it(tmp_path):
    failed = run("out", "--text", "nowhere.txt", *TINY, cwd=tmp_path)
    assert failed.returncode == 1
    expected = "train_demo_model: cannot read nowhere.txt as UTF-8 text: No such file or directory\n"
    assert failed.stderr == expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no text files: name at least one with --text"),
        (["--text", "empty.txt"], "the text files hold no text"),
        (["--text", "short.txt"], "too little text: 5 tokens, where more than one sequence of 32 is needed"),
        (["--text", "latin1.txt"], "cannot read latin1.txt as UTF-8 text"),
        (["--text", "broken.xz"], "cannot read broken.xz as UTF-8 text"),
        (["--text", "cut.xz"], "cannot read cut.xz as UTF-8 text"),
        (["--text", "."], "cannot read . as UTF-8 text: Is a directory"),
        (["--text", "short.txt", "--heldout", "gone"], "cannot read gone as UTF-8 text: No such file"),
        (["--text", "short.txt", "--vocab", "100"], "--vocab 100 must be at least 258"),
        (["--text", "short.txt", "--heads", "3"], "--hidden 32 must be a multiple of twice --heads 3"),
        (["--text", "short.txt", "--kv-heads", "3"], "--heads 2 must be a multiple of --kv-heads 3"),
        (["--text", "short.txt", "--seq", "4096"], "--seq 4096 must be between 2 and 2048"),
    ],
    ids=lambda x: " ".join(x) or "nothing" if isinstance(x, list) else "",
)
def test_errors_are_one_sentence_and_leave_nothing(recipe, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n<|endoftext|>\n \n")
    Path("short.txt").write_text("Too short.")
    Path("latin1.txt").write_bytes("naïve".encode("latin-1"))
    Path("broken.xz").write_bytes(b"not xz")
    Path("cut.xz").write_bytes(lzma.compress(b"words " * 10_000)[:-20])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as failure:
        recipe.main(["new/out", *TINY, *arguments])
    said = str(failure.value)
    assert said.startswith(f"train_demo_model: {message}")
    assert "\n" not in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("option", ["--steps", "--minutes", "--lr", "--batch"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "abc"])
def test_numbers_are_positive(recipe, capsys, option, value):
    with pytest.raises(SystemExit) as failure:
        recipe.main(["out", "--text", "a.txt", option, value])
    assert failure.value.code == 2
    assert f"argument {option}: invalid positive" in capsys.readouterr().err


def test_an_existing_folder_is_safe(recipe, texts, tmp_path, monkeypatch, capsys):
    out, files = tmp_path / "out", ["--text", str(texts / "a.txt"), *TINY, "--steps", "1"]
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"out exists; give another folder, or --force to replace it$"):
        recipe.main([str(out), *files])
    with pytest.raises(SystemExit, match=r"out was not written by this program, so --force leaves it alone$"):
        recipe.main([str(out), *files, "--force"])
    with pytest.raises(SystemExit, match=r"diary.txt exists and is not a folder$"):
        recipe.main([str(out / "diary.txt"), *files, "--force"])

    (out / "training.json").write_text("{}")  # now it looks like an earlier result

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(recipe.MistralForCausalLM, "save_pretrained", full_disk)
        with pytest.raises(SystemExit, match="No space left on device"):
            recipe.main([str(out), *files, "--force"])

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            recipe.main([str(out), *files, "--force"])
    assert (out / "diary.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

    recipe.main([str(out), *files, "--force"])
    assert not (out / "diary.txt").exists()
    assert (out / "model.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    capsys.readouterr()


def test_the_old_folder_comes_back_if_the_new_one_cannot_be_placed(recipe, tmp_path, monkeypatch):
    out, new = tmp_path / "out", tmp_path / "work" / "new"
    for folder in (out, new):
        folder.mkdir(parents=True)
        (folder / "training.json").write_text(folder.name)
    rename = Path.rename

    def fails_once(self, target):
        if self == new:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_once)
    with pytest.raises(OSError, match="Input/output"):
        recipe.replace_folder(new, out, force=True)
    assert (out / "training.json").read_text() == "out"
