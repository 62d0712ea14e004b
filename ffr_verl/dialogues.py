"""The dialogue of a row: its utterances, images and query, read out of the prompt, and written into one.

Wire format of a line: `<|utt_id_start|>7<|utt_id_end|> user1: text`; an image is
`<|img_id_start|>0<|img_id_end|><image>` inside its utterance's line, on request with
`<|caption_start|>…<|caption_end|>` behind it; the query is `<|query_start|>…<|query_end|>`. Ids count from 0 in order
of appearance.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = [
    "IMAGE",
    "Dialogue",
    "Utterance",
    "control_token",
    "extra_info",
    "parse_dialogue",
    "reserved_token",
    "unwritable",
    "utterance_spans",
    "with_image_parts",
]

IMAGE = "<image>"

_UTTERANCE = re.compile(r"<\|utt_id_start\|>([0-9]{1,9})<\|utt_id_end\|>")
_IMAGE_ID = re.compile(r"<\|img_id_start\|>([0-9]{1,9})<\|img_id_end\|>")
_PICTURE = re.compile(_IMAGE_ID.pattern + r"(?:<image>(?:<\|caption_start\|>(.*?)<\|caption_end\|>)?)?", re.DOTALL)
# Of a line without its id: the speaker, up to the first ": " or "：", or to a colon that ends the line; else a name
# without blanks up to a colon, which neither an address nor a time of day has.
_SPEAKER = re.compile(r"([^\n]*?)(?:: |：|:(?=\n|\Z))|([^\s:/\d][^\s:]*):(?!//)")
_QUERY = re.compile(r"<\|query_start\|>(.*?)<\|query_end\|>", re.DOTALL)
# What verl's placeholders and the chat template of Qwen2-VL give a meaning, wherever it stands.
_CONTROL = (
    r"<(?:video|audio)>|<\|(?:im_start|im_end|endoftext|(?:vision|object_ref|box|quad)_(?:start|end)"
    r"|(?:vision|image|video)_pad)\|>"
)
_FILE = re.compile(r"data:[\w.+/-]{0,80};base64,[A-Za-z0-9+/]{32}")
_CONTROL_TOKEN = re.compile(_CONTROL)
_RESERVED = re.compile(
    rf"<\|(?:utt|img)_ids?_(?:start|end)\|>|<\|(?:query|caption)_(?:start|end)\|>|<image>|{_CONTROL}"
)


class Utterance(NamedTuple):  # a tuple, because millions are made
    """One turn of a dialogue."""

    id: int
    speaker: str  # without `": "`, `：`, line breaks and white space around it
    text: str  # without image tags and white space around it; may be empty
    image_ids: tuple[int, ...] = ()
    captions: tuple[str, ...] = ()  # one for each image (empty where it has none), or none at all

    def to_line(self, *, captions: bool = False) -> str:
        """The utterance's line in a prompt.

        Example:
            >>> Utterance(0, "user1", "look", (0,), ("a cat",)).to_line(captions=True)
            '<|utt_id_start|>0<|utt_id_end|> user1: look<|img_id_start|>0<|img_id_end|><image><|caption_start|>a \
cat<|caption_end|>'
        """
        images = ""
        for position, image in enumerate(self.image_ids):
            images += f"<|img_id_start|>{image}<|img_id_end|>{IMAGE}"
            if captions and self.captions and self.captions[position]:
                images += f"<|caption_start|>{self.captions[position]}<|caption_end|>"
        return f"<|utt_id_start|>{self.id}<|utt_id_end|> {self.speaker}: {self.text}{images}"


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A dialogue and the query asked of it."""

    dialogue_id: str
    utterances: tuple[Utterance, ...]
    query: str

    @property
    def image_utterances(self) -> tuple[int, ...]:
        """For each image, in the order of the dialogue, the id of its utterance."""
        held = [utterance for utterance in self.utterances if utterance.image_ids]
        return tuple([utterance.id for utterance in held for _ in utterance.image_ids])

    @property
    def image_ids(self) -> tuple[int, ...]:
        """All image ids in the order of the dialogue."""
        return tuple(itertools.chain.from_iterable(map(operator.attrgetter("image_ids"), self.utterances)))

    @property
    def tagged_query(self) -> str:
        """The query in its tags, as it stands in a prompt."""
        return f"<|query_start|>{self.query}<|query_end|>"

    def to_text(self, *, captions: bool = False) -> str:
        """One line an utterance."""
        return "\n".join([utterance.to_line(captions=captions) for utterance in self.utterances])

    def to_prompt(self, instruction: str, *, captions: bool = False) -> str:
        """The user's message: query, instruction, one line an utterance; `parse_dialogue` reads it back.

        Example:
            >>> dialogue = Dialogue("d", (Utterance(0, "user1", "look", (0,)),), "a cat")
            >>> print(dialogue.to_prompt("Give the ids."))
            <|query_start|>a cat<|query_end|>
            Give the ids.
            <|utt_id_start|>0<|utt_id_end|> user1: look<|img_id_start|>0<|img_id_end|><image>
        """
        return f"{self.tagged_query}\n{instruction}\n{self.to_text(captions=captions)}"


