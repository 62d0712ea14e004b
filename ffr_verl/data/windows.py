"""Windows over a long dialogue: rows `ID_split_k` of some consecutive turns each, and the way back to the whole.

Ids in a window are either those of the whole dialogue (`global`), or utterances keep theirs while images count from 0
in every window (`published`, as the published tools have it).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ffr_verl.dialogues import extra_info, parse_dialogue, shift_image_ids, utterance_spans, with_dialogue
from ffr_verl.errors import FFRError
from ffr_verl.fragments import Fragment, format_fragment, parse_fragment, parse_gold

WindowIds = Literal["global", "published"]

_WINDOW_ID = re.compile(r"(.+)_split_([0-9]{1,9})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class WindowSettings:
    """How long dialogues are cut."""

    turns: int  # of a window, at least 1; a dialogue that is no longer stays whole
    stride: int  # turns from one window's start to the next, from 1 to `turns`
    ids: WindowIds  # see the module

    @classmethod
    def of(cls, turns: int, stride: int | None, ids: WindowIds) -> WindowSettings:
        """By default a window begins in the middle of the one before it."""
        return cls(turns, max(1, turns // 2) if stride is None else stride, ids)

    def __post_init__(self) -> None:
        if self.turns < 1:
            raise FFRError(f"--window: found {self.turns}; give a number of turns from 1")
        if not 1 <= self.stride <= self.turns:
            raise FFRError(
                f"--stride: found {self.stride}; give 1 to {self.turns} (the window), or turns between would be lost"
            )


@dataclass(frozen=True, slots=True)
class Window:
    """Some consecutive turns of a dialogue."""

    of: str  # id of the whole dialogue
    number: int  # from 0
    utterances: tuple[int, int]  # ids of the first utterance and behind the last one
    images: tuple[int, int]  # ids in the whole dialogue of the first image and behind the last one
    ids: WindowIds  # how the row names images

    @property
    def dialogue_id(self) -> str:
        """`ID_split_k`."""
        return f"{self.of}_split_{self.number}"

    @property
    def image_shift(self) -> int:
        """What is added to an image's id in the row for its id in the whole dialogue."""
        return 0 if self.ids == "global" else self.images[0]

    def to_dict(self) -> dict[str, Any]:
        """As it stands in `extra_info.window`."""
        first = {"first_utterance": self.utterances[0], "first_image": self.images[0]}
        return {"of": self.of, "number": self.number, **first, "ids": self.ids}

    def part_of(self, gold: Fragment) -> Fragment:
        """What of a whole dialogue's fragment lies in the window, in the window's ids."""
        utterances, images = range(*self.utterances), range(*self.images)
        return Fragment(
            tuple([identifier for identifier in gold.utterance_ids if identifier in utterances]),
            tuple([identifier - self.image_shift for identifier in gold.image_ids if identifier in images]),
        )

    def part_of_text(self, solution: str, gold: Fragment) -> str:
        """The part of a gold answer, in the style in which it stands; `gold` is what `parse_gold` makes of it."""
        return format_fragment(self.part_of(gold), style="plain" if parse_fragment(solution) else "reasoning")


def window_id(dialogue_id: str) -> tuple[str, int] | None:
    """Whole dialogue and number of a window's id, such as `w1` and 2 of `w1_split_2`; `None` when it is none."""
    match = _WINDOW_ID.fullmatch(dialogue_id)
    return (match.group(1), int(match.group(2))) if match else None


def windows_of(
    dialogue_id: str, image_utterances: Sequence[int], turns: int, settings: WindowSettings
) -> list[Window]:
    """The windows of a dialogue of some turns; none when it fits into one. The last one ends with the dialogue."""
    if turns <= settings.turns:
        return []
    starts = [*range(0, turns - settings.turns, settings.stride), turns - settings.turns]
    windows = []
    for number, start in enumerate(starts):
        end = start + settings.turns
        before = sum(utterance < start for utterance in image_utterances)
        inside = sum(start <= utterance < end for utterance in image_utterances)
        windows.append(Window(dialogue_id, number, (start, end), (before, before + inside), settings.ids))
    return windows


def cut_prompt(content: str, window: Window) -> str:
    """A user's message with the window's utterances only, behind what stands before the dialogue."""
    spans = utterance_spans(content)
    first, end = window.utterances
    kept = content[spans[first][0] : spans[end - 1][1]]
    if end < len(spans):
        kept = kept.removesuffix("\n")
    if shift := window.image_shift:
        kept = shift_image_ids(kept, -shift)
    return content[: spans[0][0]] + kept


def cut_messages(messages: Sequence[Mapping[str, Any]], window: Window) -> list[dict[str, Any]]:
    """The messages of a prompt with the window's utterances only; examples before the dialogue stay whole."""
    return with_dialogue(messages, lambda text: cut_prompt(text, window))


def cut_row(row: Mapping[str, Any], settings: WindowSettings) -> list[dict[str, Any]]:
    """The windows of a row of an RL file, as `ffr-verl prepare --window` writes them; the row itself when it fits. An
    `FFRError` when the row is a window already, or its gold cannot be read."""
    info, solution = row["extra_info"], row["reward_model"]["ground_truth"]
    name = info["dialogue_id"]
    if info.get("window") is not None:
        raise FFRError(f"{name}: is a window already; give the file of whole dialogues with --window")
    windows = windows_of(name, info["image_utterances"], len(info["utterance_ids"]), settings)
    if not windows:
        return [dict(row)]
    gold = None if solution is None else parse_gold(solution)
    if gold is None and solution is not None:
        raise FFRError(
            f"{name}: the gold answer cannot be read: {solution!r}; make the file again with `ffr-verl prepare`"
        )
    made = []
    for window in windows:
        images, prompt = slice(*window.images), cut_messages(row["prompt"], window)
        dialogue = parse_dialogue(prompt, window.dialogue_id)
        known = extra_info(dialogue, info["images"][images], split=info.get("split") or "")
        part_of_gold = None if gold is None else window.part_of_text(solution, gold)
        truth = {**row["reward_model"], "ground_truth": part_of_gold}
        part = {"prompt": prompt, "reward_model": truth, "extra_info": {**info, **known, "window": window.to_dict()}}
        part |= {"images": row["images"][images]} if "images" in row else {}
        made.append({**row, **part})
    return made


def whole_fragment(parts: Iterable[tuple[Window, Fragment]]) -> Fragment:
    """The fragments of a dialogue's windows united, ids sorted; each id once.

    Example:
        >>> first, second = windows_of("d", [0, 5], 6, WindowSettings(turns=4, stride=2, ids="published"))
        >>> whole_fragment([(first, Fragment((3,), ())), (second, Fragment((3, 5), (0,)))])
        Fragment(utterance_ids=(3, 5), image_ids=(1,))
    """
    utterances: set[int] = set()
    images: set[int] = set()
    for window, fragment in parts:
        utterances.update(fragment.utterance_ids)
        images.update([identifier + window.image_shift for identifier in fragment.image_ids])
    return Fragment(tuple(sorted(utterances)), tuple(sorted(images)))
