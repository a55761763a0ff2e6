"""calibrate and fit take token numbers in the forms that people have them in, and refuse the rest in a sentence."""

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

import cats_llm
import families
from cats_llm.calibration.batches import read_batches
from cats_llm.errors import CatsError

LONG, SHORT = families.ids(1, 9)[0].tolist(), families.ids(1, 5, seed=2)[0].tolist()


def expected(model):
    """Two sequences, each run on its own."""
    return cats_llm.calibrate(model, [torch.tensor([LONG]), torch.tensor([SHORT])])


def same(one, other):
    assert one.record["tokens"] == other.record["tokens"], "other tokens were counted"
    for layer, distribution in one.layers.items():
        torch.testing.assert_close(distribution.sparsity()[-1], other.layers[layer].sparsity()[-1], rtol=0, atol=1e-2)
        assert abs(distribution.threshold(0.5)[0] - other.layers[layer].threshold(0.5)[0]) < 1e-4


def padded(side, fill=0):
    ids, mask = torch.full((2, 9), fill), torch.zeros(2, 9, dtype=torch.long)
    for row, tokens in enumerate((LONG, SHORT)):
        place = slice(0, len(tokens)) if side == "right" else slice(9 - len(tokens), 9)
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
    return {"input_ids": ids, "attention_mask": mask}


