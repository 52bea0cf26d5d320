"""The errors a user can cause. A command line prints their message alone; a library caller can catch ValueError."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave cannot work. The message says what was given, what is allowed and what to do."""

    def __init__(self, message: str):
        # torch's data workers hand an error on as its type with a traceback for its message: keep what was said
        if message.startswith("Caught ") and "Original Traceback" in message:
            message = message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip()
        super().__init__(message)


class DataError(UserError):
    """A row, a column or a file of a data set cannot be used. The message names it."""
