"""A model whose code comes with the checkpoint, with projections under other names, as InternLM2 has it."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import cats_llm
from cats_llm import bundled
from cats_llm.cli.main import main

CODE = """
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class OtherConfig(PreTrainedConfig):
    model_type = "other"

    def __init__(self, vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=2, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.intermediate_size, self.num_hidden_layers = intermediate_size, num_hidden_layers
        super().__init__(**kwargs)


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.w1 = nn.Linear(d, f, bias=False)
        self.w2 = nn.Linear(f, d, bias=False)
        self.w3 = nn.Linear(d, f, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ffn_norm = nn.RMSNorm(config.hidden_size)
        self.feed_forward = FeedForward(config)

    def forward(self, x):
        return x + self.feed_forward(self.ffn_norm(x.cumsum(1)))


class OtherForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OtherConfig
    _no_split_modules = ["Block"]

    def __init__(self, config):
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.tok_embeddings

    def get_output_embeddings(self):
        return self.output

    def forward(self, input_ids=None, attention_mask=None, labels=None, use_cache=None, **kwargs):
        x = self.tok_embeddings(input_ids)
        for block in self.blocks:
            x = block(x)
        return CausalLMOutputWithPast(logits=self.output(x))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    (folder / "modeling_other.py").write_text(CODE)
    config = {
        "model_type": "other",
        "architectures": ["OtherForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_other.OtherConfig",
            "AutoModelForCausalLM": "modeling_other.OtherForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    for file in bundled.model_path().glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    model.save_pretrained(folder)
    return folder


def test_it_is_sparsified_saved_and_loaded(folder, tmp_path):
    (tmp_path / "text.txt").write_text("The miller went home in the evening and sat by the fire. " * 100)
    out = tmp_path / "out"
    arguments = ["sparsify", str(folder), str(out), "--sparsity", "0.5", "--data", str(tmp_path / "text.txt")]
    assert main([*arguments, "--seq-length", "64", "--samples", "4", "--trust-remote-code"]) == 0
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    dense = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    thresholds = cats_llm.thresholds(model)
    assert list(thresholds) == [0, 1]
    ids = torch.randint(3, 4000, (2, 30))
    for layer, block in enumerate(dense.blocks):

        def replaced(module, x, t=thresholds[layer]):
            a = torch.nn.functional.silu(module.w1(x[0]))
            return module.w2(torch.where(a.abs() < t, 0.0, a) * module.w3(x[0]))

        block.feed_forward.register_forward_hook(lambda module, x, _y, f=replaced: f(module, x))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-5)


def test_without_trust_it_is_refused_in_a_sentence(folder, tmp_path, capsys):
    assert main(["inspect", str(folder)]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "trust" in error
    assert "Traceback" not in error
