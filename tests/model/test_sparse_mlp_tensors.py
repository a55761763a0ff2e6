"""Thresholds a neuron and compensation in the module that computes them, against the formula in float64."""

import copy
import pickle

import pytest
import torch
from torch import nn

import cats_llm
from cats_llm import CatsConfig, CatsError, SparseMLP, TokenPolicy
from cats_llm.checkpoint.layer_tensors import LayerTensors
from cats_llm.kernels import cpu, operators
from cats_llm.kernels.gpu import dispatch
from cats_llm.model import sparse_mlp
from cats_llm.model.sparsify import set_thresholds
from families import HIDDEN, logits
from marks import needs_kernels
from vectors import Reference, gated_mlp, make_vectors, reference_logits, vector_config, vector_model

pytestmark = pytest.mark.usefixtures("one_thread")

D, FFN = 32, 48
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class PlainMLP(nn.Module):
    def __init__(self, fused, bias):
        super().__init__()
        self.fused = fused
        if fused:
            self.gate_up_proj = nn.Linear(D, 2 * FFN, bias=bias)
        else:
            self.gate_proj, self.up_proj = nn.Linear(D, FFN, bias=bias), nn.Linear(D, FFN, bias=bias)
        self.down_proj = nn.Linear(FFN, D, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1) if self.fused else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(self.act_fn(gate) * up)


VECTORS = {
    "thresholds": ("thresholds",),
    "compensation": ("compensation",),
    "both": ("thresholds", "compensation"),
}


def build(fused=False, bias=False, dtype=torch.float32, parts=("thresholds", "compensation")):
    """A model of one sparse MLP, its threshold and its compensation."""
    vectors = {"thresholds": 0.05 + 0.2 * torch.rand(FFN), "compensation": torch.randn(D)}
    vectors = {part: vectors[part] for part in parts}
    model = nn.Sequential(PlainMLP(fused, bias)).to(dtype)
    cats_llm.sparsify(model, CatsConfig({0: 0.1}, vectors={0: LayerTensors(**vectors)}))
    return model, vectors.get("thresholds", torch.tensor(0.1)), vectors.get("compensation")


def clear_of(model, x, threshold):
    """``x`` without the tokens that have an activation so near its threshold that rounding could decide."""
    mlp = model[0]
    gate = (mlp.gate_up_proj if mlp.roles.fused else mlp.gate_proj)(x)
    a = nn.functional.silu((gate.chunk(2, -1)[0] if mlp.roles.fused else gate).double()).abs()
    near = (a - threshold.double()).abs() < {torch.float32: 1e-6}.get(x.dtype, 2e-2) * threshold
    return x[~near.any(-1)]


def check(actual, expected, scale=1.0):
    eps = torch.finfo(actual.dtype).eps
    error = (actual.double() - expected).abs().max()
    # the gate, the product and the output are rounded to the dtype
    assert error <= scale * 4 * eps * expected.abs().max() + 1e-5, float(error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize("parts", VECTORS)
@pytest.mark.parametrize("tokens", [1, 5, 40])
@torch.no_grad()
def test_equals_the_formula(dtype, bias, fused, parts, tokens):
    model, threshold, compensation = build(fused, bias, dtype, VECTORS[parts])
    x = clear_of(model, torch.randn(30 * tokens, D).to(dtype), threshold)[:tokens]
    assert len(x) == tokens
    check(model(x), gated_mlp(model[0], x, threshold, compensation))


@torch.no_grad()
def test_what_is_attached_to_down_proj_is_called(monkeypatch):
    """The compensation is added as its bias only where nothing else happens there."""
    model, threshold, compensation = build(bias=True)
    x = clear_of(model, torch.randn(90, D), threshold)[:40]
    expected = gated_mlp(model[0], x, threshold, compensation)
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(model[0].down_proj, "forward", lambda h: seen.append(h) or nn.functional.linear(h, weight, bias))
        weight, bias = model[0].down_proj.weight, model[0].down_proj.bias
        check(model(x), expected)
    handle = model[0].down_proj.register_forward_hook(lambda module, inputs, y: seen.append(y) or 2 * y)
    check(model(x), 2 * (expected - compensation.double()) + compensation.double())
    assert len(seen) == 2
    handle.remove()
    check(model(x), expected)
    assert len(seen) == 2


KERNELS = {
    "C++": pytest.param(operators.gated_mlp, marks=needs_kernels),
    "Triton": pytest.param(
        dispatch.gated_mlp,
        marks=pytest.mark.skipif(not dispatch.INTERPRETED, reason="CPU tensors need the interpreter"),
    ),
}


# NumPy, under Triton's interpreter, warns of what a GPU computes silently
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
@torch.no_grad()
def test_a_kernel_gets_the_compensation_as_bias_and_agrees_with_the_plain_path(
    tokens, dtype, bias, fused, kernel, monkeypatch
):
    seen = []

    def run(x, *args, sparsity=0.0):
        seen.append(args)
        return kernel(x, *args)

    monkeypatch.setattr(cpu.BACKEND, "supports", lambda request: True)
    monkeypatch.setattr(sparse_mlp, "gated_mlp", run)
    model, threshold, compensation = build(fused, bias, dtype)
    x = clear_of(model, torch.randn(100 * tokens, D).to(dtype), threshold)[:tokens]
    assert len(x) == tokens
    y = model(x)
    assert len(seen) == 1
    assert torch.equal(seen[0][3], threshold)
    if bias:
        assert torch.equal(seen[0][-1], model[0].down_proj.bias + compensation.to(dtype))
    else:
        assert torch.equal(seen[0][-1], compensation.to(dtype))
        model(x)
        assert seen[1][-1] is seen[0][-1], "the step must not make the bias anew"
    check(y, gated_mlp(model[0], x, threshold, compensation), scale=2)
    monkeypatch.setattr(sparse_mlp, "MAX_DECODE_TOKENS", 0)
    check(y, model(x).double(), scale=2)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 40])
