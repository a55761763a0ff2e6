"""Which tokens are sparse: prompts, first tokens, last tokens, in every path a model is run on."""

import copy
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import cats_llm
import families
from cats_llm.checkpoint.token_policy import TokenPolicy
from cats_llm.evaluation.sparsity import SparsityCounter

RULES = {
    "dense prefill": TokenPolicy(dense_prefill=True),
    "first 3": TokenPolicy(dense_first_tokens=3),
    "last half": TokenPolicy(last_fraction=0.5),
    "first 3, last 0.7": TokenPolicy(dense_first_tokens=3, last_fraction=0.7),
}


def expected_sparse(coverage, lengths, width):
    """By hand, for a prompt of sequences of these lengths, padded on the left: (B, width)."""
    rows = []
    for length in lengths:
        row = [False] * (width - length)  # what happens to padding does not matter
        for i in range(length):
            last = coverage.last_fraction is None or i >= length - int(coverage.last_fraction * length)
            row.append(not coverage.dense_prefill and i >= coverage.dense_first_tokens and last)
        rows.append(row)
    return torch.tensor(rows)


class Reference:
    """A dense model whose MLPs are replaced, token by token, without the package's code. ``sparse`` is (B, T)."""

    def __init__(self, case, thresholds):
        self.model, self.family, self.thresholds = case.dense_copy(), case.family, thresholds
        self.sparse = None

    def __enter__(self):
        self.stack = ExitStack()
        for layer, t in self.thresholds.items():

            def hook(module, args, output, t=t):
                x = args[0]
                cats, dense = (
                    families.reference_mlp(module, x, value, self.family.act, self.family.fused) for value in (t, 0.0)
                )
                return torch.where(self.sparse[..., None], cats, dense)

            mlp = self.model.get_submodule(self.family.mlp.format(layer))
            self.stack.callback(mlp.register_forward_hook(hook).remove)
        return self

    def __exit__(self, *args):
        self.stack.close()

    @torch.no_grad()
    def logits(self, sparse, ids, **inputs):
        self.sparse = sparse
        return self.model(input_ids=ids, **inputs)


@pytest.fixture(params=RULES)
def rule(request):
    return RULES[request.param]


def sparse_model(case, coverage):
    return cats_llm.sparsify(case.dense_copy(), copy.deepcopy(case.config).with_coverage(coverage))


def close(actual, expected):
    return F.mse_loss(actual.double(), expected.double()).sqrt() <= 1e-5 * expected.double().std()


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma3", "mistral", "qwen2.5-vl"])
def test_a_prompt_and_its_continuation(cases, name, rule):
    case = cases(name)
    model = sparse_model(case, rule)
    ids = case.ids[:, :12]
    with Reference(case, case.config.thresholds) as reference, torch.no_grad():
        expected = reference.logits(expected_sparse(rule, [10] * 3, 10), ids[:, :10], use_cache=True)
        actual = model(input_ids=ids[:, :10], use_cache=True)
        assert close(actual.logits, expected.logits), "prefill"
        for i in (10, 11):
            every = torch.ones(3, 1, dtype=torch.bool)
            expected = reference.logits(every, ids[:, i : i + 1], past_key_values=expected.past_key_values)
            actual = model(input_ids=ids[:, i : i + 1], past_key_values=actual.past_key_values)
            assert close(actual.logits, expected.logits), "decode"


def test_one_token_at_a_time_from_the_beginning(split_or_fused):
    case = split_or_fused
    model = sparse_model(case, TokenPolicy(dense_first_tokens=3))
    ids = case.ids[:1, :6]
    with Reference(case, case.config.thresholds) as reference, torch.no_grad():
        cache = expected_cache = None
        for i in range(6):
            sparse = torch.full((1, 1), i >= 3)
            expected = reference.logits(sparse, ids[:, i : i + 1], past_key_values=expected_cache, use_cache=True)
            actual = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache, expected_cache = actual.past_key_values, expected.past_key_values
            assert close(actual.logits, expected.logits), f"token {i}"


def test_padding_on_the_left_is_no_first_token(llama, rule):
    model = sparse_model(llama, rule)
    lengths, width = [10, 6, 9], 10
    ids = llama.ids[:, :width]
    mask = torch.stack([F.pad(torch.ones(n, dtype=torch.long), (width - n, 0)) for n in lengths])
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with Reference(llama, llama.config.thresholds) as reference, torch.no_grad():
        expected = reference.logits(expected_sparse(rule, lengths, width), ids, **inputs).logits
        actual = model(input_ids=ids, **inputs).logits
    for row, n in enumerate(lengths):
        assert close(actual[row, -n:], expected[row, -n:]), row


