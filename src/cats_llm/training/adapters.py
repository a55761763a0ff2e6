"""LoRA on a model's projections, found by structure, by way of PEFT."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from cats_llm.errors import CatsError
from cats_llm.model.structure import find_gated_mlps, unwrap
from cats_llm.training.settings import Settings


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
    found: list[str] = []
    attention = False
    fitting: set[str] = set()
    for mlp in find_gated_mlps(base):
        linears = dict(_linears(base.get_submodule(mlp.layer_path), mlp.layer_path))
        if names is not None:
            chosen = [path for path in linears if path.rpartition(".")[2] in names]
            fitting |= {path.rpartition(".")[2] for path in chosen}
        else:
            others = [path for path in linears if not path.startswith(f"{mlp.name}.")]
            projections = _attention(others)
            attention = attention or bool(projections)
            chosen = [*projections, *(f"{mlp.name}.{part}" for part in mlp.roles.projections)]
        found += chosen
    if names is not None and (missing := [name for name in names if name not in fitting]):
        there = sorted({path.rpartition(".")[2] for path, _ in _linears(base, "")})
        raise CatsError(f"no decoder layer has a linear layer {missing[0]!r}; --lora-targets may name {_list(there)}.")
    if names is None and not attention:
        raise CatsError(
            f"{type(base).__name__} has no attention with q_proj and v_proj or a fused layer for them; name the layers "
            "that get adapters with --lora-targets."
        )
    return found


def _linears(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for path, child in module.named_modules(prefix=prefix):
        if isinstance(child, nn.Linear):
            yield path, child


def _attention(paths: list[str]) -> list[str]:
    """Query and value among a layer's linear layers."""
    named = [path for path in paths if path.rpartition(".")[2] in ("q_proj", "v_proj")]
    return named or [path for path in paths if "qkv" in path.rpartition(".")[2] or path.endswith("query_key_value")]


def _list(names: list[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def add_adapters(model: Any, settings: Settings) -> Any:
    """The model in a PEFT wrapper with fresh adapters, which alone are trained.

    Adapters are float32 whatever the model's dtype, as the optimizer needs them.

    Raises:
        CatsError: peft is not installed, or the layers cannot be found.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise CatsError("fine-tuning needs peft: pip install 'cats-llm[train]'.") from error
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=adaptable(model, settings.targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)
