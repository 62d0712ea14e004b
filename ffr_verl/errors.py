"""The one exception that commands show to a user without a traceback, and texts of others in messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# The package is on no index, so it is installed from a checkout.
INSTALL_STACK = "in a checkout of ffr_verl: make install, or pip install '.[gpu]' where there is a GPU"

INSTALL_FLASH_ATTENTION = "pip install flash-attn==2.8.3 --no-build-isolation"

# Control characters, halves of surrogate pairs, and what turns the direction of a line.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class FFRError(ValueError):
    """Something the user can mend: the message says where it is, what was found, what was expected and how to mend it.

    Commands print the message and exit with status 2; as a `ValueError` it needs no special care in library use.
    """


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """A question for a message, with a space behind it; empty when nothing known is near.

    Example:
        >>> did_you_mean("ffr_grop", ["ffr_grpo", "ffr_sft"]), did_you_mean("llama", ["ffr_grpo"])
        ("did you mean 'ffr_grpo'? ", '')
    """
    close = difflib.get_close_matches(str(given), known, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    Example:
        >>> counted(1, "image"), counted(1200, "row")
        ('1 image', '1,200 rows')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """What an exception says first, or its name where it says nothing.

    Example:
        >>> first_line(ValueError("no such key\\nat line 3")), first_line(KeyboardInterrupt())
        ('no such key', 'KeyboardInterrupt')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def install_extra(extra: str) -> str:
    """How to install what one of our extras needs.

    Example:
        >>> install_extra("embed")
        "in a checkout of ffr_verl: pip install '.[embed]'"
    """
    return f"in a checkout of ffr_verl: pip install '.[{extra}]'"


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


def error_lines(error: Exception | str) -> str:
    """What a command writes to stderr before it exits with status 2: the message, which may have several lines, with
    nothing in it that moves the cursor.

    Example:
        >>> error_lines("no\\x1b[31m.json: no such file")
        'ffr-verl: error: no\\\\x1b[31m.json: no such file\\n'
    """
    return f"ffr-verl: error: {printable_lines(str(error))}\n"


def printable_lines(text: str) -> str:
    """`printable` for each line of a text."""
    return "\n".join([printable(line) for line in text.split("\n")])
