"""Tokens that a model cannot read, found before the embedding lookup: on a GPU that fails late and ends the process."""

from typing import Any

from torch import Tensor, nn

from cats_llm.errors import CatsError
from cats_llm.model.structure import unwrap


def check_tokens(model: nn.Module, ids: Tensor, tokenizer: Any = None) -> None:
    """Make sure that the model's embedding has the tokens.

    Args:
        model: may be on the meta device.
        ids: of any shape.
        tokenizer: to name the token.

    Raises:
        CatsError: it does not.
    """
    base: Any = unwrap(model)
    if not ids.numel() or not hasattr(base, "get_input_embeddings"):
        return
    size = base.get_input_embeddings().weight.shape[0]
    for wrong in (int(ids.min()), int(ids.max())):
        if not 0 <= wrong < size:
            raise CatsError(
                f"the text holds the token {wrong}{_name(tokenizer, wrong)}, but the model's embedding has {size} rows "
                f"(0 to {size - 1}); take the tokenizer that belongs to the model, or resize the embedding with "
                "model.resize_token_embeddings."
            )


def _name(tokenizer: Any, token: int) -> str:
    if tokenizer is None or token < 0:
        return ""
    try:
        return f" ({tokenizer.convert_ids_to_tokens(token)!r})"
    except (TypeError, ValueError, IndexError, OverflowError):  # no token of this tokenizer
        return ""


def check_positions(model: nn.Module, length: int) -> None:
    """Make sure that a sequence of ``length`` tokens has a learned position for each, if positions are learned.

    Raises:
        CatsError: it has not.
    """
    limit = learned_positions(model)
    if limit is not None and length > limit:
        raise CatsError(
            f"a sequence has {length} tokens, but the model has learned {limit} positions; pass shorter ones."
        )


def learned_positions(model: nn.Module) -> int | None:
    """How many positions have an embedding of their own; None if positions are computed."""
    base: Any = unwrap(model)
    if not hasattr(base, "get_input_embeddings"):
        return None
    config = getattr(base, "config", None)
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) if config else None
    if not isinstance(limit, int):
        return None
    tokens = base.get_input_embeddings()
    # some tables begin with rows for padding
    learned = (m for m in base.modules() if isinstance(m, nn.Embedding) and m is not tokens)
    return limit if any(0 <= m.num_embeddings - limit <= 2 for m in learned) else None
