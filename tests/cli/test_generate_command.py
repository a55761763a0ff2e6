"""`cats generate`: whatever the checkpoint's settings, its tokenizer and its chat template are."""

import json
import shutil

import pytest
import torch
import transformers

from cats_llm import bundled, continuation
from cats_llm.cli.main import main
from cats_llm.continuation import Decoding, continue_prompt
from cats_llm.errors import CatsError
from cats_llm.integrations import generation
from cats_llm.loading import load_model, load_tokenizer

CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant: "
PARTS = (
    "{% for m in messages %}{% for part in m['content'] %}"
    "{% if part.type == 'text' %}<{{ part.text }}>{% endif %}"
    "{% endfor %}{% endfor %}"
)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(bundled.model_path(), tmp_path / "m")


def change(folder, name, **values):
    known = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
    (folder / name).write_text(json.dumps(known | values))


def generate(folder, tmp_path, *more):
    file = tmp_path / "g.json"
    arguments = ("generate", folder, "--prompt", "The king", "--max-new-tokens", 4, "--json", file, "--force", *more)
    assert main([str(argument) for argument in arguments]) == 0
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def greedy(model, tokenizer):
    """What the model says by itself, taken by hand."""
    ids = tokenizer("The king", return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(4):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return tokenizer.decode(ids[0, -4:], skip_special_tokens=True)


SETTINGS = {
    "beams": {"num_beams": 4, "early_stopping": True, "length_penalty": 2.0},
    "groups of beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "several sequences": {"num_return_sequences": 3, "do_sample": True},
    "a dictionary": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "hidden states": {"output_attentions": True, "output_hidden_states": True},
    "max_length": {"max_length": 2},
    "min_length": {"min_length": 100, "min_new_tokens": 100},
    "forced tokens": {"forced_bos_token_id": 7, "forced_eos_token_id": 9},
    "forced ids": {"forced_decoder_ids": [[1, 5]], "begin_suppress_tokens": [3], "suppress_tokens": [4, 5]},
    "stop strings": {"stop_strings": ["king", " "]},
    "constraints": {"force_words_ids": [[5]], "constraints": []},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {"is_assistant": True, "num_assistant_tokens": 3, "assistant_early_exit": 2},
    "dola": {"dola_layers": "high"},
    "a static cache": {"cache_implementation": "static"},
    "a quantised cache": {"cache_implementation": "quantized"},
    "no cache": {"use_cache": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "typical_p": 0.5},
    "watermark": {"watermarking_config": {"greenlist_ratio": 0.5, "bias": 9.0}},
    "penalties": {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "bad_words_ids": [[5]], "guidance_scale": 2.0},
    "low memory": {"low_memory": True, "remove_invalid_values": True, "renormalize_logits": True},
    "types that are wrong": {"temperature": "hot", "num_beams": "many", "max_new_tokens": "x"},
    "invalid": {"early_stopping": "sometimes", "cache_implementation": "none"},
    "end tokens as text": {"eos_token_id": "</s>", "pad_token_id": -1, "bos_token_id": [0.5]},
    "no end": {"eos_token_id": None, "pad_token_id": None},
    "many ends": {"eos_token_id": [4000, 4001], "pad_token_id": 99999},
    "unknown keys": {"our_own": 3, "transformers_version": "1"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_checkpoints_settings_do_not_matter(folder, tmp_path, greedy, name):
    change(folder, "generation_config.json", **SETTINGS[name])
    assert generate(folder, tmp_path)["text"] == greedy


def test_settings_in_config_json_do_not_matter(folder, tmp_path, greedy):
    change(folder, "config.json", num_beams=4, num_return_sequences=2, use_cache=False, temperature=3.0)
    assert generate(folder, tmp_path)["text"] == greedy


def test_the_models_own_settings_come_back(model, tokenizer, monkeypatch):
    own = transformers.GenerationConfig(num_beams=3, eos_token_id=7)
    monkeypatch.setattr(model, "generation_config", own)
    continue_prompt(model, tokenizer, "The king", Decoding(max_new_tokens=2))
    assert model.generation_config is own
    assert own.num_beams == 3


def test_it_ends_where_the_checkpoint_says(model, tokenizer, greedy, monkeypatch):
    second = tokenizer(greedy, add_special_tokens=False).input_ids[1]
    monkeypatch.setattr(model, "generation_config", transformers.GenerationConfig(eos_token_id=[second, 4000]))
    assert continue_prompt(model, tokenizer, "The king", Decoding(max_new_tokens=4))["tokens"] == 2


@pytest.mark.parametrize("more", [(), ("--chat",)])
@pytest.mark.parametrize("names", [["input_ids"], ["input_ids", "token_type_ids", "attention_mask", "special"]])
def test_what_else_a_tokenizer_returns_is_left_out(folder, tmp_path, more, names):
    change(folder, "tokenizer_config.json", model_input_names=names, chat_template=CHAT)
    assert generate(folder, tmp_path, *more)["tokens"] == 4


class TestChat:
    def prompt(self, tokenizer, template):
        tokenizer.chat_template = template
        return tokenizer.decode(continuation._encoded(tokenizer, "The king", chat=True)[0])

    @pytest.fixture
    def tokenizer(self):
        return load_tokenizer(str(bundled.model_path()))

    def test_text(self, tokenizer):
        assert self.prompt(tokenizer, CHAT) == "user: The king\nassistant: "

    def test_a_template_of_a_multimodal_model_gets_parts(self, tokenizer):
        assert self.prompt(tokenizer, PARTS) == "<The king>"

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{{ raise_exception('only the roles of a play') }}", r"\(only the roles of a play\)"),
            ("{% for %}", "chat template refuses"),
            ("{{ messages[5].content + 1 }}", "chat template refuses"),
            ("{{ messages[0]['content'] + 1 }}", "chat template refuses"),
            ("{{ 1 / 0 }}", "division"),
        ],
    )
    def test_a_template_that_refuses_is_one_sentence(self, tokenizer, template, message):
        with pytest.raises(CatsError, match=message) as error:
            self.prompt(tokenizer, template)
        assert "\n" not in str(error.value)

    def test_without_a_template(self, folder, capsys):
        assert main(["generate", str(folder), "--prompt", "Hello", "--chat"]) == 1
        assert "no chat template" in capsys.readouterr().err


class Tokenizer:
    """Stands for one in Python: no ids for what it does not know, and numbers with holes."""

    bos_token_id = eos_token_id = pad_token_id = chat_template = None

    def __call__(self, text, **options):
        return {"input_ids": [ord(letter) for letter in text.encode("ascii").decode()]}

    def get_vocab(self):
        return {chr(number): number for number in range(128)}

    def __len__(self):
        return 128

    def decode(self, tokens, **options):
        return "".join({number: chr(number) for number in range(128)}[token] for token in tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_that_the_tokenizer_does_not_know_are_passed_over(model, stream, capsys):
    # a model of 4096 tokens: most of what it says is beyond
    result = continue_prompt(model, Tokenizer(), "The king", Decoding(max_new_tokens=5), stream=stream)
    assert result["tokens"] == 5
    assert len(result["text"]) < 5
    assert capsys.readouterr().out.startswith("The king") == stream


def test_prompts_that_cannot_be_read_are_one_sentence(model, tokenizer):
    with pytest.raises(CatsError, match="the prompt is empty"):
        continue_prompt(model, Tokenizer(), "")
    for broken in (Tokenizer(), tokenizer):
        with pytest.raises(CatsError, match="cannot read the prompt"):
            continue_prompt(model, broken, "\udce4 king")
    grown = load_tokenizer(str(bundled.model_path()))
    grown.add_tokens(["<|im_start|>"], special_tokens=True)
    with pytest.raises(CatsError, match=r"token 4096 \('<\|im_start\|>'\)"):
        continue_prompt(model, grown, "<|im_start|>user")


def test_learned_positions_end_the_text():
    config = transformers.GPT2Config(
        vocab_size=128, n_embd=32, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=None
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    assert continue_prompt(model, Tokenizer(), "twelve chars", Decoding(max_new_tokens=50))["tokens"] == 4
    with pytest.raises(CatsError, match="the prompt has 16 tokens, but the model has learned 16 positions"):
        continue_prompt(model, Tokenizer(), "sixteen letters.")


class TestGraph:
    """There is no GPU here, so what is tested is the choice."""

    @pytest.fixture
    def asked(self, monkeypatch):
        """What the model's generate was called with."""
        found = {}

        def fake(self, ids, generation_config, **arguments):
            found.update(arguments, config=generation_config)
            return torch.cat([ids, ids[:, :1]], 1)

        monkeypatch.setattr(transformers.GenerationMixin, "generate", fake)
        return found

    def test_on_a_gpu_by_itself_without_compiling(self, model, tokenizer, asked, monkeypatch):
        monkeypatch.setattr(continuation, "graph_applies", lambda model: True)
        continue_prompt(model, tokenizer, "The king")
        assert "custom_generate" in asked
        assert asked["config"].cache_implementation == "static"
        assert asked["config"].disable_compile is True

    def test_compiled_if_asked_for(self, model, tokenizer, asked):
        continue_prompt(model, tokenizer, "The king", Decoding(graph=True))
        assert "custom_generate" in asked
        assert not asked["config"].disable_compile

    @pytest.mark.parametrize("graph", [None, False])
    def test_not_on_a_cpu_nor_if_refused(self, model, tokenizer, asked, monkeypatch, graph):
        if graph is False:
            monkeypatch.setattr(continuation, "graph_applies", lambda model: True)
        continue_prompt(model, tokenizer, "The king", Decoding(graph=graph))
        assert "custom_generate" not in asked
        assert asked["config"].cache_implementation is None

    def test_where_it_applies(self, cases, monkeypatch, caplog):
        models = {name: cases(name).dense_copy() for name in ("llama", "qwen3", "gemma2", "gemma3-text")}
        assert not generation.graph_applies(models["llama"]), "it is on the CPU"
        monkeypatch.setattr(transformers.PreTrainedModel, "device", torch.device("cuda"))
        assert generation.graph_applies(models["llama"])
        assert generation.graph_applies(models["qwen3"])
        assert not generation.graph_applies(models["gemma2"]), "it has layers with a sliding window"
        assert not generation.graph_applies(models["gemma3-text"])
        models["llama"]._can_compile_fullgraph = False
        assert not generation.graph_applies(models["llama"]), "its step may wait for the GPU"
        assert not caplog.text


def test_options(folder, tmp_path, greedy):
    assert generate(folder, tmp_path, "--no-graph")["text"] == greedy
    assert load_model(str(folder)).generation_config is not None
