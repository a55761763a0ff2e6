"""What a model predicts at each position of a batch, a part of the positions at a time."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def log_probabilities(
    positions: Tensor, *logits: Tensor, rows: int = 512
) -> Iterator[tuple[tuple[Tensor, Tensor], list[Tensor]]]:
    """Log-probabilities at the positions that count, in float32, of which a whole batch would be large.

    Args:
        positions: which count, bool (B, T).
        logits: of one model or more, (B, T, vocabulary) each, on any devices.
        rows: positions at a time.

    Yields:
        Where the positions of this part are, two indices (rows,) on the first logits' device, and for each of the
        logits the log-probabilities there, (rows, vocabulary).
    """
    axes = positions.to(logits[0].device).nonzero(as_tuple=True)
    for sequence, column in zip(*(axis.split(rows) for axis in axes), strict=True):
        there = (each[sequence.to(each.device), column.to(each.device)] for each in logits)
        yield (sequence, column), [F.log_softmax(part.float(), dim=-1) for part in there]


def kl_divergence(positions: Tensor, logits: Tensor, expected: Tensor, rows: int = 512) -> Tensor:
    """Sum over positions of KL(expected || logits), float64 (), differentiable by logits.

    The gradient, softmax(logits) - softmax(expected), is made along with the value, so that beside it no more than a
    part of the positions is ever held in float32.

    Args:
        positions: which count, bool (B, T).
        logits: (B, T, vocabulary).
        expected: of the model to be like, (B, T, vocabulary); gets no gradient.
        rows: positions at a time.
    """
    total: Tensor = _Divergence.apply(logits, expected, positions, rows)
    return total


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, expected: Tensor, positions: Tensor, rows: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        gradient = torch.zeros_like(logits) if ctx.needs_input_grad[0] else None
        for where, (log_p, log_q) in log_probabilities(positions, logits, expected, rows=rows):
            log_q = log_q.to(log_p.device)
            total += F.kl_div(log_p, log_q, log_target=True, reduction="sum").double()
            if gradient is not None:
                gradient[where] = (log_p.exp() - log_q.exp()).to(gradient.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), None, None, None
