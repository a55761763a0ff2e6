"""graph_decode gives the tokens that transformers' own loop gives."""

import functools
import logging

import pytest
import torch
from transformers import DynamicCache, StoppingCriteria, set_seed

import cats_llm
from cats_llm import graph_decode


@pytest.fixture(scope="module")
def model(cases):
    return cases("llama").sparse()


def both(model, ids, **arguments):
    """Tokens of transformers' loop and of ours, from the same seed."""
    arguments = {"max_new_tokens": 20, "do_sample": False, "cache_implementation": "static"} | arguments
    results = []
    for more in ({}, {"custom_generate": graph_decode}):
        set_seed(0)
        results.append(model.generate(ids, **arguments, **more))
    return results


def prompts(model, batch, length=6):
    return torch.randint(3, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy(model, batch, caplog):
    expected, found = both(model, prompts(model, batch))
    assert not caplog.text
    assert found.shape == (batch, 26)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "phi3"])
def test_other_families(cases, name, caplog):
    sparse = cases(name).sparse()
    expected, found = both(sparse, prompts(sparse, 2))
    assert not caplog.text
    assert torch.equal(found, expected)


def test_left_padded_prompts(model):
    ids = prompts(model, 3)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, :1] = 0
    expected, found = both(model, ids, attention_mask=mask, pad_token_id=0)
    assert torch.equal(found, expected)
    alone = model.generate(ids[:1, 4:], max_new_tokens=20, do_sample=False)
    assert torch.equal(found[:1, 6:], alone[:, 2:])


def test_sampling_and_processors(model):
    arguments = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3}
    expected, found = both(model, prompts(model, 2), **arguments)
    assert torch.equal(found, expected)
    greedy, _ = both(model, prompts(model, 2))
    assert not torch.equal(found, greedy)


@pytest.mark.parametrize("new", [1, 2, 40])
def test_sequences_that_end(model, new):
    ids = prompts(model, 3)
    free = model.generate(ids, max_new_tokens=40, do_sample=False)
    # tokens that end one sequence early and another late, so that padding and the common end are seen
    ends = [int(free[0, 8]), int(free[1, 20])]
    expected, found = both(model, ids, max_new_tokens=new, eos_token_id=ends, pad_token_id=0)
    assert torch.equal(found, expected)
    expected, found = both(model, ids[:1], max_new_tokens=new, eos_token_id=ends[:1], pad_token_id=ends[0])
    assert torch.equal(found, expected)
    assert found.shape[1] <= 9


class _After(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_other_stopping_criteria(model):
    expected, found = both(model, prompts(model, 2), stopping_criteria=[_After(11)])
    assert found.shape == (2, 11)
    assert torch.equal(found, expected)


def test_streaming(model):
    class Streamer:
        def __init__(self):
            self.tokens, self.ended = [], 0

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended += 1

    ids = prompts(model, 1)
    streamer = Streamer()
    bound = functools.partial(graph_decode, streamer=streamer)
    found = model.generate(ids, max_new_tokens=9, do_sample=False, cache_implementation="static", custom_generate=bound)
    assert streamer.tokens == found[0].tolist()
    assert streamer.ended == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"cache_implementation": None}, "static cache"),
        ({"return_dict_in_generate": True}, "more than tokens"),
    ],
)
def test_where_it_does_not_apply_it_says_so_and_transformers_goes_on(model, arguments, reason, caplog):
    ids = prompts(model, 1)
    with caplog.at_level(logging.WARNING):
        expected, found = both(model, ids, **arguments)
    assert reason in caplog.text
    if "return_dict_in_generate" in arguments:
        expected, found = expected.sequences, found.sequences
    assert torch.equal(found, expected)


def test_sliding_windows_are_left_to_transformers(cases, caplog):
    sparse = cases("mistral").sparse()
    expected, found = both(sparse, prompts(sparse, 1))
    assert "sliding window" in caplog.text
    assert torch.equal(found, expected)


def test_a_cache_of_another_kind_is_left_to_transformers(model, caplog):
    ids = prompts(model, 1)
    found = model.generate(
        ids, max_new_tokens=5, do_sample=False, past_key_values=DynamicCache(), custom_generate=graph_decode
    )
    assert "static cache" in caplog.text
    assert torch.equal(found, model.generate(ids, max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("rule", [{"dense_prefill": True}, {"dense_first_tokens": 9}])
def test_rules_of_which_tokens_are_sparse_hold(cases, rule, caplog):
    case = cases("llama")
    config = case.profile.config(0.9)
    sparse = cats_llm.sparsify(case.sparse(), cats_llm.CatsConfig(**config.to_dict() | rule))
    expected, found = both(sparse, prompts(sparse, 2))
    assert torch.equal(found, expected)
    assert ("position" in caplog.text) == ("dense_first_tokens" in rule)
