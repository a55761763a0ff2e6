"""Tiny random models of many families, and an independent computation of what CATS makes of them."""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

VOCAB = 128
HIDDEN = 64
FFN = 96  # no power of two
LAYERS = 2

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@dataclass(frozen=True)
class Family:
    """How to build a model of the family, and what its MLPs look like.

    `mlp` is the path of the MLP in layer {} of the model, `act` its activation.
    """

    architecture: str
    config: Callable[[], Any]
    mlp: str = "model.layers.{}.mlp"
    act: Callable[[Tensor], Tensor] = F.silu
    fused: bool = False

    def build(self, seed: int = 0) -> nn.Module:
        """The model in float32, in evaluation mode, with weights large enough that its layers matter."""
        torch.manual_seed(seed)
        model = getattr(transformers, self.architecture)(self.config())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2 and "embed" not in name:
                    parameter.normal_(0, 1.5 / math.sqrt(parameter[0].numel()))
                elif parameter.dim() >= 2:
                    parameter.normal_(0, 0.03)  # small, so that the layers, not the last token, decide the next one
                elif name.endswith("bias"):
                    parameter.normal_(0, 0.3)
                else:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.generation_config.eos_token_id = None  # generate all the tokens asked for
        return model.eval()


def _text(config: str, **changes: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, config)(**(TEXT | changes))


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _text("LlamaConfig")),
    "llama-tied": Family("LlamaForCausalLM", _text("LlamaConfig", tie_word_embeddings=True)),
    "llama-bias": Family("LlamaForCausalLM", _text("LlamaConfig", mlp_bias=True, attention_bias=True)),
    "mistral": Family("MistralForCausalLM", _text("MistralConfig", sliding_window=8)),
    "qwen2": Family("Qwen2ForCausalLM", _text("Qwen2Config", tie_word_embeddings=True)),
    "qwen3": Family("Qwen3ForCausalLM", _text("Qwen3Config", head_dim=32)),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _text("Gemma2Config", head_dim=16, query_pre_attn_scalar=16, sliding_window=8, tie_word_embeddings=True),
        act=gelu_tanh,
    ),
    "gemma3-text": Family(
        "Gemma3ForCausalLM",
        _text("Gemma3TextConfig", head_dim=16, query_pre_attn_scalar=16, sliding_window=8, tie_word_embeddings=True),
        act=gelu_tanh,
    ),
    "gemma3": Family(
        "Gemma3ForConditionalGeneration",
        lambda: transformers.Gemma3Config(
            text_config=TEXT | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
            vision_config=SIGLIP,
            mm_tokens_per_image=4,
            boi_token_index=120,
            eoi_token_index=121,
            image_token_index=122,
        ),
        mlp="model.language_model.layers.{}.mlp",
        act=gelu_tanh,
    ),
    "phi3": Family("Phi3ForCausalLM", _text("Phi3Config"), fused=True),
    "olmo2": Family("Olmo2ForCausalLM", _text("Olmo2Config")),
    "granite": Family(
        "GraniteForCausalLM",
        _text("GraniteConfig", mlp_bias=True, embedding_multiplier=2.0, residual_multiplier=0.5, logits_scaling=2.0),
    ),
    "smollm3": Family("SmolLM3ForCausalLM", _text("SmolLM3Config")),
    "stablelm": Family("StableLmForCausalLM", _text("StableLmConfig", use_qkv_bias=True)),
    # its vision tower has gated MLPs too, which must be left alone
    "qwen2.5-vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        lambda: transformers.Qwen2_5_VLConfig(
            text_config=TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": HIDDEN,
                "fullatt_block_indexes": [1],
            },
            image_token_id=122,
            video_token_id=123,
            vision_start_token_id=120,
            vision_end_token_id=121,
        ),
        mlp="model.language_model.layers.{}.mlp",
    ),
}

_FALCON_H1 = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_expand": 1}

# models that CATS must refuse, and a part of the sentence that says why
REFUSED: dict[str, tuple[Family, str]] = {
    "gpt2": (
        Family(
            "GPT2LMHeadModel",
            lambda: transformers.GPT2Config(
                vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
            ),
        ),
        "has no gated MLP",
    ),
    "mixtral": (
        Family("MixtralForCausalLM", _text("MixtralConfig", num_local_experts=4)),
        "routes tokens through experts",
    ),
    "qwen2-moe": (
        Family(
            "Qwen2MoeForCausalLM",
            _text("Qwen2MoeConfig", num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32),
        ),
        "routes tokens through experts",
    ),
    "falcon-h1": (
        Family("FalconH1ForCausalLM", _text("FalconH1Config", mlp_multipliers=[0.5, 1.0], **_FALCON_H1)),
        "computes more than",
    ),
    "gemma3n": (
        Family(
            "Gemma3nForCausalLM",
            _text(
                "Gemma3nTextConfig",
                num_hidden_layers=4,
                intermediate_size=[FFN] * 4,
                activation_sparsity_pattern=[0.9, 0.9, 0.0, 0.0],
                num_kv_shared_layers=0,
                layer_types=["sliding_attention", "full_attention"] * 2,
                head_dim=16,
                sliding_window=8,
                vocab_size_per_layer_input=VOCAB,
                hidden_size_per_layer_input=16,
                laurel_rank=8,
                altup_num_inputs=2,
            ),
        ),
        "computes more than",
    ),
}


def ids(batch: int = 3, length: int = 40, seed: int = 1) -> Tensor:
    """Random tokens, none of them special, (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 100, (batch, length), generator=generator)


def reference_mlp(mlp: nn.Module, x: Tensor, t: Any, act: Callable[[Tensor], Tensor], fused: bool) -> Tensor:
    """The MLP of a CATS model, written out: no code of the package is used. ``t`` is a number or one a neuron."""

    def linear(x: Tensor, module: Any) -> Tensor:
        return F.linear(x, module.weight, module.bias)

    if fused:
        both = linear(x, mlp.gate_up_proj)
        gate, up = both[..., : both.shape[-1] // 2], both[..., both.shape[-1] // 2 :]
    else:
        gate, up = linear(x, mlp.gate_proj), linear(x, mlp.up_proj)
    a = act(gate if gate.dtype == torch.float64 else gate.float())
    a = torch.where(a.abs().float() < torch.as_tensor(t, dtype=torch.float32), torch.zeros_like(a), a).to(gate.dtype)
    return linear(a * up, mlp.down_proj)


class Reference:
    """While it lasts, hooks replace the output of every MLP of a *dense* model by `reference_mlp`."""

    def __init__(self, model: nn.Module, family: Family, thresholds: Mapping[int, float]) -> None:
        self.model, self.family, self.thresholds = model, family, thresholds

    def __enter__(self) -> nn.Module:
        self.stack = ExitStack()
        for layer, t in self.thresholds.items():

            def hook(module: nn.Module, args: tuple[Tensor], output: Tensor, t: float = t) -> Tensor:
                return reference_mlp(module, args[0], t, self.family.act, self.family.fused)

            mlp = self.model.get_submodule(self.family.mlp.format(layer))
            self.stack.callback(mlp.register_forward_hook(hook).remove)
        return self.model

    def __exit__(self, *args: object) -> None:
        self.stack.close()


def logits(model: nn.Module, inputs: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=inputs, **kwargs).logits
