"""Predictions out of a JSONL file, one at a time: memory does not grow with the file, nor with a line without end.

A row has `response`, `labels` (the gold answer), `messages`, `dialogue_id` and, where the dialogue has some, `images`;
`logprobs: {"content": [{"logprob": …}, …]}` where they were asked for. So write `ffr-verl infer`, ms-swift and the
published tools.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffr_verl.errors import FFRError
from ffr_verl.evaluation.lines import LONGEST_LINE, read_lines
from ffr_verl.rewards.f1 import parse_gold

__all__ = ["Prediction", "read_predictions"]

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
            line that is cut, no JSON, not UTF-8, longer than 8 MiB, or lacks a field or holds a malformed gold answer.

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

    def unusable(line: int, reason: str) -> None:
        if not lenient:
            raise FFRError(f"{path}: line {line}: {reason} (--lenient leaves such lines out)")
        if on_skipped is not None:
            on_skipped(line, reason)

    def too_long(line: int) -> None:
        unusable(line, f"longer than {LONGEST_LINE // 2**20} MiB; give one row a line")

    found = 0
    for first, lines in read_lines(path, on_too_long=too_long):
        for number, text in enumerate(lines, start=first):
            line = text.removeprefix(codecs.BOM_UTF8) if number == 1 else text
            if not line or line.isspace():
                continue
            try:
                prediction = _prediction(number, _parsed(line))
            except ValueError as error:
                unusable(number, str(error))
                continue
            found += 1
            yield prediction
    if not found:
        raise FFRError(f"{path}: no row that can be used; give a JSONL file of predictions")


def _parsed(line: bytes) -> dict[str, Any]:
    if b"\0" in line:
        raise ValueError("holds NUL bytes, as after an interrupted write or copy; make it again")
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of it; convert it, for example with iconv") from None
    except json.JSONDecodeError as error:
        is_cut = not line.rstrip().endswith(b"}")
        what = "cut off, or not JSON" if is_cut else "not JSON"
        raise ValueError(f"{what} ({error.msg} at column {error.colno}); make it again") from None
    except RecursionError:
        raise ValueError("not JSON (nested too deeply)") from None
    if not isinstance(row, dict):
        raise ValueError(f"found {type(row).__name__}, expected an object: one row a line")
    return row


def _prediction(number: int, row: Mapping[str, Any]) -> Prediction:
    missing = [name for name in _REQUIRED if row.get(name) is None]
    if missing:
        raise ValueError(f"field {', '.join(missing)} is missing; found {', '.join(map(str, row)) or 'none'}")
    for name in ("response", "labels"):
        if not isinstance(row[name], str):
            raise ValueError(f"field {name}: found {type(row[name]).__name__}, expected text")
    if parse_gold(row["labels"]) is None:
        raise ValueError(f"field labels: malformed gold answer {row['labels'][:100]!r}")
    identifier = row["dialogue_id"]
    if isinstance(identifier, bool) or not isinstance(identifier, (str, int)):
        raise ValueError(f"field dialogue_id: found {type(identifier).__name__}, expected text")
    return Prediction(
        number,
        row["response"],
        row["labels"],
        _messages(row["messages"]),
        _images(row.get("images")),
        str(identifier),
        _logprobs(row.get("logprobs")),
        {name: value for name, value in row.items() if name not in _FIELDS},
    )


def _messages(messages: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(messages, list):
        raise ValueError(f"field messages: found {type(messages).__name__}, expected a list")
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f'field messages[{position}]: expected {{"role": text, "content": text}}')
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("field messages: no message of role 'user'")
    return tuple(messages)


def _images(images: Any) -> tuple[str, ...]:
    if images is None:
        return ()
    if not isinstance(images, list):
        raise ValueError(f"field images: found {type(images).__name__}, expected a list")
    paths: list[Any] = [image.get("path") if isinstance(image, dict) else image for image in images]
    for position, path in enumerate(paths):
        if not isinstance(path, str):
            raise ValueError(f'field images[{position}]: expected a path, or {{"path": …}}')
    return tuple(paths)


def _logprobs(logprobs: Any) -> tuple[float, ...]:
    if logprobs is None:
        return ()
    content = logprobs.get("content") if isinstance(logprobs, dict) else logprobs
    if content is None:
        return ()
    try:
        return tuple([float(token["logprob"]) for token in content])
    except (TypeError, KeyError, ValueError):
        raise ValueError('field logprobs: expected {"content": [{"logprob": number}, …]}') from None
