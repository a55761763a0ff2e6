"""Which tokens of a CATS model are sparse: part of the checkpoint's config, since it changes the function."""

from dataclasses import asdict, dataclass
from typing import Any

from cats_llm.errors import CatsError
from cats_llm.options import Panel, option


@dataclass(frozen=True)
class TokenPolicy:
    """Which tokens are thresholded; the others run the dense function. By default all are, as in the paper.

    Attributes:
        dense_prefill: tokens that come several a sequence in one call (a prompt) are dense; only decoding is sparse.
        dense_first_tokens: the first N tokens of every sequence are dense (attention sinks).
        last_fraction: of the n tokens a sequence that a call brings, only the last int(last_fraction * n) are sparse
            (the protocol of TEAL); tokens that come one at a time are sparse. None: all.
    """

    panel = Panel.SPARSITY

    dense_prefill: bool = option(False, help="Prompts run dense; only decoding is sparse.")
    dense_first_tokens: int = option(
        0, minimum=0, help="The first N tokens of every sequence run dense (attention sinks)."
    )
    last_fraction: float | None = option(
        None, minimum=0.0, maximum=1.0, help="Only this last share of a prompt is sparse, as TEAL measures."
    )

    def __post_init__(self) -> None:
        if not isinstance(self.dense_prefill, bool):
            raise CatsError(f"dense_prefill is {self.dense_prefill!r}; it must be true or false.")
        n = self.dense_first_tokens
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise CatsError(f"dense_first_tokens is {n!r}; it must be a whole number of tokens, 0 or more.")
        share = self.last_fraction
        if share is not None and (isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1):
            raise CatsError(
                f"last_fraction is {share!r}; it must be a share above 0 and up to 1 (0.5 is the last half)."
            )
        if self.dense_prefill and share is not None:
            raise CatsError(
                "dense_prefill leaves no sparse token in a prompt, so last_fraction has no meaning with it."
            )

    @property
    def all_tokens(self) -> bool:
        """Every token is sparse."""
        return self == TokenPolicy() or self == TokenPolicy(last_fraction=1.0)

    def to_dict(self) -> dict[str, Any]:
        """The keys that stand in a config, all of them."""
        return asdict(self)

    def __str__(self) -> str:
        parts = [
            "dense prefill" if self.dense_prefill else "",
            f"first {self.dense_first_tokens} dense" if self.dense_first_tokens else "",
            f"last {self.last_fraction:g} of a prompt sparse" if self.last_fraction is not None else "",
        ]
        return ", ".join(part for part in parts if part) or "all tokens"
