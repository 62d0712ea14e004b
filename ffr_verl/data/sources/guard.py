"""Formats of third parties: whatever they raise is one error that names them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ffr_verl.data.sources.raw_dialogues import RawDialogueError
from ffr_verl.data.sources.source import Notes, Probe, ReadSettings, Source
from ffr_verl.doors import blamed
from ffr_verl.errors import FFRError


def guarded(source: Source, name: str) -> Source:
    """A format of others whose errors name it: whatever it raises is an `FFRError`."""

    def records(
        path: Path, settings: ReadSettings, on_position: Callable[[int], None]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        rows, number = None, 0
        while True:
            with _named(f"{path}: behind row {number - 1}" if number else str(path), name):
                rows = iter(source.records(path, settings, on_position)) if rows is None else rows
                found = next(rows, None)
                if found is None:
                    return
                place, row = found
            yield place, row
            number = place + 1

    def dialogue(number: int, row: Mapping[str, Any], settings: ReadSettings, notes: Notes) -> Mapping[str, Any]:
        with _named(f"row {number}", name):
            return source.dialogue(number, row, settings, notes)

    def fits(probe: Probe) -> bool:
        with _named(str(probe.path), name):
            return source.fits(probe)

    return replace(source, records=records, dialogue=dialogue, fits=fits)


@contextlib.contextmanager
def _named(place: str, name: str) -> Iterator[None]:
    try:
        yield
    except (FFRError, RawDialogueError):
        raise
    except (Exception, SystemExit) as error:  # a format of others may raise anything
        raise FFRError(f"{place}: --format {name} raised {blamed(error)}; see docs/data.md") from error
