"""The checks of a row in the MLDR format. All problems of a row are collected, not the first only."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ffr_verl.data.checks.checked_row import CheckedRow, CheckSettings
from ffr_verl.data.checks.image_checks import ImageVerdict, check_image
from ffr_verl.data.checks.other_splits import dialogue_fingerprint
from ffr_verl.data.checks.problems import Problem, ProblemKind
from ffr_verl.data.compact_map import CompactMap
from ffr_verl.dialogues import (
    IMAGE,
    Dialogue,
    control_token,
    parse_dialogue,
    reserved_token,
    unwritable,
    utterance_spans,
)
from ffr_verl.fragments import TAGS, Fragment, malformed_reason, parse_fragment
from ffr_verl.images import resolve_image
from ffr_verl.rewards.f1 import f1_of_fragments
from ffr_verl.rewards.format import has_no_repeats

__all__ = ["RowChecker"]

_ROLES = (["system", "user", "assistant"], ["user", "assistant"])
_CACHED_IMAGES = 8192
_GOLD_BITS = 28
_GOLD_MASK = 2**_GOLD_BITS - 1
_QUERY_START = "<|query_start|>"
_UTTERANCE_START = "<|utt_id_start|>"
_IMAGE_WITH_ID = f"<|img_id_end|>{IMAGE}"
_ANGLES_OF_UTTERANCE, _ANGLES_OF_IMAGE = 2, 3


class RowChecker:
    """Checks rows one after another; remembers what a later row may repeat or contradict.

    Args:
        settings: what to check against.

    Example:
        >>> checker = RowChecker(CheckSettings(Path("/data")))
        >>> checker.check(0, {"dialogue_id": "d", "images": []})[1][0].message
        'missing or no list; expected system, user, assistant'
    """

    def __init__(self, settings: CheckSettings) -> None:
        self._settings = settings
        image = functools.partial(
            check_image,
            settings.images_root,
            decode=settings.decode,
            max_pixels=settings.max_pixels,
            family=settings.family,
        )
        self._image: Callable[[str], ImageVerdict] = functools.lru_cache(maxsize=_CACHED_IMAGES)(image)
        self._asked = CompactMap()  # dialogue and query: the row and, in the last bits, its gold
        self._named = CompactMap()  # dialogue id: fingerprint of the dialogue

    def check(self, number: int, row: Mapping[str, Any]) -> tuple[CheckedRow | None, list[Problem]]:
        """Check a row.

        Args:
            number: of the row, for the problems.
            row: in the MLDR format.

        Returns:
            The row, `None` when something is wrong with it; and all problems, warnings among them.
        """
        check = _Check(number, row, self._settings)
        checked = check.run(self._image)
        if checked is not None:
            self._compare(check, checked)
        return (None if any(problem.is_error for problem in check.problems) else checked), check.problems

    def check_id_and_images(self, number: int, row: Mapping[str, Any]) -> list[Problem]:
        """The problems with these two fields alone, of a row that cannot be checked as a whole."""
        check = _Check(number, row, self._settings)
        check.id_and_images(self._image)
        return check.problems

    def _compare(self, check: _Check, row: CheckedRow) -> None:
        """Against earlier rows and other splits."""
        dialogue = row.dialogue
        content = row.fingerprint
        in_file = self._settings.other_splits.file_of(content)
        if in_file is not None:
            check.report(ProblemKind.OTHER_SPLIT, "messages", f"dialogue {dialogue.dialogue_id} is in {in_file} too")
        if self._named.setdefault(hash(dialogue.dialogue_id), content) != content:
            check.report(
                ProblemKind.SAME_ID, "dialogue_id", f"{dialogue.dialogue_id} was the id of another dialogue before"
            )
        gold = hash(row.gold) & _GOLD_MASK
        count = len(self._asked)
        known = self._asked.setdefault(hash((content, dialogue.query)), check.number << _GOLD_BITS | gold)
        if len(self._asked) > count:
            return
        earlier = f"row {known >> _GOLD_BITS} asks the same of this dialogue"
        if known & _GOLD_MASK == gold:
            check.report(ProblemKind.REPEATED_ROW, "messages", earlier)
        else:
            check.report(ProblemKind.CONTRADICTION, "solution", f"{earlier} and has another answer")


def _below(root: Path, name: str) -> str:
    """An absolute path relative to the root, so that the data can move; as it is when it leaves the root."""
    try:
        return resolve_image(root, name).relative_to(root).as_posix()
    except ValueError:
        return name


class _Check:
    """The checks of one row, and what they have found."""

    def __init__(self, number: int, row: Mapping[str, Any], settings: CheckSettings) -> None:
        self.number, self._row, self._settings = number, row, settings
        self.problems: list[Problem] = []

    def report(self, kind: ProblemKind, where: str, message: str) -> None:
        self.problems.append(Problem(self.number, kind, where, message))

    def run(self, check_image: Callable[[str], ImageVerdict]) -> CheckedRow | None:
        dialogue_id, images, image_tokens = self.id_and_images(check_image)
        messages, solution = self._messages(), self._solution()
        gold = None if solution is None else self._gold(solution)
        if messages is None:
            return None
        user_text = next(message["content"] for message in messages if message["role"] == "user")
        try:
            dialogue = parse_dialogue(messages, dialogue_id)
        except ValueError as error:
            self.report(ProblemKind.NO_DIALOGUE, "messages", str(error))
            return None
        before, _, rest = user_text.partition(_UTTERANCE_START)
        self._ids(dialogue)
        self._images_of_ids(dialogue, images, user_text)
        self._query(dialogue, before)
        self._texts(messages, dialogue, before, rest)
        if solution is not None and messages[-1]["content"] != solution:
            self.report(ProblemKind.GOLD_DIFFERS, "messages", "the assistant's message is not the solution")
        if gold is not None:
            self._gold_in(dialogue, gold)
        if images is None or solution is None or gold is None:
            return None
        fingerprint = dialogue_fingerprint(dialogue, images)
        return CheckedRow(messages, images, dialogue, gold, solution, image_tokens, fingerprint)

    def id_and_images(
        self, check_image: Callable[[str], ImageVerdict]
    ) -> tuple[str, list[str] | None, tuple[int, ...]]:
        """Dialogue id, image paths, and the tokens of each image."""
        dialogue_id, images = self._dialogue_id(), self._image_names()
        verdicts = [check_image(name) for name in images or ()]
        for place, verdict in enumerate(verdicts):
            for kind, message in verdict.problems:
                self.report(kind, f"images[{place}]", message)
        return dialogue_id, images, tuple([verdict.tokens or 0 for verdict in verdicts])

    def _dialogue_id(self) -> str:
        value = self._row.get("dialogue_id")
        if value is None or value == "":
            self.report(ProblemKind.MISSING_FIELD, "dialogue_id", "missing; expected a text or a number")
        elif isinstance(value, bool) or not isinstance(value, (str, int)):
            self.report(ProblemKind.WRONG_TYPE, "dialogue_id", f"found {value!r}, expected a text or a number")
        else:
            return self._plain_text(str(value), "dialogue_id")
        return ""

    def _plain_text(self, text: str, where: str) -> str:
        """The text, if parquet and the tokenizer can take it."""
        fault = unwritable(text)
        if fault is not None:
            self.report(ProblemKind.BAD_TEXT, where, fault)
        return "" if fault is not None and "surrogate" in fault else text

    def _messages(self) -> list[dict[str, str]] | None:
        messages = self._row.get("messages")
        if not isinstance(messages, list) or not messages:
            other = " (rows with dialogue need --format dialogue)" if "dialogue" in self._row else ""
            message = f"missing or no list; expected system, user, assistant{other}"
            self.report(ProblemKind.MISSING_FIELD, "messages", message)
            return None
        good = []
        for number, message in enumerate(messages):
            role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (0, 0)
            where = f"messages[{number}]"
            if not isinstance(role, str) or not isinstance(content, str):
                self.report(ProblemKind.WRONG_TYPE, where, "expected an object with the texts role and content")
                continue
            good.append({"role": role, "content": self._plain_text(content, where)})
        if len(good) < len(messages):
            return None
        roles = [message["role"] for message in good]
        if roles not in _ROLES:
            found = ", ".join(roles)
            self.report(
                ProblemKind.BAD_ROLES,
                "messages",
                f"found the roles {found}; expected system (optional), user, assistant",
            )
            return None
        return good

    def _image_names(self) -> list[str] | None:
        images = self._row.get("images")
        if not isinstance(images, list):
            message = "missing or no list; give [] where a dialogue has none"
            self.report(ProblemKind.MISSING_FIELD, "images", message)
            return None
        names = []
        for number, image in enumerate(images):
            name = image.get("path") if isinstance(image, dict) else image
            if not isinstance(name, str) or not name:
                self.report(
                    ProblemKind.WRONG_TYPE, f"images[{number}]", f'found {image!r}; expected a path or {{"path": …}}'
                )
                continue
            name = self._plain_text(name, f"images[{number}]")
            names.append(_below(self._settings.images_root, name) if name.startswith("/") else name)
        return names if len(names) == len(images) else None

    def _ids(self, dialogue: Dialogue) -> None:
        found = [utterance.id for utterance in dialogue.utterances]
        if found != list(range(len(found))):
            wrong = next(position for position, identifier in enumerate(found) if identifier != position)
            self.report(
                ProblemKind.UTTERANCE_IDS,
                "messages",
                f"utterance {wrong} has the id {found[wrong]}; expected 0 to {len(found) - 1} in order",
            )
        image_ids = dialogue.image_ids
        if image_ids != tuple(range(len(image_ids))):
            self.report(
                ProblemKind.IMAGE_IDS,
                "messages",
                f"image ids are {list(image_ids)}; expected 0, 1, 2, ... in order",
            )

    def _images_of_ids(self, dialogue: Dialogue, images: list[str] | None, user_text: str) -> None:
        """Paths, placeholders and ids of images must be equal in number, and stand together."""
        count, placeholders = len(dialogue.image_ids), user_text.count(IMAGE)
        if images is not None and not placeholders == len(images) == count:
            self.report(
                ProblemKind.IMAGE_COUNT,
                "images",
                f"{len(images)} paths, {placeholders} {IMAGE} and {count} image ids; the three must be equal",
            )
        elif user_text.count(_IMAGE_WITH_ID) != placeholders:
            for utterance, (start, end) in zip(dialogue.utterances, utterance_spans(user_text), strict=True):
                ids, shown = len(utterance.image_ids), user_text.count(IMAGE, start, end)
                if ids != shown:
                    message = f"utterance {utterance.id} has {ids} image ids and {shown} {IMAGE}"
                    self.report(ProblemKind.IMAGE_COUNT, "messages", message)

    def _texts(self, messages: list[dict[str, str]], dialogue: Dialogue, before: str, rest: str) -> None:
        """What a text must not hold: tags of the wire format out of place, placeholders, chat tokens.

        `before` and `rest` are the user's message around the first tag of an utterance.
        """
        told = set()
        images = len(dialogue.image_ids)
        tags = _ANGLES_OF_UTTERANCE * len(dialogue.utterances) + _ANGLES_OF_IMAGE * images
        # No other tag than those of the ids, which is quick to see and true of nearly all rows.
        is_plain = rest.count("<") + 1 == tags and rest.count(_IMAGE_WITH_ID) == images
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
            is_user = message["role"] == "user"
            content = message["content"]
            found = control_token(before if is_user and is_plain else content)
            if found is None and not is_user and IMAGE in content:
                found = IMAGE
            if found is not None and found not in told:
                self.report(ProblemKind.BAD_TEXT, f"messages[{number}]", f"holds {found}")

    def _query(self, dialogue: Dialogue, before: str) -> None:
        if not dialogue.query.strip():
            self.report(ProblemKind.NO_DIALOGUE, "messages", "the query is empty")
        count = before.count(_QUERY_START)
        if count > 1:
            message = f"{count} {_QUERY_START}; the query is taken to be {dialogue.query[:80]!r}"
            self.report(ProblemKind.SEVERAL_QUERIES, "messages", message)

    def _solution(self) -> str | None:
        solution = self._row.get("solution")
        if not isinstance(solution, str):
            self.report(ProblemKind.MISSING_FIELD, "solution", "missing or no text; expected the gold answer")
            return None
        return solution

    def _gold(self, solution: str) -> Fragment | None:
        gold = parse_fragment(solution)
        if gold is None:
            reason = malformed_reason(solution)
            self.report(
                ProblemKind.GOLD_MALFORMED,
                "solution",
                f"malformed ({reason.value if reason else ''}): {solution[:80]!r}",
            )
        return gold

    def _gold_in(self, dialogue: Dialogue, gold: Fragment) -> None:
        for name, ids, count in (
            ("utterance", gold.utterance_ids, len(dialogue.utterances)),
            ("image", gold.image_ids, len(dialogue.image_ids)),
        ):
            outside = [identifier for identifier in ids if identifier >= count]
            if outside:
                self.report(
                    ProblemKind.GOLD_OUTSIDE,
                    "solution",
                    f"{name} ids {outside} are outside the dialogue, which has {count}",
                )
            if len(set(ids)) != len(ids):
                self.report(ProblemKind.GOLD_REPEATED, "solution", f"{name} ids repeat: {list(ids)}")
        if any(problem.field == "solution" for problem in self.problems):
            return
        self._gold_images(gold, dialogue)
        rewards = (*f1_of_fragments(gold, gold, length_penalty=0.0), has_no_repeats(gold))
        if rewards != (1.0, 1.0, True):
            self.report(ProblemKind.GOLD_SELF_CHECK, "solution", f"earns {rewards} in f1 and format, not 1 each")

    def _gold_images(self, gold: Fragment, dialogue: Dialogue) -> None:
        held = set(gold.utterance_ids)
        inside = {image for utterance in dialogue.utterances if utterance.id in held for image in utterance.image_ids}
        given = set(gold.image_ids)
        for ids, what in (
            (sorted(given - inside), "are gold, their utterances are not"),
            (sorted(inside - given), "are not gold, their utterances are"),
        ):
            if ids:
                self.report(ProblemKind.GOLD_IMAGES, "solution", f"images {ids} {what}")
