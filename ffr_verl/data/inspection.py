"""`ffr-verl inspect`: one row, as a person reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ffr_verl.data.parquet_files import (
    check_columns,
    is_own_root,
    read_schema,
    recorded_family,
    recorded_root,
    row_of_file,
)
from ffr_verl.data.sources import AUTO, find_source
from ffr_verl.data.sources.raw_dialogues import RawDialogueError
from ffr_verl.data.sources.rows import RowSettings, rows_of_record
from ffr_verl.data.sources.source import Notes
from ffr_verl.data.tokens import PromptTokens, estimated_tokens
from ffr_verl.dialogues import content_text, parse_dialogue
from ffr_verl.errors import FFRError, counted, printable, printable_lines
from ffr_verl.files import PARQUET, disk_errors, refuse_special
from ffr_verl.fragments import Fragment, parse_gold, reason_of_malformed
from ffr_verl.images import image_source, image_tokens, read_image_facts
from ffr_verl.model_families import ModelFamily, family_of_model
from ffr_verl.settings import DEFAULT_MAX_PIXELS

_MARKS = {"gold": "*", "answer": "+"}


class _Row(NamedTuple):
    messages: Sequence[Mapping[str, Any]]  # without the answer
    images: list[Any]
    dialogue_id: str
    solution: str | None  # the gold answer; `None` where there is none
    response: str | None = None  # a model's answer; `None` where the row is no prediction


def _of_rows(file: Path, number: int, source_format: str) -> _Row:
    """A row of a source or of predictions, whatever is wrong with it."""
    count, (_, source) = 0, find_source(source_format, file)
    settings = RowSettings() if source.has_gold else RowSettings(unlabelled=True, queries=("",))
    for place, row in source.records(file, settings.read, lambda position: None):
        try:
            made = rows_of_record(source, place, row, settings, Notes())
        except RawDialogueError as error:
            raise FFRError(f"{file}: row {place}: {error}") from None
        if number < count + len(made):
            one = made[number - count]
            messages, images = (
                one[name] if isinstance(one.get(name), list) else [] for name in ("messages", "images")
            )
            texts = [
                {**message, "content": content_text(message.get("content"))}
                for message in messages
                if isinstance(message, Mapping) and message.get("role") != "assistant"
            ]
            gold, answer = one.get("solution", one.get("labels")), one.get("response")
            shown = [text if isinstance(text, str) or text is None else str(text) for text in (gold or None, answer)]
            return _Row(texts, images, str(one.get("dialogue_id", "")), *shown)
        count += len(made)
    raise FFRError(f"{file}: has {counted(count, 'row')}, there is no row {number} (the first is 0)")


def _of_parquet(file: Path, number: int) -> _Row:
    check_columns([str(file)], "rl" if "prompt" in read_schema(file).names else "sft", unlabelled=True)
    row = row_of_file(file, number)
    images = row["images"] or []
    if "prompt" in row:
        return _Row(row["prompt"], images, str(row["extra_info"]["dialogue_id"]), row["reward_model"]["ground_truth"])
    return _Row(row["messages"][:-1], images, str(row.get("dialogue_id", "")), row["messages"][-1]["content"])


def _fragment(text: str | None, what: str) -> tuple[Fragment, str]:
    """What is marked of a gold answer or a model's, and a line about it."""
    if text is None:
        return Fragment((), ()), f"no {what}"
    found = parse_gold(text)
    if found is None:
        return Fragment((), ()), f"{what}: malformed ({reason_of_malformed(text).value})"
    if not found.utterance_ids and not found.image_ids:
        return found, f"{what}: empty"
    ids, images = len(found.utterance_ids), len(found.image_ids)
    return found, f"{what} ({_MARKS[what]}): {counted(ids, 'utterance')}, {counted(images, 'image')}"


def _shown(text: str) -> str:
    """A text of some lines that a terminal can take."""
    return printable_lines(text)


