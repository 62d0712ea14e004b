"""A row of a prediction file as a prediction; what is wrong with one that is none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ffr_verl.fragments import parse_gold

__all__ = ["NO_USER", "Prediction", "kind_of", "malformed_gold", "prediction_of", "prediction_of_verl", "user_prompt"]

NO_USER = "field messages: no message of role 'user'"
_FIELDS = ("response", "labels", "messages", "images", "dialogue_id", "logprobs", "error")
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
        error: why there is no answer, or no whole one; `None` where there is one.
        extra: the row's further fields.
    """

    line: int
    response: str
    labels: str
    messages: tuple[Mapping[str, Any], ...]
    images: tuple[str, ...]
    dialogue_id: str
    logprobs: tuple[float, ...]
    error: str | None
    extra: Mapping[str, Any]

    @property
    def rewarded(self) -> str:
        """What rewards are of: the response, but nothing where it is not whole."""
        return "" if self.error else self.response


def user_prompt(messages: Sequence[Mapping[str, Any]]) -> str:
    """The user's message, which holds dialogue and query."""
    return next(str(message["content"]) for message in messages if message["role"] == "user")


def kind_of(value: Any) -> str:
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
        raise ValueError(f"field dialogue_id: found {kind_of(identifier)}, expected text")
    return Prediction(
        number,
        _text(row, "response"),
        _gold(row, "labels"),
        _messages(row["messages"]),
        _images(row.get("images")),
        str(identifier),
        _logprobs(row.get("logprobs")),
        _error(row.get("error")),
        {name: value for name, value in row.items() if name not in _FIELDS},
    )


def prediction_of_verl(number: int, row: Mapping[str, Any]) -> Prediction:
    """A row that verl wrote as a prediction, see `read_verl_dump`; errors as of `prediction_of`."""
    _refuse_missing(row, ("input", "output", "gts"))
    prompt, response, labels = _text(row, "input"), _text(row, "output"), _gold(row, "gts")
    if "<|utt_id_start|>" not in prompt:
        raise ValueError(
            "field input: no <|utt_id_start|>; verl drops special tokens, so where the tags are such its files tell "
            "nothing: evaluate answers of `ffr-verl infer`"
        )
    extra = {name: value for name, value in row.items() if name not in ("input", "output", "gts")}
    return Prediction(number, response, labels, ({"role": "user", "content": prompt},), (), "", (), None, extra)


def _refuse_missing(row: Mapping[str, Any], names: Sequence[str]) -> None:
    missing = [name for name in names if row.get(name) is None]
    if not missing:
        return
    found = ", ".join(map(str, row)) or "none"
    hint = ""
    if "input" in row and "gts" in row and "input" not in names:
        hint = "; verl wrote it? give --format verl"
    elif "solution" in row and "response" not in row:
        hint = "; rows of a data set are no predictions, make some with `ffr-verl infer`"
    elif "response" in row and "messages" in row and "input" in names:
        hint = "; leave --format verl out"
    if missing[0] in row:
        kind = "a list" if missing[0] == "messages" else "text"
        raise ValueError(f"field {missing[0]} is null, expected {kind}{hint}")
    are = "is" if len(missing) == 1 else "are"
    raise ValueError(f"field{'s' * (len(missing) > 1)} {', '.join(missing)} {are} missing, found {found}{hint}")


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"field {name}: found {kind_of(value)}, expected text")
    return value


def _gold(row: Mapping[str, Any], name: str) -> str:
    gold = _text(row, name)
    if parse_gold(gold) is None:
        raise ValueError(malformed_gold(gold, name))
    return gold


def malformed_gold(gold: str, name: str = "labels") -> str:
    """What is said of a gold answer that cannot be read."""
    return f"field {name}: malformed gold answer {gold[:100]!r}, expected the wire format (docs/data.md)"


def _messages(messages: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"field messages: found {kind_of(messages)}, expected a list")
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"field messages[{position}]: found {kind_of(message)}, expected an object")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                found = kind_of(message[name]) if name in message else "nothing"
                raise ValueError(f"field messages[{position}].{name}: found {found}, expected text")
    if not any(message["role"] == "user" for message in messages):
        raise ValueError(NO_USER)
    return tuple(messages)


def _images(images: Any) -> tuple[str, ...]:
    if images is None:
        return ()
    if not isinstance(images, (list, tuple)):
        raise ValueError(f"field images: found {kind_of(images)}, expected a list")
    paths: list[Any] = [image.get("path") if isinstance(image, Mapping) else image for image in images]
    for position, path in enumerate(paths):
        if not isinstance(path, str):
            raise ValueError(f'field images[{position}]: found {kind_of(path)}, expected a path, or {{"path": …}}')
    return tuple(paths)


def _error(error: Any) -> str | None:
    """As text; tools write what they like."""
    return (error if isinstance(error, str) else json.dumps(error)) if error else None


def _logprobs(logprobs: Any) -> tuple[float, ...]:
    content = logprobs.get("content") if isinstance(logprobs, Mapping) else logprobs
    if content is None:
        return ()
    tokens = content if content is not logprobs and isinstance(content, (list, tuple)) else [None]
    numbers = [token.get("logprob") if isinstance(token, Mapping) else None for token in tokens]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise ValueError('field logprobs: expected {"content": [{"logprob": number}, …]}')
    return tuple([float(number) for number in numbers if number is not None])
