"""A prediction, the one record of an answered row: what `ffr-verl infer`, ms-swift (`swift infer`), the published
tools and verl write is read here, and ours is written here.

A row has `response`, `labels` (the gold answer), `messages`, `dialogue_id` where it is to be found again in another
file, and where there are such `images`, `logprobs: {"content": [{"logprob": …}, …]}`, `split` and `error` (why there
is no answer, or no whole one). verl's rows have `input`, `output` and `gts`. A file is JSONL, gzipped or not, of which
one row at a time is held, or a JSON list, which is held whole.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import msgspec

from ffr_verl.dialogues import (
    IMAGE,
    QUERY_END,
    QUERY_START,
    UTTERANCE_START,
    Dialogue,
    content_text,
    dialogue_message,
    extra_info,
)
from ffr_verl.errors import FFRError
from ffr_verl.files import GZIP, PARQUET, refuse_special
from ffr_verl.fragments import parse_gold
from ffr_verl.json_text import KeyTwiceError, decoder, json_fault
from ffr_verl.model_families import FAMILIES

__all__ = [
    "ANSWERED",
    "LEAST_LOGPROB",
    "LONGEST_LINE",
    "Answered",
    "Prediction",
    "PredictionFormat",
    "UnusableLines",
    "answered",
    "cut_off_before_text",
    "malformed_gold",
    "prediction_of",
    "prediction_row",
    "read_answered",
    "read_predictions",
    "read_verl_dump",
    "row_key",
    "row_key_without_id",
    "write_prediction",
    "wrong_field",
]

PredictionFormat = Literal["ffr", "verl"]

LONGEST_LINE = 8 * 2**20
# Stands for a probability of 0, whose logarithm JSON cannot hold; vLLM's server writes the same.
LEAST_LOGPROB = -9999.0
_BLOCK = 2**16
ANSWERED = ("response", "messages")  # what a row needs whose gold answer does not matter
_NEEDED = ("response", "labels", "messages")
_OF_VERL = ("input", "output", "gts")
_LONGEST_ENDING = 100
_ENDING = re.compile(r"\s*(?:<\|im_end\|>)?\n(?:<\|im_start\|>)?assistant\s*(?:<think>\s*(?:</think>\s*)?)?\Z")
_IMAGE_TOKENS = re.compile(
    "|".join(f"{one.image_start}(?:{one.image_pad})+{one.image_end}".replace("|", r"\|") for one in FAMILIES.values())
)


@dataclass(frozen=True, slots=True)
class Prediction:
    """An answer and what it answers."""

    line: int  # of the file, from 1
    response: str  # what the model wrote
    labels: str  # the gold answer, well-formed; empty where the row has none and needs none
    messages: tuple[Mapping[str, Any], ...]  # `{"role": …, "content": text}`; one of the user's holds the dialogue
    images: tuple[str, ...]  # paths, one for each `<image>`; empty where the row has bytes alone
    dialogue_id: str  # several rows may ask of one; empty where the row does not say it
    logprobs: tuple[float, ...]  # natural logarithms of the chosen tokens' probabilities; empty without any
    error: str | None  # why there is no answer, or no whole one
    extra: Mapping[str, Any]  # the row's further fields

    @property
    def rewarded(self) -> str:
        """What rewards are of: the response, but nothing where it is not whole."""
        return "" if self.error else self.response

    @property
    def prompt(self) -> str:
        """The user's message with the dialogue, see `dialogue_message`."""
        return dialogue_message([(message["role"], message["content"]) for message in self.messages]) or ""


def cut_off_before_text(text: str, *, is_cut_off: bool) -> str | None:
    """Why an answer that met its most tokens before it said anything is none; `None` for every other."""
    if text.strip() or not is_cut_off:
        return None
    return "cut off before the first token of an answer: give it more room (--max-new-tokens)"


def info_of(one: Prediction, dialogue: Dialogue) -> dict[str, Any]:
    """`extra_info` of a prediction whose dialogue has been read; an image without a path has an empty one."""
    count = len(dialogue.image_ids)
    names = [*one.images, *[""] * count][:count]
    return extra_info(dialogue, names, split=str(one.extra.get("split") or ""))


