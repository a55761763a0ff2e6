"""The one exception that users are meant to read."""


class CatsError(ValueError):
    """Something the user can mend. The message is one sentence: what is wrong, where, and what to do."""
