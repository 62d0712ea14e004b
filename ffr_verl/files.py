"""Files that are whole or not there: temporary names, and what may be written over."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from ffr_verl.errors import FFRError

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"  # how such files begin


@contextlib.contextmanager
def disk_errors(place: Path | str, mend: str = "give another --output") -> Iterator[None]:
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


def read_text(path: Path, *, mend: str, option: str | None = None) -> str:
    """The text of a UTF-8 file, without a mark of its encoding; an `FFRError` with `mend` where there is none.

    `option` is how the path was given, for the message.
    """
    where = _named(path, option)
    refuse_special(path)
    try:
        with disk_errors(where, mend):
            return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FFRError(f"{where}: not UTF-8 at byte {error.start:,}; {mend}") from None


def read_yaml(path: Path, *, mend: str, option: str | None = None) -> Any:
    """What a YAML file holds, by the rules of `read_text`."""
    import yaml  # not for the rewards, which import this module

    text = read_text(path, mend=mend, option=option)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date that no calendar has
        raise FFRError(f"{_named(path, option)}: {' '.join(str(error).split())}; {mend}") from None


def _named(path: Path, option: str | None) -> str:
    return str(path) if option is None else f"{option} {path}"


def _temporary_folder(path: Path) -> Path:
    """Make a hidden folder beside `path` under a name that nobody can guess; an `OSError` where something lies there
    all the same. What a command that was killed on this machine has left of such folders is removed, and what it was
    about to replace comes back."""
    node = platform.node()
    for left in path.parent.glob(f".{glob.escape(path.name)}.{node}.*.partial"):
        pid = left.name.split(".")[-3]
        if _is_own_folder(left) and re.fullmatch("[0-9]{1,9}", pid) and not psutil.pid_exists(int(pid)):
            _put_back(left / "old", path)
            _remove(left)
    made = path.with_name(f".{path.name}.{node}.{os.getpid()}.{secrets.token_hex(8)}.partial")
    made.mkdir(mode=0o700)  # follows no link
    return made


def _is_own_folder(path: Path) -> bool:
    try:
        found = path.lstat()
    except FileNotFoundError:  # its command has ended
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _put_back(old: Path, path: Path) -> None:
    if old.exists() and not path.exists():
        old.rename(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_or_nothing(
    paths: Sequence[Path], *, place: Path | None = None, mend: str = "give another --output"
) -> Iterator[list[Path]]:
    """Temporary names for `paths`, whose files are moved into place when the block ends well and removed otherwise.

    The names are this process's own, so two commands with one output do not write into one file; the last one wins,
    with all of its files. A name whose file was not made is left out. The folder of all `paths` is made when it is
    missing. Errors of the disk name `place`, by default the first of `paths`.
    """
    with disk_errors(place or paths[0], mend), contextlib.ExitStack() as stack:
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        partial = []
        for path in paths:
            folder = _temporary_folder(path)
            stack.callback(_remove, folder)
            partial.append(folder / path.name)
        yield partial
        with _alone_in(paths[0].parent):
            for path, temporary in zip(paths, partial, strict=True):
                if temporary.exists():
                    temporary.replace(path)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that takes its place when the block ends well, and is removed otherwise. Whether what is
    there may be replaced is the caller's to say."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = _temporary_folder(path)
        temporary = folder / "new"
        try:
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            with _alone_in(path.parent):
                if path.exists():
                    path.rename(folder / "old")
                temporary.rename(path)
        finally:
            _put_back(folder / "old", path)
            _remove(folder)


def lock_folder(folder: Path) -> IO[bytes]:
    """Make a folder of work in progress and lock it for this process, as long as what is returned is open; an
    `FFRError` when another run has it, or there are links in it, through which others' files would be written, or
    pipes."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder, *folder.iterdir()):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            what = "a link" if path.is_symlink() else "a pipe or a device"
            raise FFRError(f"{path}: {what}, where ffr-verl keeps work in progress; remove it")
    lock = (folder / "lock").open("ab")
    try:  # a lock of this kind ends with the process and is not inherited by those that vLLM forks
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise FFRError(f"{folder}: another run is writing it; wait for its end, or end it") from None
    return lock


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
    output: Path, *, force: bool, example: str, inputs: Iterable[Path | None] = (), option: str = "--output"
) -> None:
    """Refuse an output that is no regular file, that is an input, or that is there and shall not be replaced.

    Args:
        output: to be written.
        force: whether a file that is there may be replaced.
        example: name of such a file, for messages.
        inputs: files that are read, or written beside it; `None` where one was not given.
        option: how the output was given, for messages.

    Raises:
        FFRError: for each of these.
    """
    if output.is_dir():
        raise FFRError(f"{option} {output}: a folder; give the name of a file, such as {output / example}")
    if output.exists() and not output.is_file():
        raise FFRError(f"{option} {output}: a pipe or a device; give the name of a file, such as {example}")
    if any(file is not None and is_same_file(output, file) for file in inputs):
        raise FFRError(f"{option} {output}: is read by this command; give another name, such as {example}")
    if output.suffix == ".gz":
        raise FFRError(f"{option} {output}: the file is not compressed; give a name without .gz")
    if os.path.lexists(output) and not force:
        raise FFRError(f"{output}: is there already; choose another {option}, or replace it with --force")


def is_same_file(first: Path, second: Path) -> bool:
    """Whether two paths name one file, be it there or not."""
    is_link = first.exists() and second.exists() and first.samefile(second)
    return is_link or os.path.realpath(first) == os.path.realpath(second)
