"""What the `report` extra installs, and the sentence a user reads without it."""

from importlib import import_module

_MODULES = ("jinja2", "matplotlib")


class MissingExtraError(ImportError):
    """The `report` extra is not installed."""

    def __init__(self) -> None:
        super().__init__("the report needs matplotlib and jinja2: pip install 'cats-llm[report]'")


def require_extra() -> None:
    """Fail now rather than after minutes of work whose results could then not be drawn.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    try:
        for module in _MODULES:
            import_module(module)
    except ImportError as error:
        raise MissingExtraError from error
