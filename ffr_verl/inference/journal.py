"""Answers of a run in progress: a run that was killed is resumed where it stopped.

They lie in the folder `.NAME.answers` beside the output: `work.json` says of what work, `answers.jsonl` has a line for
each answered row with a checksum behind it, in the order in which the answers came.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ffr_verl.errors import FFRError
from ffr_verl.files import disk_errors, lock_folder, whole_or_nothing

_NONE = -1
_BEFORE_CHECKSUM = b"\t"  # JSON has it as a code


def _sealed(text: bytes) -> bytes:
    return b"%s%s%08x\n" % (text, _BEFORE_CHECKSUM, zlib.crc32(text))


def journal_folder(output: Path) -> Path:
    """Where the answers of a run that writes `output` lie until it is whole: `.NAME.answers` beside it."""
    return output.parent / f".{output.name}.answers"


class Answers:
    """The answers that there are, by row, as long as the run lasts."""

    is_kept = False  # whether a run that is stopped can be resumed

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.answered = 0
        self._records: dict[int, Mapping[str, Any]] = {}

    def __contains__(self, row: int) -> bool:
        return row in self._records

    def append(self, records: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Keep the answers to some rows."""
        self._records.update(records)
        self.answered = len(self._records)

    def records(self, none: Any = None) -> Iterator[Any]:
        """The answer to each row, a dict, in the order of the rows; `none` where there is none."""
        return (self._records.get(row, none) for row in range(self.rows))


class AnswerJournal(Answers):
    """Answers on the disk: an appended one is there.

    The work is what the answers depend on: rows, model, settings; values that JSON has. Never a secret: it is written.

    Raises:
        FFRError: when the folder belongs to an interrupted run of other work or to a run that is alive, or cannot be
            made or read.
    """

    is_kept = True

    def __init__(self, folder: Path, work: Mapping[str, Any], *, rows: int, restart: bool = False) -> None:
        super().__init__(rows)
        self.folder = folder
        self._offsets = array.array("q", [_NONE]) * rows
        with disk_errors(folder, "give --output in a folder that can be written"), contextlib.ExitStack() as opened:
            opened.enter_context(lock_folder(folder))
            if restart:
                (folder / "answers.jsonl").unlink(missing_ok=True)
                (folder / "work.json").unlink(missing_ok=True)
            self._check_work(json.loads(json.dumps(dict(work))))
            # Unbuffered: what could not be written must not be tried again when the file is closed.
            self._sink = opened.enter_context((folder / "answers.jsonl").open("ab", buffering=0))
            self._source = opened.enter_context((folder / "answers.jsonl").open("rb"))
            self._read()
            self._opened = opened.pop_all()

    def __enter__(self) -> AnswerJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._opened:
            if error is not None and not self.answered:  # there is nothing to resume
                self.remove()

    def __contains__(self, row: int) -> bool:
        return self._offsets[row] != _NONE

    def append(self, records: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Keep the answers to some rows; they are on the disk when this returns, or an `FFRError` says why not."""
        lines = [(row, _sealed(json.dumps({"row": row, **record}).encode())) for row, record in records]
        end = self._sink.seek(0, os.SEEK_END)
        waiting = memoryview(b"".join([line for _, line in lines]))
        try:
            while waiting:
                waiting = waiting[self._sink.write(waiting) :]
            os.fsync(self._sink.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._sink.truncate(end)  # a part of a line, which the next one would be written behind
            raise FFRError(
                f"{self.folder}: {error.strerror or error}; run the same command again when that is mended"
            ) from None
        for row, line in lines:
            self._offsets[row] = end
            end += len(line)
            self.answered += 1

    def records(self, none: Any = None) -> Iterator[Any]:
        """The answer to each row, a dict, in the order of the rows; `none` where there is none."""
        for offset in self._offsets:
            if offset != _NONE:
                self._source.seek(offset)
            yield none if offset == _NONE else json.loads(self._source.readline().rpartition(_BEFORE_CHECKSUM)[0])

    def remove(self) -> None:
        """Forget the answers, once they stand where they belong."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _check_work(self, work: dict[str, Any]) -> None:
        record, answers = self.folder / "work.json", self.folder / "answers.jsonl"
        # A run that ended before its first answer, such as for a wrong address, has left nothing to lose.
        if not record.is_file() or not answers.is_file() or not answers.stat().st_size:
            with whole_or_nothing([record]) as (temporary,):
                temporary.write_text(json.dumps(work), encoding="utf-8")
            return
        try:
            there = json.loads(record.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            there = None
        if not isinstance(there, dict):
            raise FFRError(f"{record}: is damaged; start again with --restart")
        if there != work:
            names = [name for name in work if there.get(name) != work[name]] or sorted(set(there) - set(work))
            raise FFRError(
                f"{self.folder}: an interrupted run of other rows, another model or other settings (different: "
                f"{', '.join(names)}); finish that one, or forget it with --restart"
            )

    def _read(self) -> None:
        end = 0
        for number, line in enumerate(self._source, start=1):
            if not line.endswith(b"\n"):  # the kill came in the middle of it
                self._sink.truncate(end)
                break
            try:
                text = line.rpartition(_BEFORE_CHECKSUM)[0]
                if line != _sealed(text):
                    raise ValueError("not as it was written")
                record = json.loads(text)
                row, response, logprobs = record["row"], record.get("response", ""), record.get("logprobs", [])
                if type(row) is not int or not 0 <= row < self.rows:
                    raise ValueError("no row of the data")
                if not isinstance(response, str) or not all(isinstance(one, (int, float)) for one in logprobs):
                    raise ValueError("no answer")
                self.answered += row not in self
                self._offsets[row] = end
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise FFRError(
                    f"{self.folder / 'answers.jsonl'}: line {number} is damaged; start again with --restart"
                ) from None
            end += len(line)
