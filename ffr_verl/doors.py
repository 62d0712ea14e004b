"""Doors: where a recipe or an option names a part of one's own, and how it is found.

`pkg://module:name` is something in an installed package, as verl writes it; `path/to/file.py:name` something in a
file; anything else the name of an entry point, which an installed package offers in its pyproject.toml.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import threading
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ffr_verl.errors import FFRError, did_you_mean, one_line

_PACKAGE, _FILE = "pkg://", "file://"
_OF_FILE = re.compile(r"(?:file://)?(.+\.py):([^:/]*)", re.DOTALL)
_files: dict[str, ModuleType] = {}
_loading = threading.RLock()


class Door(NamedTuple):
    """A name of a part of one's own, read."""

    module: str | None  # of `pkg://`
    file: Path | None  # absolute
    name: str  # in the module or the file; or of the entry point

    @property
    def is_entry_point(self) -> bool:
        return self.module is None and self.file is None

    @property
    def label(self) -> str:
        """Its name wherever it lies: of a file without its folder."""
        return self.name if self.is_entry_point else f"{self.module or (self.file or Path()).name}:{self.name}"

    def __str__(self) -> str:
        if self.is_entry_point:
            return self.name
        return f"{_PACKAGE}{self.module}:{self.name}" if self.file is None else f"{self.file}:{self.name}"


def parse_door(given: str, *, where: str) -> Door:
    """Read a door; nothing is loaded. A relative path is resolved from the working folder.

    `where` is the key or option, for the message of an `FFRError` about a door without a name behind its colon.

    Example:
        >>> parse_door("pkg://my/rewards:brevity", where="key")
        Door(module='my.rewards', file=None, name='brevity')
        >>> parse_door("rewards.py:brevity", where="key").label
        'rewards.py:brevity'
        >>> parse_door("pkg://my.rewards", where="key")
        Traceback (most recent call last):
            ...
        ffr_verl.errors.FFRError: key: found 'pkg://my.rewards', expected pkg://module:name
    """
    if given.startswith(_PACKAGE):
        module, _, name = given.removeprefix(_PACKAGE).replace("/", ".").partition(":")
        if not (module and name.isidentifier()):
            raise FFRError(f"{where}: found {given!r}, expected {_PACKAGE}module:name")
        return Door(module, None, name)
    found = _OF_FILE.fullmatch(given)
    if found is not None and found[2].isidentifier():
        return Door(None, Path(os.path.abspath(os.path.expanduser(found[1]))), found[2])
    if found is not None or given.startswith(_FILE) or given.endswith(".py"):
        raise FFRError(f"{where}: found {given!r}, expected path/to/file.py:name")
    return Door(None, None, given)


def entry_points(group: str) -> dict[str, importlib.metadata.EntryPoint]:
    """The entry points of a group that installed packages offer, by name and sorted."""
    found = importlib.metadata.entry_points(group=group)
    return {point.name: point for point in sorted(found, key=lambda point: point.name)}


def unknown_name(given: object, *, where: str, group: str, known: Iterable[str] = ()) -> FFRError:
    """The error about a name that is none of the `known` ones, no entry point of the group and no other door."""
    names = [*known, *entry_points(group)]
    return FFRError(
        f"{where}: found {given!r}, expected one of {', '.join(names) or 'none'}; {did_you_mean(given, names)}or one "
        f"of your own: pkg://module:name, path/to/file.py:name, or an entry point of group {group}"
    )


def load_door(door: Door, *, where: str, group: str, known: Iterable[str] = ()) -> Any:
    """What is behind a door.

    A file is loaded once a process, as a module of its own. What a file or package needs must be there in every
    process that opens the door, on every machine.

    Args:
        door: of `parse_door`.
        where: the key or option that names it, for messages.
        group: of entry points.
        known: names beside these, for the message about one that is none.

    Raises:
        FFRError: when there is no such entry point, file, module or name in it, or loading it fails.
    """
    said = f"{where}: {door}"
    if door.file is not None:
        return _attribute(_module_of_file(door.file, said), door.name, said)
    if door.module is not None:
        return _attribute(_imported(door.module, said), door.name, said)
    points = entry_points(group)
    if door.name not in points:
        raise unknown_name(door.name, where=where, group=group, known=known)
    point = points[door.name]
    package = point.dist.name if point.dist is not None else "an unknown package"
    said = f"{said} (entry point {point.value} of {package})"
    return _attribute(_imported(point.module, said), point.attr, said)


def blamed(error: BaseException) -> str:
    """What an error of a part of one's own says, and where it was raised, as a line."""
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith("<frozen")]
    frames = [one for one in frames if not Path(one.filename).is_relative_to(Path(__file__).parent)]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    said = str(traceback.TracebackException.from_exception(error))  # a class of others may fail to say it
    return f"{one_line(f'{type(error).__name__}: {said}')}{place}"


def _imported(module: str, said: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a module may raise anything
        mend = f"it must be importable on {platform.node()} as on every machine that opens it"
        raise FFRError(f"{said}: cannot be imported: {blamed(error)}; {mend}") from error


def _module_of_file(file: Path, said: str) -> ModuleType:
    with _loading:
        name = str(file.resolve())
        if name not in _files:
            if not file.is_file():
                where = f"on {platform.node()}, where it is opened"
                raise FFRError(f"{said}: no such file {where}; it must lie at the same path on every machine")
            spec = importlib.util.spec_from_file_location(f"ffr_verl_door_{file.stem}_{len(_files)}", file)
            assert spec is not None  # its name ends with .py
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # dataclasses look there, and pickle
            try:
                spec.loader.exec_module(module)
            except (Exception, SystemExit) as error:
                del sys.modules[spec.name]
                raise FFRError(f"{said}: cannot be loaded: {blamed(error)}") from error
            _files[name] = module
        return _files[name]


def _attribute(module: ModuleType, name: str, said: str) -> Any:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            own = [one for one in vars(module) if not one.startswith("_")]
            raise FFRError(f"{said}: there is no {part} in it; {did_you_mean(part, own)}".rstrip("; "))
        found = getattr(found, part)
    return found
