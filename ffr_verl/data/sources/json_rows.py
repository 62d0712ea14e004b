"""Rows out of a JSON list or JSONL, gzipped or not, one at a time: memory does not grow with the file."""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from ffr_verl.errors import FFRError
from ffr_verl.files import GZIP, PARQUET, disk_errors, refuse_special
from ffr_verl.json_text import KeyTwiceError, decoder, is_cut_off, json_fault

_BLOCK = 2**20
_LARGEST_ROW = 64 * 2**20
_LONGEST_ESCAPE = 12
_NEXT = re.compile(r"[^ \t\n\r]")
_OTHER_FILES = {
    b"PK\x03\x04": "a zip file; unpack it first",
    b"BZh": "a bzip2 file; unpack it first (only gzip is read as it is)",
    b"\xfd7zXZ\x00": "an xz file; unpack it first (only gzip is read as it is)",
    b"\x28\xb5\x2f\xfd": "a zstd file; unpack it first (only gzip is read as it is)",
    PARQUET: "a parquet file, which training, infer and score read; give the rows as a JSON list or JSONL",
}
_NAMES = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
_START = 4096  # bytes that tell what kind of file it is
_MEND = "; a file is a JSON list, or JSONL with one row a line"
_CUT_OFF = "; the file seems cut off, copy it again"
_WANTED = "give a JSON list or JSONL file"
_RECODE = "; convert it, for example with iconv"


def _fault(error: Exception, column: int | None = None, *, mend: str = _MEND) -> str:
    """What is wrong with a value that cannot be decoded, and how to mend it."""
    if isinstance(error, KeyTwiceError):
        return json_fault(error)
    return json_fault(error, column) + (_CUT_OFF if is_cut_off(error) else mend)


