"""Sparse inputs of linear layers, the form of TEAL and WINA: simulated, by zeroing what their kernels would skip.

A zero in the input of ``y = W x`` means that a column of W need not be read. Here all of W is read, so this measures
what the methods cost in quality, not what they gain in time.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from cats_llm.checkpoint.token_policy import TokenPolicy
from cats_llm.model.structure import find_gated_mlps, unwrap
from cats_llm.model.token_mask import TokenMask, set_token_mask


@dataclass(frozen=True)
class InputConfig:
    """Which inputs of which linear layers are skipped.

    Attributes:
        sparsity: the share of inputs to skip, which is the share of the bytes of these layers, in [0, 1).
        linear_sparsity: by path of the layer in the model. With thresholds: the share below them on the calibration
            tokens. Without: the share that every token skips.
        thresholds: TEAL: inputs of smaller magnitude are skipped. Empty: the smallest scores of WINA are.
        coverage: which tokens are sparse.
        calibration: what was calibrated on what; a record.
    """

    sparsity: float
    linear_sparsity: Mapping[str, float]
    thresholds: Mapping[str, float] = field(default_factory=dict)
    coverage: TokenPolicy = field(default_factory=TokenPolicy)
    calibration: Mapping[str, Any] = field(default_factory=dict)

    def with_coverage(self, coverage: TokenPolicy) -> "InputConfig":
        """The same config for other tokens."""
        return replace(self, coverage=coverage)


Keep = Callable[[Tensor], Tensor]
"""x, (..., n) -> bool (..., n), the inputs that are not skipped."""

Rule = Callable[[InputConfig, str, nn.Linear], Keep]
"""What a method keeps of the inputs of a linear layer, given its path and itself."""


def decoder_linears(model: nn.Module) -> dict[int, dict[str, nn.Linear]]:
    """All linear layers inside the decoder layers, by layer and path; no embedding and no head.

    Raises:
        CatsError: the model has no gated MLP, by which its layers are found.
    """
    base = unwrap(model)
    linears = {}
    for mlp in find_gated_mlps(base):
        modules = base.get_submodule(mlp.layer_path).named_modules(prefix=mlp.layer_path)
        linears[mlp.layer] = {name: module for name, module in modules if isinstance(module, nn.Linear)}
    return linears


class SparseInput:
    """A forward pre-hook of a linear layer that zeroes the inputs that it skips.

    Attributes:
        keep: which inputs are not skipped.
        tokens: knows which tokens of the running call are sparse; None if all are.
        enabled: False lets every input through.
        observer: told how many inputs each token skips, int64 (...).
    """

    def __init__(self, keep: Keep, tokens: TokenMask | None = None) -> None:
        self.keep = keep
        self.tokens = tokens
        self.enabled = True
        self.observer: Callable[[Tensor], None] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The arguments with zeros; None leaves them as they are."""
        x: Tensor = args[0]
        if not self.enabled:
            return None
        sparse = True if self.tokens is None else self.tokens.of(x)
        skip = ~self.keep(x)
        if sparse is not True:
            skip &= sparse.to(x.device).unsqueeze(-1) if isinstance(sparse, Tensor) else False
        if self.observer is not None:
            self.observer(skip.sum(-1))
        return (x.masked_fill(skip, 0), *args[1:])


@contextmanager
def sparse_inputs(model: nn.Module, config: InputConfig, rule: Rule) -> Iterator[None]:
    """Let a dense model skip inputs by a rule while the context lasts."""
    base = unwrap(model)
    handles = []
    try:
        tokens = set_token_mask(base, config.coverage)
        for name in config.linear_sparsity:
            linear: Any = base.get_submodule(name)
            handles.append(linear.register_forward_pre_hook(SparseInput(rule(config, name, linear), tokens)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        set_token_mask(base, TokenPolicy())


def hooked_inputs(model: nn.Module) -> dict[str, tuple[nn.Linear, SparseInput]]:
    """The linear layers that skip inputs, by path, with their hooks; empty outside `sparse_inputs`."""
    return {
        name: (module, hook)
        for name, module in unwrap(model).named_modules()
        if isinstance(module, nn.Linear)
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, SparseInput)
    }


@contextmanager
def dense_inputs(model: nn.Module) -> Iterator[None]:
    """Let no input be skipped while the context lasts."""
    hooks = [hook for _, hook in hooked_inputs(model).values()]
    before = [hook.enabled for hook in hooks]
    try:
        for hook in hooks:
            hook.enabled = False
        yield
    finally:
        for hook, enabled in zip(hooks, before, strict=True):
            hook.enabled = enabled
