"""A criterion: which neurons a model skips, and what it does about the error. Named as ``SCORE[+PART...]``."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from cats_llm.calibration.criteria.scores import SCORES
from cats_llm.errors import CatsError


@dataclass(frozen=True)
class Criterion:
    """A score of neurons (`SCORES`) and the parts that go with it.

    Attributes:
        score: which neurons count how much.
        compensate: add the mean of what is dropped to the MLP's output.
        sequential: calibrate each layer on what the sparse layers below it produce.
        allocate: give every layer a sparsity of its own, of the same average, by measured error.
        distill: learn the compensation by gradients, to match the dense model's predictions; implies compensate.
    """

    score: str = "cats"
    compensate: bool = False
    sequential: bool = False
    allocate: bool = False
    distill: bool = False

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise CatsError(f"{self.score!r} is no score; choose from {', '.join(SCORES)}.")
        if self.distill:
            object.__setattr__(self, "compensate", True)

    @classmethod
    def parse(cls, text: str) -> "Criterion":
        """From ``SCORE[+PART...]``, as in ``moment+compensate+sequential``.

        Raises:
            CatsError: an unknown score or part.
        """
        score, *parts = (part.strip() for part in text.split("+"))
        unknown = [part for part in parts if part not in PARTS]
        if unknown:
            raise CatsError(
                f"{unknown[0]!r} in the criterion {text!r} is no part of one; after the score come any of "
                f"{', '.join(PARTS)}, joined by +."
            )
        return cls(score, **dict.fromkeys(parts, True))

    def __str__(self) -> str:
        return "+".join([self.score, *(part for part in PARTS if getattr(self, part))])

    @property
    def plain(self) -> bool:
        """It is the paper's: a profile is all it needs."""
        return self == Criterion()

    def to_dict(self) -> dict[str, Any]:
        """The name and the parts, for the record in a config; empty for the paper's."""
        return {} if self.plain else {"name": str(self), **asdict(self)}


PARTS = tuple(field.name for field in fields(Criterion))[1:]
"""What can follow the score."""

CANDIDATES = tuple(
    Criterion.parse(name)
    for name in (
        "cats",
        "moment+compensate+sequential",
        "fisher+compensate+sequential",
        "fisher+compensate+sequential+allocate",
        "fisher+sequential+allocate+distill",
    )
)
"""What `--criterion auto` measures, from the cheapest to the dearest to calibrate."""
