"""Tells every sparse MLP which tokens of the running call are sparse, where a config asks for less than all."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cats_llm.checkpoint.token_policy import TokenPolicy
from cats_llm.kernels.backends import backend_of
from cats_llm.model.structure import decoder_of


class TokenMask:
    """A forward pre-hook of the decoder, which sees positions and padding; the MLPs ask it what it saw.

    Attributes:
        coverage: the rule.
        sparse: for the call that is running: True (all tokens), False (none), or bool (B, T).
    """

    def __init__(self, coverage: TokenPolicy, decoder: nn.Module) -> None:
        self.coverage = coverage
        self.names = tuple(inspect.signature(decoder.forward).parameters)
        self.sparse: Tensor | bool = True

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what the decoder was called with."""
        self.sparse = sparse_tokens(self.coverage, dict(zip(self.names, args, strict=False)) | kwargs)

    def of(self, x: Tensor) -> Tensor | bool:
        """Which tokens of x, (..., d), are sparse: True (all), False (none), or bool (...)."""
        sparse = self.sparse
        if isinstance(sparse, bool):
            return sparse
        return sparse if sparse.shape == x.shape[:-1] else True  # not called by the decoder

    def only_sparse(self, value: Tensor, x: Tensor) -> Tensor | None:
        """``value``, () or (n,), for the sparse tokens of x, (..., d), and 0 for dense ones.

        Returns:
            As given, (..., 1 or n) where tokens differ, None if all are dense.
        """
        sparse = self.of(x)
        if isinstance(sparse, bool):
            return value if sparse else None
        sparse = sparse.to(value.device)
        # one token keeps the shape, which kernels take
        return value * (sparse.reshape(()) if sparse.numel() == 1 else sparse.unsqueeze(-1))


def sparse_tokens(coverage: TokenPolicy, inputs: Mapping[str, Any]) -> Tensor | bool:
    """Which tokens of a decoder's call are sparse.

    Positions come from a 2-D attention_mask (so padding on either side does not count), else from 2-D position_ids
    (packed sequences), else from the length of the cache.

    Args:
        inputs: what the decoder was called with: input_ids or inputs_embeds, and maybe attention_mask, position_ids and
            past_key_values.

    Returns:
        True (all), False (none), or bool (B, T).
    """
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    tokens = ids if ids is not None else embeds
    if tokens is None:
        return True
    batch, length = tokens.shape[:2]
    prompt = length > 1
    if coverage.dense_prefill and prompt:
        return False
    mask = inputs.get("attention_mask")
    mask = mask.long() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    # index of each token in its sequence, padding not counted
    counted = mask.cumsum(-1)[:, -length:] - 1 if mask is not None else None
    sparse = None
    if coverage.dense_first_tokens:
        index = counted if counted is not None else _positions(inputs, length, tokens.device)
        sparse = (index >= coverage.dense_first_tokens).expand(batch, length)
    if coverage.last_fraction is not None and prompt:
        if mask is not None:
            here = mask[:, -length:]
            rank, number = here.cumsum(-1) - 1, here.sum(-1, keepdim=True)
        else:
            rank = torch.arange(length, device=tokens.device)
            number = torch.full((1,), length, device=tokens.device)
        last = rank >= number - (number.double() * coverage.last_fraction).long()
        sparse = last.expand(batch, length) if sparse is None else sparse & last
    if sparse is None:
        return True
    return sparse if sparse.numel() == 1 else _simplified(sparse)


def _positions(inputs: Mapping[str, Any], length: int, device: torch.device) -> Tensor:
    positions = inputs.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 2:
        return positions
    cache = inputs.get("past_key_values")
    return torch.arange(length, device=device) + (cache.get_seq_length() if cache is not None else 0)


def _simplified(sparse: Tensor) -> Tensor | bool:
    """True or False where all tokens are alike, so that kernels can be used; not where looking would break a graph."""
    if backend_of(sparse.device).in_graph():
        return sparse
    number = int(sparse.sum())
    return sparse if 0 < number < sparse.numel() else number > 0


def find_token_mask(model: nn.Module) -> TokenMask | None:
    """The model's `TokenMask`, if it has one."""
    return next((h for h in decoder_of(model)._forward_pre_hooks.values() if isinstance(h, TokenMask)), None)


def set_token_mask(model: nn.Module, coverage: TokenPolicy) -> TokenMask | None:
    """Let the decoder note which tokens are sparse; `TokenPolicy` of all tokens takes the hook away.

    Returns:
        What the sparse MLPs have to ask; None if all tokens are sparse.
    """
    decoder = decoder_of(model)
    for key, hook in list(decoder._forward_pre_hooks.items()):
        if isinstance(hook, TokenMask):
            del decoder._forward_pre_hooks[key]
            decoder._forward_pre_hooks_with_kwargs.pop(key, None)
    if coverage.all_tokens:
        return None
    hook = TokenMask(coverage, decoder)
    decoder.register_forward_pre_hook(hook, with_kwargs=True)
    return hook
