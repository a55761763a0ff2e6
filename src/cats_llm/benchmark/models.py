"""The models that are measured: the shapes of known ones, with random weights, and copies that share weights."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cats_llm.errors import CatsError
from cats_llm.kernels.definition import ACTIVATIONS, gate_activation
from cats_llm.model.structure import find_gated_mlps


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. ``intermediate_size`` neurons in each of ``layers`` layers."""

    name: str
    hidden_size: int
    intermediate_size: int
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 32000


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama2-7b", 4096, 11008, kv_heads=32),
        Shape("mistral-7b", 4096, 14336),
        Shape("llama3-8b", 4096, 14336, vocab_size=128256),
        Shape("qwen3-8b", 4096, 12288, layers=36, vocab_size=151936),
    )
}


def parse_shape(text: str) -> Shape:
    """A named shape, or D,F.

    Raises:
        CatsError: it is neither.
    """
    if text in SHAPES:
        return SHAPES[text]
    try:
        d, f = (int(part) for part in text.split(","))
    except ValueError:
        d = f = 0
    if d < 1 or f < 1:
        raise CatsError(f"{text!r} is no shape; use {', '.join(SHAPES)} or D,F (hidden and intermediate size).")
    heads = max(1, d // 128)
    return Shape(text, d, f, heads=heads, kv_heads=heads, head_dim=d // heads)


def random_model(shape: Shape, layers: int, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """A Mistral-architecture model of a shape with random weights, drawn on the device."""
    from transformers import AutoModelForCausalLM, MistralConfig

    config = MistralConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        sliding_window=None,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    config.dtype = dtype
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


class MLPs(nn.Module):
    """MLPs side by side: a call runs them one after the other on the same input, so that no weight stays cached."""

    def __init__(self, shape: Shape, layers: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        with torch.device(device):
            self.layers = nn.ModuleList(_random_mlp(shape).to(dtype) for _ in range(layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(..., d) -> one (..., d) a layer."""
        return [layer(x) for layer in self.layers]


def _random_mlp(shape: Shape) -> nn.Module:
    from transformers import MistralConfig
    from transformers.models.mistral.modeling_mistral import MistralMLP

    mlp: nn.Module = MistralMLP(MistralConfig(hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size))
    for linear in mlp.children():
        if isinstance(linear, nn.Linear):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    return mlp


def thresholds_for(gate: Tensor, sparsities: Sequence[float]) -> tuple[list[Tensor], list[float]]:
    """For each gate sparsity the threshold that reaches it on these gates, (n, f), and the share of neurons read.

    With several tokens a neuron is read if any of them keeps it.
    """
    a = gate_activation(gate, ACTIVATIONS["silu"]).abs().float()
    values = a.flatten().sort().values
    thresholds = [values[round(k * len(values))] if k else values.new_zeros(()) for k in sparsities]
    return thresholds, [float((a >= t).any(0).float().mean()) for t in thresholds]


def copy_sharing_weights(model: nn.Module, but_down: bool = False) -> nn.Module:
    """A copy that shares the parameters, or all but those of down_proj, which dense and sparse lay out differently."""
    copied_ones = {id(mlp.down_linear.weight) for mlp in find_gated_mlps(model)} if but_down else set()
    memo = {id(p): p for p in model.parameters() if id(p) not in copied_ones}
    copied = copy.deepcopy(model, memo)
    for compiled in ("_compiled_call", "_cats_compiled_step"):  # compiled forms are the original's
        vars(copied).pop(compiled, None)
    return copied
