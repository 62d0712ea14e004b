"""Predictions out of a JSONL file, one at a time: memory does not grow with the file, nor with a line without end.

A row has `response`, `labels` (the gold answer), `messages`, `dialogue_id` and, where the dialogue has some, `images`;
`logprobs: {"content": [{"logprob": …}, …]}` where they were asked for. So write `ffr-verl infer`, ms-swift and the
published tools. The files that verl writes with `trainer.validation_data_dir` are read too.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ffr_verl.errors import FFRError
from ffr_verl.evaluation.lines import LONGEST_LINE, read_lines
from ffr_verl.evaluation.prediction_rows import Prediction, kind_of, prediction_of, prediction_of_verl

__all__ = ["Prediction", "UnusableLines", "predictions_of_lines", "read_predictions", "read_verl_dump"]


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
    path: str | Path, *, lenient: bool = False, on_skipped: Callable[[int, str], None] | None = None
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
    path = Path(path)
    yield from _predictions(path, UnusableLines(path, lenient=lenient, on_skipped=on_skipped), prediction_of)


def read_verl_dump(
    path: str | Path, *, lenient: bool = False, on_skipped: Callable[[int, str], None] | None = None
) -> Iterator[Prediction]:
    """Yield the answers of a file that verl wrote, as predictions; as `read_predictions` otherwise.

    verl writes `STEP.jsonl` into `trainer.validation_data_dir` and `trainer.rollout_data_dir`. A row has `input` (the
    prompt), `output`, `gts` (the gold answer), `score`, `step` and what the reward function returned. It names no
    dialogue and no images: `dialogue_id` is empty, and `messages` is one of the user's, the whole prompt.

    Raises:
        FFRError: as `read_predictions`; also for a row whose prompt has no utterance: verl drops special tokens there,
            so the file is of no use where the model's tokenizer holds the answer tags as such.
    """
    path = Path(path)
    yield from _predictions(path, UnusableLines(path, lenient=lenient, on_skipped=on_skipped), prediction_of_verl)


def _predictions(
    path: Path, unusable: UnusableLines, convert: Callable[[int, Mapping[str, Any]], Prediction]
) -> Iterator[Prediction]:
    is_empty = True
    for first, lines in read_lines(path, on_too_long=unusable.add_too_long):
        for prediction in predictions_of_lines(first, lines, unusable, convert):
            is_empty = False
            yield prediction
    if is_empty:
        raise unusable.no_rows()


def predictions_of_lines(
    first: int,
    lines: Iterable[bytes],
    unusable: UnusableLines,
    convert: Callable[[int, Mapping[str, Any]], Prediction],
) -> Iterator[Prediction]:
    """The predictions of some lines.

    Args:
        first: number of the first line, from 1.
        lines: not decoded, with or without their ends.
        unusable: told of lines that cannot be used.
        convert: makes a prediction of a line's number and row; a `ValueError` where it cannot.
    """
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
    if line.startswith(b"PAR1"):
        raise ValueError("a parquet file; make predictions of a data set with `ffr-verl infer`")
    if b"\0" in line:
        raise ValueError("holds NUL bytes, as after an interrupted write or copy; make the file again")
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of it; convert it, for example with iconv") from None
    except json.JSONDecodeError as error:
        if line.lstrip().startswith(b"["):
            raise ValueError("starts a list, expected an object: one prediction a line") from None
        what = "not JSON" if line.rstrip().endswith(b"}") else "cut off, or not JSON"
        raise ValueError(f"{what} ({error.msg} at column {error.colno}); make the file again") from None
    except RecursionError:
        raise ValueError("not JSON (nested too deeply)") from None
    if not isinstance(row, dict):
        raise ValueError(f"found {kind_of(row)}, expected an object: one prediction a line")
    return row
