"""The arithmetic of a row: what times and bytes say."""

from collections.abc import Mapping
from typing import Any

from cats_llm.benchmark.timing import Quartiles, ratio

Times = Mapping[str, list[float]]
"""Seconds of every candidate, one a round."""


def speed(
    seconds: Times, name: str, moved: float, dense: float, references: Mapping[str, str], key: str = "ms"
) -> dict[str, Any]:
    """What a candidate's times and bytes say.

    Args:
        seconds: of all candidates.
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
