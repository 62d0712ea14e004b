"""The dialogue of a row: its utterances, images and query, read out of the prompt, and written into one.

Wire format of a line: `<|utt_id_start|>7<|utt_id_end|> user1: text`; an image is
`<|img_id_start|>0<|img_id_end|><image>` inside its utterance's line; the query is `<|query_start|>…<|query_end|>`.
Ids count from 0 in order of appearance.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["IMAGE", "Dialogue", "Utterance", "parse_dialogue", "with_image_parts"]

IMAGE = "<image>"

_UTTERANCE = re.compile(r"<\|utt_id_start\|>([0-9]{1,9})<\|utt_id_end\|>")
_IMAGE_ID = re.compile(r"<\|img_id_start\|>([0-9]{1,9})<\|img_id_end\|>")
_QUERY = re.compile(r"<\|query_start\|>(.*?)<\|query_end\|>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Utterance:
    """One turn: its id in the dialogue, who speaks, the text without image tags, and the ids of the images in it."""

    id: int
    speaker: str
    text: str
    image_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A dialogue and the query asked of it."""

    dialogue_id: str
    utterances: tuple[Utterance, ...]
    query: str

    @property
    def image_utterances(self) -> tuple[int, ...]:
        """For each image, in the order of the dialogue, the id of the utterance that holds it."""
        return tuple(utterance.id for utterance in self.utterances for _ in utterance.image_ids)

    @property
    def image_ids(self) -> tuple[int, ...]:
        """All image ids in the order of the dialogue."""
        return tuple(identifier for utterance in self.utterances for identifier in utterance.image_ids)

    def to_prompt(self, instruction: str) -> str:
        """The user's message: query, instruction, one line an utterance.

        Example:
            >>> dialogue = Dialogue("d", (Utterance(0, "user1", "look", (0,)),), "a cat")
            >>> print(dialogue.to_prompt("Give the ids."))
            <|query_start|>a cat<|query_end|>
            Give the ids.
            <|utt_id_start|>0<|utt_id_end|> user1: look<|img_id_start|>0<|img_id_end|><image>
        """
        lines = [f"<|query_start|>{self.query}<|query_end|>", instruction]
        for utterance in self.utterances:
            images = "".join(f"<|img_id_start|>{image}<|img_id_end|>{IMAGE}" for image in utterance.image_ids)
            lines.append(f"<|utt_id_start|>{utterance.id}<|utt_id_end|> {utterance.speaker}: {utterance.text}{images}")
        return "\n".join(lines)


def parse_dialogue(messages: Sequence[Mapping[str, Any]], dialogue_id: str) -> Dialogue:
    """Read a dialogue out of a row's messages (the user's message holds it).

    Args:
        messages: `{"role": …, "content": text}`; the first user message is read.
        dialogue_id: kept as it is.

    Raises:
        ValueError: when there is no user message, no query or no utterance.

    Example:
        >>> prompt = Dialogue("d", (Utterance(0, "user1", "look", (0,)),), "a cat").to_prompt("Give the ids.")
        >>> parse_dialogue([{"role": "user", "content": prompt}], "d").utterances
        (Utterance(id=0, speaker='user1', text='look', image_ids=(0,)),)
    """
    content = next((message["content"] for message in messages if message["role"] == "user"), None)
    if content is None:
        raise ValueError("no message of role 'user'")
    query = _QUERY.search(content)
    if query is None:
        raise ValueError("no <|query_start|>…<|query_end|> in the user message")
    starts = list(_UTTERANCE.finditer(content))
    if not starts:
        raise ValueError("no <|utt_id_start|>…<|utt_id_end|> in the user message")
    utterances = []
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        body = content[start.end() : following.start() if following else len(content)]
        body = body.removesuffix("\n").removeprefix(" ")
        speaker, colon, text = body.partition(":")
        if not colon:
            speaker, text = "", body
        image_ids = tuple(int(match) for match in _IMAGE_ID.findall(text))
        text = _IMAGE_ID.sub("", text).replace(IMAGE, "").removeprefix(" ")
        utterances.append(Utterance(int(start.group(1)), speaker, text, image_ids))
    return Dialogue(dialogue_id, tuple(utterances), query.group(1))


def with_image_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose texts are cut at every `<image>` into text and image parts, as chat templates and TRL take them.

    verl's dataset does this by itself.

    Example:
        >>> with_image_parts([{"role": "user", "content": "look: <image>!"}])[0]["content"]
        [{'type': 'text', 'text': 'look: '}, {'type': 'image', 'text': None}, {'type': 'text', 'text': '!'}]
    """
    structured = []
    for message in messages:
        parts: list[dict[str, Any]] = []
        for number, text in enumerate(message["content"].split(IMAGE)):
            parts += [{"type": "image", "text": None}] if number else []
            parts += [{"type": "text", "text": text}] if text else []
        structured.append({**message, "content": parts})
    return structured
