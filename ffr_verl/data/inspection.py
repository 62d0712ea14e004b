"""`ffr-verl inspect`: one row, as a person reads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ffr_verl.data.checks.problems import printable
from ffr_verl.data.config import DataConfig
from ffr_verl.data.parquet_files import images_root, read_schema
from ffr_verl.data.sources.json_rows import read_rows
from ffr_verl.data.sources.raw_dialogues import RawDialogueError, rows_of_raw_dialogue
from ffr_verl.data.tokens import PromptTokens, estimated_tokens
from ffr_verl.dialogues import parse_dialogue
from ffr_verl.errors import FFRError
from ffr_verl.fragments import Fragment, parse_fragment
from ffr_verl.images import image_source, image_tokens, read_image_facts
from ffr_verl.model_families import QWEN2_VL, ModelFamily

__all__ = ["render_row"]

_PARQUET = b"PAR1"


@dataclass(frozen=True, slots=True)
class _Row:
    messages: list[Mapping[str, Any]]
    images: list[Any]
    dialogue_id: str
    solution: str


def _rows(file: Path) -> Iterator[_Row]:
    for number, row in read_rows(file):
        made: Iterable[Mapping[str, Any]] = (row,)
        if "dialogue" in row and "messages" not in row:
            try:
                made = rows_of_raw_dialogue(row)
            except RawDialogueError as error:
                raise FFRError(f"{file}: row {number}: {error}") from None
        for one in made:
            messages = [
                message
                for message in _list_of(Mapping, one.get("messages"))
                if message.get("role") != "assistant" and isinstance(message.get("content"), str)
            ]
            images = one.get("images")
            yield _Row(
                messages,
                images if isinstance(images, list) else [],
                str(one.get("dialogue_id", "")),
                str(one.get("solution", "")),
            )


def _list_of(kind: type, values: Any) -> list[Any]:
    """The values of a kind in a list, nothing of anything else."""
    return [value for value in values if isinstance(value, kind)] if isinstance(values, list) else []


def _of_parquet(file: Path, number: int) -> _Row | int:
    """A row, of whose file no more is read than its row group; or how many rows there are."""
    names = read_schema(str(file)).names
    is_rl = "prompt" in names
    columns = ["images", *(["prompt", "extra_info", "reward_model"] if is_rl else ["messages", "dialogue_id"])]
    missing = [name for name in columns if name not in names]
    if missing:
        raise FFRError(f"{file}: no column {', '.join(missing)}; give a file of `ffr-verl prepare`")
    parquet, first = pq.ParquetFile(file), 0
    for group in range(parquet.num_row_groups):
        count = parquet.metadata.row_group(group).num_rows
        if number < first + count:
            (row,) = parquet.read_row_group(group, columns=columns).slice(number - first, 1).to_pylist()
            images = row["images"] or []
            if is_rl:
                return _Row(
                    row["prompt"], images, row["extra_info"]["dialogue_id"], row["reward_model"]["ground_truth"]
                )
            return _Row(row["messages"][:-1], images, row["dialogue_id"], row["messages"][-1]["content"])
        first += count
    return first


def _nth(file: Path, number: int) -> _Row:
    with file.open("rb") as start:
        is_parquet = start.read(4) == _PARQUET
    count = 0
    if is_parquet:
        found = _of_parquet(file, number)
        if isinstance(found, _Row):
            return found
        count = found
    else:
        for count, row in enumerate(_rows(file), start=1):
            if count > number:
                return row
    raise FFRError(f"{file}: has {count} rows, there is no row {number} (the first is 0)")


def _shown(text: str) -> str:
    """A text of some lines that a terminal can take."""
    return "\n".join([printable(line) for line in text.split("\n")])


def _picture(image: Any, root: Path | None, family: ModelFamily) -> tuple[str, int]:
    """An image as text, and its tokens."""
    image = image if isinstance(image, Mapping) else {"path": str(image)}
    name, place = image.get("path"), "" if image.get("bytes") is None else ", in the file"
    if not place and root is None:
        return f"{name} (give --images-root to look at it)", 0
    try:
        facts = read_image_facts(image_source(image, root or Path()))
        tokens = image_tokens(facts.width, facts.height, max_pixels=DataConfig().max_pixels, family=family)
    except ValueError as error:
        return f"{name}: {error}", 0
    return f"{name} ({facts.width} x {facts.height} {facts.format}, {tokens} tokens{place})", tokens


def render_row(file: Path, number: int, *, root: Path | None = None, tokenizer: str | None = None) -> RenderableType:
    """A row of a parquet file, of MLDR rows or of raw dialogues, to be printed by rich.

    Args:
        file: parquet, JSON list or JSONL.
        number: of the row, from 0; raw dialogues count one for each query.
        root: folder of the images; by default the one recorded in a parquet file.
        tokenizer: to count prompt tokens, see `PromptTokens`.

    Raises:
        FFRError: when there is no such file or row, or the row holds no dialogue.
    """
    if not file.is_file():
        raise FFRError(f"{file}: no such file")
    row = _nth(file, number)
    if root is None and file.suffix == ".parquet" and read_schema(str(file)).metadata:
        root = images_root([str(file)], DataConfig())
    try:
        dialogue = parse_dialogue(row.messages, row.dialogue_id)
    except (ValueError, KeyError, TypeError) as error:
        raise FFRError(f"{file}: row {number}: {error}; `ffr-verl prepare` checks a whole file") from None
    gold = parse_fragment(row.solution)
    marked = gold or Fragment((), ())
    counted = None if tokenizer is None else PromptTokens(tokenizer)
    family = QWEN2_VL if counted is None else counted.family
    table = Table(show_header=True, header_style="bold", expand=False)
    for name in ("", "id", "speaker", "text"):
        table.add_column(name)
    image, tokens = 0, []
    for utterance in dialogue.utterances:
        is_gold = utterance.id in marked.utterance_ids
        text = Text(_shown(utterance.text))
        for identifier in utterance.image_ids:
            is_gold_image = identifier in marked.image_ids
            line, count = _picture(row.images[image], root, family) if image < len(row.images) else ("no path", 0)
            image += 1
            tokens.append(count)
            start = "\n" if text.plain else ""
            text.append(f"{start}image {identifier}: {_shown(line)}", "green" if is_gold_image else "dim")
            text.append(" *" if is_gold_image else "", "green")
        style = "green" if is_gold else ""
        table.add_row("*" if is_gold else "", str(utterance.id), Text(_shown(utterance.speaker)), text, style=style)
    facts = [f"dialogue {_shown(row.dialogue_id)}", f"{len(dialogue.utterances)} turns", f"{len(row.images)} images"]
    if gold is None:
        facts.append("gold: malformed")
    elif not gold.utterance_ids and not gold.image_ids:
        facts.append("gold: empty")
    else:
        facts.append(f"gold: {len(gold.utterance_ids)} utterances, {len(gold.image_ids)} images (*)")
    unread = " and those of images that were not read" if not all(tokens) else ""
    if counted is not None:
        facts.append(f"{counted.count(row.messages, tokens):,} prompt tokens{unread}")
    else:
        facts.append(f"about {estimated_tokens(row.messages, tokens):,} prompt tokens{unread}")
    query = Panel(Text(_shown(dialogue.query)), title="query", title_align="left", expand=False)
    return Group(
        Text(f"{file}, row {number}: {', '.join(facts)}"), query, table, Text(_shown(row.solution), style="dim")
    )
