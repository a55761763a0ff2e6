"""A figure of the page, as those who can draw it hand it over."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure


class PageFigure(NamedTuple):
    """A figure that can be drawn.

    Attributes:
        name: for files and ids; unique in a page.
        title: its heading.
        captions: paragraphs below it.
        draw: ``draw(wide=...)`` gives it in the layout for a desk or for a phone.
    """

    name: str
    title: str
    captions: list[str]
    draw: "Callable[..., Figure]"


def numbered(name: str, index: int, count: int) -> str:
    """The name of one of several figures of a kind."""
    return f"{name}-{index + 1}" if count > 1 else name
