"""What is asked of a model: by which criterion neurons are skipped, and how many."""

import re
from dataclasses import dataclass, field

from torch import nn

from cats_llm.calibration.criteria.criterion import CANDIDATES, PARTS, Criterion
from cats_llm.calibration.criteria.distill import Distillation
from cats_llm.calibration.criteria.scores import SCORES
from cats_llm.checkpoint.config import parse_sparsity
from cats_llm.checkpoint.token_policy import TokenPolicy
from cats_llm.errors import CatsError, UsageError
from cats_llm.model.structure import find_gated_mlps
from cats_llm.model.weight_traffic import bytes_per_token
from cats_llm.options import Panel, option

AUTO = "auto"
_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}


def _criterion(text: str) -> str:
    return text if text == AUTO else str(Criterion.parse(text))


def _bytes(text: str) -> float:
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?) ?([kMG]?B?)", text.strip())
    try:
        if match is None:
            raise ValueError(text)
        return float(match[1]) * _UNITS[match[2].upper()]
    except (ValueError, KeyError) as error:
        raise CatsError(f"{text!r} is no size; 3.2GB is 3.2e9 bytes.") from error


def _increase(text: str) -> float:
    try:
        value = float(text.rstrip().removesuffix("%")) / 100
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise CatsError(f"{text!r} is no increase; 5 lets perplexity grow by 5 %.")
    return value


@dataclass(frozen=True)
class SparsityTarget:
    """A criterion, and one of three measures of how much it may skip; an increase of perplexity of 5 % is 0.05.

    Raises:
        CatsError: none or several of the measures are given, there is no such criterion, or auto is to meet a
            perplexity.
    """

    panel = Panel.SPARSITY

    sparsity: float | None = option(
        None, parse=parse_sparsity, metavar="K", help="Share of MLP neurons to skip, from 0 up to (not including) 1."
    )
    bytes_per_token: float | None = option(
        None,
        parse=_bytes,
        metavar="SIZE",
        help="Instead of --sparsity: as much as makes decoding a token read so many bytes of weights, as 3.2GB.",
    )
    max_perplexity_increase: float | None = option(
        None,
        parse=_increase,
        metavar="PERCENT",
        help="Instead of --sparsity: as much as perplexity allows, on the last eighth of the text.",
    )
    criterion: str = option(
        str(Criterion()),
        parse=_criterion,
        metavar="SCORE[+PART...]",
        help=f"Which neurons are skipped: {', '.join(SCORES)}; and what is done about the error: {', '.join(PARTS)}. "
        f"{AUTO} takes the best of {len(CANDIDATES)} by measuring. Default: the paper's.",
    )
    distill_steps: int = option(
        Distillation().steps, minimum=1, help="Batches that the part distill learns the compensation from."
    )
    coverage: TokenPolicy = field(default_factory=TokenPolicy)

    def __post_init__(self) -> None:
        measures = (self.sparsity, self.bytes_per_token, self.max_perplexity_increase)
        if sum(measure is not None for measure in measures) != 1:
            raise UsageError("pass one of --sparsity, --bytes-per-token and --max-perplexity-increase.")
        if self.criterion != AUTO:
            Criterion.parse(self.criterion)
        elif self.max_perplexity_increase is not None:
            raise UsageError(
                f"--criterion {AUTO} compares criteria at one sparsity; pass --sparsity or --bytes-per-token with it, "
                "or name a criterion."
            )

    @property
    def profile_is_enough(self) -> bool:
        """No text is needed if there is a profile."""
        return self.criterion == str(Criterion()) and self.max_perplexity_increase is None

    def gate_sparsity(self, model: nn.Module) -> float | None:
        """The sparsity, equal in all layers, see `sparsity_for_bytes`; None if it has to be found by measuring."""
        return self.sparsity if self.bytes_per_token is None else sparsity_for_bytes(model, self.bytes_per_token)


def sparsity_for_bytes(model: nn.Module, size: float) -> float:
    """The gate sparsity, equal in all layers, at which decoding a token reads ``size`` bytes of weights.

    Args:
        model: may be on the meta device.

    Raises:
        CatsError: no sparsity does.
    """
    least = bytes_per_token(model, {mlp.layer: 1.0 for mlp in find_gated_mlps(model)}).sparse
    most = bytes_per_token(model, {}).sparse
    if not least < size <= most:
        raise CatsError(
            f"{size:.4g} bytes a token cannot be had: this model reads {most:.4g} when dense, and more than "
            f"{least:.4g} at any sparsity."
        )
    return (most - size) / (most - least)
