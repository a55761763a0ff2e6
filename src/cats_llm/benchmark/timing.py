"""Timing that can be trusted on a noisy machine: candidates take turns, and ratios are taken round by round."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Quartiles":
        """Of at least one value."""
        values = list(values)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(median, low, high)


def interleave(candidates: Mapping[str, Callable[[int], float | None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every candidate in every round, after one round that warms up.

    A candidate is called with the number of its turn, counted over all candidates, so that it can rotate its weights.
    It returns the seconds if it measures them itself, else None. Every other round goes through the candidates
    backwards, so that none always follows the same one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    turn = 0
    for number in range(rounds + 1):
        for name in list(candidates) if number % 2 else reversed(list(candidates)):
            start = time.perf_counter()
            measured = candidates[name](turn)
            elapsed = time.perf_counter() - start
            turn += 1
            if number:
                seconds[name].append(elapsed if measured is None else measured)
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> Quartiles:
    """The quotient, round by round."""
    return Quartiles.of(a / b for a, b in zip(numerator, denominator, strict=True))


def speed(
    seconds: Mapping[str, list[float]],
    name: str,
    moved: float,
    dense: float,
    references: Mapping[str, str],
    key: str = "ms",
) -> dict[str, Any]:
    """What a candidate's times and bytes say.

    Args:
        seconds: of all candidates, one a round.
        name: the candidate.
        moved: bytes that it reads.
        dense: bytes that a dense model reads.
        references: candidates to compare it with, by the name of the row's entry; None where one did not take part.
        key: the entry for the milliseconds.
    """
    times = seconds[name]
    return {
        key: vars(Quartiles.of(1e3 * t for t in times)),
        "bytes": round(moved),
        "gb_per_s": moved / Quartiles.of(times).median / 1e9,
        **{
            entry: vars(ratio(seconds[other], times)) if other in seconds else None
            for entry, other in references.items()
        },
        "byte_bound": dense / moved,
    }
