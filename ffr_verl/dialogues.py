"""The dialogue of a row: its utterances, images and query, read out of the prompt, and written into one.

Wire format of a line: `<|utt_id_start|>7<|utt_id_end|> user1: text`; an image is
`<|img_id_start|>0<|img_id_end|><image>` inside its utterance's line, on request with
`<|caption_start|>…<|caption_end|>` behind it; the query is `<|query_start|>…<|query_end|>`. Ids count from 0 in order
of appearance.
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ffr_verl.model_families import CONTROL_TOKENS

IMAGE = "<image>"
UTTERANCE_START = "<|utt_id_start|>"
QUERY_START, QUERY_END = "<|query_start|>", "<|query_end|>"

_UTTERANCE = re.compile(r"<\|utt_id_start\|>([0-9]{1,9})<\|utt_id_end\|>")
# A line with a short speaker, as `Dialogue.to_prompt` writes it, up to its text.
_PLAIN_LINE = re.compile(rf"\n{_UTTERANCE.pattern} ([^\n:：<]{{0,64}}): ")
_IMAGE_ID = re.compile(r"<\|img_id_start\|>([0-9]{1,9})<\|img_id_end\|>")
_PICTURE = re.compile(_IMAGE_ID.pattern + r"(?:<image>(?:<\|caption_start\|>(.*?)<\|caption_end\|>)?)?", re.DOTALL)
# Of a line without its id: the speaker, up to the first ": " or "：", or to a colon that ends the line; else a name
# without blanks up to a colon, which neither an address nor a time of day has.
_SPEAKER = re.compile(r"([^\n]*?)(?:: |：|:(?=\n|\Z))|([^\s:/\d][^\s:]*):(?!//)")
_QUERY = re.compile(r"<\|query_start\|>(.*?)<\|query_end\|>", re.DOTALL)
# verl's placeholders, and what a chat template acts on.
_CONTROL = "|".join(["<(?:video|audio)>", *sorted(map(re.escape, CONTROL_TOKENS))])
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
        """The utterance's line in a prompt."""
        images = ""
        for position, image in enumerate(self.image_ids):
            images += f"<|img_id_start|>{image}<|img_id_end|>{IMAGE}"
            if captions and self.captions and self.captions[position]:
                images += f"<|caption_start|>{self.captions[position]}<|caption_end|>"
        return f"<|utt_id_start|>{self.id}<|utt_id_end|> {self.speaker}: {self.text}{images}"


