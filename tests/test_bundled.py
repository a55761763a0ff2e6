"""The bundled model and texts are the ones that were published, apart from each other, and good for something."""

import hashlib
import json
import math
import re

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from cats_llm import bundled

DIGESTS = {
    "model/config.json": "8c1976926ba203fc33fcd988874496c3fb7dcda678507c25fd50e947e12a98e0",
    "model/generation_config.json": "11e18a1c547b9cc2c37bc1311915af128e7e0ee0ea3f48d1664274a5bf154c62",
    "model/model.safetensors": "ba63e2ef6ac7e42400a9ca3f04bdcc3def007c39585a3133c03447c584425cf4",
    "model/tokenizer.json": "cb2477fc8d51deff5c193afbb7b0f8f99e2c5cf20ef37a8bff22d5813ab5d8b3",
    "model/tokenizer_config.json": "afd7aad98e3b4b38cbbadb85eb9973591f6c8a83af1718b2902914c23a286c73",
    "model/training.json": "f4d253988564dc77eabe983dfbb4be0f91edba58f54758a779e52645b0e1d4f5",
    "text/calibration.txt": "b3ef3448db6e1c5e7a7cf5095012ac1916479e7edb113dca1e5d5ef0dda90ed0",
    "text/heldout.txt": "90e0f74eb4d54b642110cbb02f1cf88bf64b74b1ceb7bdac6199f1758263ad52",
}
ROOT = bundled.model_path().parent


def read(path):
    return path.read_bytes().decode()  # no translation of line ends


def documents(path):
    *documents, rest = read(path).split("<|endoftext|>\n")
    assert rest == ""  # the last document is closed too
    return documents


def word_runs(text, length):
    words = re.findall(r"\w+", text.lower())
    return set(zip(*(words[i:] for i in range(length)), strict=False))


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(bundled.model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def encoder():
    return Tokenizer.from_file(str(bundled.model_path() / "tokenizer.json"))


def test_paths_point_into_the_package():
    assert bundled.model_path() == ROOT / "model"
    assert bundled.calibration_text() == ROOT / "text" / "calibration.txt"
    assert bundled.heldout_text() == ROOT / "text" / "heldout.txt"


@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_files_are_the_published_ones(name):
    assert hashlib.sha256((ROOT / name).read_bytes()).hexdigest() == DIGESTS[name]
    readme = ROOT / name.split("/")[0] / "README.md"
    assert DIGESTS[name] in readme.read_text(encoding="utf-8")


def test_nothing_else_is_shipped():
    files = {str(p.relative_to(ROOT).as_posix()) for p in ROOT.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert files == {*DIGESTS, "__init__.py", "model/README.md", "text/README.md"}


@pytest.mark.parametrize(
    ("path", "count", "tokens"),
    [(bundled.calibration_text(), 9, 210_467), (bundled.heldout_text(), 3, 175_494)],
    ids=["calibration", "heldout"],
)
def test_texts_are_whole_documents(path, count, tokens, encoder):
    texts = documents(path)
    assert len(texts) == count
    assert all(text == text.strip() + "\n" and len(text) > 50_000 for text in texts)
    assert sum(len(encoder.encode(text.strip()).ids) for text in texts) == tokens
    assert not re.search("gutenberg|transcriber", read(path), re.IGNORECASE)  # no trademark, no licence header


def test_calibration_and_heldout_text_share_no_run_of_words():
    calibration, heldout = read(bundled.calibration_text()), read(bundled.heldout_text())
    assert len(word_runs(heldout, 13)) > 100_000
    assert len(word_runs(heldout, 2) & word_runs(calibration, 2)) > 1000  # the check can see what is shared
    assert not word_runs(heldout, 13) & word_runs(calibration, 13)
    assert not word_runs(heldout, 10) & word_runs(calibration, 10)


def test_the_model_loads_as_published(model):
    assert sum(p.numel() for p in model.parameters()) == 8_130_816
    assert model.config.model_type == "mistral"
    assert AutoModelForCausalLM.from_pretrained(bundled.model_path(), dtype="auto").dtype == torch.bfloat16
    with torch.no_grad():
        logits = model(torch.arange(0, 4096, 61)[None]).logits
    assert logits.shape == (1, 68, 4096)
    assert logits.isfinite().all()


def test_the_tokenizer_gives_text_back():
    tokenizer = AutoTokenizer.from_pretrained(bundled.model_path())
    text = 'Once upon a time, "Æsop" said — naïvely: 42 €.\n  Two  blanks.'
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_perplexity_on_heldout_text(model, encoder):
    """The mean over the 16 first sequences of 512 tokens; 18.44 when measured, 17.53 over the whole file."""
    text = documents(bundled.heldout_text())[0].strip()[:100_000]
    ids = torch.tensor([0, *encoder.encode(text).ids][: 16 * 512]).view(16, 512)
    with torch.no_grad():
        probabilities = model(ids).logits[:, :-1].double().softmax(-1)  # [16, 511, 4096]
    chosen = probabilities.gather(-1, ids[:, 1:, None])
    assert chosen.numel() == 16 * 511
    assert math.exp(-chosen.log().mean().item()) == pytest.approx(18.440, abs=0.01)


def test_the_model_card_repeats_the_record():
    record = json.loads(read(ROOT / "model" / "training.json"))
    card = read(ROOT / "model" / "README.md")
    for name, value in record["heldout_perplexity"].items():
        assert f"{value:.2f}" in card, name
    assert f"{record['steps']:,}".replace(",", " ") in card


def test_the_model_continues_a_story(model):
    tokenizer = AutoTokenizer.from_pretrained(bundled.model_path())
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=24, do_sample=False)[0])
    words = re.findall(r"[a-z]+", text.lower())
    assert len(words) > 15
    assert len(set(words)) > len(words) / 2  # no stutter
