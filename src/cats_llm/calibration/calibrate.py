"""Run text through the dense model and record how large its gate activations are."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor, nn

from cats_llm.calibration.batches import Batch, check_batch, run_decoder, sum_over_processes
from cats_llm.calibration.histogram import GateHistogram
from cats_llm.calibration.profile import Profile
from cats_llm.errors import CatsError
from cats_llm.model.sparse_mlp import SparseMLP
from cats_llm.model.structure import (
    GatedMLP,
    check_function,
    checked_on_inputs,
    execution_device,
    find_gated_mlps,
    observe_gates,
    unwrap,
)
from cats_llm.model.surgery import dense_function
from cats_llm.versions import versions


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Batch], data: str | None = None) -> Profile:
    """One pass over the batches through the dense model (paper, section 3.1).

    Memory is 8 MiB a layer whatever the number of tokens. Padding, where attention_mask is 0, is not counted. Under
    torch.distributed each process passes its share of the batches, and all get the same profile. A sparse model is
    calibrated as the dense model it came from.

    Args:
        model: a causal language model with gated MLPs, on any device or spread over several.
        batches: `Batch`es, consumed one at a time.
        data: what the text is, for the record.

    Returns:
        The profile, from which thresholds for any sparsity follow.

    Raises:
        CatsError: no gated MLP, no tokens, or activations that are NaN or infinite.
    """
    mlps = find_gated_mlps(model)
    counter = _Counter(mlps)
    with evaluated(model), dense_function(model), observe_gates(mlps, counter):
        for batch in batches:
            counter.run(model, batch)
    counter.merge_processes()
    counter.check()
    layers = {mlp.layer: counter.histograms[mlp.layer].distribution(mlp.activation) for mlp in mlps}
    tokens, sequences = counter.totals.tolist()
    return Profile(layers, record_of(model, tokens, sequences, data))


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Check that the model can be calibrated, and let it be in evaluation mode while the context lasts.

    Raises:
        CatsError: no gated MLP, or one that computes something else.
    """
    dense = [mlp for mlp in find_gated_mlps(model) if not isinstance(mlp.module, SparseMLP)]
    for mlp in dense:
        check_function(mlp)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with checked_on_inputs(dense):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


class _Counter:
    """The histograms of all layers, and the mask of the batch that is running."""

    def __init__(self, mlps: list[GatedMLP]) -> None:
        self.histograms = {mlp.layer: GateHistogram(execution_device(mlp.gate_linear)) for mlp in mlps}
        self.totals = torch.zeros(2, dtype=torch.int64)  # tokens, sequences
        self.mask: Tensor | None = None

    def __call__(self, mlp: GatedMLP, gate: Tensor) -> None:
        rows = gate.reshape(-1, gate.shape[-1])
        if self.mask is not None:
            rows = rows[self.mask.to(rows.device)]
        self.histograms[mlp.layer].add(rows)

    def run(self, model: nn.Module, batch: Batch) -> None:
        inputs, self.mask = check_batch(batch)
        ids = inputs["input_ids"]
        if ids.numel():
            run_decoder(model, inputs)
            self.totals += torch.tensor([int(ids.numel() if self.mask is None else self.mask.sum()), len(ids)])

    def merge_processes(self) -> None:
        """Sum over the processes of torch.distributed, if it runs."""
        sum_over_processes([self.totals, *(t for histogram in self.histograms.values() for t in histogram.tensors())])

    def check(self) -> None:
        for layer, histogram in self.histograms.items():
            histogram.check(layer)
        if self.totals[0] == 0:
            raise CatsError("there was nothing to calibrate on: the data holds no tokens.")


def record_of(model: nn.Module, tokens: int, sequences: int, data: str | None) -> dict[str, Any]:
    """What was calibrated on what, for the record."""
    config = getattr(unwrap(model), "config", None)
    # the processes that share the weights of a model have all seen the same tokens
    copies = getattr(unwrap(model), "tp_size", None) or 1
    return {
        "model": getattr(config, "_name_or_path", None) or type(unwrap(model)).__name__,
        "revision": getattr(config, "_commit_hash", None),
        "dtype": str(getattr(unwrap(model), "dtype", None)).removeprefix("torch."),
        "data": data,
        "tokens": tokens // copies,
        "sequences": sequences // copies,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
    }
