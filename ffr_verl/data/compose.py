"""`ffr-verl build`: long dialogues of several topics, composed from short ones, with queries for their parts.

Input and output are raw dialogues (`ffr_verl.data.sources.raw_dialogues`). A part of a short dialogue that keeps its
turns in order becomes the gold fragment of its query; where topics take turns the fragment is sparse.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ffr_verl.data.sources import find_source
from ffr_verl.data.sources.raw_dialogues import RawDialogueError, RawReader
from ffr_verl.data.sources.source import DEFAULT_GAP_HOURS, Notes, ReadSettings, read_image_map
from ffr_verl.errors import FFRError
from ffr_verl.files import check_output, refuse_special, whole_or_nothing
from ffr_verl.metrics import dispersion

Layout = Literal["blocks", "interleaved", "mixed"]
_CANDIDATES = 32


class Query(NamedTuple):
    """What may be asked of a short dialogue."""

    text: str
    gold: tuple[int, ...] | None = None  # positions of its turns, from 0; `None`: all


@dataclass(frozen=True, slots=True)
class ShortDialogue:
    """A dialogue about one thing."""

    dialogue_id: str
    topic: str  # dialogues of one topic are not put together; empty: of a topic of its own
    turns: tuple[Mapping[str, Any], ...]  # raw turns
    queries: tuple[Query, ...]


@dataclass(frozen=True, slots=True)
class ComposeSettings:
    """How long dialogues are made."""

    topics: int = 3  # short dialogues in a long one
    layout: Layout = "mixed"  # one after another, taking turns, or either by chance
    dispersion: float | None = None  # wanted mean of the fragments in interleaved dialogues; `None`: as chance has it
    negatives: float = 0.15  # share of queries that ask for what is not there
    queries: int = 1  # of a dialogue; a topic is asked for once
    keep_speakers: bool = False  # otherwise they are user1 and user2 by turns
    unlabelled: bool = False  # no queries; `negatives` and `queries` are then of no use

    def __post_init__(self) -> None:
        most = self.topics + 1
        for name, is_good, expected in (
            ("topics", self.topics >= 1, "a number from 1"),
            ("dispersion", self.dispersion is None or self.dispersion >= 1, "a number from 1 (dense)"),
            ("negatives", 0 <= self.negatives <= 1, "a share from 0 to 1"),
            ("queries", 1 <= self.queries <= most, f"1 to {most} (topics and one more)"),
        ):
            if not is_good:
                raise FFRError(f"--{name}: found {getattr(self, name)}; give {expected}")


def dispersion_of(order: Sequence[int], part: int) -> float:
    """Span of a part's turns over their number: 1 where they follow each other."""
    return dispersion([place for place, owner in enumerate(order) if owner == part]) or 1.0


def _interleave(lengths: Sequence[int], stay: float, rng: random.Random) -> list[int]:
    """Parts taking turns: after each turn the same part goes on with the chance `stay`."""
    left = list(lengths)
    order: list[int] = []
    while any(left):
        part = order[-1] if order else 0
        if not order or not left[part] or rng.random() >= stay:
            part = rng.choices(range(len(left)), weights=left)[0]
        order.append(part)
        left[part] -= 1
    return order


def order_of_parts(
    lengths: Sequence[int], layout: Layout, rng: random.Random, *, dispersion: float | None = None
) -> list[int]:
    """Which part each turn of a long dialogue belongs to, of parts with some turns each. `interleaved` is a shuffle
    that keeps the order inside parts; of some of them the one whose mean dispersion is nearest to the wanted one."""
    if layout == "blocks":
        return [part for part, length in enumerate(lengths) for _ in range(length)]
    if dispersion is None:
        return _interleave(lengths, 0.0, rng)
    candidates = [_interleave(lengths, number / (_CANDIDATES - 1), rng) for number in range(_CANDIDATES)]
    parts = range(len(lengths))
    return min(
        candidates, key=lambda one: abs(sum(dispersion_of(one, part) for part in parts) / len(parts) - dispersion)
    )


def compose(
    dialogue_id: str,
    parts: Sequence[ShortDialogue],
    absent: ShortDialogue | None,
    settings: ComposeSettings,
    rng: random.Random,
) -> dict[str, Any]:
    """A long raw dialogue of short ones, in the order of their blocks, and its queries; one that asks for the `absent`
    dialogue, which is not in it, has an empty gold."""
    kinds: tuple[Layout, ...] = ("blocks", "interleaved")
    layout = rng.choice(kinds) if settings.layout == "mixed" else settings.layout
    order = order_of_parts([len(part.turns) for part in parts], layout, rng, dispersion=settings.dispersion)
    sources = [iter(part.turns) for part in parts]
    turns = []
    for number, part in enumerate(order):
        turn = next(sources[part])
        speaker = turn.get("speaker", "") if settings.keep_speakers else f"user{number % 2 + 1}"
        turns.append({"utterance_idx": number, "speaker": speaker, "utterance": turn["utterance"]})
    made = {"dialogue_id": dialogue_id, "dialogue": turns, "parts": [part.dialogue_id for part in parts]}
    if settings.unlabelled:
        return made
    asked = rng.sample(range(len(parts)), min(settings.queries, len(parts)))
    if absent is not None and rng.random() < settings.negatives:
        asked[-1] = len(parts)
    elif settings.queries > len(asked) and absent is not None:
        asked.append(len(parts))
    queries = []
    for part in asked:
        source = absent if part == len(parts) else parts[part]
        assert source is not None
        query = rng.choice(source.queries)
        gold = [number for number, owner in enumerate(order) if owner == part]
        if gold and query.gold is not None:
            gold = [gold[position] for position in query.gold]
        queries.append({"query_text": query.text, "gt_turns": gold})
    return {**made, "queries": queries}


