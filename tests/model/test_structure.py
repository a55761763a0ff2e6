"""Gated MLPs are found by what they compute: whatever the names, and nothing that computes more."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import cats_llm
import families
import tiny
from cats_llm import CatsConfig, CatsError
from families import logits

pytestmark = pytest.mark.usefixtures("one_thread")
D, FFN = 8, 12


class MLP(nn.Module):
    """Projections by any name: {"gate": name, "up": name, "down": name}, or "both" in place of gate and up."""

    def __init__(self, names, forward, d=D, f=FFN, act=None, bias=True):
        super().__init__()
        self.names, self.compute = names, forward
        sizes = {"gate": (d, f), "up": (d, f), "both": (d, 2 * f), "down": (f, d)}
        for role, name in names.items():
            self.add_module(name, nn.Linear(*sizes[role], bias=bias))
        if act is not None:
            self.activation_function = act

    def __getitem__(self, role):
        return getattr(self, self.names[role])

    def forward(self, x):
        return self.compute(self, x)


def split(m, x):
    return m["down"](F.silu(m["gate"](x)) * m["up"](x))


def fused(m, x):
    gate, up = m["both"](x).chunk(2, -1)
    return m["down"](up * m.activation_function(gate))


def fused_up_first(m, x):
    up, gate = m["both"](x).split(m["down"].weight.shape[1], -1)
    return m["down"](F.gelu(gate) * up)


def fused_by_view(m, x):
    both = m["both"](x).view(*x.shape[:-1], 2, -1)
    return m["down"](m.activation_function(both[..., 0, :]) * both[..., 1, :])


def upcast(m, x):
    return m["down"]((F.silu(m["gate"](x).double()) * m["up"](x).double()).to(x.dtype))


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


FOUND = {
    "w1 w3 w2": (lambda: MLP({"gate": "w1", "up": "w3", "down": "w2"}, split), F.silu),
    "names that say the opposite": (lambda: MLP({"gate": "down", "up": "gate", "down": "up"}, split), F.silu),
    "square": (lambda: MLP({"gate": "a", "up": "b", "down": "c"}, split, f=D), F.silu),
    "wider than long": (lambda: MLP({"gate": "a", "up": "b", "down": "c"}, split, f=5), F.silu),
    "half as long, square fused": (lambda: MLP({"both": "a", "down": "b"}, fused, f=D // 2, act=nn.SiLU()), F.silu),
    "input_linear output_linear": (
        lambda: MLP({"both": "input_linear", "down": "output_linear"}, fused, act=nn.GELU()),
        F.gelu,
    ),
    "fused, up first": (lambda: MLP({"both": "fc1", "down": "fc2"}, fused_up_first), F.gelu),
    "fused, by view": (lambda: MLP({"both": "fc1", "down": "fc2"}, fused_by_view, act=nn.GELU("tanh")), gelu_tanh),
    "upcast": (lambda: MLP({"gate": "wi_0", "up": "wi_1", "down": "wo"}, upcast), F.silu),
    "an activation that no kernel knows": (lambda: MLP({"both": "a", "down": "b"}, fused, act=nn.Mish()), F.mish),
    "a name that a sparse MLP has too": (
        lambda: MLP({"both": "activation", "down": "down_linear"}, fused_up_first),
        F.gelu,
    ),
    "without biases": (lambda: MLP({"gate": "w1", "up": "w3", "down": "w2"}, split, bias=False), F.silu),
}


def written_out(mlp, x, t, act):
    """CATS from the formula, with the roles that the test gave the projections."""

    def linear(x, module):
        return F.linear(x, module.weight, module.bias)

    if "both" in mlp.names:
        one, other = linear(x, mlp["both"]).chunk(2, -1)
        gate, up = (other, one) if mlp.compute is fused_up_first else (one, other)
    else:
        gate, up = linear(x, mlp["gate"]), linear(x, mlp["up"])
    a = act(gate)
    return linear(torch.where(a.abs().float() < t, torch.zeros_like(a), a) * up, mlp["down"])


def stack(build, layers=2):
    """A model of MLPs, whose outputs become the next ones' inputs."""
    return nn.Sequential(*(build() for _ in range(layers)))


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 5, 50])
@pytest.mark.parametrize("name", FOUND)
def test_mlps_of_any_names_become_sparse(name, tokens):
    build, act = FOUND[name]
    model, x = stack(build).double(), torch.randn(1, tokens, D, dtype=torch.float64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    dense, modules = model(x), list(model.modules())
    expected = x
    for mlp in model:
        expected = written_out(mlp, expected, 0.1, act)
    cats_llm.sparsify(model, CatsConfig({0: 0.1, 1: 0.1}))
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(expected, dense), "the threshold drops nothing: the test proves nothing"
    assert [*model.state_dict()] == [*before]
    cats_llm.densify(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert torch.equal(model(x), dense)


def test_a_name_that_a_sparse_mlp_needs_is_refused():
    model = nn.Sequential(MLP({"both": "compensation", "down": "threshold"}, fused_up_first))
    with pytest.raises(CatsError, match=r"0 \(MLP\) has a part called (compensation|threshold)"):
        cats_llm.sparsify(model, CatsConfig({0: 0.1}))
    assert type(model[0]) is MLP


@pytest.mark.parametrize("name", FOUND)
def test_weights_are_not_needed_to_find_them(name):
    build, _ = FOUND[name]
    model = stack(build)
    roles = [mlp.roles for mlp in cats_llm.find_gated_mlps(model)]
    with torch.device("meta"):
        assert [mlp.roles for mlp in cats_llm.find_gated_mlps(stack(build))] == roles
    assert [mlp.roles for mlp in cats_llm.find_gated_mlps(model.to("meta"))] == roles
    # 16-bit, as most are loaded
    assert [mlp.roles for mlp in cats_llm.find_gated_mlps(stack(build).bfloat16())] == roles


def with_steps(gate=None, up=None, h=None, y=None):
    """A gated MLP with a step more."""

    def same(value):
        return value

    gate, up, h, y = (step or same for step in (gate, up, h, y))

    def forward(m, x):
        return y(m["down"](h(F.silu(gate(m["gate"](x))) * up(m["up"](x)))))

    return lambda: MLP({"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}, forward)


def top_k(h):
    return torch.where(h.abs() >= h.abs().kthvalue(h.shape[-1] // 2, -1, keepdim=True).values, h, 0)


MORE = {
    "gate clamped": (with_steps(gate=lambda g: g.clamp(max=16)), "limits large values"),
    "up clamped": (with_steps(up=lambda u: u.clamp(-100, 100)), "limits large values"),
    "hidden clamped": (with_steps(h=lambda h: h.clamp(-1e4, 1e4)), "limits large values"),
    "output clamped": (with_steps(y=lambda y: y.clamp(-7, 7)), "has one step more|limits large values"),
    "gate scaled": (with_steps(gate=lambda g: 0.5 * g), "one step more"),
    "up shifted": (with_steps(up=lambda u: u + 1), "one step more"),
    "output scaled": (with_steps(y=lambda y: 1.05 * y), "one step more"),
    "hidden normed": (with_steps(h=lambda h: F.normalize(h, dim=-1)), "one step more"),
    "top k": (with_steps(h=top_k), "one step more"),
    "tokens mixed": (with_steps(h=lambda h: h + h.roll(1, dims=-2)), "one step more"),
}


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("which", ["all layers", "one layer"])
def test_what_computes_more_is_refused_and_says_what(name, which):
    build, reason = MORE[name]
    plain = FOUND["w1 w3 w2"][0]
    # in one layer only, the model would become sparse in the others without a word
    model = nn.Sequential(plain() if which == "one layer" else build(), build())
    modules = list(model.modules())
    for attempt in (
        lambda: cats_llm.find_gated_mlps(model),
        lambda: cats_llm.sparsify(model, CatsConfig({0: 0.1, 1: 0.1})),
    ):
        with pytest.raises(CatsError, match=rf"\(MLP\) has the parts of a gated MLP but computes more .*{reason}"):
            attempt()
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


class WithNorm(MLP):
    def __init__(self):
        super().__init__({"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}, split)
        self.norm = nn.LayerNorm(FFN)

    def forward(self, x):
        return self["down"](self.norm(F.silu(self["gate"](x)) * self["up"](x)))


class Attention(nn.Module):
    """Three projections of the shapes of a gated MLP, as the attention of some encoders has."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x, mask=None):
        return (F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x)),)


def test_other_weights_are_named():
    with pytest.raises(CatsError, match=r"it has other weights too \(norm\)"):
        cats_llm.find_gated_mlps(nn.Sequential(WithNorm()))


def test_an_attention_is_no_mlp():
    layer = nn.ModuleDict({"attention": Attention(), "mlp": FOUND["w1 w3 w2"][0]()})
    found = cats_llm.find_gated_mlps(nn.ModuleList([layer]))
    assert [mlp.name for mlp in found] == ["0.mlp"]
    with pytest.raises(CatsError, match="has no gated MLP"):
        cats_llm.find_gated_mlps(nn.ModuleList([Attention()]))


@pytest.mark.parametrize("stacked", ["parameters", "children"])
def test_stacked_experts_are_named(stacked):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            if stacked == "parameters":
                self.up_and_gate, self.down = (nn.Parameter(torch.randn(4, *s)) for s in ((2 * FFN, D), (D, FFN)))
            else:
                self.first, self.second = nn.Module(), nn.Module()
                self.first.weight = nn.Parameter(torch.randn(4, D, 2 * FFN))
                self.second.weight = nn.Parameter(torch.randn(4, FFN, D))

    layer = nn.ModuleDict({"router": nn.Linear(D, 4), "block": Experts()})
    with pytest.raises(CatsError, match=r"routes tokens through experts \(0\.block\)"):
        cats_llm.find_gated_mlps(nn.ModuleList([layer]))


def test_layers_inside_a_wrapper_are_counted_by_the_number_that_tells_them_apart():
    inner = nn.ModuleList(nn.ModuleDict({"mlp": FOUND["w1 w3 w2"][0]()}) for _ in range(3))
    assert [mlp.layer for mlp in cats_llm.find_gated_mlps(nn.Sequential(nn.ModuleDict({"layers": inner})))] == [0, 1, 2]
    blocks = nn.ModuleList(nn.ModuleList([nn.Linear(D, D), FOUND["w1 w3 w2"][0]()]) for _ in range(3))
    assert [mlp.layer for mlp in cats_llm.find_gated_mlps(blocks)] == [0, 1, 2]


def test_a_clamp_that_only_real_inputs_reach_is_seen_while_calibrating(llama):
    model = llama.dense_copy()
    mlp = model.model.layers[1].mlp

    class Limited(type(mlp)):
        def forward(self, x):
            gate = self.gate_proj(x).clamp(max=4e4)
            return self.down_proj(self.act_fn(gate) * self.up_proj(x))

    mlp.__class__ = Limited
    cats_llm.sparsify(model, llama.config)  # nothing that was tried comes near it
    cats_llm.densify(model)
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[:2] = 1e6  # such channels are what trained models have
    with pytest.raises(CatsError, match=r"model\.layers\.1\.mlp \(Limited\) .* computes more"):
        cats_llm.calibrate(model, [llama.ids])
    assert not model.model.layers[1].mlp._forward_pre_hooks


def test_one_mlp_in_several_layers_is_sparse_in_all_of_them(llama):
    model, reference = llama.dense_copy(), llama.dense_copy()
    for m in (model, reference):
        m.model.layers[1].mlp = m.model.layers[0].mlp
    assert [(mlp.layer, len(mlp.parents)) for mlp in cats_llm.find_gated_mlps(model)] == [(0, 2)]
    profile = cats_llm.calibrate(model, [llama.ids])
    assert profile.layers[0].total == 2 * llama.ids.numel() * families.FFN, "both layers' tokens are counted"
    dense = logits(model, llama.ids)
    cats_llm.sparsify(model, profile.config(0.5))
    t = cats_llm.thresholds(model)[0]
    with families.Reference(reference, llama.family, {0: t}):  # the hook is on the one module
        torch.testing.assert_close(logits(model, llama.ids), logits(reference, llama.ids), rtol=1e-5, atol=1e-5)
    with pytest.raises(CatsError, match="calls an MLP more than once"):
        cats_llm.fit(reference, [llama.ids], 0.5, cats_llm.Criterion.parse("moment+sequential"))
    cats_llm.densify(model)
    assert torch.equal(logits(model, llama.ids), dense)


def test_a_granite_hybrid_without_experts():
    torch.manual_seed(0)
    config = tiny.tiny_config("granitemoehybrid")
    config.num_local_experts = 0
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert all(mlp.roles.projections == ("input_linear", "output_linear") for mlp in cats_llm.find_gated_mlps(model))
    profile = cats_llm.calibrate(model, [families.ids(1, 24)])
    assert list(profile.layers) == list(range(config.num_hidden_layers))
    before = logits(model, families.ids(1, 24))
    assert torch.equal(logits(cats_llm.sparsify(model, profile.config(0.0)), families.ids(1, 24)), before)
    assert not torch.equal(logits(cats_llm.sparsify(model, profile.config(0.9)), families.ids(1, 24)), before)


@pytest.fixture(scope="module")
def zamba():
    torch.manual_seed(0)
    config = transformers.ZambaConfig(
        **families.TEXT | {"num_hidden_layers": 6, "num_key_value_heads": 4, "tie_word_embeddings": True},
        attn_layer_period=2,
        attn_layer_offset=1,
        n_mamba_heads=2,
        mamba_d_state=16,
    )
    return transformers.ZambaForCausalLM(config).eval()


@pytest.mark.parametrize("method", ["", "moment+compensate"], ids=["plain", "vectors"])
def test_mlps_that_share_weights_are_saved_as_the_dense_model_is(zamba, tmp_path, method):
    model, ids = copy.deepcopy(zamba), families.ids(1, 24)
    model.save_pretrained(tmp_path / "dense")
    if method:
        config = cats_llm.fit(model, [ids], 0.5, cats_llm.Criterion.parse(method))
    else:
        config = cats_llm.calibrate(model, [ids]).config(sparsity=0.5)
    cats_llm.sparsify(model, config)
    first, second = cats_llm.sparse_mlps(model).values()
    assert first.down_linear.weight is second.down_linear.weight, "the weights are not shared any more"
    model.save_pretrained(tmp_path / "cats")
    weights = "model.safetensors"
    assert (tmp_path / "cats" / weights).read_bytes() == (tmp_path / "dense" / weights).read_bytes()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cats").eval()
    assert torch.equal(logits(again, ids), logits(model, ids))
    cats_llm.densify(model)
    assert "save_pretrained" not in vars(model)
    assert torch.equal(logits(model, ids), logits(zamba, ids))


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions.*:UserWarning")
def test_dynamic_quantisation_on_top(llama):
    from torch.ao.quantization import quantize_dynamic

    def quantised(model):
        return [name for name, m in model.named_modules() if "quantized" in type(m).__module__]

    sparse = llama.sparse()
    ours = quantize_dynamic(sparse, {nn.Linear}, dtype=torch.qint8)
    dense = quantize_dynamic(llama.dense_copy(), {nn.Linear}, dtype=torch.qint8)
    assert quantised(ours) == quantised(dense)
    assert not any(families.FFN in p.shape for p in ours.parameters()), "the weights are there twice"
    assert cats_llm.thresholds(ours) == llama.config.thresholds
    with families.Reference(llama.dense_copy(), llama.family, llama.config.thresholds) as reference:
        exact = logits(reference, llama.ids)
    error, usual = (logits(ours, llama.ids) - exact).norm(), (logits(dense, llama.ids) - llama.dense_logits).norm()
    assert error < 3 * usual, "further from the CATS model than 8 bits explain"
    ours.generate(llama.ids[:1, :5], max_new_tokens=3)
    assert quantised(cats_llm.densify(ours)) == quantised(dense)
    assert torch.equal(logits(ours, llama.ids), logits(dense, llama.ids))


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel], ids=["compile", "DP"])
def test_a_wrapped_model(llama, tmp_path, wrap):
    model = llama.dense_copy()
    wrapped = wrap(model)
    config = cats_llm.calibrate(wrapped, [llama.ids]).config(sparsity=0.5)
    assert config.thresholds == llama.config.thresholds
    cats_llm.sparsify(wrapped, config)
    assert cats_llm.thresholds(wrapped) == llama.config.thresholds
    with torch.no_grad():
        torch.testing.assert_close(wrapped(llama.ids).logits, llama.reference_logits, rtol=1e-5, atol=1e-5)
    cats_llm.densify(wrapped)
    assert torch.equal(logits(model, llama.ids), llama.dense_logits)


def test_a_compiled_model_with_vectors_is_saved_whole(llama, tmp_path):
    model = torch.compile(llama.dense_copy(), backend="eager")
    config = cats_llm.fit(model, [llama.ids], 0.5, cats_llm.Criterion.parse("moment+compensate"))
    cats_llm.sparsify(model, config).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, llama.ids), logits(model._orig_mod, llama.ids))


def test_an_mlp_compiled_by_itself_is_refused(llama):
    model = llama.dense_copy()
    model.model.layers[1].mlp = torch.compile(model.model.layers[1].mlp, backend="eager")
    with pytest.raises(CatsError, match=r"compiled by itself.*compile the model afterwards"):
        cats_llm.sparsify(model, llama.config)


@pytest.mark.parametrize("thing", ["a folder", None, {"model": 1}], ids=str)
def test_what_is_no_model(thing, llama):
    with pytest.raises(CatsError, match="a loaded model is needed, but this is a"):
        cats_llm.sparsify(thing, llama.config)
    with pytest.raises(CatsError, match="a loaded model is needed, but this is a"):
        cats_llm.find_gated_mlps(thing)


@pytest.mark.parametrize("thing", [0.5, None, {0: 0.1, 1: 0.1}, "profile"], ids=str)
def test_what_is_no_config(thing, llama):
    with pytest.raises(CatsError, match="sparsify takes a CatsConfig, not a"):
        cats_llm.sparsify(llama.dense_copy(), thing)
    with pytest.raises(CatsError, match="sparsify takes a CatsConfig, not a Profile"):
        cats_llm.sparsify(llama.dense_copy(), llama.profile)