_ID = operator.attrgetter("id")


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A dialogue and the query asked of it."""

    dialogue_id: str
    utterances: tuple[Utterance, ...]
    query: str
    # Of a prompt that was read: whether each utterance stands on a line of its own and starts as `_PLAIN_LINE` says.
    has_plain_lines: bool = field(default=False, compare=False, repr=False)

    @property
    def image_utterances(self) -> tuple[int, ...]:
        """For each image, in the order of the dialogue, the id of its utterance."""
        return tuple([one.id for one in self.utterances if one.image_ids for _ in one.image_ids])

    @property
    def image_ids(self) -> tuple[int, ...]:
        """All image ids in the order of the dialogue."""
        return tuple([image for one in self.utterances if one.image_ids for image in one.image_ids])

    @property
    def tagged_query(self) -> str:
        """The query in its tags, as it stands in a prompt."""
        return f"<|query_start|>{self.query}<|query_end|>"

    @property
    def digest(self) -> str:
        """Of its utterances' ids, speakers and texts, but for the last one, behind which a prompt may go on."""
        spoken = [(utterance.id, utterance.speaker, utterance.text) for utterance in self.utterances[:-1]]
        return hashlib.blake2b(repr(spoken).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

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
    for text."""
    if "<" not in text:
        return None
    return next((piece for piece in _RESERVED.findall(text) if piece not in allowed), None)


def unwritable(text: str) -> str | None:
    """Why no prompt can hold a text: parquet or a tokenizer cannot take it, or it holds a file; `None` when it may."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return "holds half of a surrogate pair (\\ud800 to \\udfff)"
    if "\0" in text:
        return "holds a NUL character"
    found = _FILE.search(text) if ";base64," in text else None
    return f"holds a file as base64 ({found.group()}...); save it as a file and name that" if found else None


def control_token(text: str) -> str | None:
    """The first piece of a whole prompt that verl or the chat template would take for a command."""
    found = _CONTROL_TOKEN.search(text) if "<" in text else None
    return found.group() if found else None


def utterance_spans(content: str) -> list[tuple[int, int]]:
    """Where each utterance of a prompt starts and ends, its id tag included; the last one ends with the prompt."""
    starts = [match.start() for match in _UTTERANCE.finditer(content)]
    return list(zip(starts, [*starts[1:], len(content)], strict=True)) if starts else []


def _utterance(identifier: int, body: str) -> Utterance:
    # First the usual line with an image, in half of the time.
    said, _, shown = body.partition("<|img_id_start|>")
    image, end, rest = shown.partition(f"<|img_id_end|>{IMAGE}")
    speaker, colon, text = said.partition(": ")
    is_plain = bool(end and colon) and rest in ("", "\n") and "<" not in said and "\n" not in speaker
    if is_plain and "：" not in speaker and len(image) < 10 and image.isascii() and image.isdecimal():
        return Utterance(identifier, speaker.strip(), text.strip(), (int(image),))
    image_ids: tuple[int, ...] = ()
    captions: tuple[str, ...] = ()
    if "<" in body:
        pieces = _PICTURE.split(body)  # text, id, caption, text, ...
        image_ids = tuple(map(int, pieces[1::3]))
        if any(pieces[2::3]):
            captions = tuple([caption or "" for caption in pieces[2::3]])
        body = "".join(pieces[::3]).replace(IMAGE, "")
    body = body.strip()
    named = _SPEAKER.match(body)
    if named is None:
        return Utterance(identifier, "", body, image_ids, captions)
    return Utterance(
        identifier, (named[1] or named[2] or "").strip(), body[named.end() :].strip(), image_ids, captions
    )


def parse_dialogue(messages: Sequence[Mapping[str, Any]], dialogue_id: str) -> Dialogue:
    """Read a dialogue out of a row's messages, see `dialogue_message`.

    The speaker ends at the first `": "` or `：` of a line; `Ann:hello` is read too. A line without any of them has no
    speaker: its words are never cut at a colon inside them.

    Raises:
        ValueError: when there is no user message, no query or no utterance.

    Example:
        >>> prompt = Dialogue("d", (Utterance(0, "user1", "look", (0,)),), "a cat").to_prompt("Give the ids.")
        >>> parse_dialogue([{"role": "user", "content": prompt}], "d").utterances
        (Utterance(id=0, speaker='user1', text='look', image_ids=(0,), captions=()),)
    """
    content = dialogue_message([(message["role"], content_text(message["content"])) for message in messages])
    if content is None:
        raise ValueError("no message of role 'user'")
    query = _QUERY.search(content)
    if query is None:
        raise ValueError("no <|query_start|>…<|query_end|> in the user message")
    lines = _PLAIN_LINE.split("\n" + content[content.find(UTTERANCE_START) :])  # "", id, speaker, text, id, ...
    has_plain_lines = len(lines) == 3 * content.count(UTTERANCE_START) + 1 > 1
    if has_plain_lines:  # true of nearly all dialogues
        new = tuple.__new__  # without a call for each line, prepare takes a tenth less time
        utterances = [
            new(Utterance, (identifier, speaker.strip(), text.strip(), (), ()))
            if "<" not in text
            else _utterance(identifier, f"{speaker}: {text}")
            for identifier, speaker, text in zip(map(int, lines[1::3]), lines[2::3], lines[3::3], strict=True)
        ]
    else:
        pieces = _UTTERANCE.split(content)
        if len(pieces) == 1:
            raise ValueError("no <|utt_id_start|>…<|utt_id_end|> in the user message")
        utterances = list(map(_utterance, map(int, pieces[1::2]), pieces[2::2]))
    return Dialogue(dialogue_id, tuple(utterances), query.group(1), has_plain_lines)


def with_query(messages: Sequence[Mapping[str, Any]], query: str) -> list[dict[str, Any]]:
    """The messages of a prompt, with another query in its tags; a `ValueError` for a text that cannot stand there.

    Example:
        >>> prompt = [{"role": "user", "content": Dialogue("d", (), "a cat").to_prompt("Give the ids.")}]
        >>> with_query(prompt, "a dog")[0]["content"]
        '<|query_start|>a dog<|query_end|>\\nGive the ids.\\n'
    """
    fault, piece = unwritable(query), reserved_token(query)
    if fault is not None or piece is not None or not query.strip():
        raise ValueError(fault or (piece and f"holds {piece}, which has a meaning in the prompt") or "is empty")
    tagged = Dialogue("", (), query.strip()).tagged_query
    return with_dialogue(messages, lambda text: _QUERY.sub(lambda _: tagged, text, count=1))


def with_dialogue(messages: Sequence[Mapping[str, Any]], change: Callable[[str], str]) -> list[dict[str, Any]]:
    """The messages of a prompt, with another text where the dialogue is; examples before it stay as they are.

    Example:
        >>> with_dialogue([{"role": "user", "content": "look"}], str.upper)
        [{'role': 'user', 'content': 'LOOK'}]
    """
    made, place = [dict(one) for one in messages], _dialogue_place([(one["role"], one["content"]) for one in messages])
    if place is not None:
        made[place]["content"] = change(made[place]["content"])
    return made


def content_text(content: Any, *, image: str = IMAGE) -> str:
    """The text of a message's `content`: a text, a list of parts (see `with_image_parts`), or nothing; `image` stands
    for an image part, and a part that is no text, such as a thought, counts for nothing.

    Example:
        >>> content_text([{"type": "text", "text": "look: "}, {"type": "image"}, "!", None])
        'look: <image>!'
    """
    if isinstance(content, str):
        return content
    text = ""
    for part in content if isinstance(content, Iterable) and not isinstance(content, Mapping) else (content,):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            text += part
        elif isinstance(kind, str) and kind.startswith("image"):
            text += image
        elif isinstance(part, Mapping) and kind in (None, "text", "input_text", "output_text"):
            text += part["text"] if isinstance(part.get("text"), str) else ""
    return text


def _dialogue_place(messages: Sequence[tuple[str, str]]) -> int | None:
    of_user = [place for place, (role, _) in enumerate(messages) if role == "user"]
    with_dialogue = [place for place in of_user if UTTERANCE_START in messages[place][1]]
    found = with_dialogue or of_user
    return found[-1] if found else None


def dialogue_message(messages: Sequence[tuple[str, str]]) -> str | None:
    """Of messages as role and text, the text that holds the dialogue: the last of the user's with an utterance in it,
    for what stands before are examples of how to answer; the user's last one where none has any, and `None` without a
    message of the user's."""
    place = _dialogue_place(messages)
    return None if place is None else messages[place][1]


# Greatest id of the universe of a dialogue that has no ids of a modality, as published.
_DEFAULT_GREATEST = 20


class Ids(NamedTuple):
    """The ids of one modality of a dialogue."""

    first: int  # the smallest; 0 when there are none
    end: int  # behind the greatest; 0 when there are none
    others: frozenset[int] | None = None  # all of them where some between `first` and `end` are missing

    @property
    def universe(self) -> int:
        """Size of the universe `0 … greatest id`, of `0 … 20` when there are no ids."""
        return self.end or _DEFAULT_GREATEST + 1

    def outside(self, identifiers: Iterable[int]) -> int:
        """How many of the ids the dialogue does not have."""
        known = range(self.first, self.end) if self.others is None else self.others
        return sum([identifier not in known for identifier in identifiers])


class DialogueIds(NamedTuple):
    """Which ids a dialogue has, the universe of the metrics, and its number of utterances."""

    utterances: Ids
    images: Ids
    turns: int

    @property
    def is_counting(self) -> bool:
        """Whether both are `0, 1, 2, …`, as a prompt of this package has them."""
        utterances, images = self.utterances, self.images
        return not (utterances.first or images.first or utterances.others or images.others) and self.turns > 0


_COUNTED = [Ids(0, end) for end in range(1025)]
_UTTERANCE_COUNTS = {f"<|utt_id_start|>{last}<|utt_id_end|>": last + 1 for last in range(1024)}
_LAST_IMAGE = ["", *[f"<|img_id_start|>{last}<|img_id_end|>" for last in range(1024)]]


def dialogue_ids(prompt: str) -> DialogueIds:
    """The ids of the dialogue in a user's message.

    Example:
        >>> dialogue_ids("<|utt_id_start|>0<|utt_id_end|> a: <|img_id_start|>0<|img_id_end|><image>").images
        Ids(first=0, end=1, others=None)
    """
    # Nearly every prompt counts from 0, and reading all of its tags would take most of an evaluation's time: n tags of
    # a kind of which the last one is n - 1 are taken for 0, 1, …, n - 1.
    last = prompt.rfind(UTTERANCE_START)
    turns = _UTTERANCE_COUNTS.get(prompt[last : prompt.find(">", last + 16) + 1], 0)
    images = prompt.count("_id_start|>") - turns
    if turns and (
        images == 0
        or (0 < images <= 1024 and prompt.startswith(_LAST_IMAGE[images], prompt.rfind("<|img_id_start|>")))
    ):
        return DialogueIds(_COUNTED[turns], _COUNTED[images], turns)
    found = _UTTERANCE.findall(prompt)
    return DialogueIds(_ids(found), _ids(_IMAGE_ID.findall(prompt)), len(found))


def _ids(found: Sequence[str]) -> Ids:
    if not found:
        return _COUNTED[0]
    numbers = frozenset(map(int, found))
    first, end = min(numbers), max(numbers) + 1
    return Ids(first, end, None if len(numbers) == end - first else numbers)


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
        "utterance_ids": list(map(_ID, dialogue.utterances)),
        "image_ids": list(dialogue.image_ids),
        "image_utterances": list(dialogue.image_utterances),
        "images": list(images),
    }


def shift_image_ids(text: str, by: int) -> str:
    """A text with other ids in its image tags.

    Example:
        >>> shift_image_ids("look: <|img_id_start|>4<|img_id_end|><image>", -3)
        'look: <|img_id_start|>1<|img_id_end|><image>'
    """
    return _IMAGE_ID.sub(lambda tag: f"<|img_id_start|>{int(tag.group(1)) + by}<|img_id_end|>", text)


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
