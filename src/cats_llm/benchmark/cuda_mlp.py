"""One MLP on a GPU, at decode or in prefill: CATS at several sparsities and PyTorch's dense MLP."""

from typing import Any

import torch
from torch import nn

from cats_llm.benchmark import cuda
from cats_llm.benchmark.config import MLPBench
from cats_llm.benchmark.metrics import speed
from cats_llm.benchmark.models import MLPs, copy_sharing_weights, thresholds_for
from cats_llm.benchmark.shapes import parse_shape
from cats_llm.benchmark.timing import interleave
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.dtypes import dtype_name
from cats_llm.kernels.backend import MAX_DECODE_TOKENS, Request
from cats_llm.kernels.backends import backend_of
from cats_llm.model.sparsify import sparse_mlps, sparsify
from cats_llm.model.structure import find_gated_mlps

_LAYERS = 8  # their weights are far larger than any cache

DENSE = "dense products"
"""Stands for the kernel's name where there is none that would be faster than the model's own linear layers."""


@torch.no_grad()
def bench_cuda_mlp(config: MLPBench, copy_bandwidth: float, tokens: int = 1) -> list[dict[str, Any]]:
    """Time the MLP of a shape: `MLPs` after `sparsify`, so with the kernels that a model would take.

    Weights rotate over eight layers inside one CUDA graph; candidates named "eager" are launched by Python instead.

    Args:
        config: what to measure, but for batches.
        copy_bandwidth: of the GPU's memory, bytes a second.
        tokens: rows of the input; with more than `MAX_DECODE_TOKENS` it is prefill.

    Returns:
        A row for each candidate. Bytes are those of the weights: of gate_proj all, of the others what the tokens'
        masks together keep, or all where the model computes dense products.
    """
    shape, dtype, sparsities, device = parse_shape(config.shape), config.torch_dtype, config.sparsities, config.device
    torch.manual_seed(0)
    dense = MLPs(shape, _LAYERS, dtype, device)
    x = torch.randn(tokens, shape.hidden_size, device=device).to(dtype)
    by_layer = [thresholds_for(mlp.gate_linear(x), sparsities) for mlp in find_gated_mlps(dense)]
    model: nn.Module = copy_sharing_weights(dense, but_down=True)
    sparse: dict[str, nn.Module] = {}
    for i, k in enumerate(sparsities):
        thresholds = {layer: float(layer_thresholds[i]) for layer, (layer_thresholds, _) in enumerate(by_layer)}
        sparse_config = CatsConfig(thresholds, sparsity=k, layer_sparsity=dict.fromkeys(thresholds, k))
        model = sparsify(copy_sharing_weights(model), sparse_config)
        sparse[f"k = {k}"] = model
    candidates = {
        "torch dense": cuda.replayed(lambda: dense(x), _LAYERS),
        "torch dense, eager": cuda.eager(lambda: dense(x), _LAYERS),
    }
    candidates |= {name: cuda.replayed(_call(model, x), _LAYERS) for name, model in sparse.items()}
    candidates |= {f"{name}, eager": cuda.eager(_call(model, x), _LAYERS) for name, model in sparse.items()}
    seconds = interleave(candidates, config.rounds)
    matrix = shape.hidden_size * shape.intermediate_size * dtype.itemsize
    rows = []
    for name in seconds:
        kernel, share = None, 1.0
        base, eager = name.removesuffix(", eager"), ", eager" * name.endswith(", eager")
        if base in sparse:
            i = list(sparse).index(base)
            kernel = kernel_of(sparse[base], tokens, sparsities[i])
            if kernel != DENSE:
                share = sum(shares[i] for _, shares in by_layer) / len(by_layer)
        references = {
            "speedup_over_torch": "torch dense",
            "speedup_over_torch_eager": "torch dense, eager",
            "speedup_over_own_dense": f"k = 0.0{eager}",
        }
        row = speed(seconds, name, matrix * (1 + 2 * share), 3 * matrix, references)
        rows.append(
            {
                "contestant": name,
                "device": cuda.name(device),
                "shape": shape.name,
                "dtype": dtype_name(dtype),
                "tokens": tokens,
                "rounds": config.rounds,
                "kernel": kernel,
                **row,
                "share_of_copy_bandwidth": 1e9 * row["gb_per_s"] / copy_bandwidth,
                "tflops": 6 * tokens * shape.hidden_size * shape.intermediate_size / row["ms"]["median"] / 1e9,
            }
        )
    return rows


def _call(model: nn.Module, x: torch.Tensor) -> cuda.Work:
    return lambda: model(x)


def kernel_of(model: nn.Module, tokens: int, sparsity: float) -> str:
    """What a sparse model's MLPs compute with: the kernel's name or `DENSE`."""
    mlp = sparse_mlps(model)[0]
    gate, up, down = (mlp.roles.linear(mlp, role).weight for role in ("gate", "up", "down"))
    backend = backend_of(gate.device)
    served = tokens <= MAX_DECODE_TOKENS and backend.supports(Request(tokens, gate, up, down, "silu", sparsity))
    return backend.name if served else DENSE
