"""A row that has been read, the bounds that it is checked against, and its windows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from ffr_verl.data.checks.other_splits import OtherSplits
from ffr_verl.data.checks.problems import Problem, ProblemKind
from ffr_verl.data.tokens import PromptTokens
from ffr_verl.data.windows import Window, WindowSettings, cut_messages, windows_of
from ffr_verl.dialogues import Dialogue, parse_dialogue
from ffr_verl.fragments import Fragment, format_fragment, parse_fragment
from ffr_verl.model_families import QWEN2_VL, ModelFamily
from ffr_verl.settings import DEFAULT_MAX_PIXELS

__all__ = ["CheckSettings", "CheckedRow", "check_limits"]


@dataclass(frozen=True, slots=True)
class CheckSettings:
    """What rows are checked against."""

    images_root: Path  # resolved; image paths are relative to it
    decode: bool = False  # every image, instead of reading its header and end
    max_pixels: int = DEFAULT_MAX_PIXELS  # of an image, see `resized`
    family: ModelFamily = QWEN2_VL  # of the model, for the sizes of images
    max_images: int = 8  # of a row; the recipes' `rollout.limit_images`
    tokens: PromptTokens | None = None  # counts prompt tokens; `None`: lengths are not checked
    max_prompt_tokens: int = 14_512  # the recipes' `data.max_prompt_length`
    other_splits: OtherSplits = field(default_factory=OtherSplits)  # whose dialogues must not occur
    has_prompts: bool = True  # rows come with their prompts, whose lines are looked at


@dataclass(frozen=True, slots=True)
class CheckedRow:
    """A row as it is used from here on."""

    messages: list[dict[str, str]]  # system (optional), user, assistant
    images: list[str]  # paths as they stood in the row, absolute ones made relative to the images root
    image_files: list[str]  # see `image_file`
    dialogue: Dialogue  # read out of the user's message
    gold: Fragment
    solution: str  # the gold as text
    image_tokens: tuple[int, ...]  # that the model spends on each image
    fingerprint: int  # see `dialogue_fingerprint`; a window's is that of its whole dialogue
    prompt_tokens: int | None = None  # `None` when they were not counted
    window: Window | None = None  # of a longer dialogue, `None` for a whole one
    whole_size: tuple[int, int] | None = None  # turns and images of a window's whole dialogue

    def cut(self, settings: WindowSettings) -> list[CheckedRow]:
        """The row's windows, or the row itself when it fits into one."""
        count = len(self.dialogue.utterances)
        windows = windows_of(self.dialogue.dialogue_id, self.dialogue.image_utterances, count, settings)
        return [self._part(window) for window in windows] or [self]

    def _part(self, window: Window) -> CheckedRow:
        gold, images = window.part_of(self.gold), slice(*window.images)
        solution = format_fragment(gold, style="plain" if parse_fragment(self.solution) else "reasoning")
        messages = cut_messages(self.messages[:-1], window)
        return replace(
            self,
            messages=[*messages, {**self.messages[-1], "content": solution}],
            images=self.images[images],
            image_files=self.image_files[images],
            dialogue=parse_dialogue(messages, window.dialogue_id),
            gold=gold,
            solution=solution,
            image_tokens=self.image_tokens[images],
            window=window,
            whole_size=(len(self.dialogue.utterances), len(self.images)),
        )


def check_limits(number: int, row: CheckedRow, settings: CheckSettings) -> tuple[CheckedRow, list[Problem]]:
    """Whether a row, or a window, is within what a run takes: images and, where they are counted, prompt tokens; and
    whether a window is one of another split.

    Returns:
        The row with its prompt tokens, and the problems.
    """
    problems = []
    if len(row.images) > settings.max_images:
        message = f"{len(row.images)} images, at most {settings.max_images}"
        problems.append(Problem(number, ProblemKind.TOO_MANY_IMAGES, "images", message))
    if settings.tokens is not None:
        count = settings.tokens.count(row.messages[:-1], row.image_tokens)
        if count > settings.max_prompt_tokens:
            message = f"{count:,} tokens, at most {settings.max_prompt_tokens:,}"
            problems.append(Problem(number, ProblemKind.TOO_LONG, "messages", message))
        row = replace(row, prompt_tokens=count)
    if row.window is not None:
        in_file = settings.other_splits.file_of(row.dialogue, row.image_files, settings.images_root)
        if in_file is not None:
            message = f"window {row.dialogue.dialogue_id} is in {in_file} too"
            problems.append(Problem(number, ProblemKind.OTHER_SPLIT, "messages", message))
    return row, problems
