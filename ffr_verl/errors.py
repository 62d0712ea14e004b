"""The one exception that commands show to a user without a traceback."""

from __future__ import annotations

__all__ = ["FFRError"]


class FFRError(ValueError):
    """Something the user can mend: the message says where it is, what was found, what was expected and how to mend it.

    Commands print the message and exit with status 2; as a `ValueError` it needs no special care in library use.

    Example:
        >>> from ffr_verl.errors import FFRError
        >>> raise FFRError("train.json: row 3: field 'solution' is missing; add the gold answer")
        Traceback (most recent call last):
            ...
        ffr_verl.errors.FFRError: train.json: row 3: field 'solution' is missing; add the gold answer
    """
