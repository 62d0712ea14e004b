"""Raw dialogues (`--format dialogue`): chat logs with queries and gold turns, made into rows of the MLDR format.

    {"dialogue_id": "w1",
     "dialogue": [{"utterance_idx": 0, "speaker": "Ann", "utterance": "look at him"},
                  {"utterance_idx": 1, "speaker": "Ann", "utterance": [{"image_url": "cat.jpg", "caption": "a cat"}]}],
     "query_text": "the cat", "gt_turns": [0, 1]}

`query_text` and `gt_turns` may be lists of equal length, a query each; or `queries` is a list of objects with the two.
Gold turns name `utterance_idx`; gold images are those inside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ffr_verl.data.checks.problems import Problem, ProblemKind
from ffr_verl.data.templates import TEMPLATES, PromptTemplate, detect_language
from ffr_verl.dialogues import Dialogue, Utterance, reserved_token, unwritable
from ffr_verl.fragments import Fragment, format_fragment

__all__ = ["RawDialogueError", "dialogue_of_turns", "rows_of_raw_dialogue", "turns_of_dialogue"]


class RawDialogueError(ValueError):
    """Everything that is wrong with a raw dialogue.

    Attributes:
        problems: `(kind, field, message)` of each.
        images: the paths of its images, as far as they could be read.
    """

    def __init__(self, problems: Sequence[tuple[ProblemKind, str, str]], images: Sequence[str] = ()) -> None:
        super().__init__("; ".join(f"{field}: {message}" for _, field, message in problems))
        self.problems, self.images = tuple(problems), tuple(images)

    def of_row(self, row: int) -> list[Problem]:
        """The problems with the row's number."""
        return [Problem(row, kind, field, message) for kind, field, message in self.problems]


class _Reader:
    """Reads the fields of one raw dialogue and collects what is wrong with them."""

    def __init__(self) -> None:
        self.problems: list[tuple[ProblemKind, str, str]] = []

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
        return value.strip()

    def speaker(self, turn: Mapping[str, Any], field: str) -> str:
        value = turn.get("speaker", "")
        name = self.text(str(value) if isinstance(value, int) else value, f"{field}.speaker")
        if ": " in name or "\n" in name:
            self.report(ProblemKind.BAD_TEXT, f"{field}.speaker", f"{name!r} holds ': ' or a line break")
        return name

    def content(self, turn: Mapping[str, Any], field: str) -> tuple[str, list[tuple[str, str]]]:
        """The words of a turn, and path and caption of each of its images."""
        if "utterance" not in turn:
            self.report(
                ProblemKind.MISSING_FIELD, f"{field}.utterance", "missing; expected a text or a list of images"
            )
            return "", []
        value = turn["utterance"]
        if not isinstance(value, list):
            return self.text(value, f"{field}.utterance"), []
        words: list[str] = []
        images: list[tuple[str, str]] = []
        for number, item in enumerate(value):
            where = f"{field}.utterance[{number}]"
            if isinstance(item, str):
                words.append(self.text(item, where))
            elif isinstance(item, Mapping) and isinstance(item.get("image_url"), str) and item["image_url"]:
                caption = item.get("caption")
                images.append((item["image_url"], "" if caption is None else self.text(caption, f"{where}.caption")))
            else:
                self.report(
                    ProblemKind.WRONG_TYPE,
                    where,
                    f'found {_short(item)}, expected a text or {{"image_url": path, "caption": text}}',
                )
        return " ".join(filter(None, words)), images


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def dialogue_of_turns(
    dialogue_id: str, turns: Sequence[Mapping[str, Any]], query: str
) -> tuple[Dialogue, tuple[str, ...], dict[int, int]]:
    """Build a dialogue from raw turns.

    Args:
        dialogue_id: kept as it is.
        turns: `{"utterance_idx": …, "speaker": …, "utterance": text or list of images}`; `utterance_idx` counts up and
            may be left out, then turns count from 0.
        query: what is asked.

    Returns:
        The dialogue, whose utterance ids count from 0; the path of each image; and for each `utterance_idx` its id.

    Raises:
        RawDialogueError: for every turn that cannot be used.

    Example:
        >>> turns = [{"utterance_idx": 1, "speaker": "Ann", "utterance": [{"image_url": "cat.jpg"}]}]
        >>> dialogue, paths, ids = dialogue_of_turns("w1", turns, "the cat")
        >>> dialogue.utterances, paths, ids
        ((Utterance(id=0, speaker='Ann', text='', image_ids=(0,), captions=()),), ('cat.jpg',), {1: 0})
    """
    reader = _Reader()
    found = _read_turns(reader, dialogue_id, turns, reader.text(query, "query_text"))
    if reader.problems:
        raise RawDialogueError(reader.problems)
    return found