def test_the_compensation_follows_every_change(bias, tokens):
    model, threshold, _ = build(bias=bias)
    mlp, x = model[0], torch.randn(10 * tokens, D)

    def agrees(dtype=torch.float32):
        y = clear_of(model, x.to(dtype), threshold)[:tokens]
        assert len(y) == tokens
        check(model(y), gated_mlp(mlp, y, mlp.threshold, mlp.compensation))

    agrees()
    mlp.compensation = torch.randn(D)
    agrees()
    if bias:
        mlp.down_proj.bias.add_(1)
        agrees()
        mlp.down_proj.bias.data.mul_(3)  # not seen by version counters
        agrees()
        mlp.down_proj.bias = nn.Parameter(torch.randn(D))
        agrees()
    exact = mlp.compensation.clone()
    model.to(torch.bfloat16)
    assert mlp.compensation.dtype == torch.float32
    agrees(torch.bfloat16)
    model.to(torch.float32)
    assert torch.equal(mlp.compensation, exact)
    agrees()
    mlp.down_proj.to(torch.bfloat16).to(torch.float32)
    agrees()
    mlp.compensation = None
    agrees()


@torch.no_grad()
def test_as_many_neurons_as_outputs():
    model = nn.Sequential(nn.Module())
    model[0] = mlp = PlainMLP(False, False)
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (nn.Linear(D, D, bias=False) for _ in range(3))
    vectors = {0: LayerTensors(torch.rand(D) / 5, torch.randn(D))}
    cats_llm.sparsify(model, CatsConfig({0: 0.1}, vectors={0: LayerTensors(vectors[0].thresholds)}))
    cats_llm.sparsify(model, CatsConfig({0: 0.1}, vectors=vectors))
    assert torch.equal(model[0].threshold, vectors[0].thresholds)
    assert torch.equal(model[0].compensation, vectors[0].compensation)


@torch.no_grad()
def test_what_a_captured_graph_reads_stays_in_its_place():
    model, threshold, _ = build(dtype=torch.bfloat16)
    mlp = model[0]

    def places():
        return [t.data_ptr() for t in (mlp.threshold, mlp.compensation, mlp._added(torch.zeros(1, D).bfloat16()))]

    before = places()
    model.to("cpu", torch.bfloat16)
    assert places() == before
    cats_llm.sparsify(model, CatsConfig({0: 0.1}, vectors={0: LayerTensors(threshold * 2, torch.randn(D))}))
    assert places() == before
    x = clear_of(model, torch.randn(60, D).bfloat16(), mlp.threshold)[:1]
    check(model(x), gated_mlp(mlp, x, mlp.threshold, mlp.compensation))


