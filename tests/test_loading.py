"""Models of every head through the command line: loaded as what they were saved as, or told why not."""

import json
import logging
import shutil

import pytest
import torch
import transformers

import cats_llm
import tiny
from cats_llm import bundled
from cats_llm.calibration.batches import check_runs
from cats_llm.cli.main import main
from cats_llm.errors import CatsError
from cats_llm.evaluation.scoring import score_sequences
from cats_llm.loading import load_model, load_skeleton, load_tokenizer
from cats_llm.model.architecture import model_class
from checkpoints import save_with_tokenizer

PROSE = "It was a long walk to the mill, and the miller was not at home. "
LLAMA = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def mrope(model_type):
    config = tiny.tiny_config(model_type)
    config.text_config.rope_parameters = dict(MROPE)
    return config


def llama(**changes):
    return transformers.LlamaConfig(**(LLAMA | changes))


def save(folder, config, architecture=None):
    """A model folder with the bundled tokenizer (4096 tokens)."""
    return save_with_tokenizer(tiny.tiny_model(config, architecture), folder)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text(PROSE * 200, encoding="utf-8")
    return path


@pytest.fixture
def cats():
    return lambda *arguments: main([str(argument) for argument in arguments])


@pytest.fixture
def fails(cats, capsys):
    """Run a command that must fail with one sentence, and return it."""

    def run(*arguments):
        capsys.readouterr()
        assert cats(*arguments) == 1
        message = capsys.readouterr().err.strip()
        assert message.startswith("error: ")
        assert "\n" not in message
        return message

    return run


MULTIMODAL = {
    "qwen2_5_vl": lambda: mrope("qwen2_5_vl"),
    "llava": lambda: tiny.tiny_config("llava"),
    "gemma3": lambda: tiny.tiny_config("gemma3"),
    "mistral3": lambda: tiny.tiny_config("mistral3"),
    "paligemma": lambda: tiny.tiny_config("paligemma"),
    "idefics3": lambda: tiny.tiny_config("idefics3"),
    "qwen2_audio": lambda: tiny.tiny_config("qwen2_audio"),
    "voxtral": lambda: tiny.tiny_config("voxtral"),
}


@pytest.mark.parametrize("name", MULTIMODAL)
def test_the_text_half_of_a_multimodal_model_goes_through_every_command(name, cats, text, tmp_path):
    model = save(tmp_path / "m", MULTIMODAL[name]())
    out, report = tmp_path / "cats", tmp_path / "facts.json"
    assert (
        cats(
            "sparsify",
            model,
            out,
            "--sparsity",
            0.5,
            "--data",
            text,
            "--seq-length",
            32,
            "--samples",
            4,
            "--dtype",
            "float32",
        )
        == 0
    )
    stored = json.loads((out / "config.json").read_text())
    assert stored["quantization_config"]["quant_method"] == "cats", "the thresholds belong to the whole model's config"
    assert cats("inspect", out, "--text", text, "--seq-length", 32, "--samples", 4, "--json", report) == 0
    facts = json.loads(report.read_text())
    assert facts["sparse"]
    assert [layer["layer"] for layer in facts["layers"]] == [0, 1]
    assert all(0.4 < layer["measured_sparsity"] < 0.6 for layer in facts["layers"]), "half of the neurons are skipped"
    assert cats("generate", out, "--prompt", "Hello there", "--max-new-tokens", 2) == 0
    assert cats("eval", out, "--text", text, "--seq-length", 32, "--samples", 2, "--no-cache") == 0
    # what transformers makes of the folder without us is the same model, to the bit, and so is what it saves
    loaded = load_model(str(out), "float32", "cpu")
    ids = torch.randint(3, 4000, (2, 12))
    with torch.no_grad():
        logits = loaded(input_ids=ids).logits
        plain = type(loaded).from_pretrained(out, dtype="float32").eval()
        assert torch.equal(plain(input_ids=ids).logits, logits)
        plain.save_pretrained(tmp_path / "again")
        again = load_model(str(tmp_path / "again"), "float32", "cpu")
        assert torch.equal(again(input_ids=ids).logits, logits)
    assert len(cats_llm.thresholds(again)) == 2


HEADS = {
    "headless": "LlamaModel",
    "sequence classification": "LlamaForSequenceClassification",
    "token classification": "LlamaForTokenClassification",
    "question answering": "LlamaForQuestionAnswering",
}