def _topic(value: Any) -> str:
    """A topic as text, the same for 0, 0.0 and "0" (a column with gaps holds 0.0)."""
    if isinstance(value, (list, Mapping, bool)):
        raise FFRError(f"field 'topic': found {value!r}, expected a text or a number")
    if value is None or value != value:  # NaN, of a column with gaps
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _short_dialogue(
    number: int, row: Mapping[str, Any], query_fields: Sequence[str], *, unlabelled: bool
) -> ShortDialogue:
    """A raw dialogue. Queries with gold turns ask for these, those of another field for all of it."""
    turns, reader = row.get("dialogue"), RawReader()
    if not isinstance(turns, list) or not turns:
        raise FFRError("field 'dialogue': missing or empty; expected a list of turns")
    _, _, ids = reader.turns(turns)
    queries: list[Query] = []
    has_gold = "queries" in row or ("gt_turns" in row and "query_text" in query_fields)
    if has_gold:
        queries += [Query(text, tuple(gold)) for text, gold in reader.queries(row, ids)]
    for name in query_fields:
        texts = row.get(name) if name != "query_text" or not has_gold else None
        texts = texts if isinstance(texts, list) else [texts]
        queries += [Query(reader.text(text, name)) for text in texts if isinstance(text, str) and text.strip()]
    reader.unread({**row, **dict.fromkeys(query_fields)})
    if reader.problems:
        raise RawDialogueError(reader.problems)
    if not queries and not unlabelled:
        raise FFRError(f"no query in {', '.join(query_fields)}; name the field with --query-field")
    return ShortDialogue(str(row.get("dialogue_id", number)), _topic(row.get("topic")), tuple(turns), tuple(queries))


def _read_short_dialogues(
    source: Path, query_fields: Sequence[str], source_format: str, read: ReadSettings, *, unlabelled: bool
) -> list[ShortDialogue]:
    found = []
    refuse_special(source)
    name, form = find_source(source_format, source)
    if form.has_prompts:
        raise FFRError(
            f"{source}: rows of the format {name} have prompts; give dialogues (--format list shows formats)"
        )
    for number, record in form.records(source, read, lambda position: None):
        asked = {one: record[one] for one in (*query_fields, "topic") if one in record}
        try:
            row = {**asked, **form.dialogue(number, record, read, Notes())}
            found.append(_short_dialogue(number, row, query_fields, unlabelled=unlabelled))
        except ValueError as error:
            raise FFRError(f"{source}: row {number}: {error}") from None
    return found


def _draw(pool: Sequence[ShortDialogue], count: int, rng: random.Random) -> list[ShortDialogue]:
    """Some dialogues of different topics; fewer where there are no more topics."""
    drawn: list[ShortDialogue] = []
    topics: set[str] = set()
    endless = (rng.choice(pool) for _ in range(64 * len(pool)))
    for candidate in rng.sample(pool, len(pool)) if len(pool) <= 64 else endless:
        if candidate not in drawn and not (candidate.topic and candidate.topic in topics):
            drawn.append(candidate)
            topics.add(candidate.topic)
            if len(drawn) == count:
                break
    return drawn


def build(
    source: Path,
    output: Path,
    *,
    dialogues: int,
    settings: ComposeSettings,
    query_fields: Sequence[str] = ("query_text",),
    prefix: str = "built",
    seed: int = 0,
    source_format: str = "dialogue",
    gap_hours: float = DEFAULT_GAP_HOURS,
    image_map: Path | None = None,
    force: bool = True,
) -> tuple[int, float]:
    """Compose long dialogues of short ones (a JSON list or JSONL) and write them as JSONL of raw dialogues.

    The options are those of the command, whose help says what they do. Equal source, settings and seed give an equal
    file; one that is there is replaced, but not without `force`.

    Returns:
        Queries written, and the mean dispersion of their fragments.

    Raises:
        FFRError: for a source that cannot be used, or one with too few topics.
    """
    check_output(output, force=force, example="long.jsonl", inputs=[source, image_map], option="OUTPUT")
    read = ReadSettings({} if image_map is None else read_image_map(image_map), gap_hours)
    pool = _read_short_dialogues(source, query_fields, source_format, read, unlabelled=settings.unlabelled)
    rng = random.Random(seed)
    has_absent = settings.negatives > 0 or settings.queries > settings.topics
    needed = settings.topics + (has_absent and not settings.unlabelled)
    if len(_draw(pool, needed, random.Random(seed))) < needed:
        another = ", and a query for an absent one another" if needed > settings.topics else ""
        raise FFRError(
            f"{source}: {len(pool)} dialogues of too few topics: a long dialogue needs {settings.topics} of different "
            f"topics{another}"
        )
    queries, dispersions = 0, []
    with whole_or_nothing([output]) as (temporary,), temporary.open("w", encoding="utf-8") as file:
        for number in range(dialogues):
            drawn = _draw(pool, needed, rng)
            parts, absent = drawn[: settings.topics], drawn[settings.topics] if needed > settings.topics else None
            made = compose(f"{prefix}_{number:06d}", parts, absent, settings, rng)
            file.write(json.dumps(made, ensure_ascii=False) + "\n")
            queries += len(made.get("queries", ()))
            dispersions += [dispersion(query["gt_turns"]) for query in made.get("queries", ()) if query["gt_turns"]]
    return queries, sum(dispersions) / len(dispersions) if dispersions else 1.0
