"""One MLP at decode on a CPU: our kernel at several sparsities, PyTorch's dense MLP, a plain read of the same bytes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cats_llm.benchmark.config import MLPBench
from cats_llm.benchmark.metrics import speed
from cats_llm.benchmark.models import thresholds_for
from cats_llm.benchmark.shapes import Shape, parse_shape
from cats_llm.benchmark.timing import interleave, ratio
from cats_llm.dtypes import dtype_name
from cats_llm.kernels import cpu, definition
from cats_llm.kernels.backend import Request
from cats_llm.kernels.operators import gated_mlp, read_checksum

# weights that are rotated must be far larger than any cache
_WORKING_SET = 1_200_000_000


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
    matrix = shape.hidden_size * shape.intermediate_size * dtype.itemsize
    x = torch.randn(tokens, shape.hidden_size).to(dtype)
    rotated = _WORKING_SET if working_set is None else working_set
    layers = [_Layer(shape, dtype, x, sparsities) for _ in range(max(4, -(-rotated // (3 * matrix))))]

    def read(turn: int) -> None:
        layer = layers[turn % len(layers)]
        for weight in (layer.gate, layer.up, layer.down.t()):
            read_checksum(weight)

    def dense(turn: int) -> None:
        layer = layers[turn % len(layers)]
        F.linear(F.silu(F.linear(x, layer.gate)) * F.linear(x, layer.up), layer.dense_down)

    def sparse(i: int) -> Callable[[int], None]:
        def run(turn: int) -> None:
            layer = layers[turn % len(layers)]
            ours(x, layer.gate, layer.up, layer.down, layer.thresholds[i], "silu")

        return run

    first = layers[0]
    served = cpu.BACKEND.supports(Request(tokens, first.gate, first.up, first.down, "silu"))
    ours = gated_mlp if served else definition.gated_mlp
    names = [f"k = {k}" for k in sparsities]
    candidates = {"read": read, "torch dense": dense} | {name: sparse(i) for i, name in enumerate(names)}
    seconds = interleave(candidates, config.rounds)
    references = {"speedup_over_torch": "torch dense", "speedup_over_own_dense": "k = 0.0"}
    rows = []
    for name, times in seconds.items():
        share = 1.0
        if name in names:
            share = sum(layer.read_shares[names.index(name)] for layer in layers) / len(layers)
        moved = matrix * (1 + 2 * share)
        bandwidth = ratio([r * moved / (3 * matrix) for r in seconds["read"]], times)
        rows.append(
            {
                "contestant": name,
                "shape": shape.name,
                "dtype": dtype_name(dtype),
                "tokens": tokens,
                "threads": torch.get_num_threads(),
                "rounds": config.rounds,
                "kernel": (cpu.BACKEND.name if served else "plain") if name in names else None,
                "share_of_read_bandwidth": vars(bandwidth),
                **speed(seconds, name, moved, 3 * matrix, references),
            }
        )
    return rows
