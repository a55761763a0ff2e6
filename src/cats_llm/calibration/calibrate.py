"""Run text through the dense model and record how large its gate activations are."""

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor, nn

from cats_llm.calibration.batches import (
    CalibrationData,
    check_totals,
    count,
    padding_mask,
    read_batches,
    rows_of,
    run_decoder,
)
from cats_llm.calibration.distribution import GateHistogram
from cats_llm.calibration.profile import NOT_RUN, Profile
from cats_llm.distributed import sum_over_processes
from cats_llm.errors import CatsError
from cats_llm.model.architecture import check_reads_text
from cats_llm.model.sparse_mlp import SparseMLP
from cats_llm.model.sparsify import as_dense
from cats_llm.model.structure import (
    GatedMLP,
    check_function,
    checked_on_inputs,
    eval_mode,
    execution_device,
    find_gated_mlps,
    observe_gates,
    unwrap,
)
from cats_llm.versions import versions

logger = logging.getLogger(__name__)


@torch.no_grad()
def calibrate(model: nn.Module, batches: CalibrationData, data: str | None = None, tokenizer: Any = None) -> Profile:
    """One pass over the batches through the dense model (paper, section 3.1).

    Memory is 8 MiB a layer whatever the number of tokens. Padding, where attention_mask is 0, is not counted. Under
    torch.distributed each process passes its share of the batches, and all get the same profile. A sparse model is
    calibrated as the dense model it came from.

    Args:
        model: a model of text with gated MLPs, with any head or none, on any device or spread over several. Layers
            that text does not reach, as those that attend to images, stay dense: see `Profile.not_run`.
        batches: the text, see `read_batches`; consumed one batch at a time.
        data: what the text is, for the record.
        tokenizer: needed where the text comes as strings.

    Returns:
        The profile, from which thresholds for any sparsity follow.

    Raises:
        CatsError: no gated MLP, an encoder-decoder, no tokens or such as the model cannot read, or activations that
            are NaN or infinite.
    """
    mlps = find_gated_mlps(model)
    histograms = {mlp.layer: GateHistogram(execution_device(mlp.gate_linear)) for mlp in mlps}
    totals = torch.zeros(2, dtype=torch.int64)  # tokens, sequences
    mask: Tensor | None = None

    def add(mlp: GatedMLP, gate: Tensor) -> None:
        histograms[mlp.layer].add(rows_of(gate, mask))

    with calibrating(model), as_dense(model), observe_gates(mlps, add):
        for inputs in read_batches(model, batches, tokenizer):
            mask = padding_mask(inputs)
            if inputs["input_ids"].numel():
                run_decoder(model, inputs)
                totals += count(inputs, mask)
    sum_over_processes([totals, *(t for histogram in histograms.values() for t in histogram.tensors())])
    for layer, histogram in histograms.items():
        histogram.check(layer)
    check_totals(totals)
    reached = [mlp for mlp in mlps if histograms[mlp.layer].counts.any()]
    layers = {mlp.layer: histograms[mlp.layer].distribution(mlp.activation) for mlp in reached}
    return Profile(layers, record_of(model, totals, data, tell_not_run(mlps, layers)))


def tell_not_run(mlps: Sequence[GatedMLP], reached: Collection[int]) -> list[int]:
    """The layers of MLPs that text does not reach, after a warning that they stay dense.

    Raises:
        CatsError: these are all.
    """
    not_run = [mlp.layer for mlp in mlps if mlp.layer not in reached]
    named = ", ".join(map(str, not_run))
    if len(not_run) == len(mlps):
        raise CatsError(f"text alone reaches no gated MLP of this model (layers {named}), so there is nothing to do.")
    if not_run:
        logger.warning("text alone does not reach the MLPs of layers %s; they stay dense", named)
    return not_run


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Check that the model can be calibrated, and let it be in eval mode while the context lasts.

    Raises:
        CatsError: no gated MLP, or one that computes something else, or an encoder-decoder.
    """
    check_reads_text(model)
    dense = [mlp for mlp in find_gated_mlps(model) if not isinstance(mlp.module, SparseMLP)]
    for mlp in dense:
        check_function(mlp)
    with eval_mode(model), checked_on_inputs(dense):
        yield


def record_of(model: nn.Module, totals: Tensor, data: str | None, not_run: list[int]) -> dict[str, Any]:
    """What was calibrated on what, for the record.

    Args:
        totals: tokens and sequences over all processes, int64 (2,).
        data: what the text is.
        not_run: layers that text does not reach.
    """
    base = unwrap(model)
    config = getattr(base, "config", None)
    # the processes that share the weights of a model have all seen the same tokens
    tokens, sequences = (totals // (getattr(base, "tp_size", None) or 1)).tolist()
    record = {
        "model": getattr(config, "_name_or_path", None) or type(base).__name__,
        "revision": getattr(config, "_commit_hash", None),
        "dtype": str(getattr(base, "dtype", None)).removeprefix("torch."),
        "data": data,
        "tokens": tokens,
        "sequences": sequences,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    return record | ({NOT_RUN: not_run} if not_run else {})
