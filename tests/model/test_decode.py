"""Decoding on the CPU kernels: which path runs, that it is the same function, and that nothing else changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cats_llm
from cats_llm.kernels import cpu
from cats_llm.kernels.backend import MAX_DECODE_TOKENS
from cats_llm.model.decode_linear import decode_linear, decodes_on_our_kernels, use_decode_linears
from cats_llm.model.structure import find_gated_mlps
from families import logits
from marks import needs_kernels

pytestmark = needs_kernels


@pytest.fixture
def used(monkeypatch):
    """Names of the kernels that ran, in order."""
    names = []
    supports = cpu.BACKEND.supports

    def spy(request):
        served = supports(request)
        names.append("cpu" if served else "plain")
        return served

    monkeypatch.setattr(cpu.BACKEND, "supports", spy)
    return names


@torch.no_grad()
def test_a_decode_step_runs_the_cpu_kernel_in_every_layer_of_every_family(case, used):
    model = case.sparse()
    layers = len(cats_llm.sparse_mlps(model))
    out = model(case.ids[:1, :20], use_cache=True)
    assert used == [], "a prefill of 20 tokens is no decode step"
    step = model(case.ids[:1, 20:21], past_key_values=out.past_key_values, use_cache=True)
    assert used == ["cpu"] * layers
    whole = logits(model, case.ids[:1, :21])[:, -1:]
    torch.testing.assert_close(step.logits.float(), whole.float(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2, MAX_DECODE_TOKENS, MAX_DECODE_TOKENS + 1])
def test_the_number_of_tokens_decides_not_the_batch(llama, used, tokens):
    model = llama.sparse()
    expected = ["cpu"] * 2 if tokens <= MAX_DECODE_TOKENS else []
    for shape in ((1, tokens), (tokens, 1)):
        used.clear()
        model(llama.ids.flatten()[:tokens].view(shape))
        assert set(used) == set(expected), shape


def test_training_runs_the_plain_path(llama, used):
    llama.sparse()(llama.ids[:1, :4]).logits.sum().backward()
    assert used == []


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize("bias", [False, True])
def test_decode_linear_equals_float64(dtype, tokens, bias):
    linear = nn.Linear(77, 45, bias=bias).to(dtype)
    x = torch.randn(tokens, 77).to(dtype)
    truth = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    plain = (F.linear(x, linear.weight, linear.bias).double() - truth).norm()
    ours = (decode_linear(linear, x).double() - truth).norm()
    assert ours <= 2 * plain + 1e-6 * truth.norm()


def test_decode_linears_come_and_go(llama):
    model = llama.dense_copy()
    linears = [m for m in model.modules() if type(m) is nn.Linear]
    cats_llm.sparsify(model, llama.config)
    inside = {id(m) for mlp in cats_llm.sparse_mlps(model).values() for m in mlp.modules()}
    for linear in linears:
        assert decodes_on_our_kernels(linear) == (id(linear) not in inside)
        assert type(linear) is nn.Linear, "a class of ours hides the layer from what looks for nn.Linear"
    twin = copy.deepcopy(model)
    use_decode_linears(model, False)
    assert not any(map(decodes_on_our_kernels, linears))
    use_decode_linears(model)
    cats_llm.densify(model)
    assert not any("forward" in vars(linear) for linear in linears)
    theirs = [m for m in twin.modules() if decodes_on_our_kernels(m)]
    assert len(theirs) == len(linears) - len(inside & {id(m) for m in linears})
    assert all(m.forward.args == (m,) for m in theirs), "a copy's layers compute with the weights of the copy"


def test_vision_towers_keep_their_linears(cases):
    model = cases("gemma3").sparse()
    assert any(map(decodes_on_our_kernels, model.modules()))
    tower = model.model.vision_tower
    assert not any(map(decodes_on_our_kernels, tower.modules()))


def test_neuron_major_and_back(split_or_fused):
    model = split_or_fused.dense_copy()
    before = {mlp.name: mlp.down_linear.weight.detach().clone() for mlp in find_gated_mlps(model)}
    cats_llm.sparsify(model, split_or_fused.config)
    for mlp in find_gated_mlps(model):
        weight = mlp.down_linear.weight
        assert weight.t().is_contiguous()
        assert torch.equal(weight, before[mlp.name])
    for changed in (model.to(torch.bfloat16), copy.deepcopy(model)):
        assert all(mlp.down_linear.weight.t().is_contiguous() for mlp in find_gated_mlps(changed))
    cats_llm.densify(model)
    assert all(mlp.down_linear.weight.is_contiguous() for mlp in find_gated_mlps(model))


@torch.no_grad()
def test_without_the_library_everything_runs_plain(llama, monkeypatch, used):
    monkeypatch.setattr(cpu.BACKEND, "built", False)
    model = llama.sparse()
    assert all(mlp.down_linear.weight.is_contiguous() for mlp in find_gated_mlps(model))
    torch.testing.assert_close(logits(model, llama.ids), llama.reference_logits, rtol=1e-5, atol=1e-5)
    model(llama.ids[:1, :1])
    assert set(used) == {"plain"}
