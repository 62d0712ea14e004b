"""The answer: the ids of the utterances and images that form a fragment; what a text says of them, strictly and
leniently, in each style, and why it is no answer. Everything that reads answers or golds asks here.

Wire format: `<|utt_ids_start|>[1, 2]<|utt_ids_end|>;<|img_ids_start|>[0]<|img_ids_end|>`, or, in the `reasoning`
style, `<think>…</think><answer>…</answer>` around it. Parsing is strict: the whole text must be the answer. White
space around it and around its brackets and tags is forgiven: servers, templates and decoders put it there.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

__all__ = [
    "ALL_TAGS",
    "NEEDED_TAGS",
    "TAGS",
    "AnswerStyle",
    "Fragment",
    "MalformedReason",
    "format_fragment",
    "locate_ids",
    "malformed_reason",
    "parse_either",
    "parse_fragment",
    "parse_gold",
    "parse_leniently",
    "reason_of_malformed",
]

AnswerStyle = Literal["plain", "reasoning"]

TAGS = ("<|utt_ids_start|>", "<|utt_ids_end|>", "<|img_ids_start|>", "<|img_ids_end|>")

# More than any dialogue has: they bound the time that an answer can take, and keep int() far from its limit on digits.
_MOST_DIGITS, _MOST_IDS = 9, 4096
_ID = rf"[0-9]{{1,{_MOST_DIGITS}}}\s*"
_IDS = rf"\[\s*((?:{_ID}(?:,\s*{_ID}){{0,{_MOST_IDS - 1}}})?)\]"
_PLAIN = re.compile(
    r"\s*{}\s*{}\s*{}\s*;\s*{}\s*{}\s*{}\s*".format(
        re.escape(TAGS[0]), _IDS, *[re.escape(tag) for tag in TAGS[1:3]], _IDS, re.escape(TAGS[3])
    )
)
# What `format_fragment` writes, as nearly all answers are written, is read in a third of the time: ids below 1024,
# between them a comma and a blank.
match_quickly = re.compile(
    r"{}\[([0-9, ]{{0,1024}})\]{};{}\[([0-9, ]{{0,1024}})\]{}".format(*[re.escape(tag) for tag in TAGS])
).fullmatch
_SMALL_IDS = {str(identifier): identifier for identifier in range(1024)}.__getitem__
_DIGITS = re.compile("[0-9]+")
_OPEN_THINK, _CLOSE_THINK, _OPEN_ANSWER, _CLOSE_ANSWER = "<think>", "</think>", "<answer>", "</answer>"
# All that an answer is written with, in either style, and of these what it cannot be read without.
ALL_TAGS = (*TAGS, _OPEN_THINK, _CLOSE_THINK, _OPEN_ANSWER, _CLOSE_ANSWER)
NEEDED_TAGS: Mapping[AnswerStyle, tuple[str, ...]] = {"plain": TAGS, "reasoning": (*TAGS, _CLOSE_THINK)}


@dataclass(frozen=True, slots=True)
class Fragment:
    """Utterance and image ids in the order in which the answer names them, repeats kept."""

    utterance_ids: tuple[int, ...]
    image_ids: tuple[int, ...]


class MalformedReason(str, enum.Enum):
    """Why a text is no answer, or one that cannot be right; the values are names for metrics.

    `REPEATED_ID` and `ID_OUTSIDE_DIALOGUE` are faults of answers that can be parsed, see `ffr_verl.rewards.diagnose`.
    """

    EMPTY = "empty"
    NO_REASONING_WRAPPER = "no_reasoning_wrapper"
    MISSING_TAG = "missing_tag"
    TEXT_OUTSIDE = "text_outside"
    BAD_ID_LIST = "bad_id_list"
    REPEATED_ID = "repeated_id"
    ID_OUTSIDE_DIALOGUE = "id_outside_dialogue"


def _ids(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text else ()


def _small_ids(text: str) -> tuple[int, ...]:
    return tuple(map(_SMALL_IDS, text.split(", "))) if text else ()


def _unwrap(text: str) -> str | None:
    """What stands behind the thought of `<think>…</think><answer>…</answer>`.

    A chat template may have opened the thought in the prompt already, and thinking models write no `<answer>` around
    what they say: either tag may be missing.
    """
    thought, closed, rest = text.strip().removeprefix(_OPEN_THINK).partition(_CLOSE_THINK)
    rest = rest.strip()
    if not closed or _OPEN_THINK in thought:
        return None
    if rest.startswith(_OPEN_ANSWER) and rest.endswith(_CLOSE_ANSWER):
        return rest[len(_OPEN_ANSWER) : -len(_CLOSE_ANSWER)]
    return None if _OPEN_ANSWER in rest or _CLOSE_ANSWER in rest else rest


def _answer_part(text: str, style: AnswerStyle) -> str:
    """Where lenient reading looks: never in a thought, whose ids are no answer, whatever style was asked for."""
    if style == "plain" and _CLOSE_THINK not in text and not text.lstrip().startswith(_OPEN_THINK):
        return text
    _, closed, rest = text.rpartition(_CLOSE_THINK)
    _, opened, inner = rest.partition(_OPEN_ANSWER)
    if opened:
        return inner.partition(_CLOSE_ANSWER)[0]
    return rest if closed else ""


def parse_fragment(text: str, *, style: AnswerStyle = "plain") -> Fragment | None:
    """Read an answer strictly; `None` when it is malformed.

    The whole text must be the answer, white space around it and its parts aside. Inside the brackets stand at most
    4,096 ids of one to nine ASCII digits, separated by commas. The published parser also takes `[0 1]`, `[1,,2]` and
    digits of other scripts; here they are malformed.

    Args:
        text: what the model wrote. Never raises, whatever it is; time is linear in its length.
        style: `plain`, or `reasoning` for `<think>…</think><answer>…</answer>`; `<think>` may stand in the prompt
            instead, and `<answer>` be left out.

    Source: the paper's wire format; strictness is ours.

    Example:
        >>> parse_fragment("<|utt_ids_start|>[3, 4]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>")
        Fragment(utterance_ids=(3, 4), image_ids=())
        >>> parse_fragment("utterances 3 and 4") is None
        True
    """
    if style == "plain" and (match := match_quickly(text)):
        try:
            return Fragment(_small_ids(match[1]), _small_ids(match[2]))
        except KeyError:
            pass  # written in another way, or no ids
    match = _match(text, style)
    return None if match is None else Fragment(_ids(match[1]), _ids(match[2]))


def _match(text: str, style: AnswerStyle) -> re.Match[str] | None:
    if style == "reasoning":
        inner = _unwrap(text)
        if inner is None:
            return None
        text = inner
    elif style != "plain":
        raise ValueError(f"style: found {style!r}, expected one of {', '.join(get_args(AnswerStyle))}")
    return _PLAIN.fullmatch(text)


def locate_ids(text: str, *, style: AnswerStyle = "plain") -> tuple[tuple[int, ...], int, tuple[int, ...]] | None:
    """Where the parts of an answer end: offsets into `text` behind the last digit of each utterance id, behind the
    list of utterances, and behind each image id, in the order in which it names them; `None` when it is malformed.

    Example:
        >>> locate_ids("<|utt_ids_start|>[3, 14]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>")
        ((19, 23), 24, ())
    """
    match = _match(text, style)
    if match is None:
        return None
    # The answer is the last thing in the text but for what the wrapper puts around it.
    shift = text.rindex(match.string) if match.string is not text else 0
    utterances, images = (
        tuple([shift + match.start(group) + one.end() for one in _DIGITS.finditer(match[group])]) for group in (1, 2)
    )
    return utterances, shift + match.end(1) + 1, images


def _lenient_ids(text: str, start: str, end: str) -> tuple[int, ...]:
    first = text.find(start)
    last = text.find(end, first + len(start)) if first >= 0 else -1
    if last < 0:
        return ()
    try:
        found = json.loads(text[first + len(start) : last])
    except (ValueError, RecursionError):
        return ()
    values = found if isinstance(found, list) else ()
    return tuple([value for value in values if type(value) is int and 0 <= value < 10**_MOST_DIGITS])


def parse_leniently(text: str, *, style: AnswerStyle = "plain") -> Fragment:
    """Read what can be read of an answer: the first pair of tags of each kind anywhere in the text, its bracket as
    JSON; an empty list where that fails. For difficulty and evaluation, as published; rewards are strict.

    Never raises. With the style `reasoning`, and wherever there is a thought, only what stands behind it is read.

    Source: the published curriculum and evaluation. Values that are no ids of at most nine digits are left out (ours).

    Example:
        >>> parse_leniently("I think <|utt_ids_start|>[3, 4]<|utt_ids_end|> and <|img_ids_start|>[1,<|img_ids_end|>")
        Fragment(utterance_ids=(3, 4), image_ids=())
    """
    text = _answer_part(text, style)
    return Fragment(_lenient_ids(text, *TAGS[:2]), _lenient_ids(text, *TAGS[2:]))


def parse_either(text: str, *, style: AnswerStyle = "plain") -> Fragment:
    """The ids that an answer names, read strictly, or leniently where that fails: for what shows or unites answers.
    Never raises.

    Example:
        >>> text = "<|utt_ids_start|>[07]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"  # [07] is no JSON
        >>> parse_either(text), parse_leniently(text)
        (Fragment(utterance_ids=(7,), image_ids=()), Fragment(utterance_ids=(), image_ids=()))
    """
    strict = parse_fragment(text, style=style)
    return parse_leniently(text, style=style) if strict is None else strict


def parse_gold(solution: str) -> Fragment | None:
    """The gold fragment; data sets store the plain format, and one stored with the reasoning wrapper is read too."""
    return parse_fragment(solution) or parse_fragment(solution, style="reasoning")


def malformed_reason(text: str, *, style: AnswerStyle = "plain") -> MalformedReason | None:
    """Why `parse_fragment` gives `None`; `None` where it gives a fragment.

    Example:
        >>> malformed_reason("<|utt_ids_start|>[1,,2]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>").value
        'bad_id_list'
    """
    return None if parse_fragment(text, style=style) is not None else reason_of_malformed(text, style=style)


def reason_of_malformed(text: str, *, style: AnswerStyle = "plain") -> MalformedReason:
    """`malformed_reason` of a text that `parse_fragment` has refused; it is not parsed again."""
    inner: str | None = text.strip()
    if not inner:
        return MalformedReason.EMPTY
    if style == "reasoning":
        inner = _unwrap(text)
        if inner is None:
            return MalformedReason.NO_REASONING_WRAPPER
        inner = inner.strip()
    positions = [inner.find(tag) for tag in TAGS]
    if -1 in positions or positions != sorted(positions):
        return MalformedReason.MISSING_TAG
    between = inner[positions[1] + len(TAGS[1]) : positions[2]]
    is_whole = inner.startswith(TAGS[0]) and inner.endswith(TAGS[3]) and between.strip() == ";"
    return MalformedReason.BAD_ID_LIST if is_whole else MalformedReason.TEXT_OUTSIDE


def format_fragment(fragment: Fragment, *, style: AnswerStyle = "plain") -> str:
    """Write an answer in the wire format; `parse_fragment` of the same style reads it back.

    Example:
        >>> format_fragment(Fragment((1, 2), ()))
        '<|utt_ids_start|>[1, 2]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>'
    """
    utterances = ", ".join(map(str, fragment.utterance_ids))
    images = ", ".join(map(str, fragment.image_ids))
    answer = f"{TAGS[0]}[{utterances}]{TAGS[1]};{TAGS[2]}[{images}]{TAGS[3]}"
    if style == "plain":
        return answer
    return f"{_OPEN_THINK}{_CLOSE_THINK}{_OPEN_ANSWER}{answer}{_CLOSE_ANSWER}"
