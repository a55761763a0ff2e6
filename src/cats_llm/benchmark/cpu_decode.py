"""Whole-token decode through `generate` on a CPU: stock transformers, our dense path, and CATS, on the same weights."""

import itertools
import time
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cats_llm.benchmark.config import DecodeBench
from cats_llm.benchmark.decode import decode_row, generate, prompt_and_profile, read_shares
from cats_llm.benchmark.models import copy_sharing_weights
from cats_llm.benchmark.timing import Quartiles, interleave
from cats_llm.calibration.profile import Profile
from cats_llm.kernels.operators import read_checksum
from cats_llm.model.sparsify import densify, set_thresholds, sparsify
from cats_llm.model.structure import find_gated_mlps

_PROMPT = 16
_STOCK = "stock transformers"


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
    candidates = (_STOCK, *configs)

    def prepared(name: str) -> Any:
        if name == _STOCK:
            return stock
        set_thresholds(model, configs[name].thresholds, configs[name].vectors)
        return model

    def run(name: str, turn: int) -> float:
        return _seconds_a_token(prepared(name), prompt, tokens)

    sparsify(model, configs["k = 0.0"])
    try:
        seconds = interleave({name: partial(run, name) for name in candidates}, config.rounds)
        read = _read_bandwidth(model)
        breakdown = {name: _breakdown(prepared(name), prompt, tokens) for name in candidates}
        references = {"speedup_over_stock": _STOCK, "speedup_over_own_dense": "k = 0.0"}
        rows = []
        for name in candidates:
            used = configs.get(name)
            shares = {} if used is None else read_shares(model, used, prompt, tokens)
            row = decode_row(model, seconds, name, batch, used, shares, references)
            row |= {
                "threads": torch.get_num_threads(),
                "tokens": tokens,
                "share_of_read_bandwidth": 1e9 * row["gb_per_s"] / read,
            }
            rows.append(row)
        return rows, breakdown
    finally:
        densify(model)


def _seconds_a_token(model: Any, prompt: Tensor, tokens: int) -> float:
    """Median seconds between two steps of `generate`, without the prefill."""
    times: list[float] = []
    with model.register_forward_hook(lambda *_: times.append(time.perf_counter())):
        generate(model, prompt, tokens)
    return Quartiles.of(b - a for a, b in itertools.pairwise(times)).median


def _breakdown(model: Any, prompt: Tensor, tokens: int) -> dict[str, float]:
    """Milliseconds a decode step by part. Attention, norms, cache, sampling and Python are the rest."""
    part_of: dict[nn.Module, str] = {mlp.module: "mlp" for mlp in find_gated_mlps(model)}
    inside = {child for mlp in part_of for child in mlp.modules()}
    part_of |= {m: "other linear layers" for m in model.modules() if isinstance(m, nn.Linear) and m not in inside}
    spent = {"mlp": 0.0, "other linear layers": 0.0}
    starts: dict[nn.Module, float] = {}
    ends: list[dict[str, float]] = []  # at the end of each step, what was spent until then, and the clock

    def begin(module: nn.Module, _inputs: Any) -> None:
        starts[module] = time.perf_counter()

    def end(module: nn.Module, _inputs: Any, _output: Any) -> None:
        spent[part_of[module]] += time.perf_counter() - starts[module]

    with ExitStack() as hooks:
        for module in part_of:
            hooks.enter_context(module.register_forward_pre_hook(begin))
            hooks.enter_context(module.register_forward_hook(end))
        hooks.enter_context(model.register_forward_hook(lambda *_: ends.append(spent | {"rest": time.perf_counter()})))
        generate(model, prompt, tokens)
    steps = [{name: after[name] - before[name] for name in after} for before, after in itertools.pairwise(ends)]
    for step in steps:
        step["rest"] -= sum(step[name] for name in spent)
    return {name: 1e3 * Quartiles.of(step[name] for step in steps).median for name in steps[0]}


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
