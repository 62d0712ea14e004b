"""The strict parser, its inverse and the reasons for refusal."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffr_verl import Fragment, format_fragment, parse_fragment
from ffr_verl.fragments import TAGS, AnswerStyle, MalformedReason, malformed_reason, parse_gold, parse_leniently

U0, U1, I0, I1 = TAGS


def answer(utterances: str, images: str) -> str:
    return f"{U0}{utterances}{U1};{I0}{images}{I1}"


GOOD = [
    (answer("[1, 2]", "[0]"), Fragment((1, 2), (0,))),
    (answer("[]", "[]"), Fragment((), ())),
    (answer("[ ]", "[\n]"), Fragment((), ())),
    (answer("[1,2 , 3]", "[]"), Fragment((1, 2, 3), ())),
    (answer("[ 7 ]", "[0,\t1]"), Fragment((7,), (0, 1))),
    (answer("[2, 1, 2]", "[]"), Fragment((2, 1, 2), ())),
    (answer("[007]", "[]"), Fragment((7,), ())),
    # White space that servers with a reasoning parser, templates and decoders put around the answer and its parts.
    ("\n\n" + answer("[1]", "[]") + "\n", Fragment((1,), ())),
    (f"{U0} [1] {U1} ; {I0} [0] {I1}", Fragment((1,), (0,))),
    (answer("[999999999]", "[]"), Fragment((999_999_999,), ())),
    (answer(f"[{', '.join(['5'] * 4096)}]", "[]"), Fragment((5,) * 4096, ())),
]

BAD = [
    ("", MalformedReason.EMPTY),
    ("  \n", MalformedReason.EMPTY),
    ("no idea", MalformedReason.MISSING_TAG),
    (f"{U0}[1]{U1}", MalformedReason.MISSING_TAG),
    (f"{I0}[0]{I1};{U0}[1]{U1}", MalformedReason.MISSING_TAG),
    (answer("[1]", "[]") + " Done.", MalformedReason.TEXT_OUTSIDE),
    ("Sure: " + answer("[1]", "[]"), MalformedReason.TEXT_OUTSIDE),
    (f"{U0}[1]{U1}{I0}[]{I1}", MalformedReason.TEXT_OUTSIDE),
    (answer("[1,,2]", "[]"), MalformedReason.BAD_ID_LIST),
    (answer("[1 2]", "[]"), MalformedReason.BAD_ID_LIST),
    (answer("[1,]", "[]"), MalformedReason.BAD_ID_LIST),
    (answer("[-1]", "[]"), MalformedReason.BAD_ID_LIST),
    (answer("[1.0]", "[]"), MalformedReason.BAD_ID_LIST),
    (answer("1, 2", "[]"), MalformedReason.BAD_ID_LIST),
    (answer("[١]", "[]"), MalformedReason.BAD_ID_LIST),
    (answer("[1234567890]", "[]"), MalformedReason.BAD_ID_LIST),
    (answer(f"[{', '.join(['5'] * 4097)}]", "[]"), MalformedReason.BAD_ID_LIST),
    (answer("[1]", "[a]"), MalformedReason.BAD_ID_LIST),
]


@pytest.mark.parametrize(("text", "fragment"), GOOD)
def test_well_formed(text: str, fragment: Fragment) -> None:
    assert parse_fragment(text) == fragment
    assert malformed_reason(text) is None


@pytest.mark.parametrize(("text", "reason"), BAD)
def test_malformed(text: str, reason: MalformedReason) -> None:
    assert parse_fragment(text) is None
    assert malformed_reason(text) is reason


PLAIN = answer("[1]", "[0]")


@pytest.mark.parametrize(
    "text",
    [
        f"<think>two speakers</think><answer>{PLAIN}</answer>",
        f"  <think></think>\n<answer>\n{PLAIN}\n</answer>\n",
        f"<think>maybe <answer> here</think><answer>{PLAIN}</answer>",
        # A chat template has opened the thought in the prompt; thinking models write no <answer>.
        f"so\n</think>\n<answer>{PLAIN}</answer>",
        f"<think>so</think>\n\n{PLAIN}",
        f"so</think>\n\n{PLAIN}",
    ],
)
def test_reasoning_well_formed(text: str) -> None:
    assert parse_fragment(text, style="reasoning") == Fragment((1,), (0,))
    assert parse_fragment(text) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PLAIN, MalformedReason.NO_REASONING_WRAPPER),
        (f"<answer>{PLAIN}</answer>", MalformedReason.NO_REASONING_WRAPPER),
        (f"<think>a<answer>{PLAIN}</answer>", MalformedReason.NO_REASONING_WRAPPER),
        (f"<think>a</think>b<answer>{PLAIN}</answer>", MalformedReason.NO_REASONING_WRAPPER),
        (f"<think>a</think><answer>{PLAIN}</answer>!", MalformedReason.NO_REASONING_WRAPPER),
        (f"<think><think>a</think><answer>{PLAIN}</answer>", MalformedReason.NO_REASONING_WRAPPER),
        ("<think>a</think><answer>none</answer>", MalformedReason.MISSING_TAG),
        (f"<think>a</think><answer>so {PLAIN}</answer>", MalformedReason.TEXT_OUTSIDE),
    ],
)
def test_reasoning_malformed(text: str, reason: MalformedReason) -> None:
    assert parse_fragment(text, style="reasoning") is None
    assert malformed_reason(text, style="reasoning") is reason


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"<think>at first {answer('[0]', '[1]')}, but no</think><answer>{PLAIN}</answer>", Fragment((1,), (0,))),
        (f"<think>{answer('[0]', '[1]')}</think><answer>so: {PLAIN}", Fragment((1,), (0,))),
        (f"<think>{answer('[0]', '[1]')}</think>\n{PLAIN} indeed", Fragment((1,), (0,))),
        (f"{answer('[0]', '[1]')}</think><answer>nothing</answer>", Fragment((), ())),
        (f"<think>{answer('[0]', '[1]')} and", Fragment((), ())),
        (f"<answer>{PLAIN}</answer>", Fragment((1,), (0,))),
    ],
)
def test_ids_in_a_thought_are_no_answer(text: str, expected: Fragment) -> None:
    assert parse_leniently(text, style="reasoning") == expected


@pytest.mark.parametrize("text", [PLAIN, f"{PLAIN}\n", f" <think>x</think><answer>{PLAIN}</answer>\n"])
def test_golds_with_white_space_around_them(text: str) -> None:
    assert parse_gold(text) == Fragment((1,), (0,))


def test_unknown_style_is_an_error() -> None:
    with pytest.raises(ValueError, match="style: found 'xml'"):
        parse_fragment(PLAIN, style="xml")  # type: ignore[arg-type]


ids = st.lists(st.integers(0, 999_999_999), max_size=30).map(tuple)
fragments = st.builds(Fragment, ids, ids)


@given(fragments)
def test_format_then_parse_is_the_same(fragment: Fragment) -> None:
    text = format_fragment(fragment)
    assert parse_fragment(text) == fragment
    assert parse_fragment(f"<think>x</think><answer>{text}</answer>", style="reasoning") == fragment


pieces = st.sampled_from(
    [*TAGS, "[", "]", ",", ";", " ", "1", "23", "<think>", "</think>", "<answer>", "</answer>", "x"]
)


@given(st.lists(pieces, max_size=25).map("".join) | st.text(max_size=60), st.sampled_from(["plain", "reasoning"]))
def test_never_raises_and_always_gives_a_fragment_or_a_reason(text: str, style: str) -> None:
    fragment = parse_fragment(text, style=style)  # type: ignore[arg-type]
    reason = malformed_reason(text, style=style)  # type: ignore[arg-type]
    assert (fragment is None) == (reason is not None)


@pytest.mark.parametrize(
    "text",
    [
        f"{U0}[" + "1, " * 400_000,
        f"{U0}[" + " " * 1_000_000,
        U0 * 100_000,
        "<think>" * 200_000,
        f"{U0}[" + "1," * 300_000 + f"x]{U1};{I0}[]{I1}",
    ],
)
def test_long_hostile_texts_take_linear_time(text: str) -> None:
    started = time.process_time()
    for style in ("plain", "reasoning"):
        assert parse_fragment(text, style=style) is None  # type: ignore[arg-type]
    # A quadratic parser needs minutes for a megabyte; the bound is far above what a linear one takes.
    assert time.process_time() - started < 20


@pytest.mark.parametrize("style", ["plain", "reasoning"])
def test_ids_in_a_thought_are_read_in_no_style(style: AnswerStyle) -> None:
    draft, answer = format_fragment(Fragment((5,), (1,))), format_fragment(Fragment((3,), ()))
    for text in (
        f"<think>{draft}</think><answer>{answer}</answer>",
        f"{draft}</think>\n{answer}",
        f"so</think>{answer}",
    ):
        assert parse_leniently(text, style=style) == Fragment((3,), ())
    assert parse_leniently(f"<think>{draft} and on", style=style) == Fragment((), ())
