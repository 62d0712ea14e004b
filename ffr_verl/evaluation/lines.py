"""The lines of a file, gzipped or not, of which none may fill the memory."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from ffr_verl.errors import FFRError

__all__ = ["LONGEST_LINE", "read_lines"]

LONGEST_LINE = 8 * 2**20
_BLOCK = 2**18


def read_lines(
    path: Path,
    *,
    on_too_long: Callable[[int], None],
    on_position: Callable[[int], None] = lambda position: None,
    longest: int = LONGEST_LINE,
) -> Iterator[tuple[int, list[bytes]]]:
    """Yield `(number of the first line, some lines)`, without their ends; numbers are from 1.

    Args:
        path: the file.
        on_too_long: told the number of a line of more than `longest` bytes, which is left out (an empty line stands
            in its place); raises to stop there.
        on_position: told how many bytes of the file have been read.
        longest: most bytes of a line.

    Raises:
        FFRError: for a file that cannot be read or a broken gzip file.
    """
    try:
        with path.open("rb") as raw:
            is_packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if is_packed else raw
            number, pieces, waiting = 1, list[bytes](), 0
            while block := file.read(_BLOCK):
                on_position(raw.tell())
                if b"\n" not in block:
                    waiting += len(block)
                    pieces = [] if waiting > longest else [*pieces, block]
                    continue
                head, _, block = block.partition(b"\n")
                waiting += len(head)
                if waiting > longest:
                    on_too_long(number)
                    pieces, head = [], b""
                body, _, rest = block.rpartition(b"\n")
                lines = [b"".join([*pieces, head]), *(body.split(b"\n") if len(rest) < len(block) else ())]
                yield number, lines
                number += len(lines)
                pieces, waiting = [rest], len(rest)
            if waiting > longest:
                on_too_long(number)
            elif waiting:
                yield number, [b"".join(pieces)]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FFRError(f"{path}: broken gzip file ({error}); copy it again") from None
    except OSError as error:
        raise FFRError(f"{path}: {(error.strerror or str(error)).lower()}; give a JSONL file of predictions") from None