def _read_turns(
    reader: _Reader, dialogue_id: str, turns: Sequence[Any], query: str
) -> tuple[Dialogue, tuple[str, ...], dict[int, int]]:
    """As `dialogue_of_turns`; problems are left in the reader."""
    utterances: list[Utterance] = []
    paths: list[str] = []
    ids: dict[int, int] = {}
    last: int | None = None
    for position, turn in enumerate(turns):
        field = f"dialogue[{position}]"
        if not isinstance(turn, Mapping):
            reader.report(ProblemKind.WRONG_TYPE, field, f"found {_short(turn)}, expected an object")
            continue
        number = turn.get("utterance_idx", position)
        if not isinstance(number, int) or isinstance(number, bool) or (last is not None and number <= last):
            before = "" if last is None else f" above {last}"
            reader.report(
                ProblemKind.UTTERANCE_IDS,
                f"{field}.utterance_idx",
                f"found {_short(number)}, expected a whole number{before}",
            )
        else:
            ids[number] = position
            last = number
        speaker = reader.speaker(turn, field)
        text, images = reader.content(turn, field)
        image_ids = tuple(range(len(paths), len(paths) + len(images)))
        captions = tuple([caption for _, caption in images])
        utterances.append(Utterance(position, speaker, text, image_ids, captions if any(captions) else ()))
        paths += [path for path, _ in images]
    return Dialogue(dialogue_id, tuple(utterances), query), tuple(paths), ids


def turns_of_dialogue(dialogue: Dialogue, paths: Sequence[str]) -> list[dict[str, Any]]:
    """The raw turns of a dialogue; `dialogue_of_turns` builds it again.

    Example:
        >>> dialogue = Dialogue("w1", (Utterance(0, "Ann", "hi"),), "a greeting")
        >>> turns_of_dialogue(dialogue, [])
        [{'utterance_idx': 0, 'speaker': 'Ann', 'utterance': 'hi'}]
    """
    turns: list[dict[str, Any]] = []
    for utterance in dialogue.utterances:
        content: Any = utterance.text
        if utterance.image_ids:
            captions = utterance.captions or ("",) * len(utterance.image_ids)
            content = [utterance.text] if utterance.text else []
            for image, caption in zip(utterance.image_ids, captions, strict=True):
                content.append({"image_url": paths[image], **({"caption": caption} if caption else {})})
        turns.append({"utterance_idx": utterance.id, "speaker": utterance.speaker, "utterance": content})
    return turns


def _queries(row: Mapping[str, Any], reader: _Reader) -> list[tuple[Any, Any, str]]:
    """Query, gold turns and the name of the field of the gold turns, for each query of the row."""
    if "queries" in row:
        queries = row["queries"]
        if not isinstance(queries, list) or not all(isinstance(item, Mapping) for item in queries):
            reader.report(ProblemKind.WRONG_TYPE, "queries", "expected a list of {query_text, gt_turns}")
            return []
        return [
            (item.get("query_text"), item.get("gt_turns"), f"queries[{number}].gt_turns")
            for number, item in enumerate(queries)
        ]
    missing = [name for name in ("query_text", "gt_turns") if name not in row]
    for name in missing:
        reader.report(ProblemKind.MISSING_FIELD, name, "missing; expected a query and its gold turns, or queries")
    if missing:
        return []
    query, turns = row["query_text"], row["gt_turns"]
    if not isinstance(query, list):
        return [(query, turns, "gt_turns")]
    if not isinstance(turns, list) or len(turns) != len(query):
        reader.report(ProblemKind.WRONG_TYPE, "gt_turns", f"expected {len(query)} lists, one for each query_text")
        return []
    return [(one, gold, f"gt_turns[{number}]") for number, (one, gold) in enumerate(zip(query, turns, strict=True))]


