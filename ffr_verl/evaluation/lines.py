"""The lines of a file, gzipped or not; none of them fills the memory."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

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
            is_packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if is_packed else raw
            number = 1
            pieces: list[bytes] = []  # of a line whose end has not been read
            waiting = 0  # its length
            is_too_long = False
            while block := file.read(_BLOCK):
                on_position(raw.tell())
                end = block.rfind(b"\n") + 1
                waiting += block.find(b"\n") if end else len(block)
                if waiting > LONGEST_LINE and not is_too_long:
                    is_too_long = True
                    on_too_long(number)
                if not end:
                    pieces = [] if is_too_long else [*pieces, block]
                    continue
                whole = block[block.find(b"\n") : end] if is_too_long else b"".join([*pieces, block[:end]])
                lines = io.BytesIO(whole).readlines()  # several times as quick as bytes.split
                yield number, lines
                number += len(lines)
                pieces, waiting, is_too_long = [block[end:]], len(block) - end, False
            if waiting and not is_too_long:
                yield number, [b"".join(pieces)]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FFRError(f"{path}: broken gzip file ({error}); copy it again") from None
    except OSError as error:
        raise FFRError(f"{path}: {(error.strerror or str(error)).lower()}; give a JSONL file of predictions") from None
