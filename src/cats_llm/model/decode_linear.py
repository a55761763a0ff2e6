"""The linear layers outside the MLPs (attention, lm_head), on our own matrix-vector kernels when decoding."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cats_llm.kernels.backends import NO_KERNELS, backend_of
from cats_llm.kernels.operators import linear
from cats_llm.model.sparse_mlp import SparseMLP
from cats_llm.model.structure import decoder_of, unwrap


def decode_linear(layer: nn.Linear, input: Tensor) -> Tensor:
    """The forward of an nn.Linear that leaves no bandwidth unused for few tokens: the same function.

    Args:
        input: (..., in_features).

    Returns:
        (..., out_features).
    """
    backend = backend_of(input.device)
    eager = backend.linear_in_graphs_only and not backend.in_graph()
    # the question itself should cost little where the answer is known
    if eager and getattr(layer, "_cats_compiled", False):
        return F.linear(input, layer.weight, layer.bias)
    grad_or_autocast = torch.is_grad_enabled() or torch.is_autocast_enabled(input.device.type)
    if not grad_or_autocast and backend.supports_linear(input, layer.weight):
        y = linear(input, layer.weight, layer.bias)
        if not eager:
            return y
        # not used, but a later capture must find our kernel compiled
        layer._cats_compiled = True  # type: ignore[assignment]
    return F.linear(input, layer.weight, layer.bias)


def decodes_on_our_kernels(layer: nn.Module) -> bool:
    """Whether `use_decode_linears` has changed the layer."""
    return getattr(layer.__dict__.get("forward"), "func", None) is decode_linear


def use_decode_linears(model: nn.Module, enabled: bool = True) -> None:
    """Let the decoder's linear layers and lm_head decode on our kernel, or on PyTorch again, in place.

    A layer keeps its class, so that whatever looks for an nn.Linear (quantisation, adapters) finds it; only its forward
    is replaced. `sparsify` and `from_pretrained` do it. Layers inside sparse MLPs, adapters, other classes than
    nn.Linear and layers on devices that have no kernel are left alone.
    """
    base = unwrap(model)
    get_head = getattr(base, "get_output_embeddings", None)
    roots = [decoder_of(model), get_head() if callable(get_head) else None]
    for root in roots:
        if root is None:
            continue
        inside_mlps = {
            child for module in root.modules() if isinstance(module, SparseMLP) for child in module.modules()
        }
        for module in root.modules():
            if enabled and module not in inside_mlps and isinstance(module, nn.Linear) and _is_plain(module):
                # pickled and copied with the layer, as a method would not be
                module.__dict__["forward"] = functools.partial(decode_linear, module)
            elif not enabled and decodes_on_our_kernels(module):
                module.__dict__.pop("_cats_compiled", None)
                del module.__dict__["forward"]


def _is_plain(layer: nn.Linear) -> bool:
    """Whether its forward is PyTorch's own, on a device that may have kernels."""
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return False
    backend = backend_of(layer.weight.device)
    return backend is not NO_KERNELS and type(layer.weight) in backend.weight_types
