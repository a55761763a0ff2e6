"""What tokenizers put before and after a text: found from the tokenizer, and followed by all that cuts texts."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import Sequence, TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from cats_llm import bundled
from cats_llm.errors import CatsError
from cats_llm.loading import load_tokenizer
from cats_llm.text import encode, load_sequences, text_ends, token_sequences
from cats_llm.training.data import IGNORED, read_instructions

TEXT = "The miller of the village went home in the evening and sat by the fire. " * 20


def fast(template, **special):
    """The bundled tokenizer with another template for texts, as ``<s> $A``."""
    tokenizer = load_tokenizer(str(bundled.model_path()))
    names = [name for name in template.split() if name != "$A"]
    tokenizer.add_special_tokens({"extra_special_tokens": [n for n in names if n not in ("<s>", "</s>")]})
    tokens = [(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    parts = [tokenizer._tokenizer.post_processor] if tokenizer._tokenizer.post_processor else []
    processor = TemplateProcessing(single=template, special_tokens=tokens)
    tokenizer._tokenizer.post_processor = Sequence([*parts, processor])
    for name, value in special.items():
        setattr(tokenizer, name, value)
    return tokenizer


TOKENIZERS = {
    "one at the beginning": (lambda: fast("<s> $A"), ["<s>"], []),
    "two at the beginning, none named": (lambda: fast("[gMASK] <sop> $A", bos_token=None), ["[gMASK]", "<sop>"], []),
    "three at the beginning": (lambda: fast("<a> <s> <b> $A"), ["<a>", "<s>", "<b>"], []),
    "none": (lambda: load_tokenizer(str(bundled.model_path())), [], []),
    "one at the end": (lambda: fast("$A </s>"), [], ["</s>"]),
    "both, no name for the end": (lambda: fast("[CLS] $A [SEP]", eos_token=None), ["[CLS]"], ["[SEP]"]),
    "slow, one at the end": (ByT5Tokenizer, [], ["</s>"]),
}


@pytest.fixture(params=TOKENIZERS)
def ended(request):
    """A tokenizer, and the ids of what it puts before and after a text."""
    make, begin, end = TOKENIZERS[request.param]
    tokenizer = make()
    return tokenizer, *(tokenizer.convert_tokens_to_ids(list(names)) for names in (begin, end))


def test_ends_are_found(ended):
    tokenizer, begin, end = ended
    assert text_ends(tokenizer) == (begin, end)


def test_every_sequence_begins_as_the_tokenizers_texts_do(ended):
    tokenizer, begin, end = ended
    body = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert tokenizer(TEXT).input_ids == [*begin, *body, *end]
    close = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else end
    stream = [*body, *close] * 2
    rows = [ids.tolist() for ids in token_sequences([TEXT, TEXT], tokenizer, 32)]
    assert all(row[: len(begin)] == begin for row in rows)
    new = [token for row in rows for token in row[len(begin) :]]
    assert new == stream[: len(new)]
    assert len(stream) - len(new) < 32
    with pytest.raises(CatsError, match="no room"):
        next(token_sequences([TEXT], tokenizer, len(begin)))


def test_instructions_begin_and_end_as_the_tokenizers_texts_do(ended, tmp_path):
    tokenizer, begin, end = ended
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps({"prompt": "Who is there?", "completion": " The miller."}))
    (example,) = read_instructions(str(source), tokenizer, 64).examples
    close = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else end
    body = tokenizer("Who is there? The miller.", add_special_tokens=False).input_ids
    assert example["input_ids"].tolist() == [*begin, *body, *close]
    answer = example["labels"][example["labels"] != IGNORED].tolist()
    assert answer == tokenizer(" The miller.", add_special_tokens=False).input_ids[-len(answer) + len(close) :] + close


def test_what_the_tokenizer_cannot_read_is_named_with_its_row(tmp_path):
    core = Tokenizer(models.WordLevel({"a": 0, "b": 1}))  # without a token for what it does not know
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    source = tmp_path / "rows.jsonl"
    source.write_text('{"text": "a b a b"}\n{"text": "a c"}')
    with pytest.raises(CatsError, match=r"the tokenizer cannot read line 2 of .*UNK.*; mend it or leave it out"):
        list(load_sequences(str(source), tokenizer, 2))
    with pytest.raises(CatsError, match="cannot read the text"):
        encode(tokenizer, "half \ud83d")
