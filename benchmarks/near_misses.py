"""Answers that nearly keep the format: for tests and benchmarks of rewards."""

from __future__ import annotations

import random
from collections.abc import Iterator

from ffr_verl.fragments import TAGS, Fragment, format_fragment

__all__ = ["near_misses"]

_DIGITS = ("\u0663", "\u0969", "\uff13", "\u56db", "\u2167", "\u00b2", "\U0001f10b", "\u09e9")
_CONTROLS = ("\x00", "\x07", "\x1b[31m", "\u202e", "\ud800", "\ufeff", "\u200b", "\r\n", "\u2028", "\x85")
_PIECES = (
    *TAGS,
    "[",
    "]",
    ",",
    ";",
    " ",
    "\n",
    "0",
    "1",
    "12",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<|im_end|>",
)


def _ids(source: random.Random) -> tuple[int, ...]:
    return tuple(source.randrange(source.choice((3, 30, 10**9))) for _ in range(source.randrange(8)))


def near_misses(source: random.Random) -> Iterator[str]:
    """Endless answers, sound ones among them, most with a fault: huge numbers, 100 kB texts, thousands of ids, nested
    brackets, control characters, digits of other scripts, tags swapped, doubled, cut or left out; a part of them in
    the reasoning wrapper.

    Example:
        >>> stream = near_misses(random.Random(1))
        >>> all(isinstance(next(stream), str) for _ in range(100))
        True
    """
    while True:
        answer = format_fragment(Fragment(_ids(source), _ids(source)))
        position = source.randrange(len(answer) + 1)
        match source.randrange(17):
            case 0:
                yield answer
            case 1:
                yield f"<think>{source.choice(_PIECES)}</think><answer>{answer}</answer>"
            case 2:
                yield answer[:position]
            case 3:
                yield answer[:position] + source.choice(_PIECES) + answer[position:]
            case 4:
                yield answer[:position] + source.choice(_CONTROLS) + answer[position:]
            case 5:
                yield answer[:position] + source.choice(_DIGITS) + answer[position:]
            case 6:
                yield answer.replace("[", "[" + "9" * source.randrange(1, 400), 1)
            case 7:
                yield answer.replace("[", "[" * source.randrange(1, 50)).replace("]", "]" * source.randrange(1, 50))
            case 8:
                yield answer.replace(", ", source.choice((" ", ",,", ";", ", ,", "-", ".", ",\n")))
            case 9:
                first, second = source.sample(TAGS, 2)
                yield answer.replace(first, "\0").replace(second, first).replace("\0", second)
            case 10:
                yield answer.replace(source.choice(TAGS), source.choice(("", TAGS[0] * 2, "<|utt_ids_start>")))
            case 11:
                yield answer + answer
            case 12:
                yield source.choice(
                    (answer.upper(), answer.strip("<"), f" {answer}", f"{answer}\n", f"```{answer}```")
                )
            case 13:
                yield "".join(source.choice(_PIECES) for _ in range(source.randrange(40)))
            case 14:
                yield "".join(chr(source.randrange(0x10FFFF)) for _ in range(source.randrange(60)))
            case 15:
                # As many ids as there may be, sometimes one too many, or a fault at the end that is found last.
                count = source.choice((4095, 4096, 4097)) if source.random() < 0.02 else source.randrange(40)
                separator = source.choice((",", ", ", " ,\n" + " " * 12))
                ids = separator.join([str(source.randrange(10 ** source.choice((2, 9)))) for _ in range(count)])
                text = f"{TAGS[0]}[{ids}]{TAGS[1]};{TAGS[2]}[{ids}{source.choice(('', ' ', 'x', ' ;'))}]{TAGS[3]}"
                yield text if source.random() < 0.5 else f"<think>long</think>\n<answer>{text}</answer>"
            case _:
                # 100 kB is rare: a hundred thousand of them would be 10 GB of text.
                piece = source.choice((*_PIECES, "0,", "[[", "<think>", "<", "a"))
                length = 100_000 if source.random() < 0.02 else 300
                yield answer[:position] + piece * (length // len(piece)) + answer[position:]
