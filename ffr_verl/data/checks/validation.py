"""The checks of a row in the MLDR format. All problems of a row are collected, not the first only."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ffr_verl.data.checks.checked_row import CheckedRow
from ffr_verl.data.checks.image_checks import ImageVerdict, check_image
from ffr_verl.data.checks.other_splits import OtherSplits, dialogue_fingerprint, image_file
from ffr_verl.data.checks.problems import Problem, ProblemKind
from ffr_verl.data.checks.unread_fields import unread_fields
from ffr_verl.data.tokens import PromptTokens
from ffr_verl.data.windows import WindowSettings
from ffr_verl.dialogues import (
    IMAGE,
    QUERY_START,
    UTTERANCE_START,
    Dialogue,
    control_token,
    parse_dialogue,
    reserved_token,
    unwritable,
    utterance_spans,
)
from ffr_verl.fragments import TAGS, Fragment, malformed_reason, parse_gold
from ffr_verl.model_families import ModelFamily

_ROW = frozenset({"dialogue_id", "images", "messages", "solution"})
_MESSAGE = frozenset({"role", "content"})
_ROLES = (["system", "user", "assistant"], ["user", "assistant"])
_ROLES_UNLABELLED = (["system", "user"], ["user"])
_CACHED_IMAGES = 8192
_LONGEST_PATH = 4096
_ID = operator.attrgetter("id")
_IMAGE_WITH_ID = f"<|img_id_end|>{IMAGE}"
_ANGLES_OF_UTTERANCE, _ANGLES_OF_IMAGE = 2, 3
# The start of an utterance that is surely "speaker: text", behind its first tag.
_GOOD_LINE = re.compile(r"<\|utt_id_end\|> [^\n:：<]{0,64}:(?: |(?=\n|\Z|<\|img_id_start))")
# What a picture's file starts with.
_BASE64 = re.compile("(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR)[A-Za-z0-9+/]{40}")
_SHORTEST_BASE64 = 40


@dataclass
class RowChecker:
    """Checks rows one after another; remembers what a later row may repeat or contradict."""

    images_root: Path  # resolved; image paths are relative to it
    decode: bool  # every image, instead of reading its header and end
    max_pixels: int  # of an image, see `resized`
    family: ModelFamily  # of the model, for the sizes of images
    max_images: int  # of a row
    tokens: PromptTokens | None  # counts prompt tokens; `None`: lengths are not checked
    max_prompt_tokens: int
    other_splits: OtherSplits  # whose dialogues must not occur
    has_prompts: bool  # rows come with their prompts, whose lines are looked at
    window: WindowSettings | None  # cut dialogues that are longer
    unlabelled: bool = False  # rows have no gold answer

    def __post_init__(self) -> None:
        self.image = functools.lru_cache(maxsize=_CACHED_IMAGES)(self._image)
        self._asked: dict[int, tuple[int, int]] = {}  # dialogue and query: number of the row, and its gold
        self._named: dict[str, int] = {}  # dialogue id: fingerprint of the dialogue

    def _image(self, name: str) -> tuple[ImageVerdict, str]:
        """What is known of an image, and its file."""
        root, decode, most = self.images_root, self.decode, self.max_pixels
        verdict = check_image(root, name, decode=decode, max_pixels=most, family=self.family)
        return verdict, image_file(root, name)

    def check(self, number: int, rows: Iterable[Mapping[str, Any]]) -> tuple[list[CheckedRow], list[Problem]]:
        """Of the rows in the MLDR format that a row of the source gives: those and their windows, of no use when one
        of the problems is an error; and all problems, warnings among them, under its number."""
        made: list[CheckedRow] = []
        problems: list[Problem] = []
        for row in rows:
            check = _Check(number, row, self)
            whole = check.run()
            if whole is not None:
                self._compare(check, whole)
                if not any(problem.kind.is_error for problem in check.problems):
                    parts = [whole] if self.window is None else whole.cut(self.window)
                    made += [self._within_limits(check, part) for part in parts]
            problems += check.problems
        return made, list(dict.fromkeys(problems))  # several queries of a dialogue have the same problems

    def check_id_and_images(self, number: int, row: Mapping[str, Any]) -> list[Problem]:
        """The problems with these two fields alone, of a row that cannot be checked as a whole."""
        check = _Check(number, row, self)
        check.id_and_images()
        return check.problems

    def _compare(self, check: _Check, row: CheckedRow) -> None:
        """Against earlier rows and other splits."""
        dialogue, content = row.dialogue, row.fingerprint
        self._in_other_split(check, row, "dialogue")
        if self._named.setdefault(dialogue.dialogue_id, content) != content:
            message = f"{dialogue.dialogue_id} was the id of another dialogue before"
            check.report(ProblemKind.SAME_ID, "dialogue_id", message)
        gold = row.gold and (frozenset(row.gold.utterance_ids), frozenset(row.gold.image_ids))
        asked = check.number, hash(gold)
        known = self._asked.setdefault(hash((content, dialogue.query)), asked)
        earlier = f"row {known[0]} asks the same of this dialogue"
        if known is not asked and known[1] == asked[1]:
            check.report(ProblemKind.REPEATED_ROW, "messages", earlier)
        elif known is not asked:
            check.report(ProblemKind.CONTRADICTION, "solution", f"{earlier} and has another answer")

    def _in_other_split(self, check: _Check, row: CheckedRow, what: str) -> None:
        in_file = self.other_splits.file_of(row.dialogue, row.image_files, self.images_root)
        if in_file is not None:
            message = f"{what} {row.dialogue.dialogue_id} is in {in_file} too"
            check.report(ProblemKind.OTHER_SPLIT, "messages", message)

    def _within_limits(self, check: _Check, row: CheckedRow) -> CheckedRow:
        """A row, or a window, with its prompt tokens where they are counted; whether a run takes it."""
        if len(row.images) > self.max_images:
            message = f"{len(row.images)} images, at most {self.max_images}"
            check.report(ProblemKind.TOO_MANY_IMAGES, "images", message)
        if self.tokens is not None:
            count = self.tokens.count(row.prompt, row.image_tokens)
            row = replace(row, prompt_tokens=count)
            if count > self.max_prompt_tokens:
                message = f"{count:,} tokens, at most {self.max_prompt_tokens:,}"
                check.report(ProblemKind.TOO_LONG, "messages", message)
        if row.window is not None:
            self._in_other_split(check, row, "window")
        return row


class _Check:
    """The checks of one row, and what they have found."""

    def __init__(self, number: int, row: Mapping[str, Any], checker: RowChecker) -> None:
        self.number, self._row, self._checker = number, row, checker
        self.problems: list[Problem] = []

    def report(self, kind: ProblemKind, where: str, message: str) -> None:
        self.problems.append(Problem(self.number, kind, where, message))

    def run(self) -> CheckedRow | None:
        dialogue_id, images, image_tokens, files = self.id_and_images()
        messages = self._messages()
        solution, gold = None, None
        if not self._checker.unlabelled:
            solution = self._field("solution", str, "a text: the gold answer", "expected the gold answer")
        if solution is not None:
            solution = solution.strip()
            gold = parse_gold(solution)
            if gold is None:
                reason = malformed_reason(solution)
                message = f"malformed ({reason.value if reason else ''}): {solution[:80]!r}"
                self.report(ProblemKind.GOLD_MALFORMED, "solution", message)
        if messages is None:
            return None
        if not self._row.keys() <= _ROW:
            self._unread(self._row, _ROW, "", [*[message["content"] for message in messages], *(images or ())])
        try:
            dialogue = parse_dialogue(messages, dialogue_id)
        except ValueError as error:
            self.report(ProblemKind.NO_DIALOGUE, "messages", str(error))
            return None
        user_text = next(message["content"] for message in messages if message["role"] == "user")
        before, _, rest = user_text.partition(UTTERANCE_START)
        image_ids, pictures = dialogue.image_ids, user_text.count(_IMAGE_WITH_ID)
        self._ids(dialogue, image_ids)
        self._images_of_ids(dialogue, len(image_ids), images, user_text, pictures)
        # No other tag than those of the ids, which is quick to see and true of nearly all rows.
        tags = _ANGLES_OF_UTTERANCE * len(dialogue.utterances) + _ANGLES_OF_IMAGE * len(image_ids)
        is_plain = rest.count("<") + 1 == tags and pictures == len(image_ids)
        self._texts(messages, dialogue, before, is_plain=is_plain)
        if self._checker.has_prompts:
            self._lines(dialogue, user_text, rest)
        if solution is not None and messages[-1]["content"].strip() != solution:
            self.report(ProblemKind.GOLD_DIFFERS, "messages", "the assistant's message is not the solution")
        if gold is not None:
            self._gold_in(dialogue, len(image_ids), gold)
        if images is None or (gold is None and not self._checker.unlabelled):
            return None
        if solution is not None:
            messages[-1]["content"] = solution
        fingerprint = dialogue_fingerprint(dialogue, files)
        return CheckedRow(messages, images, files, dialogue, gold, solution, image_tokens, fingerprint)

    def _unread(self, value: Mapping[str, Any], read: frozenset[str], where: str, said: list[str]) -> None:
        for name, message in unread_fields(value, read, said):
            self.report(ProblemKind.UNREAD_FIELD, where + name, message)

    def id_and_images(self) -> tuple[str, list[str] | None, tuple[int, ...], list[str]]:
        """Dialogue id and image paths, tokens and file of each image."""
        dialogue_id, images = self._dialogue_id(), self._image_names()
        seen = [self._checker.image(name) for name in images or ()]
        for place, (verdict, _) in enumerate(seen):
            for kind, message in verdict.problems:
                self.report(kind, f"images[{place}]", message)
        return dialogue_id, images, tuple([verdict.tokens or 0 for verdict, _ in seen]), [file for _, file in seen]

    def _dialogue_id(self) -> str:
        value = self._row.get("dialogue_id")
        if value is None or value == "":
            self.report(ProblemKind.MISSING_FIELD, "dialogue_id", "missing; expected a text or a number")
        elif isinstance(value, bool) or not isinstance(value, (str, int)):
            self.report(ProblemKind.WRONG_TYPE, "dialogue_id", f"found {value!r}, expected a text or a whole number")
        else:
            return self._plain_text(str(value), "dialogue_id")
        return ""

    def _plain_text(self, text: str, where: str) -> str:
        """The text, if parquet and the tokenizer can take it."""
        fault = unwritable(text)
        if fault is not None:
            self.report(ProblemKind.BAD_TEXT, where, fault)
        return "" if fault is not None and "surrogate" in fault else text

    def _field(self, name: str, kind: type, expected: str, missing: str) -> Any:
        """A field of the row; `None` where it is missing or of another type."""
        value = self._row.get(name)
        if isinstance(value, kind):
            return value
        if value is None:
            self.report(ProblemKind.MISSING_FIELD, name, f"missing; {missing}")
        else:
            self.report(ProblemKind.WRONG_TYPE, name, f"found {value!r}, expected {expected}")
        return None

    def _messages(self) -> list[dict[str, str]] | None:
        other = " (rows with dialogue need --format dialogue)" if "dialogue" in self._row else ""
        expected = f"expected system, user, assistant{other}"
        messages = self._field("messages", list, "a list: system, user, assistant", expected)
        if messages is None:
            return None
        good = []
        for number, message in enumerate(messages):
            role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (0, 0)
            where = f"messages[{number}]"
            if not isinstance(role, str) or not isinstance(content, str):
                self.report(ProblemKind.WRONG_TYPE, where, "expected an object with the texts role and content")
                continue
            good.append({"role": role, "content": self._plain_text(content, where)})
            if not message.keys() <= _MESSAGE:
                self._unread(message, _MESSAGE, f"{where}.", [content])
        roles = [message["role"] for message in good]
        known, expected = _ROLES, "system (optional), user, assistant"
        if self._checker.unlabelled:
            known, expected = _ROLES_UNLABELLED, "system (optional), user"
        if len(good) == len(messages) and roles not in known:
            found = f"found the roles {', '.join(roles)}" if roles else "empty"
            self.report(ProblemKind.BAD_ROLES, "messages", f"{found}; expected {expected}")
        return good if len(good) == len(messages) and roles in known else None

    def _image_names(self) -> list[str] | None:
        expected = 'a list of paths, such as ["cat.png"]'
        images = self._field("images", list, expected, "give [] where a dialogue has none")
        names = []
        for number, image in enumerate(images or ()):
            name, where = image.get("path") if isinstance(image, dict) else image, f"images[{number}]"
            if not isinstance(name, str) or not name:
                self.report(ProblemKind.WRONG_TYPE, where, f'found {image!r}; expected a path or {{"path": …}}')
            elif len(name) > _LONGEST_PATH or (len(name) > _SHORTEST_BASE64 and _BASE64.match(name)):
                message = f"{name[:60]}...: base64 or another text of {len(name):,} characters; write it to a file"
                self.report(ProblemKind.IMAGE_PATH, where, f"{message} and give its path")
            else:
                name = name if name.startswith("data:") else self._plain_text(name, where)
                names.append(self._below(name) if name.startswith("/") else name)
        return names if images is not None and len(names) == len(images) else None

    def _below(self, name: str) -> str:
        """An absolute path relative to the root, so that the data can move; as it is when it leaves the root."""
        root = self._checker.images_root
        path = image_file(root, name, follow=False)
        return path.removeprefix(f"{root}/") if path.startswith(f"{root}/") else name

    def _ids(self, dialogue: Dialogue, image_ids: tuple[int, ...]) -> None:
        found = list(map(_ID, dialogue.utterances))
        if found != list(range(len(found))):
            wrong = [(place, one) for place, one in enumerate(found) if place != one]
            message = f"utterance {wrong[0][0]} has the id {wrong[0][1]}"
            message = f"{message}; expected 0 to {len(dialogue.utterances) - 1} in order"
            self.report(ProblemKind.UTTERANCE_IDS, "messages", message)
        if image_ids != tuple(range(len(image_ids))):
            message = f"image ids are {list(image_ids)}; expected 0, 1, 2, ... in order"
            self.report(ProblemKind.IMAGE_IDS, "messages", message)

    def _images_of_ids(
        self, dialogue: Dialogue, count: int, images: list[str] | None, user_text: str, pictures: int
    ) -> None:
        """Paths, placeholders and ids of images must be equal in number, and stand together, as `pictures` do."""
        placeholders = user_text.count(IMAGE)
        if images is not None and not placeholders == len(images) == count:
            message = f"{len(images)} paths, {placeholders} {IMAGE} and {count} image ids; the three must be equal"
            self.report(ProblemKind.IMAGE_COUNT, "images", message)
        elif pictures != placeholders:
            for utterance, (start, end) in zip(dialogue.utterances, utterance_spans(user_text), strict=True):
                ids, shown = len(utterance.image_ids), user_text.count(IMAGE, start, end)
                if ids != shown:
                    message = f"utterance {utterance.id} has {ids} image ids and {shown} {IMAGE}"
                    self.report(ProblemKind.IMAGE_COUNT, "messages", message)

    def _texts(self, messages: list[dict[str, str]], dialogue: Dialogue, before: str, *, is_plain: bool) -> None:
        """What a text must not hold: tags of the wire format out of place, placeholders, chat tokens.

        `before` is the user's message before the first utterance, behind which nothing can be found if it `is_plain`.
        """
        told = set()
        if not dialogue.query.strip():
            self.report(ProblemKind.NO_DIALOGUE, "messages", "the query is empty")
        if before.count(QUERY_START) > 1:
            several = f"{before.count(QUERY_START)} {QUERY_START}; the query is taken to be {dialogue.query[:80]!r}"
            self.report(ProblemKind.SEVERAL_QUERIES, "messages", several)
        for utterance in () if is_plain else dialogue.utterances:
            if "<" not in utterance.text and "<" not in utterance.speaker:
                continue
            # What follows the dialogue in the prompt reads as its last utterance; it may show how to answer.
            allowed = TAGS if utterance is dialogue.utterances[-1] else ()
            found = reserved_token(utterance.text, allowed=allowed) or reserved_token(utterance.speaker)
            if found is not None:
                told.add(found)
                self.report(ProblemKind.BAD_TEXT, "messages", f"utterance {utterance.id} holds {found}")
        found = reserved_token(dialogue.query)
        if found is not None:
            told.add(found)
            self.report(ProblemKind.BAD_TEXT, "messages", f"the query holds {found}")
        for number, message in enumerate(messages):
            is_user, content = message["role"] == "user", message["content"]
            found = control_token(before if is_user and is_plain else content)
            if found is None and not is_user and IMAGE in content:
                found = IMAGE
            if found is not None and found not in told:
                self.report(ProblemKind.BAD_TEXT, f"messages[{number}]", f"holds {found}")

    def _lines(self, dialogue: Dialogue, user_text: str, rest: str) -> None:
        """Ids in the middle of a line, and lines whose speaker is not surely one."""
        if dialogue.has_plain_lines:
            return
        spans = list(zip(dialogue.utterances, utterance_spans(user_text), strict=True))
        if rest.count(f"\n{UTTERANCE_START}") < len(dialogue.utterances) - 1:
            inner = [start for _, (start, _) in spans[1:] if user_text[start - 1] != "\n"]
            start = user_text[inner[0] :][:80]
            message = f"{len(inner)} utterances start in the middle of a line, the first at {start!r}"
            self.report(ProblemKind.ODD_LINE, "messages", message)
        odd = [utterance for utterance, (start, end) in spans if not _GOOD_LINE.search(user_text, start, end)]
        if odd:
            first = odd[0]
            message = f"{len(odd)} utterances are not 'speaker: text'; of utterance {first.id} {first.speaker!r} is"
            message = f"{message} taken for the speaker and {first.text[:80]!r} for the text"
            self.report(ProblemKind.ODD_LINE, "messages", message)

    def _gold_in(self, dialogue: Dialogue, images: int, gold: Fragment) -> None:
        told = len(self.problems)
        for name, ids, count in (
            ("utterance", gold.utterance_ids, len(dialogue.utterances)),
            ("image", gold.image_ids, images),
        ):
            outside = [identifier for identifier in ids if identifier >= count]
            if outside:
                message = f"{name} ids {outside} are outside the dialogue, which has {count}"
                self.report(ProblemKind.GOLD_OUTSIDE, "solution", message)
            if len(set(ids)) != len(ids):
                self.report(ProblemKind.GOLD_REPEATED, "solution", f"{name} ids repeat: {list(ids)}")
        if len(self.problems) > told:
            return
        if not images:
            return
        held, given = set(gold.utterance_ids), set(gold.image_ids)
        inside = {image for one in dialogue.utterances if one.id in held for image in one.image_ids}
        for lone, what in (
            (given - inside, "are gold, their utterances are not"),
            (inside - given, "are not gold, their utterances are"),
        ):
            if lone:
                self.report(ProblemKind.GOLD_IMAGES, "solution", f"images {sorted(lone)} {what}")
