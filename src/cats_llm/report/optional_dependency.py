"""What the `report` extra installs, and the sentence a user reads without it."""

from collections.abc import Sequence
from importlib import import_module

from cats_llm.errors import CatsError

_MODULES = ("matplotlib", "jinja2")


class MissingExtraError(CatsError, ImportError):
    """The `report` extra is not installed."""

    def __init__(self, what: str = "the report", modules: Sequence[str] = _MODULES) -> None:
        super().__init__(f"{what} needs {' and '.join(modules)}: pip install 'cats-llm[report]'")


def require_extra(what: str = "the report", modules: Sequence[str] = _MODULES) -> None:
    """Fail now rather than after minutes of work whose results could then not be drawn.

    Raises:
        MissingExtraError: one of the modules is not installed.
    """
    try:
        for module in modules:
            import_module(module)
    except ImportError as error:
        raise MissingExtraError(what, modules) from error
