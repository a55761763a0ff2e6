"""GGUF files as llama.cpp's converter writes them, of tiny models whose weights the tests know."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Type

from cats_llm import bundled

TEMPLATE = "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_llama(tied=True, **changes):
    """A random Llama of 4096 tokens, in float32, with weights that matter."""
    torch.manual_seed(1)
    rope = changes.pop("rope_parameters", {"rope_type": "default", "rope_theta": 20000.0})
    config = transformers.LlamaConfig(**SIZES | changes, tie_word_embeddings=tied, rope_parameters=rope)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1) if parameter.dim() == 2 else parameter.uniform_(0.5, 1.5)
    return model


def llama_cpp_name(name):
    """``blk.0.attn_q.weight`` for ``model.layers.0.self_attn.q_proj.weight``."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{_NAMES[part]}.{kind}"
    return f"{_NAMES[stem]}.{kind}"


def permuted(weight, heads):
    """Rows of W_q or W_k in the order of llama.cpp, which rotates neighbours instead of halves."""
    half = weight.shape[0] // heads // 2
    order = [head * 2 * half + part * half + i for head in range(heads) for i in range(half) for part in (0, 1)]
    return weight[order]


def plain(kind):
    """Stored as numbers: matrices in a type, vectors in float32."""
    return lambda name, weight: (weight if weight.ndim < 2 else weight.astype(kind), None)


def quantised(kind):
    """Stored in blocks by the package gguf; vectors in float32."""

    def store(name, weight):
        return (weight, None) if weight.ndim < 2 else (gguf.quants.quantize(weight, kind), kind)

    return store


def write(path: Path, model, store=None, *, architecture="llama", change=None, extra=(), **writer):
    """Write a model to a GGUF file, or to several (``split_max_tensors=``).

    Args:
        store: of the name and weight of a tensor the array to write and its type (None: as numpy's). Default: float32.
        change: called with the `GGUFWriter` before anything is written.
        extra: more tensors, by name.
    """
    config, store = model.config, store or plain(np.float32)
    out = gguf.GGUFWriter(path, architecture, **writer)
    out.add_name("tiny")
    out.add_context_length(config.max_position_embeddings)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_embedding_length(config.hidden_size)
    out.add_rope_dimension_count(config.head_dim)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    add_tokenizer(out)
    if change is not None:
        change(out)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        theirs = llama_cpp_name(name)
        weight = parameter.detach().float().numpy()
        for part, number in heads.items():
            weight = permuted(weight, number) if f".{part}." in theirs else weight
        array, kind = store(name, np.ascontiguousarray(weight))
        out.add_tensor(theirs, array, raw_dtype=kind)
    for name, array in dict(extra).items():
        out.add_tensor(name, array)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def add_tokenizer(out):
    """The bundled tokenizer as metadata."""
    content = json.loads((bundled.model_path() / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    special = {token["content"] for token in content["added_tokens"]}
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(tokens)
    out.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    out.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    out.add_bos_token_id(0)
    out.add_eos_token_id(1)
    out.add_pad_token_id(1)
    out.add_add_bos_token(False)
    out.add_chat_template(TEMPLATE)


def q8_0(content, shape):
    """What 34 bytes a block stand for: a float16 d, 32 int8 q; d * q. In float64, of the array's own bytes."""
    blocks = np.frombuffer(content.tobytes(), [("d", "<f2"), ("q", "i1", 32)])
    return (blocks["d"].astype(np.float64)[:, None] * blocks["q"]).reshape(shape)


def q4_0(content, shape):
    """18 bytes: a float16 d, 16 bytes of two q each, the first 16 in the low halves; d * (q - 8)."""
    blocks = np.frombuffer(content.tobytes(), [("d", "<f2"), ("q", "u1", 16)])
    q = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], axis=1).astype(np.float64) - 8
    return (blocks["d"].astype(np.float64)[:, None] * q).reshape(shape)


def random_q4_k(shape, seed):
    """Random blocks of Q4_K, written by hand, and the weights that they stand for, in float64.

    256 weights are 8 groups of 32: d * scale[g] * q - dmin * minimum[g], with q of 4 bits, scales and minima of 6.
    """
    rng = np.random.default_rng(seed)
    number = int(np.prod(shape)) // 256
    d = rng.uniform(1e-4, 1e-3, (number, 2)).astype("<f2")
    scale, minimum = (rng.integers(0, 64, (number, 8), dtype=np.uint8) for _ in range(2))
    q = rng.integers(0, 16, (number, 8, 32), dtype=np.uint8)
    packed = np.zeros((number, 12), np.uint8)
    packed[:, 0:4] = scale[:, :4] | (scale[:, 4:] >> 4) << 6
    packed[:, 4:8] = minimum[:, :4] | (minimum[:, 4:] >> 4) << 6
    packed[:, 8:12] = (scale[:, 4:] & 15) | (minimum[:, 4:] & 15) << 4
    # a run of 32 bytes holds two groups: the even one in the low halves
    halves = (q[:, 0::2] | q[:, 1::2] << 4).reshape(number, 128)
    content = np.concatenate([d.view(np.uint8), packed, halves], axis=1)
    wide = d.astype(np.float64)
    weights = wide[:, :1, None] * scale[:, :, None] * q - wide[:, 1:, None] * minimum[:, :, None]
    return content.reshape(shape[0], -1), weights.reshape(shape)


__all__ = ["SIZES", "TEMPLATE", "Type", "plain", "q4_0", "q8_0", "quantised", "random_q4_k", "tiny_llama", "write"]
