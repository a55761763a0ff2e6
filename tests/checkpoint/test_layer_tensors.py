"""Vectors in a checkpoint: a small file beside the dense model's files, named and digested in config.json."""

import copy
import hashlib
import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import cats_llm
import families
from cats_llm import CatsConfig, CatsError, TokenPolicy
from cats_llm.checkpoint.layer_tensors import LayerTensors, digest, encode, read_layer_tensors, write_layer_tensors
from cats_llm.checkpoint.write import write_checkpoint
from checkpoints import digests, edit, load, python
from families import logits
from vectors import make_vectors, vector_config, vector_model

pytestmark = pytest.mark.usefixtures("one_thread")

FILE = "cats.safetensors"


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def entry(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def weights(folder):
    return {name: value for name, value in digests(folder).items() if name != FILE}


# the vectors and their file


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"thresholds": torch.ones(3, dtype=torch.float64)}, r"thresholds .* float32 .* torch\.float64 \(3,\)"),
        ({"compensation": torch.ones(3, 1)}, r"compensation .* one dimension, .* \(3, 1\)"),
        ({"thresholds": [1.0]}, "the value is list"),
        ({"thresholds": torch.tensor([1.0, -0.5])}, "thresholds .* 0 or more"),
        ({"thresholds": torch.tensor([float("inf")])}, "thresholds .* finite"),
        ({"compensation": torch.tensor([float("nan")])}, "compensation .* finite"),
    ],
)
def test_vectors_that_are_refused(values, message):
    with pytest.raises(CatsError, match=message) as error:
        LayerTensors(**values)
    assert str(error.value).endswith(".")


def test_a_compensation_may_be_negative():
    LayerTensors(compensation=torch.tensor([-1.0]))


def test_the_file_holds_the_vectors_and_always_the_same_bytes(llama, tmp_path):
    vectors = make_vectors(llama)
    del vectors[1]
    vectors[7] = LayerTensors(compensation=torch.arange(5.0))
    write_layer_tensors(tmp_path, vectors)
    found = load_file(tmp_path / FILE)
    assert found.keys() == {"0.thresholds", "0.compensation", "7.compensation"}
    assert torch.equal(found["0.thresholds"], vectors[0].thresholds)
    assert torch.equal(found["7.compensation"], torch.arange(5.0))
    content = encode(dict(reversed(vectors.items())))
    assert content == (tmp_path / FILE).read_bytes()
    assert digest(content) == sha256(tmp_path / FILE)
    again = read_layer_tensors(tmp_path / FILE, digest(content))
    assert list(again) == [0, 7]
    assert torch.equal(again[0].compensation, vectors[0].compensation)
    assert again[7].thresholds is None


