"""Every command as a user types it, on the bundled model and on tiny random ones."""

import hashlib
import json
import re

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Qwen3Config,
)

import cats_llm
from cats_llm import bundled
from cats_llm.cli.main import main

TEXT = bundled.calibration_text()
HELDOUT = bundled.heldout_text()
SMALL = ("--samples", 4, "--seq-length", 128)


@pytest.fixture(scope="session")
def cats():
    """Run `cats ARGUMENTS` in this process and return its exit code."""

    def run(*arguments):
        return main([str(argument) for argument in arguments])

    return run


def _tiny(config, folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((bundled.model_path() / name).read_bytes())
    return folder


_SIZES = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 144,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory):
    """Folders of the bundled model, a tiny random Qwen3 and a tiny random Phi-3 (fused gate_up), by name."""
    root = tmp_path_factory.mktemp("models")
    return {
        "bundled": bundled.model_path(),
        "qwen3": _tiny(Qwen3Config(**_SIZES, head_dim=16), root / "qwen3"),
        "phi3": _tiny(Phi3Config(**_SIZES), root / "phi3"),
    }


@pytest.fixture(scope="session")
def read_json():
    """Read a JSON file."""
    return lambda path: json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["bundled", "qwen3", "phi3"])
def model(request, model_folders):
    return model_folders[request.param]


