"""The lines of a file, gzipped or not; none of them fills the memory."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ffr_verl.errors import FFRError

__all__ = ["LONGEST_LINE", "read_lines"]

LONGEST_LINE = 8 * 2**20
_BLOCK = 2**16  # stays in a core's cache with what is made of it; larger ones cost fresh pages each time


def read_lines(
    path: Path,
    *,
    on_too_long: Callable[[int], None],
    on_position: Callable[[int], None] = lambda position: None,
) -> Iterator[tuple[int, list[bytes]]]:
    """Yield some lines at a time, as `(number of the first one, lines with their ends)`; numbers are from 1.

    Args:
        path: the file.
        on_too_long: told the number of a line of more than `LONGEST_LINE` bytes; it may raise. Otherwise an
            empty line stands in its place.
        on_position: told how many bytes of the file have been read.

    Raises:
        FFRError: for a file that cannot be read or a broken gzip file.
    """
    try:
        with path.open("rb", buffering=0) as raw:
            if not raw.seekable():
                raise FFRError(f"{path}: a pipe; give a file, which can be read more than once")
            is_packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            file: io.FileIO | gzip.GzipFile = gzip.GzipFile(fileobj=raw) if is_packed else raw
            number = 1
            buffer = bytearray(2 * _BLOCK)
            held = 0  # bytes at the start of the buffer: a line whose end has not been read
            is_too_long = False  # and is dropped as it is read
            while count := file.readinto(memoryview(buffer)[held : held + _BLOCK]):
                on_position(raw.tell())
                filled = held + count
                end = buffer.rfind(b"\n", held, filled) + 1
                first = buffer.find(b"\n", held, filled) if end else filled
                if first > LONGEST_LINE and not is_too_long:
                    is_too_long = True
                    on_too_long(number)
                if not end:
                    held = 0 if is_too_long else filled
                    if held + _BLOCK > len(buffer):
                        buffer.extend(bytes(min(len(buffer), LONGEST_LINE + 2 * _BLOCK - len(buffer))))
                    continue
                # Several times as quick as bytes.split.
                lines = io.BytesIO(memoryview(buffer)[first if is_too_long else 0 : end]).readlines()
                yield number, lines
                number += len(lines)
                held, is_too_long = filled - end, False
                buffer[:held] = buffer[end:filled]
            if held and not is_too_long:
                yield number, [bytes(buffer[:held])]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FFRError(f"{path}: broken gzip file ({error}); copy it again") from None
    except OSError as error:
        raise FFRError(f"{path}: {(error.strerror or str(error)).lower()}; give a JSONL file of predictions") from None