def test_another_process_writes_the_same_bytes():
    code = (
        "import torch, hashlib\nfrom cats_llm.checkpoint.layer_tensors import LayerTensors, encode\n"
        "v = {i: LayerTensors(torch.arange(4.0), torch.arange(3.0) - 1) for i in range(12)}\n"
        "print(hashlib.sha256(encode(v)).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    same = {i: LayerTensors(torch.arange(4.0), torch.arange(3.0) - 1) for i in range(12)}
    assert done.stdout.strip() == hashlib.sha256(encode(same)).hexdigest()


@pytest.mark.parametrize(
    "tensors",
    [{"weight": torch.ones(2)}, {"00.thresholds": torch.ones(2)}, {"0.thresholds": torch.ones(2, dtype=torch.int32)}],
    ids=str,
)
def test_a_file_of_something_else(tmp_path, tensors):
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(CatsError, match="holds no vectors of a CATS model") as error:
        read_layer_tensors(tmp_path / FILE, sha256(tmp_path / FILE))
    assert str(error.value).endswith(".")
    (tmp_path / FILE).write_bytes(b"no safetensors")
    with pytest.raises(CatsError, match="holds no vectors of a CATS model"):
        read_layer_tensors(tmp_path / FILE, sha256(tmp_path / FILE))


# the config


def test_a_config_without_vectors_is_written_as_before(llama):
    config = llama.config
    empty = CatsConfig(**config.to_dict(), criterion={}, vectors={0: LayerTensors()})
    assert json.dumps(empty.to_dict()) == json.dumps(config.to_dict())
    assert list(config.to_dict()) == [
        "version", "quant_method", "thresholds", "sparsity", "layer_sparsity", "calibration",
    ]  # fmt: skip
    assert config.version == 1
    assert config.vectors is None
    assert config.vectors_sha256 is None
    assert config.criterion == {}
    assert config.with_coverage(TokenPolicy(dense_prefill=True)).version == 2


def test_vectors_stand_in_json_as_a_name_and_a_digest(llama):
    config = vector_config(llama)
    values = json.loads(json.dumps(config.to_dict()))
    assert values["version"] == 3
    assert values["vectors"] == {"file": FILE, "sha256": hashlib.sha256(encode(make_vectors(llama))).hexdigest()}
    assert values["criterion"] == {"name": "test", "seed": 0}
    assert values["thresholds"] == {str(layer): t for layer, t in llama.config.thresholds.items()}


def test_a_criterion_alone_needs_the_version_too(llama):
    # older programs refuse the key, and should say why
    config = CatsConfig(llama.config.thresholds, criterion={"name": "allocated"})
    assert config.to_dict()["version"] == 3
    assert CatsConfig.from_dict(config.to_dict()) == config
    assert "vectors" not in config.to_dict()


def test_a_config_from_json_cannot_be_used_before_its_file_is_read(llama, tmp_path):
    config = vector_config(llama)
    again = CatsConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert not again.vectors_are_loaded
    assert again.vectors_sha256 == config.vectors_sha256
    model = llama.dense_copy()
    for attempt in (
        lambda: again.vectors,
        lambda: cats_llm.sparsify(model, again),
        lambda: write_checkpoint(llama.dense_folder, tmp_path / "out", again),
    ):
        with pytest.raises(CatsError, match="does not hold what is in it") as error:
            attempt()
        assert str(error.value).endswith(".")
    assert torch.equal(logits(model, llama.ids), llama.dense_logits)
    assert not (tmp_path / "out").exists()
    write_layer_tensors(tmp_path, config.vectors)
    again.load_vectors(tmp_path / FILE)
    assert again.vectors_are_loaded
    assert again.to_dict() == config.to_dict()
    assert torch.equal(again.vectors[1].thresholds, config.vectors[1].thresholds)


@pytest.mark.parametrize(
    "copier",
    [
        copy.deepcopy,
        lambda config: pickle.loads(pickle.dumps(config)),
        lambda config: config.with_coverage(config.coverage),
        lambda config: CatsConfig(**(config.to_dict() | {"vectors": config.vectors})),
    ],
)
def test_a_copy_of_a_config_has_the_vectors(llama, copier):
    config = vector_config(llama)
    twin = copier(config)
    assert twin == config
    twin.vectors[0].thresholds.mul_(2)
    assert twin != config
    assert torch.equal(config.vectors[0].thresholds, make_vectors(llama)[0].thresholds)


def test_a_config_does_not_follow_what_it_was_made_from(llama):
    vectors, criterion = make_vectors(llama), {"name": "a"}
    config = CatsConfig(llama.config.thresholds, criterion=criterion, vectors=vectors)
    vectors[0].thresholds.zero_()
    criterion["name"] = "b"
    assert config.vectors[0].thresholds.max() > 0
    assert config.criterion == {"name": "a"}


def test_coverage_and_vectors_stand_side_by_side(llama):
    config = vector_config(llama).with_coverage(TokenPolicy(dense_first_tokens=2))
    values = config.to_dict()
    assert values["version"] == 3
    assert values["dense_first_tokens"] == 2
    assert config.vectors is not None
    assert CatsConfig.from_dict(values).coverage == config.coverage


GOOD = "0" * 64
RECORDS = {
    "text": "cats.safetensors",
    "list": [1],
    "no digest": {"file": FILE},
    "another file": {"file": "../model.safetensors", "sha256": GOOD},
    "short digest": {"file": FILE, "sha256": "0"},
    "digest no text": {"file": FILE, "sha256": 3},
    "one key more": {"file": FILE, "sha256": GOOD, "size": 3},
    "tensors": {0: torch.ones(3)},
    "lists": {"0": [0.1]},
}


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_of_vectors_that_is_refused(record):
    with pytest.raises(CatsError, match="vectors in the CATS config") as error:
        CatsConfig({0: 0.1}, vectors=RECORDS[record])
    assert str(error.value).endswith(".")
    assert len(str(error.value)) < 300


def test_vectors_of_an_unknown_layer_are_refused():
    with pytest.raises(CatsError, match="vectors of layer 3, but no threshold"):
        CatsConfig({0: 0.1}, vectors={3: LayerTensors(torch.ones(2))})


def test_a_criterion_that_is_no_record_is_refused():
    with pytest.raises(CatsError, match="criterion in the CATS config is 'best'"):
        CatsConfig({0: 0.1}, criterion="best")


# folders


@pytest.fixture
def folder(llama, tmp_path):
    """A checkpoint with vectors, saved by transformers."""
    vector_model(llama).save_pretrained(tmp_path / "vectors")
    return tmp_path / "vectors"


def test_a_round_trip_is_exact(case, tmp_path):
    model = vector_model(case)
    model.save_pretrained(tmp_path / "a")
    assert weights(tmp_path / "a") == weights(case.dense_folder)
    assert entry(tmp_path / "a")["vectors"] == {"file": FILE, "sha256": sha256(tmp_path / "a" / FILE)}
    loaded, info = load(tmp_path / "a", case.family, output_loading_info=True)
    assert not any(info.values()), info
    assert cats_llm.thresholds(loaded) == case.config.thresholds
    expected = make_vectors(case)
    for layer, mlp in cats_llm.sparse_mlps(loaded).items():
        assert torch.equal(mlp.threshold, expected[layer].thresholds)
        assert torch.equal(mlp.compensation, expected[layer].compensation)
    assert torch.equal(logits(loaded, case.ids), logits(model, case.ids))
    loaded.save_pretrained(tmp_path / "b")
    assert digests(tmp_path / "b") == digests(tmp_path / "a")
    assert entry(tmp_path / "b") == entry(tmp_path / "a")
    cats_llm.densify(loaded).save_pretrained(tmp_path / "c")
    assert digests(tmp_path / "c") == digests(case.dense_folder)
    assert not (tmp_path / "c" / FILE).exists()


def test_write_checkpoint_writes_the_same_folder(split_or_fused, tmp_path):
    case = split_or_fused
    write_checkpoint(case.dense_folder, tmp_path / "out", vector_config(case))
    vector_model(case).save_pretrained(tmp_path / "saved")
    assert digests(tmp_path / "out") == digests(tmp_path / "saved")
    assert entry(tmp_path / "out") == entry(tmp_path / "saved")
    # from a checkpoint with other vectors, and to one without
    write_checkpoint(tmp_path / "out", tmp_path / "again", vector_config(case, seed=1))
    assert sha256(tmp_path / "again" / FILE) == entry(tmp_path / "again")["vectors"]["sha256"]
    write_checkpoint(tmp_path / "out", tmp_path / "plain", case.config)
    assert not (tmp_path / "plain" / FILE).exists()
    assert digests(tmp_path / "plain") == digests(case.dense_folder)


RELOAD = """
import sys
import cats_llm, families
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
save_file({"logits": families.logits(model, families.ids())}, sys.argv[2])
model.save_pretrained(sys.argv[3])
"""


def test_a_new_process_computes_the_same_to_the_bit(llama, folder, tmp_path):
    result = python(RELOAD, folder, tmp_path / "logits", tmp_path / "again")
    assert result.returncode == 0, result.stderr
    assert torch.equal(load_file(tmp_path / "logits")["logits"], logits(vector_model(llama), llama.ids))
    assert digests(tmp_path / "again") == digests(folder)


def test_shards(llama, tmp_path):
    vector_model(llama).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(digests(tmp_path)) > 4
    assert torch.equal(logits(load(tmp_path), llama.ids), logits(vector_model(llama), llama.ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_vectors_are_exact_in_every_dtype(llama, folder, dtype):
    mlp = cats_llm.sparse_mlps(load(folder, dtype=dtype))[1]
    assert torch.equal(mlp.threshold, make_vectors(llama)[1].thresholds)
    assert torch.equal(mlp.compensation, make_vectors(llama)[1].compensation)


def test_a_dense_folder_and_a_config_with_vectors(llama, tmp_path):
    model = load(llama.dense_folder, quantization_config=vector_config(llama))
    assert torch.equal(logits(model, llama.ids), logits(vector_model(llama), llama.ids))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path), llama.ids), logits(model, llama.ids))


