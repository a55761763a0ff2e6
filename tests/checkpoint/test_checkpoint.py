"""The checkpoint format: a dense model's files and one entry in config.json, which every way of loading obeys."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import cats_llm
import families
from cats_llm import CatsConfig, CatsError, SparseMLP
from cats_llm.integrations.transformers import CatsQuantizer
from checkpoints import digests, edit, load, python
from families import logits

pytestmark = pytest.mark.usefixtures("one_thread")

CLEAN = {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}


def test_weight_files_are_those_of_the_dense_model(case):
    assert digests(case.sparse_folder) == digests(case.dense_folder)
    assert len(digests(case.sparse_folder)) == 1


def test_config_json_is_the_dense_one_and_one_entry(case):
    sparse, dense = (json.loads((f / "config.json").read_text()) for f in (case.sparse_folder, case.dense_folder))
    entry = sparse.pop("quantization_config")
    assert sparse == dense
    assert sparse["architectures"] == [case.family.architecture]
    assert entry["quant_method"] == "cats"
    assert entry["version"] == 1
    assert entry["thresholds"] == {str(layer): t for layer, t in case.config.thresholds.items()}
    assert entry["sparsity"] == 0.5
    assert entry["calibration"]["tokens"] == case.ids.numel()
    others = [file.name for file in case.sparse_folder.iterdir()]
    assert sorted(others) == sorted(file.name for file in case.dense_folder.iterdir())


def test_sharded_files_are_those_of_the_dense_model(split_or_fused, tmp_path):
    case = split_or_fused
    case.dense.save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    case.sparse().save_pretrained(tmp_path / "sparse", max_shard_size="60KB")
    assert digests(tmp_path / "sparse") == digests(tmp_path / "dense")
    assert len(digests(tmp_path / "sparse")) > 3
    model = load(tmp_path / "sparse")
    assert torch.equal(logits(model, case.ids), logits(case.sparse(), case.ids))


def test_densified_checkpoint_is_the_dense_one(split_or_fused, tmp_path):
    cats_llm.densify(load(split_or_fused.sparse_folder)).save_pretrained(tmp_path)
    assert digests(tmp_path) == digests(split_or_fused.dense_folder)
    dense = json.loads((split_or_fused.dense_folder / "config.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text()) == dense


RELOAD = """
import json, sys
from pathlib import Path
import torch
import cats_llm, families
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

logits, facts = {}, {}
for name, folder in json.loads(sys.argv[1]).items():
    images = families.FAMILIES[name].architecture.endswith("ConditionalGeneration")
    auto = AutoModelForImageTextToText if images else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    logits[name] = families.logits(model, families.ids())
    logits[name + " one token"] = families.logits(model, families.ids()[:1, :1])
    facts[name] = {
        "thresholds": cats_llm.thresholds(model),
        "info": {key: sorted(map(str, value)) for key, value in info.items()},
        "class": type(model).__name__,
    }
