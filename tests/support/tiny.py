"""Tiny random models of any family of transformers: its own config class, made small without knowing families."""

from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_HIDDEN = 64
_SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "attention_heads": 4,
    "n_head": 4,
    "num_kv_heads": 2,
    "num_global_attention_heads": 4,
    "num_global_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "query_pre_attn_scalar": 16,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "depth": 2,
    "n_layer": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_global_layers": 1,
    "intermediate_size": 96,
    "mlp_hidden_size": 96,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "ffn_dim": 96,
    "hidden_size": _HIDDEN,
    "n_embd": _HIDDEN,
    "d_model": _HIDDEN,
    "dim": _HIDDEN,
    "embed_dim": _HIDDEN,
    "out_hidden_size": _HIDDEN,
    "output_dim": _HIDDEN,
    "projection_dim": _HIDDEN,
    "vision_output_dim": 2 * _HIDDEN,
    "text_hidden_size": _HIDDEN,
    "image_size": 28,
    "patch_size": 14,
    "sliding_window": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "intermediate_layers_indices": [0],
    "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [0],
    "out_indices": [1],
    "num_kv_shared_layers": 0,
    "max_num_tiles": 1,
    "supported_aspect_ratios": [[1, 1]],
    "cross_attention_layers": [1],
}


_LATENT = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 16}
# what a family needs beside the sizes above to be built and run
_MORE: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "attn_layer_indices": [1]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 32},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_expand": 1},
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "qwen4_exp_text": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "reformer": {"is_decoder": True},
    "minicpm3": _LATENT | {"num_key_value_heads": 4, "head_dim": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": _HIDDEN, "attention_window_size": 16},
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "youtu": _LATENT | {"num_key_value_heads": 4, "head_dim": 8},
    "zamba": {"num_hidden_layers": 12, "num_key_value_heads": 4, "n_mamba_heads": 2},
}


def tiny_config(model_type: str) -> Any:
    """A family's config with two layers of 64 features, and the same for what is nested in it."""
    return _tiny(CONFIG_MAPPING[model_type])


def _tiny(config_class: Any) -> Any:
    default = config_class()
    values = {key: _SIZES[key] for key in _SIZES if _is_size(default, key)}
    layers = next((k for k in ("num_hidden_layers", "num_layers", "n_layer") if k in values), None)
    values |= (more := _MORE.get(config_class.model_type, {}))
    if layers in more and isinstance(getattr(default, "layer_types", None), list):
        values["layer_types"] = default.layer_types[: more[layers]]
    elif layers is not None and isinstance(getattr(default, "layer_types", None), list):
        kinds = list(dict.fromkeys(default.layer_types))
        values["layer_types"] = (kinds + kinds)[: max(2, len(kinds))]
        values[layers] = len(values["layer_types"])
    rope = getattr(default, "rope_parameters", None)
    if isinstance(rope, dict):
        values["rope_parameters"] = _small_rope(rope)
    for name in config_class.sub_configs or {}:
        part = getattr(default, name, None)
        if isinstance(part, transformers.PreTrainedConfig):
            values[name] = _tiny(type(part)).to_dict()
    values |= more
    try:
        return config_class(**values)
    except AttributeError:  # these follow from others in some families
        return config_class(**{key: value for key, value in values.items() if key not in ("layer_types", "head_dim")})


def _is_size(config: Any, key: str) -> bool:
    if isinstance(getattr(type(config), key, None), property):
        return False
    try:
        return isinstance(getattr(config, key, None), (int, list, tuple))
    except Exception:  # of each layer, and not of the model
        return False


def _small_rope(rope: Any) -> Any:
    if isinstance(rope, dict):
        return {k: [2, 3, 3] if k == "mrope_section" else _small_rope(v) for k, v in rope.items()}
    return rope


def tiny_model(config: Any, architecture: str | None = None) -> nn.Module:
    """The model in float32, in evaluation mode."""
    from cats_llm.model.architecture import model_class

    torch.manual_seed(0)
    found = getattr(transformers, architecture) if architecture else model_class(config)
    model = found.from_config(config) if hasattr(found, "from_config") else found._from_config(config)
    return model.float().eval()
