"""The one exception that users are meant to read, and what other libraries' exceptions say."""


class CatsError(ValueError):
    """Something the user can mend. The message is one sentence: what is wrong, where, and what to do."""


class UsageError(CatsError):
    """Options that do not go together, as the dataclass that holds them finds; wrong usage on the command line."""


def first_line(error: BaseException) -> str:
    """The first line of what another library's exception says, to stand within a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:")
