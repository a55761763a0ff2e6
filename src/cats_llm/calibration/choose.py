"""Choose a criterion, or how much sparsity is affordable, by measuring on text that nothing was fitted to."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from cats_llm.calibration.batches import CalibrationData, Inputs, read_batches
from cats_llm.calibration.calibrate import calibrate, evaluated
from cats_llm.calibration.criterion import CANDIDATES, Criterion
from cats_llm.calibration.fit import fit
from cats_llm.calibration.predictions import log_perplexity, mean_divergence
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.checkpoint.coverage import Coverage
from cats_llm.errors import CatsError
from cats_llm.model.accounting import bytes_per_token
from cats_llm.model.architecture import check_predicts_tokens
from cats_llm.model.structure import find_gated_mlps
from cats_llm.model.surgery import dense_function, densify, restored, sparsify

HELD_BACK = 8
"""One batch in so many is not fitted to, and measured on."""

_STEP = 0.01  # sparsities that are tried
_HIGHEST = 0.98


def split(batches: Sequence[Inputs]) -> tuple[list[Inputs], list[Inputs]]:
    """Calibration text in two: to fit to (the first part), and to measure on (the last).

    Raises:
        CatsError: there are less than two batches.
    """
    number = max(1, len(batches) // HELD_BACK)
    if len(batches) < 2:
        raise CatsError(
            "choosing needs calibration text of at least two batches, one of them to measure on; give more text, or a "
            "smaller --batch-size."
        )
    return list(batches[:-number]), list(batches[-number:])


def configure(
    model: nn.Module, batches: CalibrationData, sparsity: float, criterion: Criterion, **settings: Any
) -> CatsConfig:
    """The config of a criterion: the paper's by its profile, another by `fit`, which takes the settings."""
    if not criterion.plain:
        return fit(model, batches, sparsity, criterion, **settings)
    config = calibrate(model, batches, settings.get("data")).config(sparsity)  # the same to the bit as a profile's
    return config.with_coverage(settings.get("coverage") or Coverage())


@dataclass(frozen=True)
class Choice:
    """What was chosen, and what was measured.

    Attributes:
        config: the chosen one.
        measured: what was tried, in that order, and what it cost: the KL divergence a token from the dense model, or
            the relative increase of perplexity.
    """

    config: CatsConfig
    measured: dict[str, float]


def choose_criterion(
    model: nn.Module,
    batches: CalibrationData,
    sparsity: float,
    candidates: Sequence[Criterion] = CANDIDATES,
    notify: Callable[[str], None] | None = None,
    **settings: Any,
) -> Choice:
    """The criterion whose model stays closest to the dense one: least KL divergence on text held back.

    Args:
        model: as for `fit`; it is at the end what it was before.
        batches: calibration text; the last eighth is held back.
        sparsity: k, the same for all.
        candidates: to choose from; of equal ones the first is taken.
        notify: told what is being done.
        settings: for `fit`.

    Raises:
        CatsError: from `fit`, or there is too little text to hold any back.
    """
    check_predicts_tokens(model, "choosing by what a model predicts")
    fitted_to, held_back = split(list(read_batches(model, batches)))
    measured, configs = {}, {}
    with restored(model), evaluated(model):
        for criterion in candidates:
            name = str(criterion)
            configs[name] = configure(model, fitted_to, sparsity, criterion, notify=_inside(notify, name), **settings)
            sparsify(model, configs[name])
            measured[name] = mean_divergence(model, held_back)
            densify(model)
    best = min(measured, key=lambda name: measured[name])
    return Choice(configs[best], measured)


def choose_sparsity(
    model: nn.Module,
    batches: CalibrationData,
    criterion: Criterion,
    increase: float,
    notify: Callable[[str], None] | None = None,
    **settings: Any,
) -> Choice:
    """The largest sparsity, in steps of 0.01, that raises perplexity on text held back by no more than ``increase``.

    Found by bisection: perplexity is taken to rise with sparsity.

    Args:
        increase: relative to the dense model; 0.05 is 5 %.
        model, batches, notify, settings: as for `choose_criterion`.

    Raises:
        CatsError: not even the least sparsity stays below, or from `fit`.
    """
    check_predicts_tokens(model, "choosing by what a model predicts")
    fitted_to, held_back = split(list(read_batches(model, batches)))
    measured: dict[str, float] = {}
    best: CatsConfig | None = None
    with restored(model), evaluated(model):
        with dense_function(model):
            dense = log_perplexity(model, held_back)
        low, high = 0, round(_HIGHEST / _STEP) + 1
        while high - low > 1:
            middle = (low + high) // 2
            k = round(middle * _STEP, 2)
            config = configure(model, fitted_to, k, criterion, notify=_inside(notify, f"sparsity {k:g}"), **settings)
            sparsify(model, config)
            measured[f"{k:g}"] = math.expm1(log_perplexity(model, held_back) - dense)
            densify(model)
            if measured[f"{k:g}"] <= increase:
                low, best = middle, config
            else:
                high = middle
    if best is None:
        raise CatsError(
            f"a perplexity increase of at most {increase:.2%} allows no sparsity with the criterion {criterion}: "
            f"{_STEP:g} already costs {measured[f'{_STEP:g}']:.2%}; allow more."
        )
    return Choice(best, measured)


def _inside(notify: Callable[[str], None] | None, what: str) -> Callable[[str], None]:
    """Tells of steps of ``what``, and first of itself."""

    def say(text: str) -> None:
        if notify is not None:
            notify(f"{what}: {text}")

    say("calibrating")
    return say


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