def test_a_training_step_changes_the_bias_and_leaves_the_compensation():
    model, _, compensation = build(bias=True)
    x = torch.randn(1, D)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        with torch.no_grad():
            before = model(x)
        model(x).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            after = model(x)
            check(after, gated_mlp(model[0], x, model[0].threshold, compensation))
        assert not torch.equal(before, after)
    assert torch.equal(model[0].compensation, compensation)
    assert not model[0].compensation.requires_grad


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_those_of_the_formula(fused):
    model, threshold, compensation = build(fused, bias=True)
    model.double()
    x = torch.randn(7, D, dtype=torch.float64)
    target = torch.randn(7, D, dtype=torch.float64)
    found = torch.autograd.grad((model(x) - target).square().sum(), list(model.parameters()))
    expected = torch.autograd.grad(
        (gated_mlp(model[0], x, threshold, compensation) - target).square().sum(), list(model.parameters())
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 40])
@torch.no_grad()
def test_hooks_and_adapters_on_the_projections_still_see_their_calls(tokens):
    model, _, compensation = build()
    x = torch.randn(tokens, D)
    expected, calls = model(x), []
    model[0].down_proj.register_forward_hook(lambda module, args, output: calls.append(output))
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(calls[0] + compensation, expected)


@torch.no_grad()
def test_under_autocast():
    model, _, _ = build()
    x = torch.randn(1, D)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(x), rtol=0.05, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_compiled_without_a_break_nor_a_new_graph_for_new_vectors(tokens, backend, dtype):
    torch._dynamo.reset()
    model, threshold, _ = build(bias=True, dtype=dtype)
    x = clear_of(model, torch.randn(100, D).to(dtype), threshold)[:tokens]
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    check(compiled(x), gated_mlp(model[0], x, threshold, model[0].compensation))
    address = model[0].compensation.data_ptr()
    vectors = {0: LayerTensors(threshold.clone(), torch.randn(D))}
    cats_llm.sparsify(model, CatsConfig({0: 0.2}, vectors=vectors))
    assert model[0].compensation.data_ptr() == address, "a captured graph reads the old place"
    with torch.compiler.set_stance("fail_on_recompile"):
        check(compiled(x), gated_mlp(model[0], x, threshold, vectors[0].compensation))


# whole models


@pytest.mark.parametrize("parts", VECTORS)
def test_logits_equal_the_reference(case, parts):
    config = vector_config(case, VECTORS[parts])
    model = cats_llm.sparsify(case.dense_copy(), config)
    expected = reference_logits(case, config)
    torch.testing.assert_close(logits(model, case.ids), expected, rtol=1e-5, atol=1e-5)
    assert (expected - case.reference_logits).abs().max() > 0.05, "the vectors changed nothing"
    token = case.ids[:1, :1]
    with Reference(case.dense_copy(), case.family, config) as dense:
        torch.testing.assert_close(logits(model, token), logits(dense, token), rtol=1e-5, atol=1e-5)


RULES = {
    "dense prefill": TokenPolicy(dense_prefill=True),
    "first 3": TokenPolicy(dense_first_tokens=3),
    "last half": TokenPolicy(last_fraction=0.5),
}


@pytest.mark.parametrize("rule", RULES)
def test_dense_tokens_get_no_compensation(split_or_fused, rule):
    case, coverage = split_or_fused, RULES[rule]
    model = cats_llm.sparsify(case.dense_copy(), vector_config(case).with_coverage(coverage))
    ids = case.ids[:, :10]
    position = torch.arange(10).expand(3, 10)
    sparse = {"dense prefill": position < 0, "first 3": position >= 3, "last half": position >= 5}[rule]
    expected = reference_logits(case, vector_config(case), ids=ids, sparse=sparse)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)


def test_one_token_at_a_time_from_the_beginning(split_or_fused):
    case = split_or_fused
    model = cats_llm.sparsify(case.dense_copy(), vector_config(case).with_coverage(TokenPolicy(dense_first_tokens=3)))
    ids = case.ids[:1, :6]
    expected = reference_logits(case, vector_config(case), ids=ids, sparse=(torch.arange(6) >= 3)[None])
    cache, steps = None, []
    with torch.no_grad():
        for i in range(6):
            output = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-4)


def test_the_dense_function_has_no_compensation(split_or_fused):
    model = vector_model(split_or_fused)
    with cats_llm.as_dense(model):
        assert torch.equal(logits(model, split_or_fused.ids), split_or_fused.dense_logits)


