"""LoRA on a model's projections, found by structure, by way of PEFT."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from cats_llm.errors import CatsError
from cats_llm.model.structure import find_gated_mlps, unwrap
from cats_llm.training.config import TrainingConfig


def adaptable(model: nn.Module, names: Sequence[str] | None = None) -> list[str]:
    """Paths of the linear layers that get adapters.

    By default those of the paper, in every decoder layer with a gated MLP: query and value of the attention (a fused
    layer of query, key and value as a whole) and gate, up and down of the MLP.

    Args:
        names: last parts of paths to take instead, anywhere in the decoder layers.

    Raises:
        CatsError: a name fits no linear layer, or the attention has none that is known.
    """
    base = unwrap(model)
    layers = [(mlp, _linears(base, mlp.layer_path)) for mlp in find_gated_mlps(base)]
    if names is not None:
        paths = [path for _, linears in layers for path in linears if _name(path) in names]
        missing = [name for name in names if name not in map(_name, paths)]
        if missing:
            known = sorted({_name(path) for path in _linears(base)})
            some = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
            raise CatsError(f"no decoder layer has a linear layer {missing[0]!r}; --lora-targets may name {some}.")
        return paths
    attention = [path for mlp, linears in layers for path in _attention(linears, mlp.name)]
    if not attention:
        raise CatsError(
            f"{type(base).__name__} has no attention with q_proj and v_proj or a fused layer for them; name the layers "
            "that get adapters with --lora-targets."
        )
    return attention + [f"{mlp.name}.{part}" for mlp, _ in layers for part in mlp.roles.projections]


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _linears(model: nn.Module, prefix: str = "") -> list[str]:
    """Paths of the linear layers below a module."""
    modules = model.get_submodule(prefix).named_modules(prefix=prefix)
    return [path for path, module in modules if isinstance(module, nn.Linear)]


def _attention(paths: list[str], mlp: str) -> list[str]:
    """Query and value among a layer's linear layers, which may not be of its MLP."""
    paths = [path for path in paths if not path.startswith(f"{mlp}.")]
    named = [path for path in paths if _name(path) in ("q_proj", "v_proj")]
    return named or [path for path in paths if "qkv" in _name(path) or path.endswith("query_key_value")]


def add_adapters(model: Any, config: TrainingConfig) -> Any:
    """The model in a PEFT wrapper with fresh adapters, which alone are trained.

    Adapters are float32 whatever the model's dtype, as the optimizer needs them.

    Raises:
        CatsError: peft is not installed, or the layers cannot be found.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise CatsError("fine-tuning needs peft: pip install 'cats-llm[train]'.") from error
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=adaptable(model, config.targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)
