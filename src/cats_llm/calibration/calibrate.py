"""Run text through the dense model and record how large its gate activations are."""

from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cats_llm.calibration.histogram import GateHistogram
from cats_llm.calibration.profile import Profile
from cats_llm.errors import CatsError
from cats_llm.model.sparse_mlp import SparseMLP
from cats_llm.model.structure import (
    GatedMLP,
    check_function,
    execution_device,
    find_gated_mlps,
    observe_gates,
    unwrap,
)
from cats_llm.model.surgery import dense_function
from cats_llm.versions import versions

Batch = Tensor | Mapping[str, Tensor]
"""input_ids (B, T), or a dict of input_ids and, for padded sequences, attention_mask (B, T)."""


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
    for mlp in mlps:
        if not isinstance(mlp.module, SparseMLP):
            check_function(mlp)
    counter = _Counter(mlps)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with dense_function(model), observe_gates(mlps, counter):
            for batch in batches:
                counter.run(model, batch)
    finally:
        for module, training in modes.items():
            module.training = training
    counter.merge_processes()
    counter.check()
    layers = {mlp.layer: counter.histograms[mlp.layer].distribution(mlp.activation) for mlp in mlps}
    return Profile(layers, _record(model, counter, data))


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
        inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
        ids = inputs.get("input_ids")
        if ids is None:
            raise CatsError(f"a calibration batch has no input_ids, only {', '.join(map(str, inputs)) or 'nothing'}.")
        if ids.dim() != 2:
            raise CatsError(f"a calibration batch has the shape {tuple(ids.shape)}; it must be (sequences, tokens).")
        if ids.numel() == 0:
            return
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape != ids.shape:
            raise CatsError(
                f"a calibration batch has input_ids of shape {tuple(ids.shape)} but an attention_mask of shape "
                f"{tuple(mask.shape)}; they must be equal."
            )
        self.mask = None if mask is None or bool(mask.all()) else mask.reshape(-1).bool()
        # the language model without its head: logits are not needed
        base: Any = unwrap(model)
        body = base.base_model if hasattr(base, "base_model") else base
        device = body.get_input_embeddings().weight.device
        if device.type == "meta":  # offloaded: hooks bring inputs where they belong
            device = torch.device("cpu")
        names = ("input_ids", "attention_mask")
        body(**{name: inputs[name].to(device) for name in names if inputs.get(name) is not None}, use_cache=False)
        self.totals += torch.tensor([int(ids.numel() if self.mask is None else self.mask.sum()), len(ids)])

    def merge_processes(self) -> None:
        """Sum over the processes of torch.distributed, if it runs."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        tensors = [self.totals, *(t for histogram in self.histograms.values() for t in histogram.tensors())]
        # NCCL moves only what is on a GPU
        transport = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        for tensor in tensors:
            moved = tensor.to(transport)
            dist.all_reduce(moved)
            tensor.copy_(moved)

    def check(self) -> None:
        for layer, histogram in self.histograms.items():
            if histogram.not_finite:
                raise CatsError(
                    f"gate activations of layer {layer} are NaN or infinite; the weights are damaged "
                    "or the dtype overflows: try --dtype float32."
                )
        if self.totals[0] == 0:
            raise CatsError("there was nothing to calibrate on: the data holds no tokens.")


def _record(model: nn.Module, counter: _Counter, data: str | None) -> dict[str, Any]:
    config = getattr(unwrap(model), "config", None)
    # the processes that share the weights of a model have all seen the same tokens
    tokens, sequences = (counter.totals // (getattr(unwrap(model), "tp_size", None) or 1)).tolist()
    return {
        "model": getattr(config, "_name_or_path", None) or type(unwrap(model)).__name__,
        "revision": getattr(config, "_commit_hash", None),
        "dtype": str(getattr(unwrap(model), "dtype", None)).removeprefix("torch."),
        "data": data,
        "tokens": tokens,
        "sequences": sequences,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
    }
