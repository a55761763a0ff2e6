"""sparsify and densify, for every family, against an MLP written out in plain PyTorch (`families.reference_mlp`)."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from torch import nn

import cats_llm
import families
from cats_llm import CatsConfig, CatsError, SparseMLP
from cats_llm.kernels import cpu
from families import logits

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def one_sentence(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def addresses(model):
    return {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def test_logits_equal_the_reference(case):
    actual = logits(case.sparse(), case.ids)
    torch.testing.assert_close(actual, case.reference_logits, rtol=1e-5, atol=1e-5)
    moved = (actual - case.dense_logits).abs().max()
    assert moved > 0.1, "thresholds for 50 % did not change the logits: the reference proves nothing"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_equal_the_reference_in_every_dtype(split_or_fused, dtype):
    sparse, dense = split_or_fused.sparse().to(dtype), split_or_fused.dense_copy().to(dtype)
    with families.Reference(dense, split_or_fused.family, split_or_fused.config.thresholds):
        expected = logits(dense, split_or_fused.ids)
    # down_proj is laid out for decode, for which PyTorch chooses another product in some dtypes
    atol = {torch.float16: 2e-2, torch.bfloat16: 2e-1}.get(dtype, 1e-5)
    torch.testing.assert_close(logits(sparse, split_or_fused.ids), expected, rtol=0, atol=atol)


def test_only_the_mlps_of_the_text_layers_become_sparse(case):
    names = {name for name, module in case.sparse().named_modules() if isinstance(module, SparseMLP)}
    assert names == {case.family.mlp.format(layer) for layer in range(families.LAYERS)}


@pytest.mark.parametrize("length", [1, 3, 16])
def test_decoding_step_by_step_equals_prefill(case, length):
    if case.name == "stablelm" and length > 1 and transformers.__version__ == "5.0.0":
        pytest.skip("the dense model cannot continue a cache by several tokens in transformers 5.0.0")
    # in float64 rounding cannot push a neuron over the threshold
    model = case.sparse().double()
    whole = logits(model, case.ids)
    with torch.no_grad():
        output = model(input_ids=case.ids[:, :-16], use_cache=True)
        steps = [output.logits]
        for start in range(case.ids.shape[1] - 16, case.ids.shape[1], length):
            chunk = case.ids[:, start : start + length]
            output = model(input_ids=chunk, past_key_values=output.past_key_values, use_cache=True)
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-6, atol=1e-6)


def test_one_token_equals_the_reference(case):
    # few enough tokens for the decode path
    token = case.ids[:1, :1]
    with families.Reference(case.dense, case.family, case.config.thresholds) as dense:
        expected = logits(dense, token)
    torch.testing.assert_close(logits(case.sparse(), token), expected, rtol=1e-5, atol=1e-5)


def test_gradients_equal_the_reference(split_or_fused):
    case = split_or_fused
    sparse, dense = case.sparse().double(), case.dense_copy().double()
    sparse(input_ids=case.ids, labels=case.ids).loss.backward()
    with families.Reference(dense, case.family, case.config.thresholds):
        dense(input_ids=case.ids, labels=case.ids).loss.backward()
    expected = {name: p.grad for name, p in dense.named_parameters()}
    for name, parameter in sparse.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12, msg=name)
        assert parameter.grad.abs().max() > 0, name


def test_an_offload_free_call_with_and_without_gradients_is_the_same_function(split_or_fused):
    model = split_or_fused.sparse().double()
    token = split_or_fused.ids[:2, :4]
    torch.testing.assert_close(model(input_ids=token).logits.detach(), logits(model, token), rtol=1e-12, atol=1e-12)


def test_nan_reaches_the_logits(split_or_fused):
    model = split_or_fused.sparse()
    weight = cats_llm.find_gated_mlps(model)[0].gate_linear.weight
    with torch.no_grad():
        weight[0, 0] = float("nan")
    assert logits(model, split_or_fused.ids).isnan().all()
    assert logits(model, split_or_fused.ids[:, :1]).isnan().all()


def test_weights_are_neither_copied_nor_renamed(case):
    model = case.dense_copy()
    before, parameters = addresses(model), [name for name, _ in model.named_parameters()]
    cats_llm.sparsify(model, case.config)
    assert list(addresses(model)) == list(before)
    after = addresses(model)
    moved = {name for name in before if after[name] != before[name]}
    # a CPU's decode kernels need down_proj neuron-major: laid out anew, once, with no second copy
    assert all(name.endswith("mlp.down_proj.weight") for name in moved)
    for name in moved:
        weight = model.get_parameter(name)
        assert weight.stride() == (1, weight.shape[0])
        assert weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
    assert bool(moved) == cpu.available()
    assert [name for name, _ in model.named_parameters()] == parameters


def test_state_dicts_are_exchangeable(case):
    case.sparse().load_state_dict(case.dense.state_dict(), strict=True)
    case.dense_copy().load_state_dict(case.sparse().state_dict(), strict=True)


def test_densify_restores_the_very_same_model(case):
    model = case.dense_copy()
    modules = list(model.modules())
    config, attributes = model.config.to_dict(), set(model.__dict__)
    assert cats_llm.sparsify(model, case.config) is model
    assert any(isinstance(module, SparseMLP) for module in model.modules())
    assert cats_llm.densify(model) is model
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert model.config.to_dict() == config
    assert not hasattr(model.config, "quantization_config")
    assert set(model.__dict__) == attributes
    assert torch.equal(logits(model, case.ids), case.dense_logits)
    cats_llm.densify(model)  # of a dense model: nothing happens
    assert torch.equal(logits(model, case.ids), case.dense_logits)


def test_sparsify_again_changes_the_thresholds(split_or_fused):
    model, config = split_or_fused.sparse(), split_or_fused.profile.config(0.7)
    modules = list(model.modules())
    cats_llm.sparsify(model, config)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert cats_llm.thresholds(model) == config.thresholds
    assert model.config.quantization_config == config
    again = cats_llm.sparsify(cats_llm.densify(model), split_or_fused.config)
    torch.testing.assert_close(logits(again, split_or_fused.ids), split_or_fused.reference_logits)


def test_threshold_zero_is_the_dense_model_to_the_bit(case):
    config = case.profile.config(0.0)
    assert set(config.thresholds.values()) == {0.0}
    assert torch.equal(logits(cats_llm.sparsify(case.dense_copy(), config), case.ids), case.dense_logits)


def test_dense_function_is_dense_only_inside(split_or_fused):
    model = split_or_fused.sparse()

    def is_dense() -> bool:
        return torch.equal(logits(model, split_or_fused.ids), split_or_fused.dense_logits)

    with cats_llm.as_dense(model):
        with cats_llm.as_dense(model):
            assert is_dense()
        assert is_dense()
    assert not is_dense()
    with pytest.raises(KeyError), cats_llm.as_dense(model):
        raise KeyError
    assert not is_dense()
    with cats_llm.as_dense(split_or_fused.dense):
        pass


def test_thresholds_and_sparse_mlps_of_a_dense_model_are_empty(llama):
    assert cats_llm.thresholds(llama.dense) == {}
    assert cats_llm.sparse_mlps(llama.dense) == {}


def test_printing_a_model_shows_its_thresholds(llama):
    assert f"threshold={llama.config.thresholds[1]:.4g}" in repr(llama.sparse())


@pytest.mark.parametrize("tied", ["llama-tied", "qwen2", "gemma2"])
def test_tied_weights_stay_tied(cases, tied):
    for model in (cases(tied).sparse(), cats_llm.densify(cases(tied).sparse())):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        model.tie_weights()
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_followed(llama, training):
    model = llama.dense_copy().train(training)
    cats_llm.sparsify(model, llama.config)
    assert all(module.training == training for module in model.modules())
    model.train(not training)
    cats_llm.densify(model)
    assert all(module.training != training for module in model.modules())


def test_what_is_done_to_a_sparse_model_stays_when_it_becomes_dense(split_or_fused):
    model = split_or_fused.sparse()
    with torch.no_grad():
        for mlp in cats_llm.find_gated_mlps(model):
            mlp.down_linear.weight.mul_(2)
            mlp.module.down_proj = copy.deepcopy(mlp.module.down_proj)
    model.double()
    dense = split_or_fused.dense_copy().double()
    with torch.no_grad():
        for mlp in cats_llm.find_gated_mlps(dense):
            mlp.down_linear.weight.mul_(2)
    assert torch.equal(logits(cats_llm.densify(model), split_or_fused.ids), logits(dense, split_or_fused.ids))


@pytest.mark.parametrize("sparsify_first", [True, False])
def test_hooks_on_an_mlp_keep_working(llama, sparsify_first):
    model, calls = llama.dense_copy(), []

    def mlp():
        return model.get_submodule(llama.family.mlp.format(1))

    if sparsify_first:
        cats_llm.sparsify(model, llama.config)
    handle = mlp().register_forward_hook(lambda module, args, output: calls.append(type(module)))
    if not sparsify_first:
        cats_llm.sparsify(model, llama.config)
    logits(model, llama.ids)
    assert calls == [SparseMLP]
    cats_llm.densify(model)
    logits(model, llama.ids)
    assert len(calls) == 2
    handle.remove()
    logits(model, llama.ids)
    assert len(calls) == 2


CASTS = {
    "to(bfloat16)": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "float": lambda model: model.float(),
    "bfloat16 and back": lambda model: model.to(torch.bfloat16).to(torch.float32),
    "to(cpu, half)": lambda model: model.to("cpu", torch.float16),
    "to_empty": lambda model: model.to_empty(device="cpu"),
    "share_memory": lambda model: model.share_memory(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("cast", CASTS)
def test_thresholds_are_exact_after(llama, cast):
    model = CASTS[cast](llama.sparse())
    assert cats_llm.thresholds(model) == llama.config.thresholds
    for mlp in cats_llm.sparse_mlps(model).values():
        assert mlp.threshold.dtype == torch.float32
        assert "threshold" not in mlp.state_dict()


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_a_model_of_its_own(split_or_fused, copier):
    model = split_or_fused.sparse()
    twin = copier(model)
    assert torch.equal(logits(twin, split_or_fused.ids), logits(model, split_or_fused.ids))
    assert not set(addresses(twin).values()) & set(addresses(model).values())
    cats_llm.sparsify(twin, split_or_fused.profile.config(0.9))
    assert cats_llm.thresholds(model) == split_or_fused.config.thresholds
    assert torch.equal(logits(cats_llm.densify(twin), split_or_fused.ids), split_or_fused.dense_logits)
    torch.testing.assert_close(logits(model, split_or_fused.ids), split_or_fused.reference_logits)


@pytest.mark.parametrize("name", families.REFUSED)
def test_what_is_no_gated_mlp_is_refused(name):
    family, reason = families.REFUSED[name]
    model = family.build()
    before, modules = logits(model, families.ids()), list(model.modules())
    layers = range(model.config.num_hidden_layers)
    for attempt in (
        lambda: cats_llm.sparsify(model, CatsConfig(thresholds=dict.fromkeys(layers, 0.1))),
        lambda: cats_llm.calibrate(model, [families.ids()]),
    ):
        with pytest.raises(CatsError, match=reason) as error:
            attempt()
        one_sentence(error)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert not hasattr(model.config, "quantization_config")
    assert torch.equal(logits(model, families.ids()), before)


@pytest.mark.parametrize("layers", [[0], [0, 1, 2], [1, 2], [7]], ids=str)
@pytest.mark.parametrize("state", ["dense", "sparse"])
def test_another_number_of_layers_leaves_the_model_as_it_was(llama, layers, state):
    model = llama.dense_copy() if state == "dense" else llama.sparse()
    before = logits(model, llama.ids)
    with pytest.raises(CatsError, match=r"in 2 layers \(0 to 1\)") as error:
        cats_llm.sparsify(model, CatsConfig(thresholds=dict.fromkeys(layers, 0.1)))
    one_sentence(error)
    assert torch.equal(logits(model, llama.ids), before)
    assert getattr(model.config, "quantization_config", None) == (llama.config if state == "sparse" else None)


@pytest.mark.parametrize("existing", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, "object"])
def test_a_quantised_model_is_refused(llama, existing):
    if existing == "object":
        from transformers import BitsAndBytesConfig

        existing = BitsAndBytesConfig(load_in_8bit=True)
    model = llama.dense_copy()
    model.config.quantization_config = existing
    with pytest.raises(CatsError, match="already quantised with bitsandbytes") as error:
        cats_llm.sparsify(model, llama.config)
    one_sentence(error)
    assert torch.equal(logits(model, llama.ids), llama.dense_logits)


def test_two_gated_mlps_in_a_layer_are_refused(llama):
    model = llama.dense_copy()
    model.model.layers[1].second = copy.deepcopy(model.model.layers[1].mlp)
    with pytest.raises(CatsError, match="two gated MLPs in layer 1") as error:
        cats_llm.sparsify(model, llama.config)
    one_sentence(error)


def test_a_module_with_the_parts_but_another_function_is_refused(llama):
    # what a family that does not exist yet may look like
    model = llama.dense_copy()
    mlp = model.model.layers[0].mlp

    class Scaled(type(mlp)):
        def forward(self, x):
            return super().forward(x) * 1.05

    mlp.__class__ = Scaled
    with pytest.raises(CatsError, match=r"model\.layers\.0\.mlp \(Scaled\) has the parts") as error:
        cats_llm.sparsify(model, llama.config)
    one_sentence(error)
    assert type(mlp) is Scaled


class PlainMLP(nn.Module):
    """What people write themselves; no family of transformers has biases in a fused projection."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        if fused:
            self.gate_up_proj = nn.Linear(8, 24)
        else:
            self.gate_proj, self.up_proj = nn.Linear(8, 12), nn.Linear(8, 12)
        self.down_proj = nn.Linear(12, 8)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1) if self.fused else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(self.act_fn(gate) * up)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 50])
def test_a_model_that_transformers_does_not_know(fused, tokens):
    model = nn.Sequential(PlainMLP(fused), PlainMLP(fused)).double()
    x = torch.randn(tokens, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = x
        for mlp in model:
            expected = families.reference_mlp(mlp, expected, 0.1, nn.functional.silu, fused)
        cats_llm.sparsify(model, CatsConfig(thresholds={0: 0.1, 1: 0.1}))
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
        cats_llm.densify(model)
    assert all(type(mlp) is PlainMLP for mlp in model)


def test_the_config_of_a_sparse_model_is_json(case):
    text = case.sparse().config.to_json_string()
    assert json.loads(text)["quantization_config"]["quant_method"] == "cats"
