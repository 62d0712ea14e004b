"""A row that has been read, the bounds that it is checked against, and its windows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from ffr_verl.data.checks.other_splits import OtherSplits
from ffr_verl.data.checks.problems import Problem, ProblemKind
from ffr_verl.data.config import DEFAULT_MAX_PIXELS
from ffr_verl.data.tokens import PromptTokens
from ffr_verl.data.windows import Window, WindowSettings, cut_messages, windows_of
from ffr_verl.dialogues import Dialogue, parse_dialogue
from ffr_verl.fragments import Fragment, format_fragment, parse_fragment

__all__ = ["CheckSettings", "CheckedRow", "check_limits"]


@dataclass(frozen=True, slots=True)
class CheckSettings:
    """What rows are checked against.

    Attributes:
        images_root: resolved folder that image paths are relative to.
        decode: decode every image, instead of reading its header and end.
        max_pixels: bound of an image, see `resized`.
        max_images: most images of a row; the recipes' `rollout.limit_images`.
        tokens: counts prompt tokens; `None`: lengths are not checked.
        max_prompt_tokens: most tokens of a prompt; the recipes' `data.max_prompt_length`.
        other_splits: whose dialogues must not occur.
        has_prompts: rows come with their prompts, whose lines are looked at.
    """

    images_root: Path
    decode: bool = False
    max_pixels: int = DEFAULT_MAX_PIXELS
    max_images: int = 8
    tokens: PromptTokens | None = None
    max_prompt_tokens: int = 14_512
    other_splits: OtherSplits = field(default_factory=OtherSplits)
    has_prompts: bool = True


@dataclass(frozen=True, slots=True)
class CheckedRow:
    """A row as it is used from here on.

    Attributes:
        messages: system (optional), user, assistant.
        images: paths as they stood in the row, absolute ones made relative to the images root.
        image_files: the file of each image, see `image_file`.
        dialogue: read out of the user's message.
        gold: the gold answer.
        solution: the same as text.
        image_tokens: that the model spends on each image.
        fingerprint: of the dialogue, see `dialogue_fingerprint`; a window's is that of its whole dialogue.
        prompt_tokens: of the whole prompt, `None` when they were not counted.
        window: of a longer dialogue, `None` for a whole one.
        whole_size: turns and images of a window's whole dialogue.
    """

    messages: list[dict[str, str]]
    images: list[str]
    image_files: list[str]
    dialogue: Dialogue
    gold: Fragment
    solution: str
    image_tokens: tuple[int, ...]
    fingerprint: int
    prompt_tokens: int | None = None
    window: Window | None = None
    whole_size: tuple[int, int] | None = None

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
