"""Predictions out of a JSONL file, one at a time: memory does not grow with the file, nor with a line without end.

A row has `response`, `labels` (the gold answer), `messages`, `dialogue_id` and, where the dialogue has some, `images`;
`logprobs: {"content": [{"logprob": …}, …]}` where they were asked for. So write `ffr-verl infer`, ms-swift and the
published tools. The files that verl writes with `trainer.validation_data_dir` are read too.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from ffr_verl.errors import FFRError
from ffr_verl.evaluation.lines import LONGEST_LINE, read_lines
from ffr_verl.rewards.f1 import parse_gold

__all__ = [
    "Answered",
    "Prediction",
    "PredictionFormat",
    "UnusableLines",
    "prediction_of",
    "read_answered",
    "read_predictions",
    "read_verl_dump",
    "user_prompt",
]

PredictionFormat = Literal["ffr", "verl"]

# Line, response, labels, user's message and dialogue_id of a row: all that the metrics need. A plain tuple, and read
# without the rest of the row, because these are most of the time that an evaluation takes.
Answered = tuple[int, str, str, str, str]

_FIELDS = ("response", "labels", "messages", "images", "dialogue_id", "logprobs")
_REQUIRED = ("response", "labels", "messages", "dialogue_id")


@dataclass(frozen=True, slots=True)
class Prediction:
    """An answer and what it answers.

    Attributes:
        line: of the file, from 1.
        response: what the model wrote.
        labels: the gold answer, well-formed.
        messages: `{"role": …, "content": text}`; the user's holds dialogue and query.
        images: paths, one for each `<image>`.
        dialogue_id: of the dialogue; several rows may ask of one.
        logprobs: natural logarithms of the chosen tokens' probabilities; empty without any.
        extra: the row's further fields.
    """

    line: int
    response: str
    labels: str
    messages: tuple[Mapping[str, Any], ...]
    images: tuple[str, ...]
    dialogue_id: str
    logprobs: tuple[float, ...]
    extra: Mapping[str, Any]


class UnusableLines:
    """What becomes of lines that cannot be used: the first one is an error, or all are counted and left out.

    Args:
        path: of the file, for the message.
        lenient: count them.
        on_skipped: told the number of each line left out, from 1, and what is wrong with it.
    """

    def __init__(
        self, path: Path, *, lenient: bool = False, on_skipped: Callable[[int, str], None] | None = None
    ) -> None:
        self.count = 0
        self._path, self._lenient, self._on_skipped = path, lenient, on_skipped

    def add(self, line: int, reason: str) -> None:
        """Leave a line out.

        Raises:
            FFRError: when not lenient.
        """
        if not self._lenient:
            raise FFRError(f"{self._path}: line {line}: {reason}; or leave such lines out with --lenient")
        self.count += 1
        if self._on_skipped is not None:
            self._on_skipped(line, reason)

    def add_too_long(self, line: int) -> None:
        """Leave out a line that is too long to be read."""
        self.add(line, f"longer than {LONGEST_LINE // 2**20} MiB; give one row a line")

    def no_rows(self) -> FFRError:
        """The error of a file in which nothing is left."""
        left_out = f", {self.count} lines left out" if self.count else ""
        return FFRError(f"{self._path}: no predictions{left_out}; give a JSONL file, one prediction a line")


def read_predictions(
    path: Path, *, lenient: bool = False, on_skipped: Callable[[int, str], None] | None = None
) -> Iterator[Prediction]:
    """Yield the predictions of a JSONL file, gzipped or not; blank lines are passed over.

    Args:
        path: the file.
        lenient: leave out lines that cannot be used.
        on_skipped: told the number of each line left out, from 1, and what is wrong with it.

    Raises:
        FFRError: for a file that cannot be read or has no line that can be used; without `lenient` also for the first
            line that is cut, no JSON, not UTF-8, longer than 8 MiB, lacks a field or holds a malformed gold answer.

    Example:
        >>> import tempfile
        >>> gold = "<|utt_ids_start|>[1]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
        >>> messages = [{"role": "user", "content": "…"}]
        >>> row = {"response": "none", "labels": gold, "messages": messages, "dialogue_id": "d"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "pred.jsonl"
        ...     _ = file.write_text(json.dumps(row))
        ...     [prediction] = read_predictions(file)
        >>> prediction.line, prediction.response, prediction.images
        (1, 'none', ())
    """
    yield from _predictions(path, UnusableLines(path, lenient=lenient, on_skipped=on_skipped), prediction_of)


def read_verl_dump(
    path: Path, *, lenient: bool = False, on_skipped: Callable[[int, str], None] | None = None
) -> Iterator[Prediction]:
    """Yield the answers of a file that verl wrote, as predictions; as `read_predictions` otherwise.

    verl writes `STEP.jsonl` into `trainer.validation_data_dir` and `trainer.rollout_data_dir`. A row has `input` (the
    prompt), `output`, `gts` (the gold answer), `score`, `step` and what the reward function returned. It names no
    dialogue and no images: `dialogue_id` is empty, and `messages` is one of the user's, the whole prompt.

    Raises:
        FFRError: as `read_predictions`; also for a row whose prompt has no utterance: verl drops special tokens there,
            so the file is of no use where the model's tokenizer holds the answer tags as such.
    """
    yield from _predictions(path, UnusableLines(path, lenient=lenient, on_skipped=on_skipped), _prediction_of_verl)


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
    convert = prediction_of if row_format == "ffr" else _prediction_of_verl
    for first, lines in read_lines(path, on_too_long=unusable.add_too_long, on_position=on_position):
        rows = _typed_rows(lines) if row_format == "ffr" else None
        if rows is None:  # one of the lines is broken, or unusual: look at each
            for one in _of_lines(first, lines, unusable, convert):
                yield one.line, one.response, one.labels, user_prompt(one.messages), one.dialogue_id
            continue
        for number, row in enumerate(rows, start=first):
            messages = row.messages
            if len(messages) > 1 and messages[1].role == "user" != messages[0].role:
                prompt = messages[1].content
            else:
                found = [message.content for message in messages if message.role == "user"]
                if not found:
                    unusable.add(number, _NO_USER)
                    continue
                prompt = found[0]
            yield number, row.response, row.labels, prompt, row.dialogue_id


def user_prompt(messages: Sequence[Mapping[str, Any]]) -> str:
    """The user's message, which holds dialogue and query."""
    return next(str(message["content"]) for message in messages if message["role"] == "user")


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


_decode_row = msgspec.json.Decoder(_Row).decode


def _typed_rows(lines: list[bytes]) -> list[_Row] | None:
    """The rows of some lines, or `None` when one of them is no usual row."""
    try:
        for line in lines:
            if not line.isascii():
                line.decode("utf-8")  # the decoder does not look into texts that it leaves out
        return list(map(_decode_row, lines))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _predictions(
    path: Path, unusable: UnusableLines, convert: Callable[[int, Mapping[str, Any]], Prediction]
) -> Iterator[Prediction]:
    is_empty = True
    for first, lines in read_lines(path, on_too_long=unusable.add_too_long):
        for prediction in _of_lines(first, lines, unusable, convert):
            is_empty = False
            yield prediction
    if is_empty:
        raise unusable.no_rows()


def _of_lines(
    first: int,
    lines: Iterable[bytes],
    unusable: UnusableLines,
    convert: Callable[[int, Mapping[str, Any]], Prediction],
) -> Iterator[Prediction]:
    for number, text in enumerate(lines, start=first):
        line = text.removeprefix(codecs.BOM_UTF8) if number == 1 else text
        if not line or line.isspace():
            continue
        try:
            prediction = convert(number, _parsed(line))
        except ValueError as error:
            unusable.add(number, str(error))
            continue
        yield prediction


def _parsed(line: bytes) -> dict[str, Any]:
    if b"\0" in line:
        raise ValueError("holds NUL bytes, as after an interrupted write or copy; make the file again")
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of it; convert it, for example with iconv") from None
    except json.JSONDecodeError as error:
        what = "not JSON" if line.rstrip().endswith(b"}") else "cut off, or not JSON"
        raise ValueError(f"{what} ({error.msg} at column {error.colno}); make the file again") from None
    except RecursionError:
        raise ValueError("not JSON (nested too deeply)") from None
    if not isinstance(row, dict):
        raise ValueError(f"found {_kind(row)}, expected an object: one prediction a line")
    return row


def _kind(value: Any) -> str:
    """What JSON calls it."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def prediction_of(number: int, row: Mapping[str, Any]) -> Prediction:
    """A row as a prediction.

    Args:
        number: of its line, from 1.
        row: see the module.

    Raises:
        ValueError: when it is none; the message names the field.
    """
    _refuse_missing(row, _REQUIRED)
    identifier = row["dialogue_id"]
    if isinstance(identifier, bool) or not isinstance(identifier, (str, int)):
        raise ValueError(f"field dialogue_id: found {_kind(identifier)}, expected text")
    return Prediction(
        number,
        _text(row, "response"),
        _gold(row, "labels"),
        _messages(row["messages"]),
        _images(row.get("images")),
        str(identifier),
        _logprobs(row.get("logprobs")),
        {name: value for name, value in row.items() if name not in _FIELDS},
    )


def _prediction_of_verl(number: int, row: Mapping[str, Any]) -> Prediction:
    _refuse_missing(row, ("input", "output", "gts"))
    prompt, response, labels = _text(row, "input"), _text(row, "output"), _gold(row, "gts")
    if "<|utt_id_start|>" not in prompt:
        raise ValueError(
            "field input: no <|utt_id_start|>; verl drops special tokens, so where the tags are such its files tell "
            "nothing: evaluate answers of `ffr-verl infer`"
        )
    extra = {name: value for name, value in row.items() if name not in ("input", "output", "gts")}
    return Prediction(number, response, labels, ({"role": "user", "content": prompt},), (), "", (), extra)


def _refuse_missing(row: Mapping[str, Any], names: Sequence[str]) -> None:
    missing = [name for name in names if row.get(name) is None]
    if not missing:
        return
    found = ", ".join(map(str, row)) or "none"
    hint = ""
    if "input" in row and "gts" in row:
        hint = "; verl wrote it? give --format verl"
    elif "solution" in row and "response" not in row:
        hint = "; rows of a data set are no predictions, make some with `ffr-verl infer`"
    elif "response" in row and "messages" in row and "input" in names:
        hint = "; leave --format verl out"
    raise ValueError(f"field {', '.join(missing)} is missing, found {found}{hint}")


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"field {name}: found {_kind(value)}, expected text")
    return value


def _gold(row: Mapping[str, Any], name: str) -> str:
    gold = _text(row, name)
    if parse_gold(gold) is None:
        raise ValueError(malformed_gold(gold, name))
    return gold


def malformed_gold(gold: str, name: str = "labels") -> str:
    """What is said of a gold answer that cannot be read."""
    return f"field {name}: malformed gold answer {gold[:100]!r}, expected the wire format (docs/data.md)"


_NO_USER = "field messages: no message of role 'user'"


def _messages(messages: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"field messages: found {_kind(messages)}, expected a list")
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"field messages[{position}]: found {_kind(message)}, expected an object")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                found = _kind(message[name]) if name in message else "nothing"
                raise ValueError(f"field messages[{position}].{name}: found {found}, expected text")
    if not any(message["role"] == "user" for message in messages):
        raise ValueError(_NO_USER)
    return tuple(messages)


def _images(images: Any) -> tuple[str, ...]:
    if images is None:
        return ()
    if not isinstance(images, (list, tuple)):
        raise ValueError(f"field images: found {_kind(images)}, expected a list")
    paths: list[Any] = [image.get("path") if isinstance(image, Mapping) else image for image in images]
    for position, path in enumerate(paths):
        if not isinstance(path, str):
            raise ValueError(f'field images[{position}]: found {_kind(path)}, expected a path, or {{"path": …}}')
    return tuple(paths)


def _logprobs(logprobs: Any) -> tuple[float, ...]:
    if logprobs is None:
        return ()
    content = logprobs.get("content", ()) if isinstance(logprobs, Mapping) else None
    if isinstance(logprobs, Mapping) and content is None:
        return ()
    numbers = [token.get("logprob") if isinstance(token, Mapping) else None for token in content or ()]
    if content is None or not all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in numbers):
        raise ValueError('field logprobs: expected {"content": [{"logprob": number}, …]}')
    return tuple([float(one) for one in numbers if one is not None])
