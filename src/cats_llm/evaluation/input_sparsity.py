"""Sparse inputs of linear layers, the form of TEAL and WINA: simulated, by zeroing what their kernels would skip.

A zero in the input of ``y = W x`` means that a column of W need not be read. Here all of W is read, so this measures
what the methods cost in quality, not what they gain in time.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from cats_llm.checkpoint.token_policy import TokenPolicy
from cats_llm.errors import CatsError
from cats_llm.kernels.definition import keep_mask
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


def decoder_linears(model: nn.Module) -> dict[int, dict[str, nn.Linear]]:
    """All linear layers inside the decoder layers, by layer and path; no embedding and no head.

    Raises:
        CatsError: the model has no gated MLP, by which its layers are found.
    """
    base = unwrap(model)
    found = {}
    for mlp in find_gated_mlps(base):
        modules = base.get_submodule(mlp.layer_path).named_modules(prefix=mlp.layer_path)
        found[mlp.layer] = {name: module for name, module in modules if isinstance(module, nn.Linear)}
    return found


class SparseInput:
    """A forward pre-hook of a linear layer that zeroes the inputs that it skips.

    Attributes:
        keep: x, (..., n) -> bool (..., n), the inputs that are not skipped.
        tokens: knows which tokens of the running call are sparse; None if all are.
        enabled: False lets every input through.
        observer: told how many inputs each token skips, int64 (...).
    """

    def __init__(self, keep: Callable[[Tensor], Tensor], tokens: TokenMask | None = None) -> None:
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


def below(threshold: float) -> Callable[[Tensor], Tensor]:
    """TEAL's rule: keep what is not smaller than the threshold in magnitude. NaN is kept, and so shows."""
    limit = torch.tensor(threshold, dtype=torch.float32, device="cpu")  # compares with tensors anywhere
    return lambda x: keep_mask(x, limit)


def smallest(norms: Tensor, share: float) -> Callable[[Tensor], Tensor]:
    """WINA's rule: keep the inputs with the largest ``|x_i| norms_i`` of each token. NaN counts as large.

    Args:
        norms: float32 (n,).
        share: of the n inputs to skip, rounded to a number of them.
    """
    kept = len(norms) - round(share * len(norms))

    def keep(x: Tensor) -> Tensor:
        score = x.abs() * norms.to(x.device)
        mask = torch.zeros(score.shape, dtype=torch.bool, device=x.device)
        return mask.scatter_(-1, score.topk(kept, dim=-1, sorted=False).indices, True)

    return keep


@torch.no_grad()
def column_norms(name: str, linear: nn.Linear) -> Tensor:
    """The Euclidean norm of every column of the weight, float32 (in_features,).

    Raises:
        CatsError: the weight is not in memory.
    """
    if linear.weight.is_meta:
        raise CatsError(f"wina needs the norms of {name}, which is offloaded; use a smaller --dtype or more memory.")
    norms: Tensor = torch.linalg.vector_norm(linear.weight.float(), dim=0)
    return norms


@contextmanager
def sparse_inputs(model: nn.Module, config: InputConfig) -> Iterator[None]:
    """Let a dense model skip inputs while the context lasts."""
    base = unwrap(model)
    handles = []
    try:
        tokens = set_token_mask(base, config.coverage)
        for name, share in config.linear_sparsity.items():
            linear: Any = base.get_submodule(name)
            threshold = config.thresholds.get(name)
            keep = smallest(column_norms(name, linear), share) if threshold is None else below(threshold)
            handles.append(linear.register_forward_pre_hook(SparseInput(keep, tokens)))
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
