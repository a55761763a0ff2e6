"""Fixtures that several test files share."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3Config, Qwen3Config

from cats_llm import bundled
from cats_llm.cli.main import main


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
