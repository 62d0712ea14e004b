"""The one exception that commands show to a user without a traceback, and texts of others in messages."""

from __future__ import annotations

import re

__all__ = ["FFRError", "one_line", "printable"]

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class FFRError(ValueError):
    """Something the user can mend: the message says where it is, what was found, what was expected and how to mend it.

    Commands print the message and exit with status 2; as a `ValueError` it needs no special care in library use.
    """


def one_line(text: str, *, longest: int = 300) -> str:
    """A text that a server or a file holds, of at most `longest` characters, as a line for a terminal and for a file:
    with a space for line ends, escape sequences, and half of a surrogate pair, which fits into no file.

    Example:
        >>> one_line("too long:\\n\\x1b[31m \\ud83d 5000")
        'too long: [31m 5000'
    """
    return " ".join("".join([letter if letter.isprintable() else " " for letter in text[:longest]]).split())


def printable(text: str) -> str:
    """A text that fits on a line of a terminal or a report: what would move the cursor, or cannot be encoded, is
    written as a code."""
    return _UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape", "surrogatepass").decode(), text)