@pytest.mark.parametrize("head", HEADS)
def test_other_heads_are_kept_calibrated_and_inspected_but_predict_nothing(head, cats, fails, text, tmp_path):
    model, out, report = tmp_path / "m", tmp_path / "cats", tmp_path / "facts.json"
    save(model, llama(), HEADS[head])
    assert type(load_skeleton(str(model))).__name__ == HEADS[head]
    data = ("--data", text, "--seq-length", 32, "--samples", 4)
    assert cats("sparsify", model, out, "--sparsity", 0.5, *data) == 0
    loaded = load_model(str(out), "float32", "cpu")
    assert type(loaded).__name__ == HEADS[head]
    assert len(cats_llm.thresholds(loaded)) == 2
    assert cats("inspect", out, "--text", text, "--seq-length", 32, "--samples", 4, "--json", report) == 0
    shares = [layer["measured_sparsity"] for layer in json.loads(report.read_text())["layers"]]
    assert shares == pytest.approx([0.5, 0.5], abs=0.05)
    short = ("--seq-length", 32, "--no-cache")
    for arguments in (
        ("generate", out, "--prompt", "Hello"),
        ("eval", out, "--text", text, *short),
        ("finetune", model, tmp_path / "f", "--method", "dense", "--data", text, "--steps", 1, "--seq-length", 32),
    ):
        message = fails(*arguments)
        assert HEADS[head] in message
        assert "predicts no next token" in message
    criterion = cats_llm.Criterion.parse("moment+allocate")
    with pytest.raises(CatsError, match="predicts no next token"):
        cats_llm.fit(loaded, [torch.randint(3, 4000, (2, 12))], 0.5, criterion)


def test_a_headless_checkpoint_gets_no_random_head(tmp_path):
    model = save(tmp_path / "m", llama(), "LlamaModel")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(CatsError, match=r"lacks 1 weights? of the model \(lm_head.weight"):
        load_model(str(model))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": "LlamaForCausalLM"}, "LlamaForCausalLM"),
        ({"architectures": []}, "AutoModelForCausalLM"),
        ({"architectures": None}, "AutoModelForCausalLM"),
        # of another family, unknown, or no model at all: what the type says
        ({"architectures": ["MistralForCausalLM"]}, "AutoModelForCausalLM"),
        ({"architectures": ["OurOwnForCausalLM"]}, "AutoModelForCausalLM"),
        ({"architectures": ["TrainingArguments", 7]}, "AutoModelForCausalLM"),
    ],
)
def test_the_class_is_the_one_that_the_checkpoint_names(changes, expected):
    config = llama()
    vars(config)["architectures"] = changes["architectures"]  # some versions of transformers would check it
    assert model_class(config).__name__ == expected


def test_code_of_the_checkpoint_goes_first_only_if_it_is_trusted():
    config = llama()
    config.architectures, config.auto_map = ["LlamaForCausalLM"], {"AutoModelForCausalLM": "mine.Model"}
    assert model_class(config, trust_remote_code=True).__name__ == "AutoModelForCausalLM"
    assert model_class(config).__name__ == "LlamaForCausalLM"


def test_a_multimodal_config_without_architectures_is_an_image_text_model():
    assert model_class(tiny.tiny_config("llava")).__name__ == "AutoModelForImageTextToText"


@pytest.fixture(scope="module")
def mllama():
    text = LLAMA | {
        "num_hidden_layers": 4,
        "cross_attention_layers": [1, 3],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1} | {
        "attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
    }
    return tiny.tiny_model(transformers.MllamaConfig(text_config=text, vision_config=vision))


class TestLayersThatTextSkips:
    """Mllama: the layers of cross-attention run only where there is an image."""

    @pytest.fixture
    def ids(self):
        return torch.randint(3, 4000, (2, 24))

    def test_they_stay_dense_count_as_dense_and_are_named(self, mllama, ids, caplog, tmp_path):
        with caplog.at_level(logging.WARNING):
            profile = cats_llm.calibrate(mllama, ids)
        assert "layers 1, 3" in caplog.text
        assert profile.not_run == [1, 3]
        profile.save(tmp_path / "p")
        config = cats_llm.Profile.load(tmp_path / "p").config(0.5)
        assert config.thresholds[1] == config.thresholds[3] == 0
        assert config.thresholds[0] > 0 < config.thresholds[2]
        assert config.layer_sparsity == pytest.approx({0: 0.5, 1: 0.0, 2: 0.5, 3: 0.0}, abs=0.01)

    @pytest.mark.parametrize("criterion", ["moment", "moment+compensate+sequential+allocate"])
    def test_other_criteria_pass_over_them(self, mllama, ids, criterion):
        config = cats_llm.fit(mllama, ids, 0.5, cats_llm.Criterion.parse(criterion))
        assert [layer for layer, t in config.thresholds.items() if t == 0] == [1, 3]
        assert config.layer_sparsity[1] == config.layer_sparsity[3] == 0

    def test_the_command_line(self, mllama, cats, text, tmp_path, capsys):
        mllama.save_pretrained(tmp_path / "m")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(bundled.model_path() / name, tmp_path / "m" / name)
        data = ("--data", text, "--seq-length", 32, "--samples", 4)
        assert cats("calibrate", tmp_path / "m", "-o", tmp_path / "p", *data) == 0
        out = tmp_path / "cats"
        assert cats("sparsify", tmp_path / "m", out, "--sparsity", 0.5, "--profile", tmp_path / "p") == 0
        assert "25.0" in capsys.readouterr().out, "half of the neurons in half of the layers"
        assert cats("generate", out, "--prompt", "Hello", "--max-new-tokens", 2) == 0
        assert cats("inspect", out, "--text", text, "--seq-length", 32, "--samples", 4) == 0


