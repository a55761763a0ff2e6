"""TEAL with a share of its own for every linear layer, found by TEAL's block-wise greedy search.

In each decoder layer, on its inputs in the dense model, the search raises step by step the sparsity of the linear
layer that costs the decoder layer's output least, until the layer skips the share of bytes asked for. All decoder
layers skip the same share. As published but for these: a step is at most `_MOST_A_STEP` of a linear layer's inputs,
since equal bytes would be most of a small one, and so the least added error *a byte* wins; the last step is cut so that
the bytes are exact; the error is the squared one over all tokens; the search sees `_TOKENS` tokens of calibration text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from cats_llm.calibration.batches import run_decoder
from cats_llm.calibration.distribution import MagnitudeDistribution
from cats_llm.checkpoint.config import check_sparsity
from cats_llm.evaluation.baselines.input_mask import InputConfig, SparseInput, decoder_linears
from cats_llm.evaluation.baselines.teal import distributions, not_below, threshold_config
from cats_llm.evaluation.method_data import MethodData
from cats_llm.model.sparsify import as_dense
from cats_llm.model.structure import eval_mode, unwrap

# a step skips so much of a decoder layer's weights, but no more than so much of a linear layer's inputs
_STEP = 0.04
_MOST_A_STEP = 0.2
# no linear layer skips more
_MOST = 0.99
_TOKENS = 1024


def teal_greedy(model: nn.Module, data: MethodData, sparsity: float) -> InputConfig:
    """Thresholds of TEAL, with shares by output error; what was searched for one sparsity serves the next.

    Raises:
        CatsError: there is no calibration text, or activations are NaN or infinite.
    """
    check_sparsity(sparsity)
    learned = distributions("teal-greedy", model, data)
    searches: list[_Search] = data.learned.setdefault("searches", [])
    if not searches:
        for layer in decoder_linears(model).values():
            searches.append(_Search({name: linear for name, linear in layer.items() if name in learned}, learned))
    shares: dict[str, float] = {}
    for search in searches:
        if not search.reaches(sparsity):
            search.extend(model, data, sparsity)
        shares |= search.shares(sparsity)
    return threshold_config(data, sparsity, learned, shares)


class _Search:
    """The greedy path in one decoder layer, as far as it was asked for."""

    def __init__(self, linears: Mapping[str, nn.Linear], learned: Mapping[str, MagnitudeDistribution]) -> None:
        self.linears = linears
        self.learned = learned
        sizes = {name: linear.weight.numel() for name, linear in linears.items()}
        self.weights = {name: size / sum(sizes.values()) for name, size in sizes.items()}
        # shares by linear layer; each differs from the one before in one of them
        self.path = [dict.fromkeys(linears, 0.0)]
        self.error = 0.0

    def bytes(self, shares: Mapping[str, float]) -> float:
        """The share of the decoder layer's linear weights that is skipped."""
        return sum(self.weights[name] * share for name, share in shares.items())

    def reaches(self, sparsity: float) -> bool:
        """The path is long enough, or can get no longer."""
        last = self.path[-1]
        return self.bytes(last) >= sparsity or all(share >= _MOST for share in last.values())

    def shares(self, sparsity: float) -> dict[str, float]:
        """The first point of the path that skips so many bytes, with its last step cut to fit."""
        end = next((i for i, point in enumerate(self.path) if self.bytes(point) >= sparsity), len(self.path) - 1)
        if end == 0:
            return dict(self.path[0])
        before, after = self.path[end - 1], self.path[end]
        low, high = self.bytes(before), self.bytes(after)
        part = min(1.0, (sparsity - low) / (high - low))
        return {name: before[name] + part * (after[name] - before[name]) for name in before}

    @torch.no_grad()
    def extend(self, model: nn.Module, data: MethodData, sparsity: float) -> None:
        """Lengthen the path until it skips so many bytes."""
        base = unwrap(model)
        # the decoder layer is what all of its linear layers are in
        parts = zip(*(name.split(".") for name in self.linears), strict=False)
        common = takewhile(lambda group: len(set(group)) == 1, parts)
        layer = base.get_submodule(".".join(group[0] for group in common))
        with eval_mode(model), as_dense(model):
            calls = _calls(model, layer, data)
            while not self.reaches(sparsity):
                trials = []
                for name, weight in self.weights.items():
                    step = min(_STEP / weight, _MOST_A_STEP, _MOST - self.path[-1][name])
                    if step > 0:
                        trial = self.path[-1] | {name: self.path[-1][name] + step}
                        error = self._error(layer, calls, trial)
                        trials.append(((error - self.error) / (step * weight), error, trial))
                _, self.error, best = min(trials, key=lambda item: item[0])
                self.path.append(best)

    def _error(self, layer: nn.Module, calls: list["_Call"], shares: Mapping[str, float]) -> float:
        """The squared error of the decoder layer's output."""
        handles = []
        try:
            for name, share in shares.items():
                threshold, _ = self.learned[name].threshold(share)
                handles.append(self.linears[name].register_forward_pre_hook(SparseInput(not_below(threshold))))
            return sum(call.error(layer) for call in calls)
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class _Call:
    """A decoder layer as it was called, its dense output, and which tokens are real (None: all)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    real: Tensor | None

    def error(self, layer: nn.Module) -> float:
        difference = (_tensor(layer(*self.args, **self.kwargs)) - self.output).float().square().sum(-1)
        if self.real is not None:
            difference = difference[self.real.to(difference.device)]
        return float(difference.sum(dtype=torch.float64))


def _calls(model: nn.Module, layer: nn.Module, data: MethodData) -> list[_Call]:
    """The calls of a decoder layer on the first tokens of the calibration text."""
    calls: list[_Call] = []
    real: Tensor | None = None

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(_Call(args, kwargs, _tensor(output), real))

    handle = layer.register_forward_hook(note, with_kwargs=True)
    try:
        left = _TOKENS
        for batch in data.text("teal-greedy"):
            length = batch["input_ids"].shape[1]
            inputs = {name: value[: max(1, left // length)] for name, value in batch.items()}
            mask = inputs.get("attention_mask")
            real = None if mask is None else mask.bool()
            run_decoder(model, inputs)
            left -= inputs["input_ids"].numel()
            if left <= 0:
                break
    finally:
        handle.remove()
    return calls


def _tensor(output: Any) -> Tensor:
    hidden_states: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden_states
