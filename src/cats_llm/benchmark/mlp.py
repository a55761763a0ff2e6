"""One MLP with random weights: CATS at several sparsities, PyTorch's dense MLP, and what the memory can do."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cats_llm.benchmark import cuda
from cats_llm.benchmark.config import MLPBench
from cats_llm.benchmark.models import MLPs, Shape, copy_sharing_weights, parse_shape, thresholds_for
from cats_llm.benchmark.timing import interleave, ratio, speed
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.dtypes import dtype_name
from cats_llm.kernels import cpu, definition
from cats_llm.kernels.backend import MAX_DECODE_TOKENS, Request
from cats_llm.kernels.backends import backend_of
from cats_llm.kernels.operators import gated_mlp, read_checksum
from cats_llm.model.sparsify import sparse_mlps, sparsify
from cats_llm.model.structure import find_gated_mlps

# weights that are rotated must be far larger than any cache: bytes on a CPU, layers on a GPU
_WORKING_SET = 1_200_000_000
_LAYERS = 8

DENSE = "dense products"
"""Stands for the kernel's name where there is none that would be faster than the model's own linear layers."""


class _Layer:
    """Random weights of one MLP: neuron-major for the kernel, and down_proj once more as PyTorch keeps it."""

    def __init__(self, shape: Shape, dtype: torch.dtype, x: Tensor, sparsities: Sequence[float]) -> None:
        d, f = shape.hidden_size, shape.intermediate_size
        self.gate, self.up = (torch.empty(f, d, dtype=dtype).normal_(std=d**-0.5) for _ in range(2))
        self.dense_down = torch.empty(d, f, dtype=dtype).normal_(std=f**-0.5)
        self.down = cpu.BACKEND.neuron_major(self.dense_down)
        self.thresholds, self.read_shares = thresholds_for(F.linear(x, self.gate), sparsities)


@torch.inference_mode()
def bench_cpu_mlp(config: MLPBench, tokens: int, working_set: int | None = None) -> list[dict[str, Any]]:
    """Time the MLP of a shape with the current number of threads.

    Args:
        config: what to measure, but for threads and batches.
        tokens: at a time.
        working_set: bytes of weights that are rotated, at least; by default far more than any cache holds.

    Returns:
        A row for each candidate: milliseconds, bytes, GB/s, share of the read bandwidth of the same rounds, speed-up
        over PyTorch's dense MLP and over our own kernel at sparsity 0, and the speed-up that the bytes allow.
    """
    shape, dtype, sparsities = parse_shape(config.shape), config.torch_dtype, config.sparsities
    torch.manual_seed(0)
    x = torch.randn(tokens, shape.hidden_size).to(dtype)
    rotated = _WORKING_SET if working_set is None else working_set
    layers = [_Layer(shape, dtype, x, sparsities) for _ in range(max(4, -(-rotated // _bytes(shape, dtype))))]

    def read(turn: int) -> None:
        layer = layers[turn % len(layers)]
        for weight in (layer.gate, layer.up, layer.down.t()):
            read_checksum(weight)

    def dense(turn: int) -> None:
        layer = layers[turn % len(layers)]
        F.linear(F.silu(F.linear(x, layer.gate)) * F.linear(x, layer.up), layer.dense_down)

    def sparse(i: int, turn: int) -> None:
        layer = layers[turn % len(layers)]
        ours(x, layer.gate, layer.up, layer.down, layer.thresholds[i], "silu")

    first = layers[0]
    served = cpu.BACKEND.supports(Request(tokens, first.gate, first.up, first.down, "silu"))
    ours = gated_mlp if served else definition.gated_mlp
    kernel = cpu.BACKEND.name if served else "plain"
    names = [f"k = {k}" for k in sparsities]
    candidates = {"read": read, "torch dense": dense} | {name: partial(sparse, i) for i, name in enumerate(names)}
    seconds = interleave(candidates, config.rounds)
    references = {"speedup_over_torch": "torch dense", "speedup_over_own_dense": "k = 0.0"}
    rows = []
    for name, times in seconds.items():
        share = 1.0
        if name in names:
            share = sum(layer.read_shares[names.index(name)] for layer in layers) / len(layers)
        row = _row(config, tokens, seconds, name, kernel if name in names else None, share, references)
        bandwidth = ratio([r / row["byte_bound"] for r in seconds["read"]], times)
        rows.append(row | {"threads": torch.get_num_threads(), "share_of_read_bandwidth": vars(bandwidth)})
    return rows


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
    reads: dict[str, tuple[str | None, float]] = {"torch dense": (None, 1.0)}  # the kernel, and its share of neurons
    for i, k in enumerate(sparsities):
        thresholds = {layer: float(layer_thresholds[i]) for layer, (layer_thresholds, _) in enumerate(by_layer)}
        sparse_config = CatsConfig(thresholds, sparsity=k, layer_sparsity=dict.fromkeys(thresholds, k))
        model = sparsify(copy_sharing_weights(model), sparse_config)
        kernel = kernel_of(model, tokens, k)
        mean_share = sum(shares[i] for _, shares in by_layer) / _LAYERS
        sparse[f"k = {k}"] = model
        reads[f"k = {k}"] = kernel, 1.0 if kernel == DENSE else mean_share
    candidates = {
        "torch dense": cuda.replayed(partial(dense, x), _LAYERS),
        "torch dense, eager": cuda.eager(partial(dense, x), _LAYERS),
    }
    candidates |= {name: cuda.replayed(partial(model, x), _LAYERS) for name, model in sparse.items()}
    candidates |= {f"{name}, eager": cuda.eager(partial(model, x), _LAYERS) for name, model in sparse.items()}
    seconds = interleave(candidates, config.rounds)
    rows = []
    for name in seconds:
        eager = ", eager" * name.endswith(", eager")
        references = {
            "speedup_over_torch": "torch dense",
            "speedup_over_torch_eager": "torch dense, eager",
            "speedup_over_own_dense": f"k = 0.0{eager}",
        }
        row = _row(config, tokens, seconds, name, *reads[name.removesuffix(eager)], references)
        row |= {
            "device": torch.cuda.get_device_name(device),
            "share_of_copy_bandwidth": 1e9 * row["gb_per_s"] / copy_bandwidth,
            "tflops": 6 * tokens * shape.hidden_size * shape.intermediate_size / row["ms"]["median"] / 1e9,
        }
        rows.append(row)
    return rows


def kernel_of(model: nn.Module, tokens: int, sparsity: float) -> str:
    """What a sparse model's MLPs compute with: the kernel's name or `DENSE`."""
    mlp = sparse_mlps(model)[0]
    gate, up, down = (mlp.roles.linear(mlp, role).weight for role in ("gate", "up", "down"))
    backend = backend_of(gate.device)
    served = tokens <= MAX_DECODE_TOKENS and backend.supports(Request(tokens, gate, up, down, "silu", sparsity))
    return backend.name if served else DENSE


def _bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Of the three matrices."""
    return 3 * shape.hidden_size * shape.intermediate_size * dtype.itemsize


def _row(
    config: MLPBench,
    tokens: int,
    seconds: Mapping[str, list[float]],
    name: str,
    kernel: str | None,
    share: float,
    references: Mapping[str, str],
) -> dict[str, Any]:
    """What every device's rows hold. ``share``: of the neurons, what is read of up_proj and down_proj."""
    shape = parse_shape(config.shape)
    dense = _bytes(shape, config.torch_dtype)
    return {
        "contestant": name,
        "shape": shape.name,
        "dtype": dtype_name(config.torch_dtype),
        "tokens": tokens,
        "rounds": config.rounds,
        "kernel": kernel,
        **speed(seconds, name, dense / 3 * (1 + 2 * share), dense, references),
    }