def test_saving_over_another_checkpoint(llama, folder):
    vector_model(llama, seed=1).save_pretrained(folder)
    assert torch.equal(logits(load(folder), llama.ids), logits(vector_model(llama, seed=1), llama.ids))
    llama.sparse().save_pretrained(folder)  # what nobody names any more is not read
    assert torch.equal(logits(load(folder), llama.ids), logits(llama.sparse(), llama.ids))


def test_without_the_package_the_model_is_the_dense_one(llama, folder, tmp_path):
    code = RELOAD.replace("import cats_llm, families", "import families")
    result = python(code, folder, tmp_path / "logits", tmp_path / "again")
    assert result.returncode == 0, result.stderr
    assert torch.equal(load_file(tmp_path / "logits")["logits"], llama.dense_logits)
    # it could not save the vectors, and that does not go unnoticed
    with pytest.raises(CatsError, match=f"{FILE}.*cannot be read"):
        load(tmp_path / "again")


def _cut(folder):
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-1])


def _flip(folder):
    content = bytearray((folder / FILE).read_bytes())
    content[-1] ^= 1
    (folder / FILE).write_bytes(content)


def _other(folder):
    write_layer_tensors(folder, {0: LayerTensors(torch.ones(families.FFN))})


DAMAGE = {
    "missing": (lambda folder: (folder / FILE).unlink(), "cannot be read"),
    "cut": (_cut, "is damaged or belongs to another checkpoint"),
    "one bit": (_flip, "is damaged or belongs to another checkpoint"),
    "of another model": (_other, "is damaged or belongs to another checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_one_clear_error(llama, folder, damage):
    change, message = DAMAGE[damage]
    change(folder)
    (folder / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(CatsError, match=message) as error:
        load(folder)
    assert FILE in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


def test_vectors_of_a_model_of_another_size_are_refused(llama, folder, tmp_path):
    other = {0: LayerTensors(compensation=torch.ones(3))}
    damaged = edit(folder, tmp_path / "edited", lambda e: e["vectors"].update(sha256=digest(encode(other))))
    (damaged / FILE).unlink()
    write_layer_tensors(damaged, other)
    with pytest.raises(CatsError, match=r"compensation of layer 0 are 3 numbers, but the model needs 64"):
        load(damaged)


def test_offloading_and_a_device_map(llama, folder, tmp_path):
    expected = logits(vector_model(llama), llama.ids)
    assert torch.equal(logits(load(folder, device_map="cpu"), llama.ids), expected)
    disk = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    disk |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    for offload_buffers in (False, True):
        model = load(folder, device_map=disk, offload_folder=str(tmp_path / "offload"), offload_buffers=offload_buffers)
        torch.testing.assert_close(logits(model, llama.ids), expected, rtol=1e-5, atol=1e-5)
        with pytest.warns(UserWarning, match="offloaded"):
            model.save_pretrained(tmp_path / f"saved{offload_buffers}")
        assert digests(tmp_path / f"saved{offload_buffers}") == digests(folder)


# what people save models with


def test_arguments_of_save_pretrained_reach_it(llama, tmp_path):
    model = vector_model(llama)
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "positional", True, state)
    assert not any(t.any() for t in load_file(tmp_path / "positional" / "model.safetensors").values())
    assert (tmp_path / "positional" / FILE).is_file()
    model.save_pretrained(str(tmp_path / "variant"), variant="x")
    assert (tmp_path / "variant" / "model.x.safetensors").is_file()
    model.save_pretrained(tmp_path / "other process", is_main_process=False)
    assert not (tmp_path / "other process" / FILE).exists()


def test_a_copied_or_compiled_model_saves_its_own(llama, tmp_path):
    model = vector_model(llama)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    cats_llm.sparsify(twin, vector_config(llama, seed=1))
    for name, saved in {"model": model, "twin": twin, "compiled": torch.compile(model)}.items():
        saved.save_pretrained(tmp_path / name)
    assert sha256(tmp_path / "model" / FILE) == vector_config(llama).vectors_sha256
    assert sha256(tmp_path / "twin" / FILE) == vector_config(llama, seed=1).vectors_sha256
    assert digests(tmp_path / "compiled") == digests(tmp_path / "model")


def test_somebody_elses_save_pretrained_is_kept(llama, tmp_path):
    model, calls = llama.dense_copy(), []
    usual = type(model).save_pretrained

    def own(folder, **kwargs):
        calls.append(folder)
        usual(model, folder, **kwargs)

    model.save_pretrained = own
    cats_llm.sparsify(model, vector_config(llama))
    model.save_pretrained(tmp_path)
    assert calls == [tmp_path]
    assert (tmp_path / FILE).is_file()
    assert cats_llm.densify(model).save_pretrained is own


def test_pushing_to_the_hub_uploads_the_vectors(llama, tmp_path, monkeypatch):
    from transformers.utils import hub

    uploads = []

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})

        def create_commit(self, repo_id, operations, **kwargs):
            files = {operation.path_in_repo for operation in operations}
            uploads.append((repo_id, files, kwargs["commit_message"], kwargs["create_pr"]))

    card = type("Card", (), {"save": lambda self, path: None})()
    monkeypatch.setattr(hub, "hf_api", Hub)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", Hub, raising=False)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: card)
    model = vector_model(llama)
    model.push_to_hub("me/mine")
    model.save_pretrained(tmp_path / "here", push_to_hub=True, repo_id="me/other", commit_message="new", create_pr=True)
    model.save_pretrained(tmp_path / "name", True, None, True)
    assert [(repo, message, pr) for repo, _, message, pr in uploads] == [
        ("me/mine", "Upload LlamaForCausalLM", False),
        ("me/other", "new", True),
        ("name", "Upload LlamaForCausalLM", False),
    ]
    assert all({"config.json", "model.safetensors", FILE} <= files for _, files, *_ in uploads)
    assert sha256(tmp_path / "here" / FILE) == vector_config(llama).vectors_sha256


