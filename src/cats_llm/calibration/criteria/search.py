"""The config of a model for what is asked; where that leaves a choice, by measuring on text nothing was fitted to."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from cats_llm.calibration.batches import CalibrationData, Inputs, read_batches
from cats_llm.calibration.calibrate import calibrate, calibrating
from cats_llm.calibration.criteria.criterion import CANDIDATES, Criterion
from cats_llm.calibration.criteria.distill import Distillation
from cats_llm.calibration.criteria.divergence import log_perplexity, mean_divergence
from cats_llm.calibration.criteria.fit import fit
from cats_llm.calibration.criteria.target import AUTO, SparsityTarget
from cats_llm.calibration.profile import Profile
from cats_llm.checkpoint.config import CatsConfig
from cats_llm.errors import CatsError
from cats_llm.model.architecture import check_predicts_tokens
from cats_llm.model.sparsify import as_dense, densify, restoring, sparsify

HELD_BACK = 8
"""One batch in so many is not fitted to, and measured on."""

_STEP = 0.01  # sparsities that are tried
_HIGHEST = 0.98

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Choice:
    """A config, and what was measured to choose it.

    Attributes:
        config: the chosen one.
        measured: on text held back, by the name of the criterion or the sparsity, in the order of measuring: the KL
            divergence a token to the dense model, or the relative increase of perplexity. Empty where there was
            nothing to choose.
    """

    config: CatsConfig
    measured: dict[str, float] = field(default_factory=dict)


def find_config(
    model: nn.Module,
    calibration: Profile | CalibrationData,
    target: SparsityTarget,
    *,
    data: str | None = None,
    tokenizer: object = None,
    notify: Notify | None = None,
) -> Choice:
    """The thresholds, and what else a criterion sets, that make a model as sparse as is asked.

    The model is at the end what it was before. Under torch.distributed each process passes its share of the batches,
    and all get the same config.

    Args:
        model: as for `fit`; with a profile and no need to measure, its structure on the meta device is enough.
        calibration: a profile of the model, which is enough for the paper's criterion; or text, see `read_batches`.
            Text is read once for the paper's criterion, else it is kept. The last eighth of it is held back where
            something has to be measured.
        target: what is asked.
        data: what the text is, for the record.
        tokenizer: needed where the text comes as strings.
        notify: told in a few words what is being done.

    Raises:
        CatsError: from `calibrate` or `fit`; the profile is of another model or not enough; or the target cannot be
            met.
    """
    sparsity = target.gate_sparsity(model)
    if isinstance(calibration, Profile):
        if not target.profile_is_enough or sparsity is None:
            raise CatsError("a profile holds only what the criterion cats needs; pass --data instead of it.")
        calibration.check_model(model)
        return Choice(calibration.config(sparsity).with_coverage(target.coverage))
    if target.criterion == AUTO or sparsity is None:
        return _search(model, calibration, target, data, tokenizer, notify)
    criterion = Criterion.parse(target.criterion)
    if criterion.plain:
        # the same to the bit as by `fit`, in one pass over text that need not be kept
        profile = calibrate(model, calibration, data, tokenizer)
        return Choice(profile.config(sparsity).with_coverage(target.coverage))
    config = fit(
        model,
        calibration,
        sparsity,
        criterion,
        coverage=target.coverage,
        data=data,
        distillation=Distillation(target.distill_steps),
        notify=notify,
        tokenizer=tokenizer,
    )
    return Choice(config)


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


def _search(
    model: nn.Module,
    batches: CalibrationData,
    target: SparsityTarget,
    data: str | None,
    tokenizer: object,
    notify: Notify | None,
) -> Choice:
    """The criterion that stays closest to the dense model, or the largest sparsity that perplexity allows."""
    check_predicts_tokens(model, "choosing by what a model predicts")
    fitted_to, held_back = split(list(read_batches(model, batches, tokenizer)))
    increase = target.max_perplexity_increase
    measured: dict[str, float] = {}

    def attempt(name: str, tried: SparsityTarget, measure: Callable[[], float]) -> CatsConfig:
        def say(text: str) -> None:
            if notify is not None:
                notify(f"{name if increase is None else f'sparsity {name}'}: {text}")

        say("calibrating")
        config = find_config(model, fitted_to, tried, data=data, notify=say).config
        sparsify(model, config)
        measured[name] = measure()
        densify(model)
        return config

    with restoring(model), calibrating(model):
        if increase is None:
            configs = {
                name: attempt(name, replace(target, criterion=name), lambda: mean_divergence(model, held_back))
                for name in map(str, CANDIDATES)
            }
            # of equal ones the first
            return Choice(configs[min(measured, key=lambda name: measured[name])], measured)
        with as_dense(model):
            dense = log_perplexity(model, held_back)
        best: CatsConfig | None = None
        # bisection: perplexity is taken to rise with sparsity
        low, high = 0, round(_HIGHEST / _STEP) + 1
        while high - low > 1:
            middle = (low + high) // 2
            k = round(middle * _STEP, 2)
            config = attempt(
                f"{k:g}",
                replace(target, sparsity=k, max_perplexity_increase=None),
                lambda: math.expm1(log_perplexity(model, held_back) - dense),
            )
            low, high, best = (middle, high, config) if measured[f"{k:g}"] <= increase else (low, middle, best)
    if best is None:
        raise CatsError(
            f"a perplexity increase of at most {increase:.2%} allows no sparsity with the criterion "
            f"{target.criterion}: {_STEP:g} already costs {measured[f'{_STEP:g}']:.2%}; allow more."
        )
    return Choice(best, measured)
