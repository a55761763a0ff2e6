"""What methods learn from: the profile, and the calibration text itself for those that need more."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cats_llm.calibration.batches import Inputs
from cats_llm.calibration.profile import Profile
from cats_llm.errors import CatsError


@dataclass(frozen=True, eq=False)
class MethodData:
    """What a user gave to learn from.

    Attributes:
        profile: None if there is none.
        batches: the calibration text as inputs of the model; of several processes each has all of it. None if there is
            none.
        learned: what methods keep for the next sparsity, under names of their own.
    """

    profile: Profile | None = None
    batches: Sequence[Inputs] | None = None
    learned: dict[str, Any] = field(default_factory=dict, repr=False)

    def text(self, method: str) -> Sequence[Inputs]:
        """The batches.

        Raises:
            CatsError: there are none.
        """
        if not self.batches:
            raise CatsError(
                f"the method {method} learns from text, more than a profile holds: pass --calibration TEXT instead of "
                "--profile (in Python make_variants(..., batches=...))."
            )
        return self.batches
