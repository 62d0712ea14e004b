"""A row that has been read, and its windows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ffr_verl.data.windows import Window, WindowSettings, cut_messages, windows_of
from ffr_verl.dialogues import Dialogue, parse_dialogue
from ffr_verl.fragments import Fragment


@dataclass(frozen=True, slots=True)
class CheckedRow:
    """A row as it is used from here on."""

    messages: list[dict[str, str]]  # system (optional), user, and assistant where there is a gold answer
    images: list[str]  # paths as they stood in the row, absolute ones made relative to the images root
    image_files: list[str]  # see `image_file`
    dialogue: Dialogue  # read out of the user's message
    gold: Fragment | None  # `None` of an unlabelled row
    solution: str | None  # the gold as text
    image_tokens: tuple[int, ...]  # that the model spends on each image
    fingerprint: int  # see `dialogue_fingerprint`; a window's is that of its whole dialogue
    prompt_tokens: int | None = None  # `None` when they were not counted
    window: Window | None = None  # of a longer dialogue, `None` for a whole one
    whole_size: tuple[int, int] | None = None  # turns and images of a window's whole dialogue

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The messages without the answer."""
        return self.messages if self.gold is None else self.messages[:-1]

    def cut(self, settings: WindowSettings) -> list[CheckedRow]:
        """The row's windows, or the row itself when it fits into one."""
        dialogue = self.dialogue
        windows = windows_of(dialogue.dialogue_id, dialogue.image_utterances, len(dialogue.utterances), settings)
        return [self._part(window) for window in windows] or [self]

    def _part(self, window: Window) -> CheckedRow:
        gold, solution, images = None, None, slice(*window.images)
        prompt = messages = cut_messages(self.prompt, window)
        if self.gold is not None and self.solution is not None:
            gold = window.part_of(self.gold)
            solution = window.part_of_text(self.solution, self.gold)
            messages = [*prompt, {**self.messages[-1], "content": solution}]
        return replace(
            self,
            messages=messages,
            images=self.images[images],
            image_files=self.image_files[images],
            dialogue=parse_dialogue(prompt, window.dialogue_id),
            gold=gold,
            solution=solution,
            image_tokens=self.image_tokens[images],
            window=window,
            whole_size=(len(self.dialogue.utterances), len(self.images)),
        )
