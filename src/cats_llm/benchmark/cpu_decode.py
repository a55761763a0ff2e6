"""Whole-token decode through `generate` on a CPU: stock transformers, our dense path, and CATS, on the same weights."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cats_llm.benchmark.config import DecodeBench
from cats_llm.benchmark.decode import prompt_and_profile, read_shares
from cats_llm.benchmark.metrics import speed
from cats_llm.benchmark.models import copy_sharing_weights
from cats_llm.benchmark.timing import Quartiles, interleave
from cats_llm.calibration.profile import Profile
from cats_llm.kernels.operators import read_checksum
from cats_llm.model.sparsify import densify, set_thresholds, sparsify
from cats_llm.model.structure import find_gated_mlps
from cats_llm.model.weight_traffic import bytes_per_token

_PROMPT = 16


@torch.inference_mode()
def bench_cpu_decode(
    config: DecodeBench, model: Any, profile: Profile | None, batch: int
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Time `model.generate` on random prompts with the current number of threads. The model is left dense.

    Args:
        config: what to measure, but for threads and batches.
        model: dense, on a CPU.
        profile: thresholds come from it; without one, from random tokens.
        batch: sequences at a time.

    Returns:
        A row for each candidate, and by candidate the milliseconds of each part of a step.
    """
    tokens = config.tokens or 16
    prompt, profile = prompt_and_profile(model, batch, _PROMPT, profile)
    stock = densify(copy_sharing_weights(model, but_down=True))
    configs = {f"k = {k}": profile.config(k) for k in dict.fromkeys([0.0, *config.sparsities])}
    sparsify(model, next(iter(configs.values())))
    try:

        def runner(name: str) -> Callable[[int], float]:
            def run(turn: int) -> float:
                if name not in configs:
                    return _seconds_a_token(stock, prompt, tokens)
                set_thresholds(model, configs[name].thresholds, configs[name].vectors)
                return _seconds_a_token(model, prompt, tokens)

            return run

        seconds = interleave({name: runner(name) for name in ("stock transformers", *configs)}, config.rounds)
        read = _read_bandwidth(model)
        breakdown = {"stock transformers": _breakdown(stock, prompt, tokens)}
        for name, sparse in configs.items():
            set_thresholds(model, sparse.thresholds, sparse.vectors)
            breakdown[name] = _breakdown(model, prompt, tokens)
        references = {"speedup_over_stock": "stock transformers", "speedup_over_own_dense": "k = 0.0"}
        rows = []
        for name, times in seconds.items():
            used = configs.get(name)
            shares = {} if used is None else read_shares(model, used, prompt, tokens)
            vectors = None if used is None else used.vectors
            moved = bytes_per_token(model, {layer: 1 - share for layer, share in shares.items()}, vectors).sparse
            rows.append(
                {
                    "contestant": name,
                    "batch": batch,
                    "threads": torch.get_num_threads(),
                    "rounds": config.rounds,
                    "tokens": tokens,
                    "sparsity_decoded": 1 - sum(shares.values()) / len(shares) if shares else None,
                    "tokens_per_second": batch / Quartiles.of(times).median,
                    "share_of_read_bandwidth": moved / Quartiles.of(times).median / read,
                    **speed(seconds, name, moved, bytes_per_token(model, {}).dense, references, "ms_per_step"),
                }
            )
        return rows, breakdown
    finally:
        densify(model)


def _seconds_a_token(model: Any, prompt: Tensor, tokens: int) -> float:
    """Median seconds between two steps of `generate`, without the prefill."""
    times: list[float] = []
    hook = model.register_forward_hook(lambda *_: times.append(time.perf_counter()))
    try:
        model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    finally:
        hook.remove()
    return Quartiles.of(b - a for a, b in itertools.pairwise(times)).median


@contextmanager
def _stopwatches(model: Any) -> Iterator[dict[str, float]]:
    """Add up the seconds spent in MLPs and in the other linear layers."""
    spent = {"mlp": 0.0, "other linear layers": 0.0}
    starts: dict[nn.Module, float] = {}
    watched: dict[nn.Module, str] = {mlp.module: "mlp" for mlp in find_gated_mlps(model)}
    inside = {child for mlp in watched for child in mlp.modules()}
    watched |= {m: "other linear layers" for m in model.modules() if isinstance(m, nn.Linear) and m not in inside}

    def begin(module: nn.Module, _inputs: Any) -> None:
        starts[module] = time.perf_counter()

    def end(module: nn.Module, _inputs: Any, _output: Any) -> None:
        spent[watched[module]] += time.perf_counter() - starts[module]

    hooks = [m.register_forward_pre_hook(begin) for m in watched] + [m.register_forward_hook(end) for m in watched]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


def _breakdown(model: Any, prompt: Tensor, tokens: int) -> dict[str, float]:
    """Milliseconds a decode step by part. Attention, norms, cache, sampling and Python are the rest."""
    steps: list[dict[str, float]] = []
    with _stopwatches(model) as spent:
        last = dict(spent)
        begun = time.perf_counter()

        def step(*_: Any) -> None:
            nonlocal last, begun
            now = time.perf_counter()
            parts = {name: spent[name] - last[name] for name in spent}
            steps.append(parts | {"rest": now - begun - sum(parts.values())})
            last, begun = dict(spent), now

        hook = model.register_forward_hook(step)
        try:
            model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        finally:
            hook.remove()
    return {name: 1e3 * Quartiles.of(parts[name] for parts in steps[1:]).median for name in steps[0]}


def _read_bandwidth(model: nn.Module) -> float:
    """Bytes a second that a plain read of the MLPs' weights reaches with the current threads."""
    weights = [w for mlp in find_gated_mlps(model) for w in (mlp.gate_linear.weight, mlp.down_linear.weight.t())]
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        for weight in weights:
            read_checksum(weight)
        rates.append(sum(w.numel() * w.element_size() for w in weights) / (time.perf_counter() - start))
    return Quartiles.of(rates).median
