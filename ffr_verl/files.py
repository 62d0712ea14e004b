"""Files that are whole or not there: temporary names, and what may be written over."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import platform
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import psutil

from ffr_verl.errors import FFRError

__all__ = ["check_output", "disk_errors", "refuse_special", "whole_or_nothing"]


@contextlib.contextmanager
def disk_errors(place: Path, mend: str = "give another --output") -> Iterator[None]:
    """An `OSError` of the block as an `FFRError` of one line that says where and how to mend it."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise FFRError(f"{place}: the disk is full; free some space, or {mend}") from None
        raise FFRError(f"{place}: {error.strerror or error}; {mend}") from None


def refuse_special(path: str | os.PathLike[str]) -> None:
    """Refuse a pipe or a device, which a reader might wait for without end, by an `FFRError`; what is not there, or a
    folder, is the reader's to say. `/dev/stdin` is fine where a file is put into it."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise FFRError(f"{os.fspath(path)}: a pipe or a device, which is not read; save it as a file first")


@contextlib.contextmanager
def whole_or_nothing(
    paths: Sequence[Path], *, place: Path | None = None, mend: str = "give another --output"
) -> Iterator[list[Path]]:
    """Temporary names for `paths`, whose files are moved into place when the block ends well and removed otherwise.

    The names are this process's own, so two commands with one output do not write into one file; the last one wins,
    with all of its files. A name whose file was not made is left out. The folder of all `paths` is made when it is
    missing. Errors of the disk name `place`, by default the first of `paths`.
    """
    node = platform.node()
    partial = {path: path.with_name(f".{path.name}.{node}.{os.getpid()}.partial") for path in paths}
    with disk_errors(place or paths[0], mend), contextlib.ExitStack() as stack:
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        for path in paths:
            for left in path.parent.glob(f".{glob.escape(path.name)}.{node}.*.partial"):  # by one that was killed
                pid = left.name.split(".")[-2]
                if pid.isdigit() and not psutil.pid_exists(int(pid)):
                    left.unlink(missing_ok=True)
        for temporary in partial.values():
            stack.callback(temporary.unlink, missing_ok=True)
        yield list(partial.values())
        with _alone_in(paths[0].parent):
            for path, temporary in partial.items():
                if temporary.exists():
                    temporary.replace(path)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """No other process is in such a block of this folder, so files that belong together come from one process."""
    place = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network disks have no locks
            fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)


def check_output(
    output: Path, *, force: bool, example: str, inputs: Iterable[Path] = (), option: str = "--output"
) -> None:
    """Refuse an output that is a folder, that is an input, or that is there and shall not be replaced (`force`).

    `example` is the name of such a file, and `option` how it was given, for the message.
    """
    if output.is_dir():
        raise FFRError(f"{option} {output}: a folder; give the name of a file, such as {output / example}")
    if output.exists() and any(file.exists() and output.samefile(file) for file in inputs):
        raise FFRError(f"{option} {output}: is read by this command; give another name, such as {example}")
    if output.suffix == ".gz":
        raise FFRError(f"{option} {output}: the file is not compressed; give a name without .gz")
    if output.exists() and not force:
        raise FFRError(f"{output}: is there already; choose another {option}, or replace it with --force")
