"""Rows out of a JSON list or JSONL, gzipped or not, one at a time: memory does not grow with the file."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from ffr_verl.errors import FFRError

__all__ = ["read_rows"]

_BLOCK = 2**20
_LARGEST_ROW = 64 * 2**20
_LONGEST_ESCAPE = 12
_BLANK = " \t\n\r"
_decoder = json.JSONDecoder()
_GZIP = b"\x1f\x8b"
_OTHER_FILES = {
    b"PK\x03\x04": "a zip file; unpack it first",
    b"BZh": "a bzip2 file; unpack it first (only gzip is read as it is)",
    b"\xfd7zXZ\x00": "an xz file; unpack it first (only gzip is read as it is)",
    b"\x28\xb5\x2f\xfd": "a zstd file; unpack it first (only gzip is read as it is)",
    b"PAR1": "a parquet file; give the rows as a JSON list or JSONL",
}
_MOST_BYTES = max(map(len, _OTHER_FILES))
_MEND = "; a file is a JSON list, or JSONL with one row a line"
_CUT_OFF = "; the file seems cut off, copy it again"
_RECODE = "; convert it, for example with iconv"
_TOO_LARGE = "longer than {} MiB" + _MEND


def _without_bom(data: bytes) -> bytes:
    return data.removeprefix(codecs.BOM_UTF8)


def _is_cut_off(text: str, error: json.JSONDecodeError) -> bool:
    """Whether what is wrong with the last piece of a file is that it ends too early."""
    return "Unterminated" in error.msg or not text[error.pos :].strip(_BLANK)


def _message(error: json.JSONDecodeError) -> str:
    return error.msg.removesuffix(" starting at")


class _ListText:
    """The characters of a JSON list, decoded and read in blocks."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._bytes = 0
        self._line, self._column = 1, 0  # of the buffer's first character; columns from 0
        self._is_at_end = False
        self._buffer = ""
        self.at = 0

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
            at = self._bytes - waiting + error.start
            mend = _CUT_OFF if error.reason == "unexpected end of data" else _RECODE
            raise FFRError(f"{self._path}: not UTF-8 at byte {at}{mend}") from None
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
        while True:
            while self.at < len(self._buffer) and self._buffer[self.at] in _BLANK:
                self.at += 1
            if self.at < len(self._buffer):
                return self._buffer[self.at]
            if not self._more():
                return ""

    def error(self, message: str, position: int | None = None, *, mend: str = _MEND) -> FFRError:
        """What is wrong at a place of the buffer, by default the current one."""
        line, column = self._place(self.at if position is None else position)
        return FFRError(f"{self._path}: line {line}: not JSON ({message} at column {column + 1}){mend}")

    def value(self) -> Any:
        """The JSON value that starts here; goes behind it."""
        while True:
            try:
                found, end = _decoder.raw_decode(self._buffer, self.at)
            except RecursionError:
                raise self.error("nested too deeply") from None
            except json.JSONDecodeError as error:
                # Is the value broken, or does it go on in the next block?
                is_far_from_the_end = (
                    len(self._buffer) - error.pos > _BLOCK + _LONGEST_ESCAPE and "Unterminated" not in error.msg
                )
                if len(self._buffer) - self.at > _LARGEST_ROW:
                    line, _ = self._place(self.at)
                    size = _LARGEST_ROW // 2**20
                    raise FFRError(f"{self._path}: the row at line {line}: {_TOO_LARGE.format(size)}") from None
                if is_far_from_the_end or not self._more():
                    mend = _CUT_OFF if _is_cut_off(self._buffer, error) else _MEND
                    raise self.error(_message(error), error.pos, mend=mend) from None
                continue
            except ValueError:  # Python reads no number of more than 4,300 digits
                raise self.error("a number of thousands of digits") from None
            if end == len(self._buffer) and self._more():  # a number may go on
                continue
            self.at = end
            return found


def _list_values(path: Path, file: BinaryIO) -> Iterator[Any]:
    text = _ListText(path, file)
    cut_off = FFRError(f"{path}: the list is cut off, no closing ] at the end of the file; copy it again")
    text.next_character()
    text.at += 1
    if text.next_character() == "]":
        text.at += 1
    else:
        while True:
            if not text.next_character():
                raise cut_off
            yield text.value()
            separator = text.next_character()
            if not separator:
                raise cut_off
            if separator not in ",]":
                raise text.error("expecting ',' or ']'")
            text.at += 1
            if separator == "]":
                break
    if text.next_character():
        raise text.error("something follows the list")


def _line_values(path: Path, file: BinaryIO) -> Iterator[Any]:
    for number, line in enumerate(iter(lambda: file.readline(_LARGEST_ROW), b""), start=1):
        line = _without_bom(line) if number == 1 else line
        if line.isspace() or not line:
            continue
        if len(line) == _LARGEST_ROW:
            raise FFRError(f"{path}: line {number}: {_TOO_LARGE.format(_LARGEST_ROW // 2**20)}")
        try:
            yield json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise FFRError(f"{path}: line {number}: not UTF-8 at byte {error.start} of it{_RECODE}") from None
        except json.JSONDecodeError as error:
            is_last = not line.endswith(b"\n")
            mend = _CUT_OFF if is_last and _is_cut_off(error.doc, error) else _MEND
            raise FFRError(
                f"{path}: line {number}: not JSON ({_message(error)} at column {error.colno}){mend}"
            ) from None
        except RecursionError:
            raise FFRError(f"{path}: line {number}: not JSON (nested too deeply){_MEND}") from None
        except ValueError:  # Python reads no number of more than 4,300 digits
            raise FFRError(f"{path}: line {number}: not JSON (a number of thousands of digits){_MEND}") from None


def _name_of(value: Any) -> str:
    """What JSON calls a value that is no object."""
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _is_list(file: BinaryIO) -> bool:
    """Whether the first character that is no white space is a bracket."""
    while block := file.read(max(_BLOCK, len(codecs.BOM_UTF8))):
        start = _without_bom(block).lstrip()
        if start:
            return start.startswith(b"[")
    return False


def read_rows(
    path: Path, *, on_position: Callable[[int], None] = lambda position: None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(row number from 0, row)` of a file of rows: a JSON list or JSONL, gzipped or not, seen from its content.

    Args:
        path: the file.
        on_position: told after each row how many bytes of the file have been read.

    Raises:
        FFRError: for a missing file or one of another kind, another encoding than UTF-8, a broken gzip file, broken
            JSON (with line and column) or a row that is no object. Rows before the fault have been yielded by then.
    """
    try:
        with path.open("rb") as raw:
            start = raw.read(_MOST_BYTES)
            for magic, what in _OTHER_FILES.items():
                if start.startswith(magic):
                    raise FFRError(f"{path}: {what}")
            is_packed = start.startswith(_GZIP)
            raw.seek(0)
            file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if is_packed else raw
            values = _list_values if _is_list(file) else _line_values
            file.seek(0)
            for number, row in enumerate(values(path, file)):
                if not isinstance(row, dict):
                    raise FFRError(f"{path}: row {number}: found {_name_of(row)}, expected an object{_MEND}")
                yield number, row
                on_position(raw.tell())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FFRError(f"{path}: broken gzip file ({error}); copy it again") from None
    except OSError as error:
        raise FFRError(f"{path}: {(error.strerror or str(error)).lower()}; give a JSON list or JSONL file") from None