RIGHT, LEFT = padded("right"), padded("left")
ROWS = [{"input_ids": LONG, "text": "a", "labels": 3}, {"input_ids": SHORT, "text": "b", "labels": 4}]
FORMS = {
    "lists of numbers": [LONG, SHORT],
    "a tuple of lists": (tuple(LONG), SHORT),
    "one ragged batch": [[LONG, SHORT]],
    "tensors of one sequence": [torch.tensor(LONG), torch.tensor(SHORT)],
    "arrays": [np.array(LONG), np.array(SHORT, dtype=np.int32)],
    "an array of lists": np.array([LONG, SHORT], dtype=object),
    "a batch of tensors in a generator": ([torch.tensor(LONG), torch.tensor(SHORT)] for _ in range(1)),
    "a generator of lists": (row for row in (LONG, SHORT)),
    "numpy numbers": [[np.int64(n) for n in LONG], SHORT],
    "one mapping": RIGHT,
    "one mapping padded on the left": LEFT,
    "one BatchEncoding": BatchEncoding(RIGHT),
    "a list of mappings": [RIGHT],
    "a mapping of arrays": {name: value.numpy() for name, value in RIGHT.items()},
    "a mapping of lists": {name: value.tolist() for name, value in LEFT.items()},
    "a mapping of ragged lists": {"input_ids": [LONG, SHORT], "attention_mask": [[1] * 9, [1] * 5]},
    "a mapping of tensors": {"input_ids": [torch.tensor(LONG), torch.tensor(SHORT)]},
    "rows": ROWS,
    "rows in a batch": [ROWS],
    "a dataset": datasets.Dataset.from_list(ROWS),
    "a dataset of tensors": datasets.Dataset.from_list(ROWS).with_format("torch"),
    "input_ids and mask": (RIGHT["input_ids"], RIGHT["attention_mask"]),
    "a TensorDataset": TensorDataset(RIGHT["input_ids"], RIGHT["attention_mask"]),
    "a DataLoader of a TensorDataset": DataLoader(TensorDataset(RIGHT["input_ids"], RIGHT["attention_mask"]), 2),
    "with labels": DataLoader(TensorDataset(LEFT["input_ids"], LEFT["attention_mask"], torch.tensor([0, 1])), 2),
    "a DataLoader of mappings": DataLoader([{k: v[i] for k, v in RIGHT.items()} for i in range(2)], 2),
    "a DataLoader that collates nothing": DataLoader(ROWS, 2, collate_fn=list),
    "a bool mask": RIGHT | {"attention_mask": RIGHT["attention_mask"].bool()},
    # the pad token was added to the tokenizer and not to the model
    "padding that is no token": padded("right", fill=families.VOCAB),
    "padding of -100": padded("left", fill=-100),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_people_pass_gives_the_same_profile(llama, form):
    same(cats_llm.calibrate(llama.dense, FORMS[form]), expected(llama.dense))


@pytest.mark.parametrize("form", [torch.tensor(LONG), LONG, np.array(LONG), torch.tensor([LONG]), {"input_ids": LONG}])
def test_one_sequence(llama, form):
    same(cats_llm.calibrate(llama.dense, form), cats_llm.calibrate(llama.dense, [torch.tensor([LONG])]))


def test_labels_of_a_tensor_dataset_are_no_text(llama):
    ids = families.ids(2, 8)
    loader = DataLoader(TensorDataset(ids, torch.full_like(ids, -100)), 2)
    same(cats_llm.calibrate(llama.dense, loader), cats_llm.calibrate(llama.dense, [ids]))


def test_texts_need_a_tokenizer(model, tokenizer):
    texts = ["The miller went home in the evening.", "It rained."]
    wanted = cats_llm.calibrate(model, [tokenizer(text).input_ids for text in texts])
    for form in (texts, [texts], tuple(texts), iter(texts)):
        same(cats_llm.calibrate(model, form, tokenizer=tokenizer), wanted)
    same(
        cats_llm.calibrate(model, texts[0], tokenizer=tokenizer),
        cats_llm.calibrate(model, tokenizer(texts[0]).input_ids),
    )
    with pytest.raises(CatsError, match="pass tokenizer="):
        cats_llm.calibrate(model, texts)


def test_fit_takes_the_same(llama):
    criterion = cats_llm.Criterion.parse("moment+compensate")
    wanted = cats_llm.fit(llama.dense, [RIGHT], 0.5, criterion).thresholds
    for form in (RIGHT, FORMS["a DataLoader of a TensorDataset"], ({**RIGHT} for _ in range(1))):
        assert cats_llm.fit(llama.dense, form, 0.5, criterion).thresholds == wanted


def test_batches_are_consumed_one_at_a_time(llama):
    made = []

    def generate():
        for i in range(3):
            made.append(i)
            yield families.ids(1, 4)

    next(read_batches(llama.dense, generate()))
    assert made == [0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "is None"),
        (3, "is 3, a int"),
        (1.5, "a float"),
        (b"abc", "a bytes"),
        (object, "a type"),
        ("a text", "pass tokenizer="),
        (["a", "b"], "pass tokenizer="),
        ([None], "is None"),
        ([[None, 2]], "is None"),
        ([[1, "a"]], "is 1, a int"),
        ([], "no tokens"),
        ([[]], "no tokens"),
        ([1.0, 2.0], "float64 values, which are no token numbers"),
        ([float("nan")], "no token numbers"),
        ([True, False], "bool values"),
        ([1, 2**70], "input_ids of a calibration batch"),
        (torch.rand(2, 8), "float32 values"),
        (np.zeros((2, 8)), "float64 values"),
        (torch.ones(2, 8, dtype=torch.bool), "bool values"),
        (torch.zeros(2, 8, dtype=torch.complex64), "complex64 values"),
        (torch.tensor(3), r"shape \(\)"),
        (torch.zeros(1, 2, 8, dtype=torch.long), r"shape \(1, 2, 8\)"),
        ({"train": [1]}, "no input_ids, only train"),
        ({}, "no input_ids, only nothing"),
        ({"input_ids": "abc"}, "input_ids of a calibration batch is 'abc'"),
        ({"input_ids": ["abc"]}, "holds 'abc'"),
        ({"input_ids": None}, "no input_ids"),
        ({"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1]]}, "2 sequences but an attention_mask of 1"),
        ({"input_ids": [[1, 2]], "attention_mask": "yes"}, "attention_mask of a calibration batch is 'yes'"),
        ({"input_ids": families.ids(2, 8), "attention_mask": torch.ones(1, 1, 8, 8)}, "must be equal"),
        ([LONG, [families.VOCAB]], rf"holds the token {families.VOCAB}, .* has {families.VOCAB} rows"),
        ([-1, 5], "holds the token -1"),
        (torch.nn.Linear(1, 1), "a Linear"),
    ],
)
def test_everything_else_is_one_sentence(llama, data, message):
    with pytest.raises(CatsError, match=message) as error:
        cats_llm.calibrate(llama.dense, data)
    assert "\n" not in str(error.value)
    with pytest.raises(CatsError, match=message):
        cats_llm.fit(llama.dense, data, 0.5, cats_llm.Criterion.parse("moment"))


def test_a_token_beyond_the_embedding_is_named(model, tokenizer):
    import copy

    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(["<|im_start|>"], special_tokens=True)
    with pytest.raises(CatsError, match=r"token 4096 \('<\|im_start\|>'\)"):
        cats_llm.calibrate(model, "<|im_start|>user", tokenizer=grown)


def test_more_tokens_than_learned_positions_are_refused(llama):
    # no family with a gated MLP learns positions today; code of a checkpoint may
    model = llama.dense_copy()
    model.model.embed_positions = torch.nn.Embedding(model.config.max_position_embeddings, 4)
    with pytest.raises(CatsError, match="has 257 tokens, but the model has learned 256 positions"):
        cats_llm.calibrate(model, [families.ids(1, 257)])
    cats_llm.calibrate(llama.dense, [families.ids(1, 257)])  # computed positions have no end