def test_densify_gives_the_dense_model_back(case):
    model = case.dense_copy()
    attributes = set(model.__dict__)
    cats_llm.densify(cats_llm.sparsify(model, vector_config(case)))
    assert set(model.__dict__) == attributes
    assert torch.equal(logits(model, case.ids), case.dense_logits)


def test_a_plain_config_takes_the_vectors_away_and_back(split_or_fused):
    case = split_or_fused
    model = vector_model(case)
    expected = logits(model, case.ids)
    cats_llm.sparsify(model, case.config)
    assert torch.equal(logits(model, case.ids), logits(case.sparse(), case.ids))
    for mlp in cats_llm.sparse_mlps(model).values():
        assert mlp.threshold.shape == ()
        assert mlp.compensation is None
        assert mlp.score is None
    assert "save_pretrained" not in vars(model)
    cats_llm.sparsify(model, vector_config(case))
    assert torch.equal(logits(model, case.ids), expected)


def test_thresholds_are_the_numbers_of_the_config(llama):
    model = vector_model(llama)
    assert cats_llm.thresholds(model) == llama.config.thresholds
    set_thresholds(model, dict.fromkeys(llama.config.thresholds, 0.25), make_vectors(llama, ("compensation",)))
    assert set(cats_llm.thresholds(model).values()) == {0.25}
    assert cats_llm.sparse_mlps(model)[0].threshold.shape == ()
    assert cats_llm.sparse_mlps(model)[0].compensation is not None


def test_only_some_layers_may_have_vectors(llama):
    vectors = {1: make_vectors(llama)[1]}
    config = CatsConfig(**llama.config.to_dict(), vectors=vectors)
    model = cats_llm.sparsify(llama.dense_copy(), config)
    assert cats_llm.sparse_mlps(model)[0].compensation is None
    torch.testing.assert_close(logits(model, llama.ids), reference_logits(llama, config), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", ["thresholds", "compensation"])
def test_vectors_of_another_model_leave_the_model_as_it_was(llama, part):
    size = HIDDEN + 1
    config = CatsConfig(llama.config.thresholds, vectors={1: LayerTensors(**{part: torch.ones(size)})})
    for model in (llama.dense_copy(), llama.sparse()):
        before = logits(model, llama.ids)
        with pytest.raises(CatsError, match=f"{part} of layer 1 are {size} numbers, but the model needs"):
            cats_llm.sparsify(model, config)
        assert torch.equal(logits(model, llama.ids), before)


CASTS = {
    "to(bfloat16)": lambda model: model.to(torch.bfloat16),
    "double": lambda model: model.double(),
    "bfloat16 and back": lambda model: model.to(torch.bfloat16).to(torch.float32),
    "to_empty": lambda model: model.to_empty(device="cpu"),
    "share_memory": lambda model: model.share_memory(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("cast", CASTS)
def test_vectors_are_exact_after(llama, cast):
    model = CASTS[cast](vector_model(llama))
    expected = make_vectors(llama)
    for layer, mlp in cats_llm.sparse_mlps(model).items():
        assert torch.equal(mlp.threshold, expected[layer].thresholds)
        assert torch.equal(mlp.compensation, expected[layer].compensation)
        assert not {"threshold", "compensation"} & set(mlp.state_dict())
    assert model.config.quantization_config == vector_config(llama)


def test_the_meta_device(llama):
    model = vector_model(llama).to("meta")
    mlp = cats_llm.sparse_mlps(model)[0]
    assert mlp.compensation.is_meta
    assert mlp.compensation.dtype == torch.float32
    assert "compensation" in repr(mlp)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_vectors_of_its_own(llama, copier):
    model = vector_model(llama)
    expected = logits(model, llama.ids)
    twin = copier(model)
    cats_llm.sparsify(twin, vector_config(llama, seed=1))
    assert torch.equal(logits(model, llama.ids), expected)
    assert not torch.equal(logits(twin, llama.ids), expected)
    assert vars(twin)["save_pretrained"].model is twin


def test_a_config_does_not_follow_the_model(llama):
    config = vector_config(llama)
    model = cats_llm.sparsify(llama.dense_copy(), config)
    before = copy.deepcopy(config)
    cats_llm.sparsify(model, vector_config(llama, seed=1))
    assert config == before


def test_the_module_is_a_sparse_mlp(llama):
    assert all(isinstance(mlp, SparseMLP) for mlp in cats_llm.sparse_mlps(vector_model(llama)).values())
