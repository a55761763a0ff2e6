"""How well a model predicts a batch: what calibration measures when it has to choose."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cats_llm.calibration.batches import run_decoder
from cats_llm.distributed import sum_over_processes
from cats_llm.model.predictions import kl_divergence, log_probabilities
from cats_llm.model.sparsify import as_dense

# positions at a time, whose float32 sum is what is added up
_ROWS = 1024


def logits_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """(B, T, vocabulary)."""
    logits: Tensor = run_decoder(model, inputs, head=True).logits
    return logits


def divergence(logits: Tensor, expected: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Sum over tokens of KL(expected || logits), float64 (), differentiable by logits; padding is left out."""
    return kl_divergence(counted_tokens(inputs), logits, expected, rows=_ROWS)


@torch.no_grad()
def log_perplexity(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """The mean negative log-likelihood of a token, each sequence predicted from its own beginning; over processes."""
    sums = torch.zeros(2, dtype=torch.float64)
    for inputs in batches:
        logits, ids, counted = logits_of(model, inputs), inputs["input_ids"], counted_tokens(inputs)
        predicted = counted[:, 1:] & counted[:, :-1]
        targets = ids[:, 1:].to(logits.device)
        for where, (log_p,) in log_probabilities(predicted, logits[:, :-1], rows=_ROWS):
            sums[0] += F.nll_loss(log_p, targets[where], reduction="sum").double().cpu()
        sums[1] += int(predicted.sum())
    sum_over_processes([sums])
    return float(sums[0] / sums[1])


@torch.no_grad()
def mean_divergence(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], expected: Sequence[Tensor] | None = None
) -> float:
    """KL(dense || model) a token, over processes.

    Args:
        model: sparse.
        batches: what to predict.
        expected: the dense model's logits of each batch; None computes them, one batch at a time.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    for i, inputs in enumerate(batches):
        if expected is None:
            with as_dense(model):
                dense = logits_of(model, inputs)
        else:
            dense = expected[i]
        sums[0] += divergence(logits_of(model, inputs), dense, inputs).cpu()
        sums[1] += int(counted_tokens(inputs).sum())
    sum_over_processes([sums])
    return float(sums[0] / sums[1])


def counted_tokens(inputs: Mapping[str, Tensor]) -> Tensor:
    """Which tokens are no padding, bool (B, T)."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
