"""Raw dialogues (`--format dialogue`): chat logs with queries and gold turns, made into rows of the MLDR format.

    {"dialogue_id": "w1",
     "dialogue": [{"utterance_idx": 0, "speaker": "Ann", "utterance": "look at him"},
                  {"utterance_idx": 1, "speaker": "Ann", "utterance": [{"image_url": "cat.jpg", "caption": "a cat"}]}],
     "query_text": "the cat", "gt_turns": [0, 1]}

`query_text` and `gt_turns` may be lists of equal length, a query each; or `queries` is a list of objects with the two.
Gold turns name `utterance_idx`; gold images are those inside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ffr_verl.data.checks.problems import ProblemKind, clipped
from ffr_verl.data.checks.unread_fields import unread_fields
from ffr_verl.data.sources.source import Notes
from ffr_verl.data.sources.speakers import SpeakerNames
from ffr_verl.data.templates import TEMPLATES, PromptTemplate, detect_language
from ffr_verl.dialogues import Dialogue, Utterance, reserved_token, unwritable
from ffr_verl.fragments import Fragment, format_fragment

_ROW = frozenset({"dialogue_id", "dialogue", "query_text", "gt_turns"})
_ROW_OF_QUERIES = frozenset({"dialogue_id", "dialogue", "queries"})
_TURN = frozenset({"utterance_idx", "speaker", "utterance"})
_IMAGE = frozenset({"image_url", "caption"})
_QUERY = frozenset({"query_text", "gt_turns"})


class RawDialogueError(ValueError):
    """Everything that is wrong with a raw dialogue: `problems`, a `(kind, field, message)` each; and the paths of its
    `images`, as far as they could be read."""

    def __init__(self, problems: Sequence[tuple[ProblemKind, str, str]], images: Sequence[str] = ()) -> None:
        super().__init__("; ".join(f"{field}: {clipped(message)}" for _, field, message in problems))
        self.problems, self.images = tuple(problems), tuple(images)


class RawReader:
    """Reads the fields of one raw dialogue, and collects what is wrong with them and what they say."""

    def __init__(self) -> None:
        self.problems: list[tuple[ProblemKind, str, str]] = []
        self.said: list[str] = []
        self.odd: list[tuple[str, Mapping[str, Any], frozenset[str]]] = []  # objects with other fields than these
        self.speakers = SpeakerNames()

    def report(self, kind: ProblemKind, field: str, message: str) -> None:
        self.problems.append((kind, field, message))

    def text(self, value: Any, field: str) -> str:
        if not isinstance(value, str):
            self.report(ProblemKind.WRONG_TYPE, field, f"found {value!r}, expected a text")
            return ""
        fault, found = unwritable(value), reserved_token(value)
        if fault is not None:
            self.report(ProblemKind.BAD_TEXT, field, fault)
        if found is not None:
            self.report(ProblemKind.BAD_TEXT, field, f"holds {found}, which has a meaning in the prompt")
        self.said.append(value)
        return value.strip()

    def speaker(self, turn: Mapping[str, Any], field: str) -> str:
        value = turn.get("speaker", "")
        return self.speakers.written(self.text(str(value) if isinstance(value, int) else value, field))

    def content(self, value: Any, field: str) -> tuple[str, list[tuple[str, str]]]:
        """The words of a turn, and path and caption of each of its images."""
        if not isinstance(value, list):
            return self.text(value, field), []
        words: list[str] = []
        images: list[tuple[str, str]] = []
        for number, item in enumerate(value):
            where = f"{field}[{number}]"
            if isinstance(item, str):
                words.append(self.text(item, where))
            elif isinstance(item, Mapping) and isinstance(item.get("image_url"), str) and item["image_url"]:
                if not item.keys() <= _IMAGE:
                    self.odd.append((f"{where}.", item, _IMAGE))
                caption = item.get("caption")
                self.said.append(item["image_url"])
                images.append((item["image_url"], "" if caption is None else self.text(caption, f"{where}.caption")))
            else:
                expected = 'expected a text or {"image_url": path, "caption": text}'
                self.report(ProblemKind.WRONG_TYPE, where, f"found {_short(item)}, {expected}")
        return " ".join(filter(None, words)), images

    def turns(self, turns: Sequence[Any]) -> tuple[tuple[Utterance, ...], list[str], dict[int, int]]:
        """The utterances, whose ids count from 0; the path of each image; and for each `utterance_idx`, which counts
        up and may be left out, its id."""
        utterances: list[Utterance] = []
        paths: list[str] = []
        ids: dict[int, int] = {}
        last: int | None = None
        for position, turn in enumerate(turns):
            field = f"dialogue[{position}]"
            if not isinstance(turn, Mapping):
                self.report(ProblemKind.WRONG_TYPE, field, f"found {_short(turn)}, expected an object")
                continue
            if not turn.keys() <= _TURN:
                self.odd.append((f"{field}.", turn, _TURN))
            number = turn.get("utterance_idx", position)
            if not isinstance(number, int) or isinstance(number, bool) or (last is not None and number <= last):
                expected = "expected a whole number" + ("" if last is None else f" above {last}")
                where = f"{field}.utterance_idx"
                self.report(ProblemKind.UTTERANCE_IDS, where, f"found {_short(number)}, {expected}")
            else:
                ids[number] = position
                last = number
            speaker = self.speaker(turn, f"{field}.speaker")
            if "utterance" not in turn:
                missing = "missing; expected a text, or a list of texts and images"
                self.report(ProblemKind.MISSING_FIELD, f"{field}.utterance", missing)
            text, images = self.content(turn.get("utterance", ""), f"{field}.utterance")
            image_ids = tuple(range(len(paths), len(paths) + len(images)))
            captions = tuple([caption for _, caption in images])
            utterances.append(Utterance(position, speaker, text, image_ids, captions if any(captions) else ()))
            paths += [path for path, _ in images]
        return tuple(utterances), paths, ids

    def queries(self, row: Mapping[str, Any], ids: Mapping[int, int]) -> list[tuple[str, list[int]]]:
        """Text and gold positions of each query."""
        missing = [] if "queries" in row else [name for name in ("query_text", "gt_turns") if name not in row]
        for name in missing:
            self.report(ProblemKind.MISSING_FIELD, name, "missing; expected a query and its gold turns, or queries")
        if missing:
            return []
        if "queries" in row:
            items, place = row["queries"], "queries[{}].%s"
            if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
                self.report(ProblemKind.WRONG_TYPE, "queries", "expected a list of {query_text, gt_turns}")
                return []
        else:
            texts, turns, place = row["query_text"], row["gt_turns"], "%s[{}]"
            if not isinstance(texts, list):
                return [self.query(row, ids, "%s")]
            if not isinstance(turns, list) or len(turns) != len(texts):
                message = f"expected {len(texts)} lists, one for each query_text"
                self.report(ProblemKind.WRONG_TYPE, "gt_turns", message)
                return []
            items = [{"query_text": text, "gt_turns": gold} for text, gold in zip(texts, turns, strict=True)]
        if not items:
            self.report(ProblemKind.MISSING_FIELD, "queries", "empty; expected at least one query")
        return [self.query(item, ids, place.format(number)) for number, item in enumerate(items)]

    def query_texts(self, row: Mapping[str, Any]) -> list[str]:
        """The queries of a row whose gold does not matter."""
        items = row.get("queries", row.get("query_text", []))
        items = items if isinstance(items, list) else [items]
        texts = [item.get("query_text") if isinstance(item, Mapping) else item for item in items]
        found = [self.text(text, f"queries[{number}]") for number, text in enumerate(texts)]
        if not all(found) or not found:
            self.report(
                ProblemKind.MISSING_FIELD, "query_text", "missing or empty; expected a query, or give --query TEXT"
            )
        return found

    def query(self, item: Mapping[str, Any], ids: Mapping[int, int], where: str) -> tuple[str, list[int]]:
        """Text and gold positions, rising; `where` makes the name of a field."""
        field, field_of_gold, turns = where % "query_text", where % "gt_turns", item.get("gt_turns")
        if field != "query_text":  # that of a row
            self.odd.append((where % "", item, _QUERY))
        text = self.text(item.get("query_text"), field)
        if not text and isinstance(item.get("query_text"), str):
            self.report(ProblemKind.MISSING_FIELD, field, "empty; expected a query")
        if not isinstance(turns, list) or not all(type(turn) is int for turn in turns):
            expected = "expected a list of utterance_idx"
            self.report(ProblemKind.WRONG_TYPE, field_of_gold, f"found {_short(turns)}, {expected}")
            return text, []
        outside = [turn for turn in turns if turn not in ids]
        if outside:
            self.report(ProblemKind.GOLD_OUTSIDE, field_of_gold, f"{outside} are no utterance_idx of the dialogue")
        if len(set(turns)) != len(turns):
            self.report(ProblemKind.GOLD_REPEATED, field_of_gold, f"turns repeat: {turns}")
        return text, sorted({ids[turn] for turn in turns if turn in ids})

    def unread(self, row: Mapping[str, Any]) -> None:
        """Fields that look like content and are dropped: of the row, and of what has been read of it."""
        of_row = "", row, _ROW_OF_QUERIES if "queries" in row else _ROW
        for where, value, read in [of_row, *self.odd]:
            for name, message in unread_fields(value, read, self.said):
                self.report(ProblemKind.UNREAD_FIELD, where + name, message)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def rows_of_raw_dialogue(
    row: Mapping[str, Any],
    *,
    template: PromptTemplate | None = None,
    captions: bool = False,
    unlabelled: bool = False,
    queries: Sequence[str] = (),
    notes: Notes | None = None,
) -> list[dict[str, Any]]:
    """The rows of the MLDR format that a raw dialogue gives, one for each query; a `RawDialogueError` for everything
    that is wrong with it. The instructions are by default those of the language in which the dialogue is; with
    `captions` behind the images, the model could answer without looking. Rows that are `unlabelled` have no gold
    answer, and ask the given `queries`, or those that the dialogue has; `notes` are told what is left out.

    Example:
        >>> row = {"dialogue_id": 7, "dialogue": [{"utterance": "hi"}], "query_text": "a greeting", "gt_turns": [0]}
        >>> [(made["dialogue_id"], made["solution"]) for made in rows_of_raw_dialogue(row)]
        [(7, '<|utt_ids_start|>[0]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>')]
    """
    reader, notes = RawReader(), notes or Notes()
    turns, row_id = row.get("dialogue"), row.get("dialogue_id")
    if not isinstance(turns, list) or not turns:
        other = " (rows with messages need --format mldr)" if "messages" in row else ""
        reader.report(ProblemKind.MISSING_FIELD, "dialogue", f"missing or empty; expected a list of turns{other}")
        if not unlabelled:
            reader.queries(row, {})
        raise RawDialogueError(reader.problems)
    utterances, paths, ids = reader.turns(turns)
    if template is None:
        template = TEMPLATES[detect_language(" ".join([utterance.text for utterance in utterances]))]
    asked: list[tuple[str, list[int] | None]]
    if unlabelled:
        asked = [(reader.text(text, "--query"), None) for text in queries or reader.query_texts(row)]
        notes.leave("gold answers (--unlabelled)", "gt_turns" in row or "queries" in row)
    else:
        asked = [*reader.queries(row, ids)]
    made = []
    for query, gold in asked:
        messages = template.messages(Dialogue("", utterances, query), captions=captions)
        one: dict[str, Any] = {"images": list(paths), "dialogue_id": row_id, "messages": messages}
        if gold is not None:
            images = [image for turn in utterances if turn.id in gold for image in turn.image_ids]
            one["solution"] = format_fragment(Fragment(tuple(gold), tuple(images)))
            messages.append({"role": "assistant", "content": one["solution"]})
        made.append(one)
    reader.unread(row)
    if reader.problems:
        raise RawDialogueError(reader.problems, paths)
    for name, written in reader.speakers.changed.items():
        notes.leave(f"name of a speaker, {clipped(name)!r} is written {clipped(written)!r}")
    return made