class _ListText:
    """The characters of a JSON list, decoded and read in blocks; `at` is the place of the next one in the buffer."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._bytes, self._is_at_end = 0, False
        self._line, self._column = 1, 0  # of the buffer's first character; columns from 0
        self._buffer, self.at = "", 0

    def _more(self) -> bool:
        """Put another block behind the characters not yet used; `False` at the end of the file."""
        if self._is_at_end:
            return False
        block = self._file.read(_BLOCK)
        self._is_at_end = not block
        waiting = len(self._utf8.getstate()[0])
        try:
            text = self._utf8.decode(block, final=self._is_at_end)
        except UnicodeDecodeError as error:
            mend = _CUT_OFF if error.reason == "unexpected end of data" else _RECODE
            raise FFRError(f"{self._path}: not UTF-8 at byte {self._bytes - waiting + error.start}{mend}") from None
        self._bytes += len(block)
        self._line, self._column = self._place(self.at)
        self._buffer, self.at = self._buffer[self.at :] + text, 0
        return True

    def _place(self, position: int) -> tuple[int, int]:
        """Line from 1 and column from 0 of a place of the buffer."""
        newline = self._buffer.rfind("\n", 0, position)
        column = position + self._column if newline < 0 else position - newline - 1
        return self._line + self._buffer.count("\n", 0, position), column

    def next_character(self) -> str:
        """Go to the next character that is no white space; it, or nothing at the end."""
        while (found := _NEXT.search(self._buffer, self.at)) is None:
            self.at = len(self._buffer)
            if not self._more():
                return ""
        self.at = found.start()
        return found.group()

    def error(self, message: str) -> FFRError:
        line, column = self._place(self.at)
        return FFRError(f"{self._path}: line {line}: not JSON ({message} at column {column + 1}){_MEND}")

    def value(self) -> Any:
        """The JSON value that starts here; goes behind it."""
        while True:
            try:
                found, end = decoder.raw_decode(self._buffer, self.at)
            except (ValueError, RecursionError) as error:
                place = self.at
                if isinstance(error, json.JSONDecodeError):  # is the value broken, or does the next block hold more?
                    place = error.pos
                    if len(self._buffer) - self.at > _LARGEST_ROW:
                        what = f"longer than {_LARGEST_ROW // 2**20} MiB{_MEND}"
                        line, _ = self._place(self.at)
                        raise FFRError(f"{self._path}: the row at line {line}: {what}") from None
                    is_near_the_end = len(self._buffer) - place <= _BLOCK + _LONGEST_ESCAPE
                    if (is_near_the_end or "Unterminated" in error.msg) and self._more():
                        continue
                line, column = self._place(place)
                raise FFRError(f"{self._path}: line {line}: {_fault(error, column + 1)}") from None
            if end == len(self._buffer) and self._more():  # a number may have more digits
                continue
            self.at = end
            return found


def _list_values(path: Path, file: BinaryIO) -> Iterator[Any]:
    text = _ListText(path, file)
    cut_off = FFRError(f"{path}: the list is cut off, no closing ] at the end of the file; copy it again")
    text.next_character()
    text.at += 1
    separator = text.next_character()
    while separator != "]":
        if not text.next_character():
            raise cut_off
        yield text.value()
        separator = text.next_character()
        if not separator:
            raise cut_off
        if separator not in ",]":
            raise text.error("expecting ',' or ']'")
        text.at += separator == ","
    text.at += 1
    if text.next_character():
        raise text.error("something follows the list")


def _line_values(path: Path, file: BinaryIO) -> Iterator[Any]:
    for number, line in enumerate(iter(lambda: file.readline(_LARGEST_ROW), b""), start=1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.isspace() or not line:
            continue
        if len(line) == _LARGEST_ROW:
            raise FFRError(f"{path}: line {number}: longer than {_LARGEST_ROW // 2**20} MiB{_MEND}")
        try:
            yield decoder.decode(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise FFRError(f"{path}: line {number}: not UTF-8 at byte {error.start} of it{_RECODE}") from None
        except (ValueError, RecursionError) as error:
            fault = _fault(error, error.colno if isinstance(error, json.JSONDecodeError) else None)
            fault = fault.replace(_CUT_OFF, _MEND) if line.endswith(b"\n") else fault
            raise FFRError(f"{path}: line {number}: {fault}") from None


def _opened(path: Path) -> BinaryIO:
    if path.is_dir() or not path.exists():
        raise FFRError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; {_WANTED}")
    refuse_special(path)
    return path.open("rb")


def _unpacked(path: Path, raw: BinaryIO) -> tuple[BinaryIO, bytes]:
    """The bytes of a file, unpacked, and the first of them; kinds that are not read are refused."""
    is_packed = raw.read(len(GZIP)) == GZIP
    raw.seek(0)
    file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if is_packed else raw
    start = file.read(_START)
    what = next((what for magic, what in _OTHER_FILES.items() if start.startswith(magic)), None)
    if what is None and b"\0" in start[:8]:
        what = f"not UTF-8 but UTF-16 or another encoding with NUL bytes{_RECODE}"
    if what is not None:
        raise FFRError(f"{path}: {what}")
    file.seek(0)
    return file, start


def read_value(path: Path, *, mend: str) -> Any:
    """The one JSON value of a file, gzipped or not, which is held whole; errors as those of `read_rows`, and `mend`
    says what to give instead."""
    with disk_errors(path, f"give {mend}"), _opened(path) as raw:
        try:
            text = _unpacked(path, raw)[0].read().decode("utf-8-sig")
            return decoder.decode(text)
        except UnicodeDecodeError as error:
            fault = _CUT_OFF if error.reason == "unexpected end of data" else _RECODE
            raise FFRError(f"{path}: not UTF-8 at byte {error.start}{fault}") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise FFRError(f"{path}: broken gzip file ({error}); copy it again") from None
        except (ValueError, RecursionError) as error:
            if isinstance(error, FFRError):
                raise
            line, column = (error.lineno, error.colno) if isinstance(error, json.JSONDecodeError) else (1, None)
            raise FFRError(f"{path}: line {line}: {_fault(error, column, mend=f'; give {mend}')}") from None


def read_rows(
    path: Path, *, on_position: Callable[[int], None] = lambda position: None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(row number from 0, row)` of a file of rows: a JSON list or JSONL, gzipped or not, seen from its content;
    `on_position` is told after each row how many bytes of the file have been read.

    Raises:
        FFRError: for a missing file or one of another kind, another encoding than UTF-8, a broken gzip file, broken
            JSON (with line and column), a key that an object has twice, or a row that is no object. Rows before the
            fault have been yielded by then.
    """
    with disk_errors(path, _WANTED), _opened(path) as raw:
        try:
            file, start = _unpacked(path, raw)
            is_list = start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
            for number, row in enumerate((_list_values if is_list else _line_values)(path, file)):
                if not isinstance(row, dict):
                    found = _NAMES.get(type(row), "a number")
                    raise FFRError(f"{path}: row {number}: found {found}, expected an object{_MEND}")
                yield number, row
                on_position(raw.tell())
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise FFRError(f"{path}: broken gzip file ({error}); copy it again") from None