def row_key(dialogue_id: str, query: str, solution: str) -> int:
    """Tells the rows of a data set apart, whatever file or place they are in; a signed number of 64 bits."""
    digest = hashlib.blake2b(f"{dialogue_id}\0{query}\0{solution}".encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little", signed=True)


def row_key_without_id(dialogue: Dialogue, solution: str) -> int:
    """`row_key` of a row that does not say its dialogue's id: what is spoken in it stands for that."""
    return row_key(f"\0{dialogue.digest}", dialogue.query, solution)


class UnusableLines:
    """What becomes of lines that cannot be used: the first one is an error, or all are counted and left out.

    `on_skipped` is told the number of each line left out, from 1, and what is wrong with it; `mend` ends the error.
    """

    def __init__(
        self,
        path: Path,
        *,
        lenient: bool = False,
        on_skipped: Callable[[int, str], None] = lambda line, reason: None,
        mend: str = "; or leave such lines out with --lenient",
    ) -> None:
        self.count = 0
        self._path, self._lenient, self._on_skipped, self._mend = path, lenient, on_skipped, mend

    def add(self, line: int, reason: str) -> None:
        """Leave a line out, or raise an `FFRError` when not lenient."""
        if not self._lenient:
            raise FFRError(f"{self._path}: line {line}: {reason}{self._mend}")
        self.count += 1
        self._on_skipped(line, reason)

    def no_rows(self) -> FFRError:
        """The error of a file in which nothing is left."""
        left_out = f", {self.count} lines left out" if self.count else ""
        return FFRError(f"{self._path}: no predictions{left_out}; give a JSONL file, one prediction a line")


# ---- what a row may hold


class _Part(msgspec.Struct, gc=False):
    type: str = "text"
    text: str | None = None


class _Message(msgspec.Struct, gc=False):
    role: str
    content: str | list[str | _Part] | None = None


class _Image(msgspec.Struct, gc=False):
    path: str | None = None


class _Token(msgspec.Struct, gc=False):
    logprob: float | None


class _Logprobs(msgspec.Struct, gc=False):
    content: list[_Token] | None = None


class _Row(msgspec.Struct, gc=False):
    response: str
    messages: list[_Message]
    labels: str | None = ""
    dialogue_id: str | int | None = None
    images: list[str | _Image] | None = None
    logprobs: _Logprobs | None = None
    error: str | None = None


_decode = msgspec.json.Decoder(_Row).decode
_KINDS = {"array": "a list", "object": "an object", "str": "text", "bool": "true or false", "null": "null"}
_WRONG_KIND = re.compile(r"Expected `(.+)`, got `(.+)` - at `\$\.?(.*)`")


def _kind(name: str) -> str:
    names = [_KINDS.get(one, "a number") for one in name.split(" | ") if one != "null"]
    return " or ".join(dict.fromkeys(names)) or "null"


def wrong_field(wrong: msgspec.ValidationError) -> str:
    """What is wrong with which field, in our words."""
    if found := _WRONG_KIND.fullmatch(str(wrong)):
        expected, got, field = found.groups()
        return f"field {field}: found {_kind(got)}, expected {_kind(expected)}"
    text, _, place = str(wrong).partition(" - at `$.")
    return f"field {place.rstrip('`')}: {text.lower()}"


def prediction_of(number: int, row: Mapping[str, Any], *, needed: Sequence[str] = _NEEDED) -> Prediction:
    """A row, see the module, as a prediction; a `ValueError` that names the field when it is none.

    Fields that are `needed` must be there, and needed gold answers well-formed.
    """
    _refuse_missing(row, needed)
    error = row.get("error")
    error = None if not error else error if isinstance(error, str) else json.dumps(error)  # tools write what they like
    try:
        one = msgspec.convert({**row, "error": error}, _Row)
    except msgspec.ValidationError as wrong:
        raise ValueError(wrong_field(wrong)) from None
    if "labels" in needed and parse_gold(one.labels or "") is None:
        raise ValueError(malformed_gold(one.labels or ""))
    if not _prompt(one):
        raise ValueError("field messages: no message of role 'user' with a text")
    images = [image if isinstance(image, str) else image.path or "" for image in one.images or ()]
    tokens = [token.logprob for token in (one.logprobs and one.logprobs.content) or ()]
    known = [value for value in tokens if value is not None and value == value]
    return Prediction(
        number,
        one.response,
        one.labels or "",
        tuple([{**message, "content": content_text(message.get("content"))} for message in row["messages"]]),
        tuple(images),
        "" if one.dialogue_id is None else str(one.dialogue_id),
        tuple([max(value, LEAST_LOGPROB) for value in known]) if len(known) == len(tokens) else (),
        error,
        {name: value for name, value in row.items() if name not in _Row.__struct_fields__},
    )


def _of_verl(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row that verl wrote as one of ours, see `read_verl_dump`."""
    _refuse_missing(row, _OF_VERL)
    prompt, response, labels = (row[name] for name in _OF_VERL)
    if UTTERANCE_START not in str(prompt):
        raise ValueError(
            "field input: no <|utt_id_start|>; verl drops special tokens, so where the tags are such its files tell "
            "nothing: evaluate answers of `ffr-verl infer`"
        )
    first, last = prompt.find(QUERY_START), prompt.rfind(QUERY_START)
    if first < last:  # examples of how to answer stand before what is asked, each with its query
        is_query_first = first < prompt.find(UTTERANCE_START)
        prompt = prompt[last if is_query_first else prompt.rfind(QUERY_END, 0, last) :]
    # What the chat template writes around the user's words, and its tokens in place of an image.
    prompt = _IMAGE_TOKENS.sub(IMAGE, prompt[:-_LONGEST_ENDING] + _ENDING.sub("", prompt[-_LONGEST_ENDING:]))
    error = cut_off_before_text(str(response), is_cut_off=bool(row.get("cut_off")))
    ours = {"response": response, "labels": labels, "messages": [{"role": "user", "content": prompt}], "error": error}
    return {**{name: value for name, value in row.items() if name not in _OF_VERL}, **ours}


def _refuse_missing(row: Mapping[str, Any], names: Sequence[str]) -> None:
    missing = [name for name in names if row.get(name) is None]
    if not missing:
        return
    found, hint = ", ".join(map(str, row)) or "none", ""
    if "input" in row and "gts" in row and "input" not in names:
        hint = "; verl wrote it? give --format verl"
    elif "solution" in row and "response" not in row:
        hint = "; rows of a data set are no predictions, make some with `ffr-verl infer`"
    elif "response" in row and "messages" in row and "input" in names:
        hint = "; leave --format verl out"
    if missing[0] == "labels" and "labels" in row:
        raise ValueError(
            "field labels is null: an unlabelled row (`ffr-verl prepare --unlabelled`) has no gold answer to compare "
            "with; `ffr-verl inspect` shows its answer"
        )
    if missing[0] in row:
        kind = "a list" if missing[0] == "messages" else "text"
        raise ValueError(f"field {missing[0]} is null, expected {kind}{hint}")
    what = f"field {missing[0]} is" if len(missing) == 1 else f"fields {', '.join(missing)} are"
    raise ValueError(f"{what} missing, found {found}{hint}")


def malformed_gold(gold: str) -> str:
    """The fault of a row whose gold answer cannot be read."""
    return f"field labels: malformed gold answer {gold[:100]!r}, expected the wire format (docs/data.md)"


# ---- reading


def read_predictions(
    path: str | Path,
    *,
    row_format: PredictionFormat = "ffr",
    lenient: bool = False,
    on_skipped: Callable[[int, str], None] = lambda line, reason: None,
    unusable: UnusableLines | None = None,
    needed: Sequence[str] = _NEEDED,
) -> Iterator[Prediction]:
    """Yield the predictions of a file; blank lines are passed over.

    Args:
        path: the file.
        row_format: `ffr`, as ms-swift and the published tools write too; `verl` as `read_verl_dump`.
        lenient: leave out lines that cannot be used; `on_skipped` is told the number of each, from 1, and why.
        unusable: told of such lines instead.
        needed: fields that rows must have, of rows that verl did not write.

    Raises:
        FFRError: for a file that cannot be read or has no line that can be used; without `lenient` also for the first
            line that is cut, no JSON, not UTF-8, longer than 8 MiB, lacks a field or holds a malformed gold answer.

    Example:
        >>> import tempfile
        >>> gold = "<|utt_ids_start|>[1]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
        >>> row = {"response": "none", "labels": gold, "messages": [{"role": "user", "content": "…"}]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "pred.jsonl"
        ...     _ = file.write_text(json.dumps(row))
        ...     [prediction] = read_predictions(file)
        >>> prediction.line, prediction.response, prediction.images
        (1, 'none', ())
    """
    path = Path(path)
    unusable = unusable or UnusableLines(path, lenient=lenient, on_skipped=on_skipped)
    is_empty = True
    for number, line in _lines(path, unusable):
        if (one := _prediction(number, line, row_format, unusable, needed)) is not None:
            is_empty = False
            yield one
    if is_empty:
        raise unusable.no_rows()


def read_verl_dump(
    path: str | Path, *, lenient: bool = False, on_skipped: Callable[[int, str], None] = lambda line, reason: None
) -> Iterator[Prediction]:
    """Yield the answers of a file that verl wrote, as predictions; as `read_predictions` otherwise.

    verl writes `STEP.jsonl` into `trainer.validation_data_dir` and `trainer.rollout_data_dir`. A row has `input` (the
    prompt), `output`, `gts` (the gold answer), `score`, `step` and what the reward function returned. It names no
    dialogue and no images: `dialogue_id` is empty, and `messages` is one of the user's, the whole prompt. A prompt
    without an utterance is an error: verl drops special tokens there, so the file is of no use where the model's
    tokenizer holds the answer tags as such.
    """
    return read_predictions(path, row_format="verl", lenient=lenient, on_skipped=on_skipped)


# Line, response, labels, prompt, dialogue_id and error of a row: all that the metrics need. A plain tuple, and read
# without a `Prediction`, because these are most of the time that an evaluation takes.
Answered = tuple[int, str, str, str, str, str | None]


def answered(one: Prediction) -> Answered:
    """The part of a prediction that the metrics need."""
    return one.line, one.response, one.labels, one.prompt, one.dialogue_id, one.error


def read_answered(
    path: Path,
    unusable: UnusableLines,
    *,
    row_format: PredictionFormat = "ffr",
    on_position: Callable[[int], None] = lambda position: None,
) -> Iterator[Answered]:
    """What the metrics need of each prediction, several times as quickly as `read_predictions`; gold answers are not
    looked at. `on_position` is told how many bytes of the file have been read."""
    for number, line in _lines(path, unusable, on_position):
        if row_format == "ffr":
            try:
                if not line.isascii():
                    line.decode("utf-8")  # the decoder does not look into texts that it leaves out
                row = _decode(line)
                labels = row.labels or ""
                is_whole = _is_first(line, b'"response":', row.response) and _is_first(line, b'"labels":', labels)
                if is_whole and labels and (prompt := _prompt(row)):
                    identifier = row.dialogue_id
                    name = identifier if type(identifier) is str else "" if identifier is None else str(identifier)
                    yield number, row.response, labels, prompt, name, row.error
                    continue
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                pass  # broken, or unusual: look again
        if (one := _prediction(number, line, row_format, unusable)) is not None:
            yield answered(one)


def _prompt(row: _Row) -> str | None:
    for message in reversed(row.messages):
        content = message.content
        if message.role == "user" and type(content) is str and UTTERANCE_START in content:
            return content
    return dialogue_message([(one.role, content_text(msgspec.to_builtins(one.content))) for one in row.messages])


def _prediction(
    number: int, line: bytes, row_format: PredictionFormat, unusable: UnusableLines, needed: Sequence[str] = _NEEDED
) -> Prediction | None:
    try:
        row = _parsed(line)
        return prediction_of(number, row if row_format == "ffr" else _of_verl(row), needed=needed)
    except ValueError as error:
        unusable.add(number, str(error))
        return None


def _parsed(line: bytes) -> dict[str, Any]:
    if line.startswith(PARQUET):
        raise ValueError("a parquet file; make predictions of a data set with `ffr-verl infer`")
    if b"\0" in line:
        raise ValueError("holds NUL bytes, as after an interrupted write or copy; make the file again")
    try:
        row = decoder.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of it; convert it, for example with iconv") from None
    except (ValueError, RecursionError) as error:
        if not isinstance(error, json.JSONDecodeError):
            raise ValueError(json_fault(error)) from None
        if line.lstrip().startswith(b"["):
            raise ValueError("starts a list, expected an object: one prediction a line") from None
        cut_off = "" if line.rstrip().endswith(b"}") else "cut off, or "
        raise ValueError(f"{cut_off}{json_fault(error, error.colno)}; make the file again") from None
    if not isinstance(row, dict):
        name = {list: "array", str: "str", bool: "bool", type(None): "null"}.get(type(row), "int")
        raise ValueError(f"found {_kind(name)}, expected an object: one prediction a line")
    return row


def _is_first(line: bytes, key: bytes, value: str) -> bool:
    """Whether a value, the last one of the key in a line, is surely the first one of it too: then none is dropped."""
    place = line.find(key) + len(key)
    place += line.startswith(b" ", place)
    return line.startswith(b'"%b"' % value.encode("utf-8", "surrogatepass"), place) or line.count(key) == 1


def _lines(
    path: Path, unusable: UnusableLines, on_position: Callable[[int], None] = lambda position: None
) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank with their numbers, from 1; those of a JSON list are made."""
    try:
        refuse_special(path)
        with io.BufferedReader(io.FileIO(path), _BLOCK) as raw:
            is_packed = raw.peek(2).startswith(GZIP)
            file: Any = gzip.GzipFile(fileobj=raw) if is_packed else raw
            start = file.peek(64)
            if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, b"{\0", b"\0{"):
                raise FFRError(f"{path}: UTF-16, expected UTF-8; convert it: iconv -f UTF-16 -t UTF-8 {path.name}")
            if start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                try:
                    rows = decoder.decode(file.read().decode("utf-8-sig"))
                except KeyTwiceError as error:
                    raise FFRError(f"{path}: {json_fault(error)}") from None
                except (ValueError, RecursionError):
                    file.seek(0)  # the first line says what is wrong
                else:
                    yield from ((number, json.dumps(row).encode()) for number, row in enumerate(rows, start=1))
                    return
            yield from _lines_of(file, unusable, lambda: on_position(raw.tell()))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FFRError(f"{path}: broken gzip file ({error}); copy it again") from None
    except OSError as error:
        raise FFRError(f"{path}: {(error.strerror or str(error)).lower()}; give a JSONL file of predictions") from None


def _lines_of(
    file: io.BufferedIOBase, unusable: UnusableLines, on_some: Callable[[], None]
) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE and not line.endswith(b"\n"):
            unusable.add(number, f"longer than {LONGEST_LINE // 2**20} MiB; give one row a line")
            while line and not line.endswith(b"\n"):
                line = file.readline(_BLOCK)
            continue
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.isspace() and line:
            yield number, line
        if number % 64 == 0:
            on_some()


# ---- writing


def prediction_row(row: Mapping[str, Any], record: Mapping[str, Any], *, logprobs: bool) -> dict[str, Any]:
    """A row of a file of predictions, see the module: a row of an RL file, and a `record` of `response`, `logprobs`
    and, where there is none, the `error`, as an `AnswerJournal` has it.

    Example:
        >>> row = {"prompt": [{"role": "user", "content": "Find it."}], "images": [{"path": "a.png", "bytes": b""}],
        ...        "reward_model": {"ground_truth": "gold"}, "extra_info": {"dialogue_id": "d", "images": ["a.png"]}}
        >>> prediction_row(row, {"response": "yes", "logprobs": [-0.5]}, logprobs=True)
        {'response': 'yes', 'labels': 'gold', 'logprobs': {'content': [{'logprob': -0.5}]}, 'messages': [{'role': \
'user', 'content': 'Find it.'}, {'role': 'assistant', 'content': 'yes'}], 'images': ['a.png'], 'dialogue_id': 'd'}
    """
    response, info = record["response"], row["extra_info"]
    found: dict[str, Any] = {"response": response, "labels": row["reward_model"]["ground_truth"]}
    if logprobs:
        found["logprobs"] = {"content": [{"logprob": value} for value in record["logprobs"]]}
    found["messages"] = [*row["prompt"], {"role": "assistant", "content": response}]
    found["images"] = list(info["images"])
    found["dialogue_id"] = info["dialogue_id"]
    if info.get("split") is not None:
        found["split"] = info["split"]
    if "error" in record:
        found["error"] = record["error"]
    return found


def write_prediction(file: IO[str], row: Mapping[str, Any]) -> None:
    """Write a row of `prediction_row` as a line."""
    file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
