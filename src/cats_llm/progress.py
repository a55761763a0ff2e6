"""How whoever calls for long work may watch it: the library draws nothing itself."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Track(Protocol):
    """Gives the items back one by one, and shows meanwhile how many of them are done, as a progress bar."""

    def __call__(self, items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]: ...  # noqa: D102


def untracked(items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
    """The items, and nothing is shown."""
    return items
