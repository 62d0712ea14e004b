"""Rows of the MLDR format out of any source: with their gold answers, or without (`unlabelled`, for `infer` only)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ffr_verl.data.sources import AUTO, Source, find_source
from ffr_verl.data.sources.raw_dialogues import RawDialogueError, rows_of_raw_dialogue
from ffr_verl.data.sources.source import Notes, ReadSettings
from ffr_verl.data.templates import PromptTemplate
from ffr_verl.errors import FFRError
from ffr_verl.files import read_text


@dataclass(frozen=True, slots=True)
class RowSettings:
    """How rows are made.

    Attributes:
        read: see `ReadSettings`.
        template: instructions around dialogues; by default those of the language of each.
        captions: write captions behind their images.
        unlabelled: rows without a gold answer, for `infer` only.
        queries: of unlabelled rows, instead of those that dialogues have.
    """

    read: ReadSettings = field(default_factory=ReadSettings)
    template: PromptTemplate | None = None
    captions: bool = False
    unlabelled: bool = False
    queries: Sequence[str] = ()

    def check(self, name: str, source: Source) -> None:
        """Refuse settings that do not go with a source.

        Raises:
            FFRError: names the option.
        """
        if self.queries and not self.unlabelled:
            raise FFRError("--query: asks for what has no gold answer; it goes with --unlabelled")
        if self.queries and source.has_prompts:
            raise FFRError(
                f"--query: read as rows of the format {name}, which bring their prompts, each with its query; leave "
                "it out, or say with --format what the file is"
            )
        if not source.has_gold and not self.unlabelled:
            raise FFRError(
                f"--format {name}: has no queries and gold answers; give --unlabelled with --query TEXT, for rows "
                "that `ffr-verl infer` answers"
            )
        if not source.has_gold and not self.queries:
            raise FFRError(f"--format {name}: has no queries; give --query TEXT, or --query-file FILE with one a line")


def rows_of_record(
    source: Source, number: int, record: Mapping[str, Any], settings: RowSettings, notes: Notes
) -> list[Mapping[str, Any]]:
    """The rows of the MLDR format that a row of a source gives.

    Raises:
        RawDialogueError: for what is wrong with the row.
    """
    row = source.dialogue(number, record, settings.read, notes)
    if not source.has_prompts:
        return [
            *rows_of_raw_dialogue(
                row,
                template=settings.template,
                captions=settings.captions,
                unlabelled=settings.unlabelled,
                queries=settings.queries,
                notes=notes,
            )
        ]
    messages = row.get("messages")
    if settings.unlabelled:
        notes.leave("gold answers (--unlabelled)", "solution" in row)
        row = {name: value for name, value in row.items() if name != "solution"}
        if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
            row["messages"] = messages[:-1] if messages[-1].get("role") == "assistant" else messages
    return [row]


def chat_rows(
    path: Path,
    queries: Sequence[str],
    *,
    source_format: str = AUTO,
    settings: RowSettings | None = None,
    on_note: Callable[[str, int], None] = lambda what, count: None,
) -> Iterator[dict[str, Any]]:
    """The rows of a chat in any source format, without gold: each of its dialogues asked each query, to be answered.

    Args:
        path: a file, or a folder where the format is one.
        queries: what to ask.
        source_format: as `--format` takes it.
        settings: how rows are made; `unlabelled` and `queries` are set here.
        on_note: told what the rows leave out, and how often, when the last one has been made.

    Yields:
        Rows with `dialogue_id`, `images` (paths as in the source) and `messages` (system, user).

    Raises:
        FFRError: for a file or a row that cannot be used.
    """
    given = settings or RowSettings()
    made = RowSettings(given.read, given.template, given.captions, True, tuple(queries))
    name, source = find_source(source_format, path)
    made.check(name, source)
    notes = Notes()
    for number, record in source.records(path, made.read, lambda position: None):
        try:
            yield from map(dict, rows_of_record(source, number, record, made, notes))
        except RawDialogueError as error:
            raise FFRError(f"{path}: row {number}: {error}") from None
    for what, count in notes.left_out.items():
        on_note(what, count)


def read_queries(path: Path, *, option: str = "--query-file") -> list[str]:
    """The queries of a file, one a line; `option` gave its name.

    Raises:
        FFRError: for a file that cannot be read, or has none.
    """
    lines = read_text(path, mend="give a UTF-8 text with one query a line", option=option).splitlines()
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise FFRError(f"{option} {path}: no query in it; give one a line")
    return found
