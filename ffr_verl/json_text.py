"""JSON as it is read here: a key that an object has twice is a fault, since one of its values would be dropped; and
what is wrong with a text that cannot be read, in one set of words."""

from __future__ import annotations

import json
from typing import Any

from ffr_verl.errors import printable


class KeyTwiceError(ValueError):
    """An object has a key twice; the key is the error's text."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyTwiceError(next(name for name in names if names.count(name) > 1))
    return made


decoder = json.JSONDecoder(object_pairs_hook=_object)


def json_fault(error: Exception, column: int | None = None) -> str:
    """What is wrong with a text that `decoder` has refused, by its `ValueError` or `RecursionError`.

    Example:
        >>> try:
        ...     decoder.decode('{"a": 1, "a": 2}')
        ... except ValueError as error:
        ...     json_fault(error)
        "the key 'a' stands twice in an object; keep one of them"
    """
    at = "" if column is None else f" at column {column}"
    if isinstance(error, KeyTwiceError):
        return f"the key {printable(str(error)[:80])!r} stands twice in an object; keep one of them"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg.removesuffix(' at').removesuffix(' starting')}{at})"
    # Python reads numbers of no more than 4,300 digits.
    what = "nested too deeply" if isinstance(error, RecursionError) else "a number of thousands of digits"
    return f"not JSON ({what}{at})"


def is_cut_off(error: Exception) -> bool:
    """Whether the text ended where the error was found."""
    return isinstance(error, json.JSONDecodeError) and (
        "Unterminated" in error.msg or not error.doc[error.pos :].strip(" \t\n\r")
    )
