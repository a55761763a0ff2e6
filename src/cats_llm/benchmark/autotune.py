"""Measuring which launch config of the GPU kernels is fastest; kernels/gpu/tuning.py keeps what was found."""

import logging
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from cats_llm.benchmark import cuda
from cats_llm.kernels.gpu import dispatch, tuning
from cats_llm.kernels.gpu.config import Config, Tile, candidates
from cats_llm.kernels.gpu.dispatch import device_facts

logger = logging.getLogger(__name__)


def tune(d: int, f: int, dtype: torch.dtype, tokens: int, sparsity: float) -> tuple[Config, float, float]:
    """Measure the candidates on the current GPU with random weights and keep the best.

    Args:
        d, f: hidden and intermediate size.
        dtype: of the model.
        tokens: 1 to 16.
        sparsity: share of neurons that a token skips.

    Returns:
        The config, its microseconds a call, and those of the default.
    """
    device = _device()
    x, layers = _input_and_layers(d, f, dtype, tokens, tuning.bucket(sparsity), device)
    shared_memory = device_facts(device)[1]
    configs = list(dict.fromkeys(candidates(tokens, d, dtype.itemsize, sparsity**tokens, shared_memory)))
    times: dict[Config, float] = {}

    def measure(config: Config) -> None:
        def run() -> None:
            for gate, up, down, threshold in layers:
                dispatch.gated_mlp(x, gate, up, down, threshold, config=config)

        times[config] = median_us(run) / len(layers)

    for config in configs:
        try:
            measure(config)
        except Exception as error:  # one that this GPU cannot run
            logger.debug("%s: %s", config, error)
    best = min(times, key=times.__getitem__)
    # tiles were varied one at a time: the best of each together may be better still
    combined = type(best)(**{name: _best_tile(times, name) for name in vars(best)})
    if combined not in configs:
        measure(combined)
        best = min(times, key=times.__getitem__)
    dispatch.forget_plans()
    tuning.remember(device, tokens, d, f, dtype, sparsity, best, times[best])
    return best, times[best], times.get(configs[0], times[best])


def median_us(call: Callable[[], object], rounds: int = 15) -> float:
    """Microseconds of a call as a CUDA graph, the median of replays after two that warm up."""
    run = cuda.eager(cuda.captured(call))
    return 1e6 * statistics.median([run(turn) for turn in range(rounds + 2)][2:])


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _best_tile(times: dict[Config, float], name: str) -> Tile:
    start = next(iter(times))
    others = [n for n in vars(start) if n != name]
    alone = [config for config in times if all(getattr(config, n) == getattr(start, n) for n in others)]
    tile: Tile = getattr(min(alone, key=times.__getitem__), name)
    return tile


def _input_and_layers(
    d: int, f: int, dtype: torch.dtype, tokens: int, sparsity: float, device: torch.device
) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """Enough layers of random weights to leave no cache useful, each with the threshold for the sparsity."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, d, generator=generator, device=device).to(dtype)
    layers = []
    for _ in range(min(32, max(2, -(-800_000_000 // (3 * d * f * dtype.itemsize))))):
        gate, up, down = ((torch.randn(f, d, generator=generator, device=device) * d**-0.5).to(dtype) for _ in range(3))
        a = torch.nn.functional.silu((x @ gate.t()).float()).abs().flatten()
        threshold = a.kthvalue(max(1, round(sparsity * a.numel()))).values if sparsity else a.new_zeros(())
        layers.append((gate, up, down.t(), threshold))
    return x, layers