def _picture(image: Any, root: Path | None, family: ModelFamily) -> tuple[str, int]:
    """An image as text, and its tokens."""
    image = image if isinstance(image, Mapping) else {"path": str(image)}
    name, place = image.get("path"), "" if image.get("bytes") is None else ", in the file"
    if not place and root is None:
        return f"{name} (give --images-root to look at it)", 0
    try:
        facts = read_image_facts(image_source(image, root or Path()))
        tokens = image_tokens(facts.width, facts.height, max_pixels=DEFAULT_MAX_PIXELS, family=family)
    except ValueError as error:
        return f"{name}: {error}", 0
    return f"{name} ({facts.width} x {facts.height} {facts.format}, {tokens} tokens{place})", tokens


def render_row(
    file: Path,
    number: int,
    *,
    root: Path | None = None,
    tokenizer: str | None = None,
    model_family: str | None = None,
    source_format: str = AUTO,
) -> RenderableType:
    """A row of a parquet file, of a source (`ffr_verl.data.sources`; raw dialogues count one for each query) or of
    predictions, to be printed by rich, with the gold fragment and the answer marked.

    The images' folder is by default the one recorded in a parquet file, or a source's own; the model's family is that
    of the tokenizer, then the recorded one.

    Raises:
        FFRError: when there is no such file or row, or the row holds no dialogue.
    """
    refuse_special(file)
    if not file.exists():
        raise FFRError(f"{file}: no such file")
    is_parquet = False
    if file.is_file():
        with disk_errors(file, "give a file that can be read"), file.open("rb") as start:
            is_parquet = start.read(4) == PARQUET
    row = _of_parquet(file, number) if is_parquet else _of_rows(file, number, source_format)
    if root is not None:
        root = root.expanduser().resolve()
    elif is_parquet:
        root = recorded_root(file)
        root = root if root is None or is_own_root(file, root) else None
    elif row.response is None:
        root = (file if file.is_dir() else file.parent).resolve()  # as `prepare` takes it
    try:
        dialogue = parse_dialogue(row.messages, row.dialogue_id)
    except (ValueError, KeyError, TypeError) as error:
        raise FFRError(f"{file}: row {number}: {error}; `ffr-verl prepare` checks a whole file") from None
    told = {}
    if row.solution is not None or row.response is None:
        told["gold"] = _fragment(row.solution, "gold")
    if row.response is not None:
        told["answer"] = _fragment(row.response, "answer")
    counter = None if tokenizer is None else PromptTokens(tokenizer, model_family=model_family)
    family = family_of_model(None, name=model_family) if counter is None else counter.family
    if is_parquet and tokenizer is None and model_family is None:
        family = recorded_family(file) or family
    table = Table("", "id", "speaker", "text", header_style="bold")
    tokens: list[int] = []
    for utterance in dialogue.utterances:
        marks = "".join([_MARKS[what] for what, (one, _) in told.items() if utterance.id in one.utterance_ids])
        text = Text(_shown(utterance.text))
        for identifier in utterance.image_ids:
            of_image = "".join([_MARKS[what] for what, (one, _) in told.items() if identifier in one.image_ids])
            place = len(tokens)
            line, count = _picture(row.images[place], root, family) if place < len(row.images) else ("no path", 0)
            tokens.append(count)
            start_of_line = "\n" if text.plain else ""
            text.append(f"{start_of_line}image {identifier}: {_shown(line)}", "green" if of_image else "dim")
            text.append(f" {of_image}" if of_image else "", "green")
        style = "green" if marks else ""
        table.add_row(marks, str(utterance.id), Text(_shown(utterance.speaker)), text, style=style)
    facts = [f"dialogue {_shown(row.dialogue_id)}", counted(len(dialogue.utterances), "turn")]
    facts += [counted(len(row.images), "image"), *[about for _, about in told.values()]]
    about = f"about {estimated_tokens(row.messages, tokens):,}"
    if counter is not None:
        about = f"{counter.count(row.messages, tokens):,}"
    unread = " and those of images that were not read" if not all(tokens) else ""
    facts.append(f"{about} prompt tokens{unread}")
    query = Panel(Text(_shown(dialogue.query)), title="query", title_align="left", expand=False)
    head = Text(f"{printable(str(file))}, row {number}: {', '.join(facts)}")
    texts = {"gold": row.solution, "answer": row.response}
    return Group(head, query, table, *[Text(f"{what}: {_shown(texts[what] or '')}", "dim") for what in told])