@pytest.fixture(scope="module")
def profile(model, cats, tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "p.safetensors"
    assert cats("calibrate", model, "--data", TEXT, "-o", path, *SMALL, "--dtype", "float32") == 0
    return path


@pytest.fixture(scope="module")
def sparse(model, profile, cats, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "cats50"
    assert cats("sparsify", model, out, "--sparsity", 0.5, "--profile", profile) == 0
    return out


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights(path):
    with safe_open(path / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_sparsify_keeps_the_weights_to_the_byte(model, sparse):
    assert digest(sparse / "model.safetensors") == digest(model / "model.safetensors")


def test_the_checkpoint_is_a_cats_model_for_transformers(model, sparse):
    loaded = AutoModelForCausalLM.from_pretrained(sparse, dtype="auto")
    config = loaded.config.quantization_config
    assert cats_llm.thresholds(loaded) == config.thresholds
    assert config.sparsity == 0.5
    for layer, share in config.layer_sparsity.items():
        assert share == pytest.approx(0.5, abs=1e-3), f"layer {layer}"
    dense = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    assert type(loaded) is type(dense)


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_achieved_sparsity_counted_by_hand_on_the_calibration_tokens(model, profile, cats, tmp_path, sparsity):
    """Within 0.1 point in every layer, counted without any code of the package."""
    out = tmp_path / "out"
    assert cats("sparsify", model, out, "--sparsity", sparsity, "--profile", profile) == 0
    thresholds = cats_llm.CatsConfig.from_dict(
        AutoModelForCausalLM.from_pretrained(out).config.quantization_config.to_dict()
    ).thresholds
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    documents = TEXT.read_text(encoding="utf-8").split("\n<|endoftext|>\n")
    ids = tokenizer(documents[0].strip(), verbose=False).input_ids[: 4 * 128]
    counted = {}
    for layer, block in enumerate(dense.model.layers):
        act = block.mlp.act_fn if hasattr(block.mlp, "act_fn") else block.mlp.activation_fn
        act.register_forward_hook(lambda module, inputs, a, layer=layer: counted.update({layer: a.abs()}))
    with torch.no_grad():
        dense(torch.tensor(ids).view(4, 128))
    for layer, a in counted.items():
        share = (a < thresholds[layer]).double().mean().item()
        assert share == pytest.approx(sparsity, abs=1e-3), f"layer {layer}"


def test_several_sparsities_from_one_profile(model, profile, cats, tmp_path, read_json):
    found = []
    for sparsity in (0.3, 0.9):
        out = tmp_path / str(sparsity)
        assert cats("sparsify", model, out, "--sparsity", sparsity, "--profile", profile) == 0
        found.append(read_json(out / "config.json")["quantization_config"]["thresholds"])
    assert all(found[0][layer] < found[1][layer] for layer in found[0])


def test_sparsify_from_text_equals_sparsify_from_a_profile(model, sparse, cats, tmp_path, read_json):
    out = tmp_path / "out"
    assert cats("sparsify", model, out, "--sparsity", 0.5, "--data", TEXT, *SMALL, "--dtype", "float32") == 0
    configs = [read_json(path / "config.json")["quantization_config"] for path in (out, sparse)]
    assert configs[0]["thresholds"] == configs[1]["thresholds"]
    assert configs[0]["calibration"]["tokens"] == 512


def test_calibration_of_a_cats_checkpoint_is_that_of_its_dense_model(sparse, profile, cats, tmp_path):
    path = tmp_path / "p.safetensors"
    assert cats("calibrate", sparse, "--data", TEXT, "-o", path, *SMALL, "--dtype", "float32") == 0
    a, b = cats_llm.Profile.load(path), cats_llm.Profile.load(profile)
    assert a.config(0.7).thresholds == b.config(0.7).thresholds


def test_inspect(model, sparse, cats, tmp_path, read_json, capsys):
    file = tmp_path / "i.json"
    assert cats("inspect", sparse, "--json", file, "--seq-length", 64, "--samples", 2) == 0
    facts = read_json(file)
    assert facts["sparse"]
    thresholds = cats_llm.thresholds(AutoModelForCausalLM.from_pretrained(sparse))
    assert {layer["layer"]: layer["threshold"] for layer in facts["layers"]} == thresholds
    assert all(0.2 < layer["measured_sparsity"] < 0.8 for layer in facts["layers"])
    # bytes of the matrices, from the file itself
    tensors = weights(model)
    mlp = sum(t.numel() * t.element_size() for name, t in tensors.items() if ".mlp." in name)
    every = sum(t.numel() * t.element_size() for t in tensors.values())
    if "lm_head.weight" in tensors:
        every -= tensors["model.embed_tokens.weight"].numel() * tensors["model.embed_tokens.weight"].element_size()
    read = facts["bytes_per_token"]
    assert (read["mlp_dense"], read["dense"]) == (mlp, every)
    mean = sum(layer["measured_sparsity"] for layer in facts["layers"]) / len(facts["layers"])
    assert read["mlp_sparse"] == pytest.approx(mlp * (1 - 2 / 3 * mean), rel=1e-6)
    assert read["dense"] - read["sparse"] == read["mlp_dense"] - read["mlp_sparse"]
    assert facts["sparsity"]["gate"] == pytest.approx(mean)
    assert facts["sparsity"]["ffn"] == pytest.approx(2 / 3 * mean)
    capsys.readouterr()
    assert cats("inspect", model, "--no-measure") == 0
    assert "dense model" in capsys.readouterr().out


def test_generate_streams_what_transformers_generates(sparse, cats, tmp_path, read_json, capsys):
    file = tmp_path / "g.json"
    assert cats("generate", sparse, "--prompt", "Once upon a time", "--max-new-tokens", 12, "--json", file) == 0
    printed = capsys.readouterr()
    result = read_json(file)
    loaded = AutoModelForCausalLM.from_pretrained(sparse, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(sparse)
    inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
    expected = loaded.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert result["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert result["sparse"]
    assert result["text"].strip()[:20] in printed.out
    assert "tokens/s" in printed.err


def test_generate_without_decode_linears(sparse, cats, tmp_path, read_json):
    file = tmp_path / "g.json"
    arguments = ("--prompt", "The king", "--max-new-tokens", 4, "--no-decode-linears", "--json", file)
    assert cats("generate", sparse, *arguments) == 0
    assert read_json(file)["tokens"] == 4


def test_generate_with_our_own_loop_gives_the_same_and_streams(sparse, cats, tmp_path, read_json, capsys):
    texts = []
    for name, *more in (("plain",), ("graph", "--graph")):
        file = tmp_path / f"{name}.json"
        capsys.readouterr()
        assert cats("generate", sparse, "--prompt", "The king", "--max-new-tokens", 12, "--json", file, *more) == 0
        texts.append(read_json(file)["text"])
        assert texts[-1].strip()[:20] in capsys.readouterr().out
    assert texts[0] == texts[1]


def test_sampling_is_repeatable(sparse, cats, tmp_path, read_json):
    texts = []
    for i, seed in enumerate((1, 1, 2)):
        file = tmp_path / f"{i}.json"
        arguments = ("--prompt", "The king", "--max-new-tokens", 10, "--temperature", 1.0, "--seed", seed)
        assert cats("generate", sparse, *arguments, "--json", file) == 0
        texts.append(read_json(file)["text"])
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_eval_equals_a_computation_by_hand(model, sparse, cats, tmp_path, read_json):
    file = tmp_path / "e.json"
    assert cats("eval", sparse, "--text", HELDOUT, *SMALL, "--dtype", "float32", "--json", file) == 0
    result = read_json(file)
    assert [variant["name"] for variant in result["variants"]] == ["dense", sparse.name]
    found = {row["metric"]: row for row in result["results"] if row["variant"] == sparse.name}
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(sparse, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(sparse)
    document = HELDOUT.read_text(encoding="utf-8").split("\n<|endoftext|>\n")[0]
    ids = torch.tensor(tokenizer(document, verbose=False).input_ids[: 4 * 128]).view(4, 128)
    with torch.no_grad():
        p, q = (m(ids).logits[:, :-1].double().log_softmax(-1) for m in (dense, loaded))
    nll = -q.gather(-1, ids[:, 1:, None]).mean()
    assert result["tasks"][0]["tokens"] == 4 * 127
    assert found["perplexity"]["tokens"] == 4 * 128
    assert found["perplexity"]["value"] == pytest.approx(nll.exp().item(), rel=1e-5)
    assert found["kl"]["value"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    assert found["top1_agreement"]["value"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    other = tmp_path / "o.json"
    arguments = ("--against", model, "--text", HELDOUT, *SMALL, "--dtype", "float32", "--json", other)
    assert cats("eval", sparse, *arguments) == 0
    again = {row["metric"]: row for row in read_json(other)["results"] if row["variant"] == sparse.name}
    for key in ("kl", "perplexity", "top1_agreement"):
        assert again[key]["value"] == pytest.approx(found[key]["value"], rel=1e-6), (
            "the dense function is another model"
        )


def test_eval_of_a_dense_model(model, cats, tmp_path, read_json, capsys):
    file = tmp_path / "e.json"
    assert cats("eval", model, "--text", HELDOUT, *SMALL, "--json", file) == 0
    result = read_json(file)
    assert [variant["name"] for variant in result["variants"]] == ["dense"]
    assert {row["metric"] for row in result["results"]} == {"perplexity", "word_perplexity", "byte_perplexity"}
    assert all(row["layer_sparsity"] == {} and row["difference"] is None for row in result["results"])
    assert f"{result['results'][0]['value']:.4f}" in capsys.readouterr().out


def test_eval_of_many_variants(model, profile, sparse, cats, tmp_path, read_json, capsys):
    file = tmp_path / "e.json"
    arguments = ("--sparsity", "0,0.5,0.9", "--method", "cats,relu", "--profile", profile, "--checkpoint", sparse)
    measure = ("--text", HELDOUT, *SMALL, "--dtype", "float32")
    assert cats("eval", model, *arguments, *measure, "--json", file) == 0
    result = read_json(file)
    names = ["dense", "cats k=0.5", "cats k=0.9", "relu", sparse.name]
    assert [variant["name"] for variant in result["variants"]] == names
    assert result["format"] == "cats-eval"
    rows = {row["variant"]: row for row in result["results"] if row["metric"] == "perplexity"}
    assert rows["cats k=0.5"]["value"] == rows[sparse.name]["value"], "the same thresholds"
    assert rows["cats k=0.9"]["sparsity"]["gate"] > rows["cats k=0.5"]["sparsity"]["gate"] > 0.4
    for name in names[1:]:
        difference = rows[name]["difference"]
        assert difference["value"] == pytest.approx(rows[name]["value"] - rows["dense"]["value"])
        assert difference["low"] <= difference["value"] <= difference["high"]
        assert 0 < difference["p"] <= 1
    printed = capsys.readouterr()
    assert "[5/5]" in printed.err
    assert f"{rows['relu']['value']:.4f}" in printed.out
    assert cats("eval", model, *arguments, *measure) == 0
    assert capsys.readouterr().err.count("known already") == 5


def test_which_tokens_are_sparse_is_kept_in_the_checkpoint(model, profile, cats, tmp_path, read_json, capsys):
    rule = ("--dense-first-tokens", 4, "--last-fraction", 0.5)
    assert cats("sparsify", model, tmp_path / "c", "--sparsity", 0.5, "--profile", profile, *rule) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert str(loaded.config.quantization_config.coverage) == "first 4 dense, last 0.5 of a prompt sparse"
    capsys.readouterr()
    assert cats("inspect", tmp_path / "c") == 0
    assert "sparse tokens: first 4 dense, last 0.5 of a prompt sparse" in capsys.readouterr().out
    file = tmp_path / "e.json"
    assert cats("eval", tmp_path / "c", "--text", HELDOUT, *SMALL, "--json", file) == 0
    result = read_json(file)
    assert result["variants"][1]["coverage"] == {
        "dense_prefill": False, "dense_first_tokens": 4, "last_fraction": 0.5,
    }  # fmt: skip
    assert 0.2 < result["results"][-1]["sparsity"]["gate"] < 0.3
    assert cats("eval", tmp_path / "c", "--text", HELDOUT, *SMALL, "--dense-prefill", "--json", file, "--force") == 0
    assert read_json(file)["results"][-1]["sparsity"]["gate"] == 0.0


@pytest.mark.parametrize("command", ["calibrate", "sparsify", "inspect", "generate", "eval", "demo"])
def test_every_command_has_help_with_an_example(cats, capsys, command):
    assert cats(command, "--help") == 0
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert f"Example: cats {command}" in shown
    for option in ("--json", "--device", "--dtype"):
        assert option in shown


class TestErrors:
    """One sentence, the right exit code, nothing left behind."""

    @pytest.fixture
    def fails(self, cats, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

        def check(code, message, *arguments):
            before = sorted(p.as_posix() for p in tmp_path.rglob("*"))
            capsys.readouterr()
            assert cats(*arguments) == code
            printed = capsys.readouterr()
            assert re.search(message, printed.err), printed.err
            assert printed.err.startswith("error: ")
            assert printed.err.count("\n") == 1, "more than one line"
            assert "Traceback" not in printed.err + printed.out
            assert sorted(p.as_posix() for p in tmp_path.rglob("*")) == before, "something was left behind"

        return check

    @pytest.fixture
    def gpt2(self, tmp_path, model_folders):
        folder = tmp_path / "gpt2"
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 4096, "n_positions": 256}
        GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((model_folders["bundled"] / name).read_bytes())
        return folder

    @pytest.fixture
    def good(self, model_folders):
        return model_folders["qwen3"]

    @pytest.fixture
    def good_profile(self, good, cats, tmp_path):
        path = tmp_path / "good.safetensors"
        assert cats("calibrate", good, "--data", TEXT, "-o", path, *SMALL) == 0
        return path

    def test_no_gated_mlp(self, fails, gpt2, good_profile):
        message = "GPT2LMHeadModel has no gated MLP"
        fails(1, message, "calibrate", gpt2, "--data", TEXT, "-o", "p")
        fails(1, message, "sparsify", gpt2, "out", "--sparsity", 0.5, "--profile", good_profile)
        fails(1, message, "sparsify", gpt2, "out", "--sparsity", 0.5, "--data", TEXT)
        fails(1, message, "inspect", gpt2)

    @pytest.mark.parametrize("sparsity", ["1.0", "-0.1", "abc", "nan", "50"])
    def test_sparsity(self, fails, good, good_profile, sparsity):
        fails(2, "sparsity|not a number", "sparsify", good, "out", "--sparsity", sparsity, "--profile", good_profile)

    def test_missing_things(self, fails, good):
        fails(1, r"no folder \./nope", "inspect", "./nope")
        fails(1, r"no file or folder nope\.txt", "calibrate", good, "--data", "nope.txt", "-o", "p", *SMALL)
        fails(1, "no calibration profile nope", "sparsify", good, "out", "--sparsity", 0.5, "--profile", "nope")
        fails(2, "Missing (argument|parameter)", "sparsify", good)
        fails(2, "either --profile, or --data", "sparsify", good, "out", "--sparsity", 0.5)
        fails(2, "No such command", "frobnicate")

    def test_text(self, fails, good, tmp_path):
        (tmp_path / "empty.txt").write_text("")
        (tmp_path / "short.txt").write_text("hello there")
        for command in (("calibrate", good, "-o", "p", "--data"), ("eval", good, "--text")):
            fails(1, "holds no text", *command, "empty.txt", *SMALL)
            fails(1, "fewer tokens than one sequence of 128", *command, "short.txt", *SMALL)
            fails(1, "more than the 256 tokens", *command, "short.txt", "--seq-length", 257)
        fails(1, "the prompt is empty", "generate", good, "--prompt", "")
        fails(1, "no chat template", "generate", good, "--prompt", "x", "--chat")

    def test_results_are_never_on_the_text_of_the_calibration(self, fails, good, good_profile, tmp_path):
        (tmp_path / "copy.txt").write_bytes(TEXT.read_bytes())
        arguments = ("eval", good, "--sparsity", 0.5, "--text", "copy.txt")
        fails(1, "the text that the thresholds come from", *arguments, "--calibration", TEXT, *SMALL)
        fails(1, "the text that the thresholds come from", *arguments, "--profile", good_profile, *SMALL)

    def test_eval(self, fails, good):
        fails(2, "nothing to measure", "eval", good)
        fails(2, "not a number", "eval", good, "--text", HELDOUT, "--sparsity", "0.5,x")
        fails(1, "needs thresholds", "eval", good, "--text", HELDOUT, "--sparsity", 0.5, *SMALL)
        fails(1, "'magic' is no method", "eval", good, "--text", HELDOUT, "--method", "magic", *SMALL)
        fails(1, "magic_task is no task", "eval", good, "--tasks", "magic_task")
        fails(1, "no folder nope", "eval", good, "--tasks", "piqa", "--data-dir", "nope")
        fails(1, "no meaning", "eval", good, "--text", HELDOUT, "--dense-prefill", "--last-fraction", 0.5)
        fails(1, "a stride of 200", "eval", good, "--text", HELDOUT, *SMALL, "--stride", 200)

    def test_damaged_files(self, fails, good, good_profile, tmp_path):
        (tmp_path / "corrupt").write_bytes(good_profile.read_bytes()[:-100])
        fails(1, "damaged", "sparsify", good, "out", "--sparsity", 0.5, "--profile", "corrupt")
        broken = tmp_path / "broken"
        broken.mkdir()
        for file in good.iterdir():
            (broken / file.name).write_bytes(file.read_bytes())
        (broken / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes()[:5000])
        fails(1, "truncated or damaged", "sparsify", broken, "out", "--sparsity", 0.5, "--profile", good_profile)
        fails(1, "truncated or damaged", "calibrate", broken, "--data", TEXT, "-o", "p")
        fails(1, "truncated or damaged", "generate", broken, "--prompt", "x")
        (broken / "config.json").write_text("{")
        fails(1, "not JSON", "inspect", broken)
        (broken / "config.json").unlink()
        fails(1, r"no config\.json", "inspect", broken)

    def test_a_profile_of_another_model(self, fails, good, good_profile, tmp_path):
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
        for layers in (2, 3):
            other = tmp_path / f"other{layers}"
            LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers)).save_pretrained(other)
            message = "the profile was made with another model"
            fails(1, message, "sparsify", other, "out", "--sparsity", 0.5, "--profile", good_profile)

    def test_existing_outputs(self, fails, good, good_profile, cats, tmp_path):
        out = tmp_path / "out"
        assert cats("sparsify", good, out, "--sparsity", 0.5, "--profile", good_profile) == 0
        before = digest(out / "config.json")
        again = ("sparsify", good, out, "--sparsity", 0.9, "--profile", good_profile)
        fails(1, "exists already", *again)
        fails(1, "exists already", "calibrate", good, "--data", TEXT, "-o", good_profile)
        fails(1, "exists already", "inspect", good, "--json", good_profile)
        assert digest(out / "config.json") == before
        assert cats(*again, "--force") == 0
        assert digest(out / "config.json") != before
        fails(1, "is the model itself", "sparsify", out, out, "--sparsity", 0.5, "--profile", good_profile, "--force")

    def test_a_checkpoint_with_missing_weights(self, fails, good, tmp_path):
        from safetensors.torch import save_file

        broken = tmp_path / "broken"
        broken.mkdir()
        for file in good.iterdir():
            (broken / file.name).write_bytes(file.read_bytes())
        tensors = weights(good)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
        fails(1, r"lacks 1 weights? .*layers\.1\.mlp\.up_proj", "generate", broken, "--prompt", "x")

    def test_options(self, fails, good):
        fails(2, "'int3' is none of", "generate", good, "--prompt", "x", "--dtype", "int3")
        fails(2, "'gpu' is no device", "generate", good, "--prompt", "x", "--device", "gpu")


def test_demo(cats, tmp_path, read_json, capsys):
    out = tmp_path / "demo"
    assert cats("demo", "--out", out, "--samples", 2, "--max-new-tokens", 8) == 0
    results = read_json(out / "results.json")
    variants = {variant["name"]: variant for variant in results["variants"]}
    assert list(variants) == ["dense", "cats k=0.5", "cats k=0.7", "cats k=0.9"]
    for folder, (name, variant) in zip(("cats-50", "cats-70", "cats-90"), list(variants.items())[1:], strict=True):
        assert cats_llm.thresholds(AutoModelForCausalLM.from_pretrained(out / folder))
        assert all(abs(s - variant["sparsity"]) <= 1e-3 for s in variant["layer_sparsity"].values()), name
    perplexities = [row["value"] for row in results["results"] if row["metric"] == "perplexity"]
    assert len(perplexities) == 4
    assert perplexities == sorted(perplexities)
    assert all(texts.keys() == variants.keys() for texts in results["continuations"].values())
    report = (out / "report.html").read_text(encoding="utf-8")
    assert f"{perplexities[1]:.2f}" in report
    # an ordinary result and profile, and the one page
    again = tmp_path / "again.html"
    assert cats("report", out / "results.json", out / "profile.safetensors", "--output", again) == 0
    assert again.read_text(encoding="utf-8") == report
    printed = capsys.readouterr().out
    assert "to the bit" in printed
    # a rate of this model, taken once, is noise
    for told in (report, printed, json.dumps(results)):
        assert not re.search(r"tokens(/s|_per_s|\s*per\s+second|<br>per)", told), "the demo tells a speed"


class TestTune:
    """The command around `autotune.tune`, with an invented GPU."""

    @pytest.fixture
    def calls(self, monkeypatch, tmp_path):
        from cats_llm.benchmark import autotune
        from cats_llm.kernels import gpu
        from cats_llm.kernels.gpu import tuning

        made = []

        def tune(d, f, dtype, tokens, sparsity):
            made.append((d, f, dtype, tokens, sparsity))
            return None, 40.0, 50.0

        monkeypatch.setattr(gpu.BACKEND, "available", lambda: True)
        monkeypatch.setattr(autotune, "tune", tune)
        monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "tuned.json"))
        return made

    def test_every_shape_batch_and_sparsity(self, cats, calls, capsys, model_folders, read_json):
        assert cats("tune", "--shape", "96,160", "--batch", "1,4", "--sparsity", "0,0.5", "--dtype", "float16") == 0
        assert calls == [(96, 160, torch.float16, tokens, k) for tokens in (1, 4) for k in (0.0, 0.5)]
        out = capsys.readouterr().out
        assert "1.25" in out
        assert "tuned.json" in re.sub(r"\s", "", out)
        calls.clear()
        assert cats("tune", model_folders["qwen3"], "--sparsity", 0.7) == 0
        config = read_json(model_folders["qwen3"] / "config.json")
        assert calls == [(config["hidden_size"], config["intermediate_size"], torch.bfloat16, 1, 0.7)]

    def test_wrong_usage(self, cats, calls, capsys):
        for message, *arguments in (
            ("either MODEL or --shape", "tune"),
            ("either MODEL or --shape", "tune", "folder", "--shape", "mistral-7b"),
            ("up to 16", "tune", "--shape", "mistral-7b", "--batch", "17"),
        ):
            assert cats(*arguments) == 2
            assert message in re.sub(r"\s+", " ", capsys.readouterr().err)
        assert not calls

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu(self, cats, capsys):
        assert cats("tune", "--shape", "mistral-7b") == 1
        assert "nothing to tune" in capsys.readouterr().err


# criteria


@pytest.fixture(scope="module")
def fitted(model, cats, tmp_path_factory):
    """A checkpoint of a criterion that needs vectors, and what the command wrote as JSON."""
    out = tmp_path_factory.mktemp("fitted")
    name = "moment+sequential+allocate+distill"
    arguments = ["--sparsity", 0.6, "--data", TEXT, "--samples", 4, "--seq-length", 64, "--dtype", "float32"]
    arguments += ["--distill-steps", 4]
    assert cats("sparsify", model, out / "m", "--criterion", name, *arguments, "--json", out / "m.json") == 0
    return out / "m"


def test_a_criterion_writes_an_ordinary_checkpoint_and_one_small_file(model, fitted, read_json):
    assert digest(fitted / "model.safetensors") == digest(model / "model.safetensors")
    written = read_json(fitted / "config.json")["quantization_config"]
    assert written["version"] == 3
    assert written["criterion"]["name"] == "moment+compensate+sequential+allocate+distill"
    assert written["criterion"]["distillation"]["steps"] == 4
    assert written["vectors"]["sha256"] == digest(fitted / "cats.safetensors")
    shares = list(written["layer_sparsity"].values())
    assert sum(shares) / len(shares) == pytest.approx(0.6, abs=5e-3)
    loaded = AutoModelForCausalLM.from_pretrained(fitted, dtype="auto")
    assert loaded.config.quantization_config.vectors is not None


def test_a_model_with_a_criterion_generates_and_is_inspected(fitted, cats, tmp_path, read_json, capsys):
    assert cats("generate", fitted, "--prompt", "Once upon a time", "--max-new-tokens", 4) == 0
    assert cats("inspect", fitted, "--seq-length", 64, "--samples", 4, "--json", tmp_path / "i.json") == 0
    assert "moment" in capsys.readouterr().out


def test_auto_says_what_it_measured(model_folders, cats, tmp_path, read_json, capsys):
    out = tmp_path / "m"
    small = ["--samples", 4, "--seq-length", 64, "--batch-size", 2]
    arguments = ["--sparsity", 0.5, "--data", TEXT, *small, "--distill-steps", 2, "--json", tmp_path / "m.json"]
    assert cats("sparsify", model_folders["qwen3"], out, "--criterion", "auto", *arguments) == 0
    measured = read_json(tmp_path / "m.json")["measured"]
    assert next(iter(measured)) == "cats"
    chosen = read_json(out / "config.json")["quantization_config"].get("criterion", {}).get("name", "cats")
    assert chosen == min(measured, key=measured.get)
    assert "KL to dense" in capsys.readouterr().out


def test_as_much_sparsity_as_bytes_or_perplexity_allow(model_folders, cats, tmp_path, read_json):
    model = model_folders["bundled"]
    small = ["--data", TEXT, "--samples", 4, "--seq-length", 64, "--batch-size", 2]
    assert cats("sparsify", model, tmp_path / "a", "--bytes-per-token", "13MB", *small) == 0
    k = read_json(tmp_path / "a" / "config.json")["quantization_config"]["sparsity"]
    linear = 2 * 4096 * 256 + 2 * 8 * (256 * (256 + 128 + 128) + 256 * 256) + 2 * 17 * 256  # head, attention, norms
    mlp = 2 * 8 * 3 * 256 * 896
    assert linear + mlp * (1 - 2 / 3 * k) == pytest.approx(13e6, rel=1e-6)
    arguments = ["--max-perplexity-increase", "10%", *small, "--json", tmp_path / "b.json"]
    assert cats("sparsify", model, tmp_path / "b", *arguments) == 0
    facts = read_json(tmp_path / "b.json")
    assert facts["measured"][f"{facts['config']['sparsity']:g}"] <= 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--criterion", "magic", "--sparsity", 0.5], "'magic' is no score"),
        (["--criterion", "cats+magic", "--sparsity", 0.5], "is no part of one"),
        (["--sparsity", 0.5, "--bytes-per-token", "1GB"], "pass one of --sparsity"),
        ([], "pass one of --sparsity"),
        (["--bytes-per-token", "many"], "'many' is no size"),
        (["--bytes-per-token", "1GB"], "bytes a token cannot be had"),
        (["--max-perplexity-increase", "-3"], "'-3' is no increase"),
        (["--max-perplexity-increase", "3", "--criterion", "auto"], "compares criteria at one sparsity"),
    ],
)
def test_wrong_questions_are_one_sentence(model_folders, cats, tmp_path, capsys, arguments, message):
    assert cats("sparsify", model_folders["qwen3"], tmp_path / "m", "--data", TEXT, *SMALL, *arguments) != 0
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in shown, shown
    assert not list(tmp_path.iterdir())


def test_a_criterion_needs_text(model_folders, profile, cats, tmp_path, capsys):
    arguments = ["--sparsity", 0.5, "--criterion", "norm", "--profile", profile]
    assert cats("sparsify", model_folders["qwen3"], tmp_path / "m", *arguments) != 0
    assert "pass --data instead" in " ".join(capsys.readouterr().err.replace("│", " ").split())