def _gold(turns: Any, ids: Mapping[int, int], dialogue: Dialogue, field: str, reader: _Reader) -> Fragment:
    if not isinstance(turns, list) or not all(isinstance(turn, int) and not isinstance(turn, bool) for turn in turns):
        reader.report(ProblemKind.WRONG_TYPE, field, f"found {_short(turns)}, expected a list of utterance_idx")
        return Fragment((), ())
    outside = [turn for turn in turns if turn not in ids]
    if outside:
        reader.report(ProblemKind.GOLD_OUTSIDE, field, f"{outside} are no utterance_idx of the dialogue")
    if len(set(turns)) != len(turns):
        reader.report(ProblemKind.GOLD_REPEATED, field, f"turns repeat: {turns}")
    gold = sorted({ids[turn] for turn in turns if turn in ids})
    held = set(gold)
    images = [image for utterance in dialogue.utterances if utterance.id in held for image in utterance.image_ids]
    return Fragment(tuple(gold), tuple(images))


def rows_of_raw_dialogue(
    row: Mapping[str, Any], *, template: PromptTemplate | None = None, captions: bool = False
) -> Iterable[dict[str, Any]]:
    """The rows of the MLDR format that a raw dialogue gives, one for each query.

    Args:
        row: see the module.
        template: instructions; by default those of the language in which the dialogue is.
        captions: write captions behind their images; the model could then answer without looking.

    Raises:
        RawDialogueError: for everything that is wrong with the row.

    Example:
        >>> row = {"dialogue_id": 7, "dialogue": [{"utterance": "hi"}], "query_text": "a greeting", "gt_turns": [0]}
        >>> [(made["dialogue_id"], made["solution"]) for made in rows_of_raw_dialogue(row)]
        [(7, '<|utt_ids_start|>[0]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>')]
    """
    reader = _Reader()
    turns = row.get("dialogue")
    if not isinstance(turns, list) or not turns:
        other = " (rows with messages need --format mldr)" if "messages" in row else ""
        reader.report(ProblemKind.MISSING_FIELD, "dialogue", f"missing or empty; expected a list of turns{other}")
        _queries(row, reader)
        raise RawDialogueError(reader.problems)
    dialogue, paths, ids = _read_turns(reader, str(row.get("dialogue_id", "")), turns, "")
    if template is None:
        template = TEMPLATES[detect_language(" ".join([utterance.text for utterance in dialogue.utterances]))]
    made = []
    for query, gold_turns, field in _queries(row, reader):
        query_field = field.replace("gt_turns", "query_text")
        text = reader.text(query, query_field)
        if isinstance(query, str) and not text:
            reader.report(ProblemKind.MISSING_FIELD, query_field, "empty; expected a query")
        solution = format_fragment(_gold(gold_turns, ids, dialogue, field, reader))
        asked = Dialogue(dialogue.dialogue_id, dialogue.utterances, text)
        made.append(
            {
                "images": list(paths),
                "dialogue_id": row.get("dialogue_id"),
                "solution": solution,
                "messages": [
                    *template.messages(asked, captions=captions),
                    {"role": "assistant", "content": solution},
                ],
            }
        )
    if not made and not reader.problems:
        reader.report(ProblemKind.MISSING_FIELD, "queries", "empty; expected at least one query")
    if reader.problems:
        raise RawDialogueError(reader.problems, paths)
    return made