save_file(logits, sys.argv[2] + "/logits.safetensors")
Path(sys.argv[2], "facts.json").write_text(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def reloaded(cases, tmp_path_factory):
    """All families, loaded and run in one new process."""
    folder = tmp_path_factory.mktemp("reloaded")
    sources = {name: str(cases(name).sparse_folder) for name in families.FAMILIES}
    result = python(RELOAD, json.dumps(sources), folder)
    assert result.returncode == 0, result.stderr
    return load_file(folder / "logits.safetensors"), json.loads((folder / "facts.json").read_text())


def test_a_new_process_computes_the_same_logits_to_the_bit(case, reloaded):
    found, facts = reloaded
    model = case.sparse()
    assert torch.equal(found[case.name], logits(model, case.ids))
    # how a matrix-vector product rounds depends on where the weights lie in memory, so compare loaded with loaded
    model = load(case.sparse_folder, case.family)
    assert torch.equal(found[case.name + " one token"], logits(model, case.ids[:1, :1]))
    assert facts[case.name]["thresholds"] == {str(layer): t for layer, t in case.config.thresholds.items()}
    assert facts[case.name]["class"] == case.family.architecture


def test_no_key_is_missing_or_unexpected(case, reloaded):
    info = reloaded[1][case.name]["info"]
    assert info.keys() >= CLEAN
    assert not any(info.values()), info


def test_loading_twice_gives_two_models(split_or_fused):
    first, second = load(split_or_fused.sparse_folder), load(split_or_fused.sparse_folder)
    cats_llm.sparsify(first, split_or_fused.profile.config(0.9))
    assert cats_llm.thresholds(second) == split_or_fused.config.thresholds
    assert torch.equal(logits(second, split_or_fused.ids), logits(split_or_fused.sparse(), split_or_fused.ids))


def test_saving_again_writes_the_same_folder(case, tmp_path):
    load(case.sparse_folder, case.family).save_pretrained(tmp_path / "again")
    load(case.dense_folder, case.family).save_pretrained(tmp_path / "dense")
    assert digests(tmp_path / "again") == digests(case.sparse_folder)
    first, again, dense = (
        json.loads((folder / "config.json").read_text())
        for folder in (case.sparse_folder, tmp_path / "again", tmp_path / "dense")
    )
    assert again.pop("quantization_config") == first["quantization_config"]
    assert again == dense  # some families add keys when they are saved again
    model = load(tmp_path / "again", case.family)
    assert torch.equal(logits(model, case.ids), logits(case.sparse(), case.ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, "auto"], ids=str)
def test_dtype_at_loading_keeps_thresholds_exact(split_or_fused, dtype):
    case = split_or_fused
    model = load(case.sparse_folder, dtype=dtype)
    assert model.dtype == (torch.float32 if dtype == "auto" else dtype)
    assert cats_llm.thresholds(model) == case.config.thresholds
    dense = load(case.dense_folder, dtype=dtype)
    with families.Reference(dense, case.family, case.config.thresholds):
        expected = logits(dense, case.ids)
    # down_proj is laid out for decode, for which PyTorch chooses another product in some dtypes
    atol = {torch.float16: 2e-2, torch.bfloat16: 2e-1}.get(model.dtype, 1e-5)
    torch.testing.assert_close(logits(model, case.ids), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("cast", ["half", "float", "double", "bfloat16"])
def test_a_loaded_model_can_be_cast(llama, cast):
    # transformers forbids some casts of quantised models; these weights are not quantised
    model = getattr(load(llama.sparse_folder), cast)()
    assert cats_llm.thresholds(model) == llama.config.thresholds
    assert not getattr(model, "is_quantized", False)


def test_a_cast_model_saves_and_reloads(llama, tmp_path):
    model = load(llama.sparse_folder).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype="auto")
    assert again.dtype == torch.bfloat16
    assert cats_llm.thresholds(again) == llama.config.thresholds


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_device_map(split_or_fused, device_map):
    model = load(split_or_fused.sparse_folder, device_map=device_map)
    assert cats_llm.thresholds(model) == split_or_fused.config.thresholds
    assert torch.equal(logits(model, split_or_fused.ids), logits(split_or_fused.sparse(), split_or_fused.ids))


def test_a_dense_folder_and_a_config_give_a_sparse_model(case, tmp_path):
    model, info = load(
        case.dense_folder, case.family, quantization_config=CatsConfig(case.config.thresholds), output_loading_info=True
    )
    assert not any(info.values()), info
    assert cats_llm.thresholds(model) == case.config.thresholds
    assert torch.equal(logits(model, case.ids), logits(case.sparse(), case.ids))
    model.save_pretrained(tmp_path)
    assert digests(tmp_path) == digests(case.dense_folder)
    assert cats_llm.thresholds(load(tmp_path, case.family)) == case.config.thresholds


@pytest.mark.parametrize("name", families.REFUSED)
def test_a_refused_model_is_not_loaded_sparse_either(name, tmp_path):
    family, reason = families.REFUSED[name]
    model = family.build()
    model.save_pretrained(tmp_path)
    config = CatsConfig(dict.fromkeys(range(model.config.num_hidden_layers), 0.1))
    with pytest.raises(CatsError, match=reason):
        load(tmp_path, family, quantization_config=config)


def test_densify_and_dequantize_of_a_loaded_model(case):
    for model in (cats_llm.densify(load(case.sparse_folder, case.family)), load(case.sparse_folder, case.family)):
        if any(isinstance(module, SparseMLP) for module in model.modules()):
            model.dequantize()
        assert torch.equal(logits(model, case.ids), case.dense_logits)
        assert not any(isinstance(module, SparseMLP) for module in model.modules())
        assert not hasattr(model.config, "quantization_config")
        assert getattr(model, "hf_quantizer", None) is None
        cats_llm.sparsify(model, case.config)
        assert torch.equal(logits(model, case.ids), logits(case.sparse(), case.ids))


def test_new_thresholds_on_a_loaded_model_are_saved(llama, tmp_path):
    config = llama.profile.config(0.9)
    cats_llm.sparsify(load(llama.sparse_folder), config).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert cats_llm.thresholds(model) == config.thresholds
    assert model.config.quantization_config == config


def test_a_tool_can_tell_that_the_model_is_sparse(llama):
    model = load(llama.sparse_folder)
    assert isinstance(model.hf_quantizer, CatsQuantizer)
    assert model.hf_quantizer.is_serializable()
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_compileable
    assert len(cats_llm.sparse_mlps(model)) == families.LAYERS


def test_import_again_registers_once():
    from cats_llm.integrations.transformers import register

    register()


WITHOUT_THE_PACKAGE = """
import sys
from safetensors.torch import save_file
import families
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info.values()), info
assert not any(name.startswith("cats_llm") for name in sys.modules)
save_file({"logits": families.logits(model, families.ids())}, sys.argv[2])
model.save_pretrained(sys.argv[3])
"""


def test_without_import_the_model_is_the_dense_one_and_transformers_warns(llama, tmp_path):
    result = python(WITHOUT_THE_PACKAGE, llama.sparse_folder, tmp_path / "out.safetensors", tmp_path / "saved")
    assert result.returncode == 0, result.stderr
    assert "Unknown quantization type, got cats" in result.stderr
    assert "we will skip the quantization" in result.stderr
    assert torch.equal(load_file(tmp_path / "out.safetensors")["logits"], llama.dense_logits)
    # saved by somebody without the package, it is a CATS model still
    assert cats_llm.thresholds(load(tmp_path / "saved")) == llama.config.thresholds


def _set(key, value):
    return lambda entry: entry.__setitem__(key, value)


def _threshold(value, layer="0"):
    return lambda entry: entry["thresholds"].__setitem__(layer, value)


DAMAGE = {
    "unknown key": (_set("treshold", 1), r"unknown keys \(treshold\)"),
    "two unknown keys": (lambda entry: entry.update(b=1, a=2), r"unknown keys \(a, b\)"),
    "layer missing": (lambda entry: entry["thresholds"].pop("1"), r"1 layer \(0\), but .* 2 layers \(0 to 1\)"),
    "layer too many": (_threshold(0.1, "2"), r"3 layers \(0 to 2\), but .* 2 layers \(0 to 1\)"),
    "no thresholds": (lambda entry: entry.pop("thresholds"), "thresholds"),
    "empty thresholds": (_set("thresholds", {}), "no thresholds"),
    "list of thresholds": (_set("thresholds", [0.1, 0.2]), r"\[0.1, 0.2\]"),
    "null thresholds": (_set("thresholds", None), "thresholds"),
    "NaN threshold": (_threshold(math.nan), "layer 0 .* is nan"),
    "infinite threshold": (_threshold(math.inf), "layer 0 .* is inf"),
    "threshold beyond float32": (_threshold(1e39), r"layer 0 .* is 1e\+39"),
    "threshold beyond float64": (_threshold(10**400), "layer 0"),
    "negative threshold": (_threshold(-0.1), r"layer 0 .* is -0.1"),
    "bool threshold": (_threshold(True), "layer 0 .* is True"),
    "string threshold": (_threshold("0.1"), "layer 0 .* is '0.1'"),
    "null threshold": (_threshold(None), "layer 0 .* is None"),
    "layer that is no number": (_threshold(0.1, "first"), "'first'"),
    "negative layer": (_threshold(0.1, "-1"), "'-1'"),
    "two spellings": (_threshold(0.1, "00"), "twice"),
    "newer version": (_set("version", 4), "version 4, newer than 3"),
    "version 0": (_set("version", 0), "version 0"),
    "version x": (_set("version", "x"), "version 'x'"),
    "version 1.0": (_set("version", 1.0), r"version 1\.0"),
    "version true": (_set("version", True), "version True"),
    "version null": (_set("version", None), "version None"),
    "sparsity 1": (_set("sparsity", 1.0), r"sparsity is 1\.0"),
    "sparsity abc": (_set("sparsity", "abc"), "sparsity is 'abc'"),
    "sparsity NaN": (_set("sparsity", math.nan), "sparsity is nan"),
    "layer sparsity above 1": (lambda entry: entry["layer_sparsity"].update({"0": 1.5}), "layer_sparsity of layer 0"),
    "layer sparsity a number": (_set("layer_sparsity", 0.5), "layer_sparsity"),
    "calibration a string": (_set("calibration", "yes"), "calibration"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_config_is_one_clear_error(llama, tmp_path, damage):
    change, message = DAMAGE[damage]
    folder = edit(llama.sparse_folder, tmp_path / "damaged", change)
    with pytest.raises(CatsError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")
    assert len(str(error.value)) < 300


def test_a_threshold_given_as_a_whole_number_is_a_number(llama, tmp_path):
    folder = edit(llama.sparse_folder, tmp_path / "whole", _threshold(1))
    assert cats_llm.thresholds(load(folder))[0] == 1.0


def test_optional_keys_may_be_absent(llama, tmp_path):
    def only_thresholds(entry):
        for key in ("sparsity", "layer_sparsity", "calibration", "version"):
            del entry[key]

    model = load(edit(llama.sparse_folder, tmp_path / "short", only_thresholds))
    assert torch.equal(logits(model, llama.ids), logits(llama.sparse(), llama.ids))


def test_a_truncated_weight_file_is_an_error(llama, tmp_path):
    folder = edit(llama.sparse_folder, tmp_path / "truncated", lambda entry: None)
    (folder / "model.safetensors").unlink()
    data = (llama.sparse_folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(Exception, match=r"[Ii]ncomplete|HeaderTooLarge|deserializing|InvalidHeader"):
        load(folder)


def test_a_file_with_a_threshold_tensor_does_not_change_the_thresholds(llama, tmp_path):
    # thresholds have one home, config.json
    folder = edit(llama.sparse_folder, tmp_path / "tensor", lambda entry: None)
    tensors = load_file(llama.sparse_folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name = "model.layers.0.mlp.threshold"
    save_file(tensors | {name: torch.tensor(9.0)}, folder / "model.safetensors", metadata={"format": "pt"})
    model, info = load(folder, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {name}
    assert cats_llm.thresholds(model) == llama.config.thresholds


numbers = st.floats(0, torch.finfo(torch.float32).max, width=32)
records = st.dictionaries(st.text(), st.none() | st.integers() | st.floats(allow_nan=False) | st.text(), max_size=3)


@settings(deadline=None, max_examples=200)
@given(
    st.dictionaries(st.integers(0, 200), numbers, min_size=1),
    st.none() | st.floats(0, 1, exclude_max=True),
    st.dictionaries(st.integers(0, 200), st.floats(0, 1)),
    records,
)
def test_the_config_survives_json_to_the_bit(thresholds, sparsity, layer_sparsity, calibration):
    config = CatsConfig(thresholds, sparsity, layer_sparsity, calibration)
    again = CatsConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.to_dict() == config.to_dict()
    assert again.thresholds == dict(sorted(thresholds.items()))
    assert list(again.thresholds) == sorted(thresholds)
    assert again.layer_sparsity == layer_sparsity
    assert again.sparsity == sparsity
    assert again.calibration == calibration


@settings(deadline=None, max_examples=200)
@given(st.floats(0, 3e38))
def test_a_threshold_is_rounded_to_float32_once(value):
    config = CatsConfig({0: value})
    assert config.thresholds[0] == torch.tensor(value, dtype=torch.float32).item()
    assert CatsConfig(config.thresholds) == config


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=5,
)
names = ["thresholds", "sparsity", "layer_sparsity", "calibration", "criterion", "vectors", "version", "quant_method"]
keys = st.sampled_from([*names, "other"])


@settings(deadline=None, max_examples=500)
@given(st.dictionaries(keys, json_values | st.dictionaries(st.sampled_from("0123x"), json_values, max_size=3)))
def test_any_json_is_a_config_or_a_cats_error(entry):
    try:
        config = CatsConfig.from_dict(entry)
    except CatsError:
        return
    text = json.dumps(config.to_dict())  # a record may hold NaN, which equals nothing
    assert json.dumps(CatsConfig.from_dict(json.loads(text)).to_dict()) == text


def test_a_config_does_not_follow_what_it_was_made_from():
    thresholds, record = {0: 0.5}, {"data": "text"}
    config = CatsConfig(thresholds, calibration=record)
    thresholds[0], record["data"] = 0.7, "other"
    assert config.thresholds == {0: 0.5}
    assert config.calibration == {"data": "text"}
