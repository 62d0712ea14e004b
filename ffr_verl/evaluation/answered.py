"""What the metrics need of prediction files, several times as quickly as whole predictions are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from ffr_verl.evaluation.lines import read_lines
from ffr_verl.evaluation.prediction_rows import NO_USER, Prediction, prediction_of, prediction_of_verl, user_prompt
from ffr_verl.evaluation.predictions import UnusableLines, predictions_of_lines

__all__ = ["Answered", "PredictionFormat", "answered", "read_answered"]

PredictionFormat = Literal["ffr", "verl"]

# Line, response, labels, user's message, dialogue_id and error (why there is no answer) of a row: all that the
# metrics need. A plain tuple, and read without the rest of the row, because these are most of the time that an
# evaluation takes.
Answered = tuple[int, str, str, str, str, str | None]


def read_answered(
    path: Path,
    unusable: UnusableLines,
    *,
    row_format: PredictionFormat = "ffr",
    on_position: Callable[[int], None] = lambda position: None,
) -> Iterator[Answered]:
    """What the metrics need of each prediction; gold answers are not looked at.

    Args:
        path: the file.
        unusable: told of lines that cannot be used.
        row_format: `ffr` or `verl`, see `read_predictions` and `read_verl_dump`.
        on_position: told how many bytes of the file have been read.

    Raises:
        FFRError: for a file that cannot be read.
    """
    convert = prediction_of if row_format == "ffr" else prediction_of_verl
    for first, lines in read_lines(path, on_too_long=unusable.add_too_long, on_position=on_position):
        rows = _typed_rows(lines) if row_format == "ffr" else None
        if rows is None:  # one of the lines is broken, or unusual: look at each
            for one in predictions_of_lines(first, lines, unusable, convert):
                yield answered(one)
            continue
        for number, row in enumerate(rows, start=first):
            messages = row.messages
            if len(messages) > 1 and messages[1].role == "user" != messages[0].role:
                prompt = messages[1].content
            else:
                found = [message.content for message in messages if message.role == "user"]
                if not found:
                    unusable.add(number, NO_USER)
                    continue
                prompt = found[0]
            yield number, row.response, row.labels, prompt, row.dialogue_id, row.error


def answered(one: Prediction) -> Answered:
    """What the metrics need of a prediction."""
    return one.line, one.response, one.labels, user_prompt(one.messages), one.dialogue_id, one.error


class _Message(msgspec.Struct, gc=False):
    role: str
    content: str


class _Image(msgspec.Struct, gc=False):
    path: str


class _Token(msgspec.Struct, gc=False):
    logprob: float


class _Logprobs(msgspec.Struct, gc=False):
    content: list[_Token] | None = None


class _Row(msgspec.Struct, gc=False):
    """What every usual row fits; `prediction_of` takes more, and says what is wrong."""

    response: str
    labels: str
    messages: list[_Message]
    dialogue_id: str
    images: list[str | _Image] | None = None
    logprobs: _Logprobs | None = None
    error: str | None = None


_decode_row = msgspec.json.Decoder(_Row).decode


def _typed_rows(lines: list[bytes]) -> list[_Row] | None:
    """The rows of some lines, or `None` when one of them is no usual row."""
    try:
        if not all(map(bytes.isascii, lines)):
            b"".join(lines).decode("utf-8")  # the decoder does not look into texts that it leaves out
        return list(map(_decode_row, lines))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