def test_generate_in_a_padded_batch_equals_one_by_one(llama):
    model = sparse_model(llama, TokenPolicy(dense_first_tokens=4))
    lengths, width = [9, 3], 9
    ids = llama.ids[:2, :width]
    mask = torch.stack([F.pad(torch.ones(n, dtype=torch.long), (width - n, 0)) for n in lengths])
    together = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row, n in enumerate(lengths):
        alone = model.generate(ids[row : row + 1, -n:], max_new_tokens=6, do_sample=False)
        assert together[row, width:].tolist() == alone[0, n:].tolist()


def test_packed_sequences_count_from_their_own_beginning(llama):
    model = sparse_model(llama, TokenPolicy(dense_first_tokens=2))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    with torch.no_grad():
        model(input_ids=llama.ids[:1, :9], position_ids=positions)
    mlp = cats_llm.sparse_mlps(model)[0]
    assert mlp.token_mask.sparse.tolist() == (positions >= 2).tolist()


def test_achieved_sparsity_counts_dense_tokens(llama):
    ids = llama.ids
    found = {}
    for name, coverage in {"all": TokenPolicy(), **RULES}.items():
        model = sparse_model(llama, coverage)
        counter = SparsityCounter(model)
        with counter, torch.no_grad():
            model(input_ids=ids)
        assert counter.tokens() == ids.numel()
        found[name] = counter.result()[0]
    assert found["dense prefill"] == 0.0
    shares = {name: expected_sparse(rule, [40] * 3, 40).double().mean().item() for name, rule in RULES.items()}
    for name, share in shares.items():
        assert found[name] == pytest.approx(found["all"] * share, abs=0.05), name


def test_a_checkpoint_keeps_the_rule(llama, rule, tmp_path):
    model = sparse_model(llama, rule)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.quantization_config.coverage == rule
    assert torch.equal(families.logits(loaded, llama.ids), families.logits(model, llama.ids))
    assert loaded.config.quantization_config.to_dict()["version"] == 2, "older versions would ignore the rule"


def test_all_tokens_leave_the_file_as_it_was(llama):
    values = llama.config.to_dict()
    assert values["version"] == 1
    assert not values.keys() & TokenPolicy().to_dict().keys()


def test_the_rule_changes_and_goes(llama):
    model = sparse_model(llama, TokenPolicy(dense_first_tokens=3))
    cats_llm.sparsify(model, copy.deepcopy(llama.config))
    assert torch.equal(families.logits(model, llama.ids), families.logits(llama.sparse(), llama.ids))
    cats_llm.sparsify(model, llama.config.with_coverage(TokenPolicy(dense_prefill=True)))
    cats_llm.densify(model)
    assert torch.equal(families.logits(model, llama.ids), llama.dense_logits)
    assert not model.get_decoder()._forward_pre_hooks


def test_a_copied_model_has_its_own_rule(llama):
    model = sparse_model(llama, TokenPolicy(dense_first_tokens=3))
    other = copy.deepcopy(model)
    cats_llm.sparsify(model, copy.deepcopy(llama.config))
    assert torch.equal(
        families.logits(other, llama.ids), families.logits(sparse_model(llama, RULES["first 3"]), llama.ids)
    )


@pytest.mark.slow
def test_compiled_decoding_with_a_static_cache(llama):
    from transformers.generation import CompileConfig

    model = sparse_model(llama, TokenPolicy(dense_first_tokens=12))
    eager = model.generate(llama.ids[:2, :10], max_new_tokens=6, do_sample=False)
    torch.manual_seed(0)
    config = CompileConfig(mode="default", dynamic=False, fullgraph=True)
    config._compile_all_devices = True
    compiled = model.generate(
        llama.ids[:2, :10], max_new_tokens=6, do_sample=False, cache_implementation="static", compile_config=config
    )
    assert compiled.tolist() == eager.tolist()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dense_prefill": 1}, "true or false"),
        ({"dense_first_tokens": -1}, "whole number"),
        ({"dense_first_tokens": True}, "whole number"),
        ({"last_fraction": 0.0}, "share above 0"),
        ({"last_fraction": 1.5}, "share above 0"),
        ({"last_fraction": float("nan")}, "share above 0"),
        ({"dense_prefill": True, "last_fraction": 0.5}, "no meaning"),
    ],
)
def test_rules_without_meaning(llama, values, message):
    with pytest.raises(cats_llm.CatsError, match=message):
        cats_llm.CatsConfig(llama.config.thresholds, **values)
