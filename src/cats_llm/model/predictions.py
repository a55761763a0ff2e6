"""What a model predicts at each position of a batch, a part of the positions at a time."""

from collections.abc import Iterator

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