def reserved_token(text: str, *, allowed: Sequence[str] = ()) -> str | None:
    """The first piece of a text, but for `allowed` ones, that the wire format, verl or the chat template does not take
    for text.

    Example:
        >>> reserved_token("see <image> there")
        '<image>'
        >>> reserved_token("a < b, b > c") is None
        True
    """
    if "<" not in text:
        return None
    return next((piece for piece in _RESERVED.findall(text) if piece not in allowed), None)


def unwritable(text: str) -> str | None:
    """Why no prompt can hold a text: parquet or a tokenizer cannot take it, or it holds a file; `None` when it may.

    Example:
        >>> unwritable("a\\0b")
        'holds a NUL character'
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds half of a surrogate pair (\\ud800 to \\udfff)"
    if "\0" in text:
        return "holds a NUL character"
    found = _FILE.search(text) if ";base64," in text else None
    return f"holds a file as base64 ({found.group()}...); save it as a file and name that" if found else None


def control_token(text: str) -> str | None:
    """The first piece of a whole prompt that verl or the chat template would take for a command.

    Example:
        >>> control_token("<|query_start|>a <|image_pad|><|query_end|>")
        '<|image_pad|>'
    """
    found = _CONTROL_TOKEN.search(text)
    return found.group() if found else None


def utterance_spans(content: str) -> list[tuple[int, int]]:
    """Where each utterance of a prompt starts and ends, its id tag included; the last one ends with the prompt.

    Example:
        >>> utterance_spans("Hello <|utt_id_start|>0<|utt_id_end|> a: b")
        [(6, 42)]
    """
    starts = [match.start() for match in _UTTERANCE.finditer(content)]
    return list(zip(starts, [*starts[1:], len(content)], strict=True)) if starts else []


def _utterance(identifier: int, body: str) -> Utterance:
    image_ids: tuple[int, ...] = ()
    captions: tuple[str, ...] = ()
    if "<" in body:
        pictures = _PICTURE.findall(body)
        image_ids = tuple([int(found) for found, _ in pictures])
        captions = tuple([caption for _, caption in pictures])
        captions = captions if any(captions) else ()
        body = _PICTURE.sub("", body).replace(IMAGE, "")
    body = body.strip()
    named = _SPEAKER.match(body)
    if named is None:
        return Utterance(identifier, "", body, image_ids, captions)
    return Utterance(
        identifier, (named[1] or named[2] or "").strip(), body[named.end() :].strip(), image_ids, captions
    )


def parse_dialogue(messages: Sequence[Mapping[str, Any]], dialogue_id: str) -> Dialogue:
    """Read a dialogue out of a row's messages, the first one of the user.

    The speaker ends at the first `": "` or `：` of a line; `Ann:hello` is read too. A line without any of them has no
    speaker: its words are never cut at a colon inside them.

    Raises:
        ValueError: when there is no user message, no query or no utterance.

    Example:
        >>> prompt = Dialogue("d", (Utterance(0, "user1", "look", (0,)),), "a cat").to_prompt("Give the ids.")
        >>> parse_dialogue([{"role": "user", "content": prompt}], "d").utterances
        (Utterance(id=0, speaker='user1', text='look', image_ids=(0,), captions=()),)
    """
    content = next((message["content"] for message in messages if message["role"] == "user"), None)
    if content is None:
        raise ValueError("no message of role 'user'")
    query = _QUERY.search(content)
    if query is None:
        raise ValueError("no <|query_start|>…<|query_end|> in the user message")
    pieces = _UTTERANCE.split(content)
    if len(pieces) == 1:
        raise ValueError("no <|utt_id_start|>…<|utt_id_end|> in the user message")
    new = tuple.__new__  # most lines are plain: without calls for each of them, prepare takes a tenth less time
    utterances = [
        new(Utterance, (identifier, parts[0].strip(), parts[2].strip(), (), ()))
        if "<" not in body and (parts := body.partition(": "))[1] and "：" not in parts[0] and "\n" not in parts[0]
        else _utterance(identifier, body)
        for identifier, body in zip(map(int, pieces[1::2]), pieces[2::2], strict=True)
    ]
    return Dialogue(dialogue_id, tuple(utterances), query.group(1))


def extra_info(dialogue: Dialogue, images: Sequence[str], *, split: str = "") -> dict[str, Any]:
    """What rewards need to know of a row's dialogue: `extra_info` of an RL row, but for `index` and `window`.

    `images` are the paths as they stand in the row; `split` tells apart dialogues of one id in an embedding store.

    Example:
        >>> extra_info(Dialogue("d", (Utterance(0, "user1", "look", (0,)),), "a cat"), ["cat.png"])["image_utterances"]
        [0]
    """
    return {
        "split": split,
        "dialogue_id": dialogue.dialogue_id,
        "query": dialogue.query,
        "utterance_ids": [utterance.id for utterance in dialogue.utterances],
        "image_ids": list(dialogue.image_ids),
        "image_utterances": list(dialogue.image_utterances),
        "images": list(images),
    }


def with_image_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose texts are cut at every `<image>` into text and image parts, as chat templates and TRL take them
    (verl's dataset does this by itself).

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
