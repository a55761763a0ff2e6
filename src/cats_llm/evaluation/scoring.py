"""How well a model predicts sequences, and how far its next-token distributions are from another model's."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cats_llm.errors import CatsError
from cats_llm.evaluation.sparsity import SparsityCounter
from cats_llm.model.architecture import check_predicts_tokens, text_alone
from cats_llm.model.predictions import log_probabilities
from cats_llm.model.sparsify import as_dense
from cats_llm.model.tokens import check_positions, check_tokens


@dataclass(frozen=True)
class SequenceScores:
    """Sums over the predicted tokens of each sequence; all tensors are float64 (B,) on the CPU.

    Attributes:
        tokens: how many tokens were predicted.
        nll: their negative log-likelihood, in nats.
        kl: KL(reference || model), in nats; None without a reference.
        agree: how often both find the same token most likely; None without a reference.
    """

    tokens: Tensor
    nll: Tensor
    kl: Tensor | None
    agree: Tensor | None


@torch.no_grad()
def score_sequences(
    model: nn.Module,
    ids: Tensor,
    first: Tensor | int = 1,
    reference: nn.Module | None = None,
    dense: Callable[[nn.Module], AbstractContextManager[None]] = as_dense,
    counter: SparsityCounter | None = None,
) -> SequenceScores:
    """Predict tokens of sequences, each from its own beginning, every token computed as in prefill.

    Args:
        model: in eval mode.
        ids: input_ids (B, T).
        first: index of the first token to predict, at least 1; one for all or (B,).
        reference: the model to compare with. Passing ``model`` itself compares it with what it is inside ``dense``.
        dense: see above.
        counter: told of every call of ``model``, not of the reference's.

    Raises:
        CatsError: the vocabularies differ, or the model predicts no tokens or cannot read these.
    """
    with counter if counter is not None else nullcontext():
        logits = _logits(model, ids)
    expected = None
    if reference is not None:
        with dense(model) if reference is model else nullcontext():
            expected = _logits(reference, ids)
        if expected.shape != logits.shape:
            raise CatsError(
                f"the models have different vocabularies ({logits.shape[-1]} and {expected.shape[-1]} tokens), so "
                "their predictions cannot be compared."
            )
    ids = ids.to(logits.device)
    position = torch.arange(1, ids.shape[1], device=ids.device).expand(len(ids), -1)
    start = first.to(ids.device)[:, None] if isinstance(first, Tensor) else first
    sums = torch.zeros(4, len(ids), dtype=torch.float64, device="cpu")
    compared_logits = [logits] if expected is None else [logits, expected]
    for where, (log_p, *others) in log_probabilities(position >= start, *compared_logits):
        measures = [torch.ones(len(log_p)), F.nll_loss(log_p, ids[:, 1:][where], reduction="none")]
        for other in others:
            log_q = other.to(log_p.device)
            measures.append(F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1))
            measures.append(log_p.argmax(-1) == log_q.argmax(-1))
        for row, values in zip(sums, measures, strict=False):
            row.index_add_(0, where[0].cpu(), values.cpu().double())
    compared = reference is not None
    return SequenceScores(sums[0], sums[1], sums[2] if compared else None, sums[3] if compared else None)


def exp(value: float) -> float:
    """The exponential; infinity where it is too large."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _logits(model: Any, ids: Tensor) -> Tensor:
    """Logits that predict the tokens after the first, (B, T - 1, vocabulary)."""
    check_predicts_tokens(model, "perplexity")
    check_tokens(model, ids)
    check_positions(model, ids.shape[1])
    device = model.get_input_embeddings().weight.device
    with text_alone(model):
        logits: Tensor = model(input_ids=ids.to("cpu" if device.type == "meta" else device), use_cache=False).logits
    return logits[:, :-1]
