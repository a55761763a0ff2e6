"""Standard errors, and paired comparisons of a variant with the dense model on the same documents."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cats_llm.evaluation.task import Metric
from cats_llm.number_format import Z95

# random numbers drawn for one test, at most
_DRAWS = 9_999
_NUMBERS = 200_000_000
_CHUNK = 4_000_000


@dataclass(frozen=True)
class PairedDifference:
    """A variant's value minus the dense model's.

    Attributes:
        value: the difference.
        stderr: its standard error.
        low, high: a 95 % confidence interval.
        p: two-sided, of the hypothesis that the variant is as good as the dense model on these documents' population.
        test: which test gave p.
    """

    value: float
    stderr: float
    low: float
    high: float
    p: float
    test: str


def standard_error(scores: list[float], weights: list[float], strata: list[int] | None = None) -> float | None:
    """Of the weighted mean, documents drawn independently within each stratum; None if one has a single document.

    Args:
        scores, weights: one a document.
        strata: the numbers of documents that belong together, in their order; None takes all as one.
    """
    variance = 0.0
    begin = 0
    for n in strata or [len(scores)]:
        s = torch.tensor(scores[begin : begin + n], dtype=torch.float64)
        w = torch.tensor(weights[begin : begin + n], dtype=torch.float64)
        begin += n
        if n < 2:
            return None
        centred = w * (s - (w * s).sum() / w.sum())
        variance += float(centred.square().sum()) * n / (n - 1)
    return math.sqrt(variance) / sum(weights)


def paired_difference(variant: Metric, dense: Metric) -> PairedDifference | None:
    """The difference of a metric, and how sure it is. Document i of one is compared with document i of the other.

    For means the standard error is that of the mean of the differences, and the interval a normal one. p comes from
    McNemar's exact test where every score is 0 or 1 and all weights are equal, else from random sign flips of the
    differences. For perplexities standard error and interval come from a bootstrap over windows, p from sign flips.

    Returns:
        None where there are no scores to pair, fewer than two documents, or a value that is not finite.
    """
    if variant.kind == "opaque" or variant.value is None or dense.value is None or len(variant.scores) < 2:
        return None
    if len(variant.scores) != len(dense.scores) or variant.weights != dense.weights:
        return None
    value = variant.value - dense.value
    a, b, w = (torch.tensor(x, dtype=torch.float64) for x in (variant.scores, dense.scores, variant.weights))
    if variant.kind == "perplexity":
        draws = _bootstrap(a, b, w)
        low, high = (float(q) for q in draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)))
        p, test = _sign_flips((a - b) * w)
        return PairedDifference(value, float(draws.std()), low, high, p, test)
    error = standard_error((a - b).tolist(), variant.weights, variant.strata)
    if error is None:
        return None
    if bool(torch.isin(torch.cat((a, b)), torch.tensor([0.0, 1.0])).all()) and bool((w == w[0]).all()):
        p, test = mcnemar(int((a > b).sum()), int((a < b).sum())), "McNemar, exact"
    else:
        p, test = _sign_flips((a - b) * w)
    return PairedDifference(value, error, value - Z95 * error, value + Z95 * error, p, test)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p that ``gained`` and ``lost`` documents come from a fair coin."""
    n, k = gained + lost, min(gained, lost)
    if n == 0:
        return 1.0
    # log of the binomial coefficients: the coefficients themselves do not fit a float
    terms = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    return min(1.0, 2 * sum(math.exp(term) for term in terms))


def _sign_flips(differences: Tensor) -> tuple[float, str]:
    """Two-sided p that the sum of the differences is as large as it is when each sign is random."""
    draws = max(999, min(_DRAWS, _NUMBERS // len(differences)))
    generator = torch.Generator().manual_seed(0)
    observed = abs(float(differences.sum())) * (1 - 1e-12)
    extreme, left = 0, draws
    while left:
        rows = max(1, min(left, _CHUNK // len(differences)))
        signs = torch.randint(0, 2, (rows, len(differences)), generator=generator, dtype=torch.int8)
        sums = (signs.double() * 2 - 1) @ differences
        extreme += int((sums.abs() >= observed).sum())
        left -= rows
    return (1 + extreme) / (1 + draws), f"sign flips, {draws} draws"


def _bootstrap(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """Differences of perplexity on windows drawn with replacement, float64 (draws,)."""
    draws = max(999, min(_DRAWS, _NUMBERS // len(a)))
    generator = torch.Generator().manual_seed(0)
    differences = []
    left = draws
    while left:
        rows = max(1, min(left, _CHUNK // len(a)))
        index = torch.randint(0, len(a), (rows, len(a)), generator=generator)
        weights = w[index]
        total = weights.sum(1)
        perplexities = [((x[index] * weights).sum(1) / total).exp() for x in (a, b)]
        differences.append(perplexities[0] - perplexities[1])
        left -= rows
    return torch.cat(differences)


def combined(name: str, metrics: list[Metric]) -> Metric | None:
    """The plain mean of a metric over several tasks, each of the same weight; None where that has no meaning."""
    if any(metric.kind != "mean" or metric.value is None for metric in metrics):
        return None
    scores = [score for metric in metrics for score in metric.scores]
    weights = [w / sum(metric.weights) for metric in metrics for w in metric.weights]
    strata = [n for metric in metrics for n in metric.strata or [len(metric.scores)]]
    value = sum(metric.value or 0.0 for metric in metrics) / len(metrics)
    error = standard_error(scores, weights, strata)
    return Metric(name, value, error, metrics[0].higher_is_better, len(scores), "mean", scores, weights, strata=strata)