def test_an_encoder_decoder_is_refused_in_a_sentence(fails, text, tmp_path):
    half = LLAMA | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
    config = transformers.T5GemmaConfig(encoder=dict(half), decoder=dict(half), vocab_size=4096)
    model = save(tmp_path / "m", config, "T5GemmaForConditionalGeneration")
    data = ("--data", text, "--seq-length", 32)
    for arguments in (
        ("calibrate", model, *data, "-o", tmp_path / "p"),
        ("sparsify", model, tmp_path / "o", "--sparsity", 0.5, *data),
        ("generate", model, "--prompt", "Hello"),
        ("eval", model, "--text", text, "--seq-length", 32, "--no-cache"),
    ):
        assert "is an encoder-decoder" in fails(*arguments)
    with pytest.raises(CatsError, match="is an encoder-decoder"):
        cats_llm.calibrate(load_model(str(model)), [torch.randint(3, 4000, (2, 12))])


def test_a_model_that_needs_more_than_text_says_so(llama):
    class NeedsSound(type(llama.dense)):
        def forward(self, *args, input_features=None, **kwargs):
            if input_features is None:
                raise ValueError("You must specify input_features\nor not")
            return super().forward(*args, **kwargs)

    model = llama.dense_copy()
    model.model.forward = NeedsSound.forward.__get__(model)
    message = r"does not run on text alone \(You must specify input_features\)"
    with pytest.raises(CatsError, match=message):
        cats_llm.calibrate(model, [llama.ids])
    with pytest.raises(CatsError, match=message):
        score_sequences(model, llama.ids)
    with pytest.raises(CatsError, match=message):
        check_runs(model)


class TestFolders:
    @pytest.fixture
    def folder(self, tmp_path):
        return shutil.copytree(bundled.model_path(), tmp_path / "m")

    def change(self, folder, name="config.json", **values):
        known = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps(known | values))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model_type": "brandnew", "architectures": ["BrandNewForCausalLM"]}, "upgrade transformers"),
            (
                {"model_type": "brandnew", "auto_map": {"AutoConfig": "a.C", "AutoModelForCausalLM": "a.M"}},
                "pass --trust-remote-code",
            ),
            ({"hidden_act": "unheard_of"}, "KeyError 'unheard_of'"),
            ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, ""),
        ],
    )
    def test_configs_that_nothing_is_made_of(self, folder, fails, changes, message):
        self.change(folder, **changes)
        assert message in fails("inspect", folder, "--no-measure")
        with pytest.raises(CatsError, match=message):
            load_model(str(folder))

    @pytest.mark.parametrize(
        "settings",
        [
            {"early_stopping": "x"},
            {"cache_implementation": "foo"},
            {"watermarking_config": {"seeding_scheme": "q"}},
            {"compile_config": {"x": 1}},
            {"max_new_tokens": -3},
        ],
    )
    def test_invalid_generation_settings_do_not_stop_loading(self, folder, settings, caplog):
        self.change(folder, "generation_config.json", **settings)
        assert load_model(str(folder)).generation_config.eos_token_id is None
        assert "generation_config.json" in caplog.text

    def test_valid_generation_settings_are_kept(self, folder):
        self.change(folder, "generation_config.json", repetition_penalty=1.5)
        assert load_model(str(folder)).generation_config.repetition_penalty == 1.5

    def test_a_folder_without_a_tokenizer(self, folder):
        for file in folder.glob("tokenizer*"):
            file.unlink()
        with pytest.raises(CatsError, match="no tokenizer files"):
            load_tokenizer(str(folder))