def test_the_trainer_saves_them(llama, tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in llama.ids]
    model = vector_model(llama)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, learning_rate=1e-3, use_cpu=True, report_to=[], disable_tqdm=True
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for name in ("checkpoint-1", "final"):
        assert sha256(tmp_path / name / FILE) == vector_config(llama).vectors_sha256
    model = model.eval()
    torch.testing.assert_close(logits(load(tmp_path / "final"), llama.ids), logits(model, llama.ids))


def test_adapters_on_a_model_with_vectors(llama, folder, tmp_path):
    peft = pytest.importorskip("peft")
    model = load(folder)
    lora = peft.LoraConfig(target_modules=["down_proj", "gate_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora)
    expected = logits(adapted, llama.ids)
    assert not torch.equal(expected, logits(vector_model(llama), llama.ids))
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter")
    torch.testing.assert_close(logits(again, llama.ids), expected)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert sha256(tmp_path / "merged" / FILE) == vector_config(llama).vectors_sha256
    torch.testing.assert_close(logits(load(tmp_path / "merged"), llama.ids), expected, rtol=1e-4, atol=1e-4)


# the hub


def hub_cache(folder, cache, without=()):
    """A hub's cache that holds the folder as the model me/mine."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = cache / "models--me--mine" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(commit)
    for file in folder.iterdir():
        if file.name not in without:
            shutil.copyfile(file, snapshot / file.name)
    return snapshot


def test_a_model_of_the_hub(llama, folder, tmp_path):
    hub_cache(folder, tmp_path / "cache")
    model = load("me/mine", cache_dir=tmp_path / "cache")
    assert torch.equal(logits(model, llama.ids), logits(vector_model(llama), llama.ids))
    model.save_pretrained(tmp_path / "saved")
    assert digests(tmp_path / "saved") == digests(folder)


def test_a_file_that_is_not_there_yet_is_fetched_from_the_same_commit(llama, folder, tmp_path, monkeypatch):
    snapshot = hub_cache(folder, tmp_path / "cache", without=[FILE])
    asked = []

    def cached_file(name, file, **kwargs):
        asked.append((name, file, kwargs))
        return str(folder / file)

    monkeypatch.setattr("cats_llm.integrations.transformers.cached_file", cached_file)
    model = load("me/mine", cache_dir=tmp_path / "cache")
    assert torch.equal(logits(model, llama.ids), logits(vector_model(llama), llama.ids))
    place = {"cache_dir": str(tmp_path / "cache"), "revision": snapshot.name, "subfolder": ""}
    assert asked == [("me/mine", FILE, place)]


def test_a_model_of_the_hub_without_its_vectors(folder, tmp_path):
    hub_cache(folder, tmp_path / "cache", without=[FILE])
    with pytest.raises(CatsError, match=f"me/mine lacks {FILE}") as error:
        load("me/mine", cache_dir=tmp_path / "cache")
    assert "\n" not in str(error.value)
