"""Reading a dialogue out of a prompt, and writing it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffr_verl.dialogues import Dialogue, Utterance, parse_dialogue


def messages(content: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "s"}, {"role": "user", "content": content}]


def test_ids_images_and_query() -> None:
    dialogue = parse_dialogue(
        messages(
            "<|query_start|>the cat: at home<|query_end|>\nGive the ids.\n"
            "<|utt_id_start|>0<|utt_id_end|> Ann: look: <|img_id_start|>0<|img_id_end|><image>"
            "<|img_id_start|>1<|img_id_end|><image>\n"
            "<|utt_id_start|>1<|utt_id_end|> Bob: two\nlines\n"
            "<|utt_id_start|>2<|utt_id_end|> no speaker\n"
        ),
        "d",
    )
    assert dialogue.query == "the cat: at home"
    assert dialogue.utterances == (
        Utterance(0, "Ann", "look:", (0, 1)),
        Utterance(1, "Bob", "two\nlines"),
        Utterance(2, "", "no speaker"),
    )
    assert dialogue.image_utterances == (0, 0)
    assert dialogue.image_ids == (0, 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"role": "system", "content": "x"}], "no message of role 'user'"),
        (messages("<|utt_id_start|>0<|utt_id_end|> a: b"), "no <|query_start|>"),
        (messages("<|query_start|>q<|query_end|>"), "no <|utt_id_start|>"),
    ],
)
def test_what_is_missing_is_named(rows: list[dict[str, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        parse_dialogue(rows, "d")


words = st.text(st.characters(categories=["L", "N", "P", "Zs"], exclude_characters=":<>|"), min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("said", "speaker", "text"),
    [
        ("a: b", "a", "b"),
        ("a：b: c", "a", "b: c"),
        ("a:\nb: c", "a", "b: c"),
        ("a:b", "a", "b"),
        ("at 12:30", "", "at 12:30"),
        ("a <b>: c", "a <b>", "c"),
    ],
)
@pytest.mark.parametrize("end", ["", "\n", " \n\n"])
def test_a_line_with_an_image_is_read_like_one_without(said: str, speaker: str, text: str, end: str) -> None:
    for image, ids in (("", ()), ("<|img_id_start|>4<|img_id_end|><image>", (4,))):
        prompt = f"<|query_start|>q<|query_end|><|utt_id_start|>0<|utt_id_end|> {said}{image}{end}"
        assert parse_dialogue(messages(prompt), "d").utterances == (Utterance(0, speaker, text, ids),)


speakers = words.map(str.strip).filter(bool)


@given(
    st.lists(st.tuples(speakers, words.map(str.strip).filter(bool), st.integers(0, 2)), min_size=1, max_size=12), words
)
def test_to_prompt_then_parse_is_the_same(turns: list[tuple[str, str, int]], query: str) -> None:
    utterances, image = [], 0
    for number, (speaker, text, images) in enumerate(turns):
        utterances.append(Utterance(number, speaker, text, tuple(range(image, image + images))))
        image += images
    dialogue = Dialogue("d", tuple(utterances), query)
    assert parse_dialogue(messages(dialogue.to_prompt("Give the ids.")), "d") == dialogue


PIECES = st.sampled_from(
    [
        *(
            f"\n<|utt_id_start|>{number}<|utt_id_end|> {name}"
            for number in (0, 7)
            for name in ("Ann: ", "Bo Li: ", "")
        ),
        *("\n", ": ", "：", "<", "hello", " ", "Ann:hello", "x" * 65 + ": ", "http://x.org"),
        *("<|img_id_start|>4<|img_id_end|><image>", "<|img_id_start|>5<|img_id_end|>", "<|utt_id_start|>"),
    ]
)


@given(st.lists(PIECES, max_size=12))
def test_a_line_reads_the_same_beside_plain_and_other_lines(pieces: list[str]) -> None:
    """Where every line is plain they are split in one go; one that is not, behind them, must change nothing."""
    prompt = f"<|query_start|>q<|query_end|>\n<|utt_id_start|>1<|utt_id_end|> Ann: hi{''.join(pieces)}"
    other = "\n<|utt_id_start|>9<|utt_id_end|> no speaker"
    alone, beside = (parse_dialogue(messages(content), "d") for content in (prompt, prompt + other))
    assert not beside.has_plain_lines
    assert beside.utterances == (*alone.utterances, Utterance(9, "", "no speaker"))
