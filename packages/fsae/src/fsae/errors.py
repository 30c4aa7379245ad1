"""The errors that a user can cause and mend: their text is all that a command line prints."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave cannot be used.

    The text is one sentence that says what was given, what is accepted and what to do; command lines print it
    without a traceback and exit with 2.
    """


class CheckpointError(UserError):
    """A checkpoint is missing, cut short, or does not fit the model it is loaded into."""


def require(condition: bool, name: str, value: object, accepted: str) -> None:
    """Refuse a setting with a sentence."""
    if not condition:
        raise UserError(f"{name} is {value!r}; it must be {accepted}")
