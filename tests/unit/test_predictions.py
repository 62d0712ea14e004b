"""Prediction files: what is read, and what is said of broken ones."""

from __future__ import annotations

import gzip
import json
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ffr_verl.dialogues import Utterance, parse_dialogue
from ffr_verl.errors import FFRError
from ffr_verl.evaluation import BootstrapSettings, evaluate_file, read_predictions, read_verl_dump, row_statistics
from ffr_verl.predictions import LONGEST_LINE, UnusableLines, read_answered

GOLD = "<|utt_ids_start|>[1, 2]<|utt_ids_end|>;<|img_ids_start|>[0]<|img_ids_end|>"
PROMPT = "Find <|query_start|>it<|query_end|>\n" + "\n".join(
    f"<|utt_id_start|>{turn}<|utt_id_end|> a: b" for turn in range(4)
)
ROW: dict[str, Any] = {
    "response": GOLD,
    "labels": GOLD,
    "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": PROMPT}],
    "images": ["a.jpg"],
    "dialogue_id": "d",
}


def written(path: Path, *rows: Any) -> Path:
    """A file of lines; bytes and texts as they are, the rest as JSON."""
    encoded = [
        row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else json.dumps(row).encode()
        for row in rows
    ]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in ROW.items() if key != name}


def test_every_field_is_read(tmp_path: Path) -> None:
    logprobs = {"content": [{"logprob": -0.5, "token": "x"}, {"logprob": -1}]}
    row = {**ROW, "images": ["a.jpg", {"path": "b.jpg"}], "logprobs": logprobs, "split": "val", "error": "too long"}
    [found] = read_predictions(written(tmp_path / "p.jsonl", row))
    assert (found.line, found.response, found.labels, found.dialogue_id) == (1, GOLD, GOLD, "d")
    assert found.messages == tuple(row["messages"])
    assert found.images == ("a.jpg", "b.jpg")
    assert found.logprobs == (-0.5, -1.0)
    assert (found.error, found.extra) == ("too long", {"split": "val"})


@pytest.mark.parametrize(
    "row",
    [
        {**ROW, "dialogue_id": 7},
        without("images"),
        {**ROW, "images": None},
        {**ROW, "logprobs": None},
        {**ROW, "logprobs": {"content": None}},
        {**ROW, "logprobs": {"content": [{"logprob": -math.inf}]}},
        {**ROW, "response": "\ud83d"},
        {**ROW, "response": "日本語 \u00e9 😀"},
        {**ROW, "labels": f"<think>x</think><answer>{GOLD}</answer>"},
        {**ROW, "messages": [*ROW["messages"], {"role": "assistant", "content": GOLD, "loss": True}]},
        {**ROW, "messages": [{"role": "user", "content": PROMPT}]},
        {**ROW, "messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]},
        {**ROW, "messages": [*ROW["messages"], {"role": "assistant", "content": None, "tool_calls": []}]},
        {**ROW, "images": [{"bytes": "x"}]},
        {**ROW, "logprobs": {"content": [{"logprob": None}]}},
    ],
    ids=lambda row: str({key: value for key, value in row.items() if ROW.get(key) != value})[:40],
)
def test_unusual_rows_are_taken(tmp_path: Path, row: dict[str, Any]) -> None:
    path = written(tmp_path / "p.jsonl", ROW, row)
    _, second = read_predictions(path)
    assert second.dialogue_id == str(row["dialogue_id"])
    assert evaluate_file(path).samples == 2


def test_gzip_bom_blank_lines_and_line_ends_of_windows(tmp_path: Path) -> None:
    text = ("\ufeff" + json.dumps(ROW) + "\r\n\n  \n" + json.dumps(ROW)).encode()
    for name, data in (("p.jsonl", text), ("p.jsonl.gz", gzip.compress(text))):
        (tmp_path / name).write_bytes(data)
        assert [found.line for found in read_predictions(tmp_path / name)] == [1, 4]
        assert evaluate_file(tmp_path / name).samples == 2


def test_a_key_twice_in_a_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text("[" + json.dumps(ROW)[:-1] + ', "labels": ""}]')
    for read in (lambda: list(read_predictions(path)), evaluate_of(path)):
        with pytest.raises(FFRError, match=r"p\.json: the key 'labels' stands twice in an object"):
            read()


Broken = dict[str, tuple[Any, str]]
BROKEN: Broken = {
    "cut": (json.dumps(ROW)[:-5], r"line 2: cut off, or not JSON \(.* at column \d+\); make the file again"),
    "cut in the middle of a character": (
        json.dumps({"a": "é"}, ensure_ascii=False).encode()[:-3],
        "line 2: not UTF-8",
    ),
    "not JSON": ("{'response': 1}", r"line 2: not JSON \(.* at column 2\)"),
    "two rows in a line": (json.dumps(ROW) * 2, r"line 2: not JSON \(Extra data at column \d+\)"),
    "a row over two lines": (json.dumps(ROW).replace(', "labels"', ',\n"labels"'), "line 2: cut off"),
    "nested deeply": ("[" * 100_000 + "]" * 100_000, r"line 2: not JSON \(nested too deeply\)"),
    "a number without end": ('{"response": ' + "9" * 5000 + "}", r"line 2: not JSON \(a number of thousands of dig"),
    "a key twice": (
        json.dumps(ROW)[:-1] + ', "response": ""}',
        "line 2: the key 'response' stands twice in an object; keep one of them",
    ),
    "NUL": (b"\0" * 300, "line 2: holds NUL bytes, as after an interrupted write"),
    "not UTF-8": (b'{"response": "\xff"}', "line 2: not UTF-8 at byte 14 of it; convert it"),
    "not UTF-8 in a field that is not needed": (
        json.dumps(ROW).encode()[:-1] + b', "note": "\xff"}',
        r"line 2: not UTF-8 at byte \d+ of it",
    ),
    "a list": ([ROW], "line 2: found a list, expected an object: one prediction a line"),
    "the first line of a list": ("[", "line 2: starts a list, expected an object"),
    "a parquet file": ("PAR1" + chr(0), "line 2: a parquet file; make predictions of a data set"),
    "a number": (3, "line 2: found a number, expected an object"),
    "no response": (without("response"), "line 2: field response is missing, found labels, messages, images"),
    "no labels": ({**ROW, "labels": None}, "line 2: field labels is null: an unlabelled row"),
    "no messages": (without("messages"), "line 2: field messages is missing"),
    "nothing": ({}, "line 2: fields response, labels, messages are missing, found none"),
    "a row of a data set": (
        {"images": [], "dialogue_id": "d", "solution": GOLD, "messages": ROW["messages"]},
        "line 2: fields response, labels are missing, found .*; rows of a data set are no predictions, make some with",
    ),
    "a row of verl": ({"input": PROMPT, "output": GOLD, "gts": GOLD}, "line 2: .* are missing.*give --format verl"),
    "response of another kind": ({**ROW, "response": [GOLD]}, "line 2: field response: found a list, expected text"),
    "labels of another kind": ({**ROW, "labels": {"x": 1}}, "line 2: field labels: found an object, expected text"),
    "a malformed gold": (
        {**ROW, "labels": GOLD[:-3]},
        "line 2: field labels: malformed gold answer '<|utt_ids_start|>",
    ),
    "dialogue_id of another kind": ({**ROW, "dialogue_id": True}, "line 2: field dialogue_id: found true or false"),
    "messages of another kind": ({**ROW, "messages": PROMPT}, "line 2: field messages: found text, expected a list"),
    "a message of another kind": (
        {**ROW, "messages": [PROMPT]},
        r"line 2: field messages\[0\]: found text, expected an object",
    ),
    "parts without a text": (
        {**ROW, "messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "line 2: field messages: no message of role 'user' with a text",
    ),
    "content of another kind": (
        {**ROW, "messages": [{"role": "user", "content": 3}]},
        r"line 2: field messages\[0\].content: found a number, expected text or a list",
    ),
    "no content": ({**ROW, "messages": [{"role": "user"}]}, "line 2: field messages: no message of role 'user' with"),
    "no user": ({**ROW, "messages": ROW["messages"][:1]}, "line 2: field messages: no message of role 'user'"),
    "images of another kind": ({**ROW, "images": 3}, "line 2: field images: found a number, expected a list"),
    "content of logprobs of another kind": (
        {**ROW, "logprobs": {"content": 3}},
        "line 2: field logprobs.content: found a number, expected a list",
    ),
    "logprobs of another kind": ({**ROW, "logprobs": [-0.1]}, "line 2: field logprobs: found a list, expected an obj"),
    "a logprob that is no number": (
        {**ROW, "logprobs": {"content": [{"logprob": "0"}]}},
        r"line 2: field logprobs.content\[0\].logprob: found text, expected a number",
    ),
    "a token without logprob": (
        {**ROW, "logprobs": {"content": [{"token": "x"}]}},
        r"line 2: field logprobs.content\[0\]: object missing required field `logprob`",
    ),
}


@pytest.mark.parametrize(("broken", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_line_is_named_or_left_out(tmp_path: Path, broken: Any, message: str) -> None:
    path = written(tmp_path / "p.jsonl", ROW, broken, ROW)
    skipped: list[tuple[int, str]] = []
    readers: tuple[Callable[..., Any], ...] = (
        lambda **options: list(read_predictions(path, **options)),
        evaluate_of(path),
    )
    for read in readers:
        with pytest.raises(FFRError, match=message) as raised:
            read()
        assert str(raised.value).startswith(f"{path}: line 2: ")
        skipped.clear()
        found = read(lenient=True, on_skipped=lambda line, reason: skipped.append((line, reason)))
        assert (len(found) if isinstance(found, list) else found.samples) == 2
        assert skipped[0][0] == 2
        assert len(skipped) == (2 if "\n" in str(broken) else 1)
        if not isinstance(found, list):
            assert found.skipped == len(skipped)


def evaluate_of(path: Path) -> Callable[..., Any]:
    return lambda **options: evaluate_file(path, **options)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"{}\n{}\n"])
def test_nothing_usable_is_an_error_even_when_lenient(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    left_out = r", 2 lines left out" if content.startswith(b"{") else ""
    for read in (lambda: list(read_predictions(path, lenient=True)), lambda: evaluate_file(path, lenient=True)):
        with pytest.raises(FFRError, match=f"no predictions{left_out}; give a JSONL file, one prediction a line"):
            read()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FFRError, match=r"no such file or directory; give a JSONL file"):
        list(read_predictions(tmp_path / "missing"))
    with pytest.raises(FFRError, match="is a directory"):
        list(read_predictions(tmp_path))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(json.dumps(ROW).encode() * 1000)[:-20])
    with pytest.raises(FFRError, match="broken gzip file"):
        list(read_predictions(tmp_path / "cut.gz"))


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", ROW)
    with path.open("r+b") as file:
        file.seek(0, 2)
        start = file.tell()
        file.truncate(start + 2**27)  # a hole: it reads as 128 MiB of NUL bytes, and takes no room on disk
        file.seek(0, 2)
        file.write(b"\n" + json.dumps(ROW).encode())
    skipped: list[tuple[int, str]] = []
    tracemalloc.start()
    with pytest.raises(
        FFRError, match="line 2: longer than 8 MiB; give one row a line; or leave such lines out with --l"
    ):
        evaluate_file(path)
    found = list(read_predictions(path, lenient=True, on_skipped=lambda *fault: skipped.append(fault)))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [one.line for one in found] == [1, 3]
    assert skipped == [(2, "longer than 8 MiB; give one row a line")]
    assert most < 3 * LONGEST_LINE


@pytest.mark.parametrize("read", ["predictions", "evaluate"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str) -> None:
    monkeypatch.setattr(row_statistics, "_CHUNK", 256)

    def peak(rows: int) -> int:
        path = tmp_path / "p.jsonl"
        long = {**ROW, "messages": [{"role": "user", "content": PROMPT + "x" * 3000}]}
        path.write_text((json.dumps(long) + "\n") * rows)
        tracemalloc.start()
        if read == "evaluate":
            evaluate_file(path, bootstrap=BootstrapSettings(resamples=50))
        else:
            assert sum(1 for _ in read_predictions(path)) == rows
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    few, many = peak(600), peak(2_400)
    assert many - few < 1_800 * 150, "88 bytes a row are kept, not the row"


def test_the_quick_reader_and_the_thorough_one_give_the_same(tmp_path: Path) -> None:
    rows = [{**ROW, "dialogue_id": f"d{number}", "response": "x" * number} for number in range(60)]
    rows[40]["dialogue_id"] = 40  # the quick reader does not take it
    rows[7]["error"] = rows[41]["error"] = "too long"
    path = written(tmp_path / "p.jsonl", *rows)
    expected = [
        (one.line, one.response, one.labels, PROMPT, one.dialogue_id, one.error) for one in read_predictions(path)
    ]
    assert list(read_answered(path, UnusableLines(path))) == expected


def test_a_file_that_verl_wrote(tmp_path: Path) -> None:
    row = {"input": f"system\ns\nuser\n{PROMPT}\nassistant\n", "output": GOLD, "gts": GOLD, "score": 1.3, "step": 4}
    path = written(tmp_path / "4.jsonl", {**row, "f1": 1.0}, {**row, "output": "no"})
    first, _ = read_verl_dump(path)
    assert (first.response, first.labels, first.dialogue_id, first.images) == (GOLD, GOLD, "", ())
    assert first.extra == {"score": 1.3, "step": 4, "f1": 1.0}
    result = evaluate_file(path, row_format="verl")
    assert (result.samples, result.rewards["f1"], result.malformed["missing_tag"]) == (2, 0.5, 1)
    written(path, {**row, "input": "tags were special tokens"})
    with pytest.raises(FFRError, match=r"line 1: field input: no <\|utt_id_start\|>; verl drops special tokens"):
        evaluate_file(path, row_format="verl")
    written(path, {**row, "gts": None})
    with pytest.raises(FFRError, match="line 1: field gts is null, expected text; or leave"):
        list(read_verl_dump(path))
    written(path, ROW)
    with pytest.raises(FFRError, match=r"line 1: fields input, output, gts are missing.*leave --format verl out"):
        list(read_verl_dump(path))


def few_shot(dialogue: str) -> list[dict[str, Any]]:
    """An example with eight utterances, and what is asked."""
    example = "<|query_start|>other<|query_end|>\n" + "".join(
        f"<|utt_id_start|>{n}<|utt_id_end|> x: y" for n in range(8)
    )
    return [
        {"role": "user", "content": example},
        {"role": "assistant", "content": GOLD},
        {"role": "user", "content": dialogue},
        {"role": "assistant", "content": GOLD},
    ]


def test_examples_of_how_to_answer_are_not_the_dialogue(tmp_path: Path) -> None:
    messages = few_shot(PROMPT)
    path = written(tmp_path / "p.jsonl", {**ROW, "messages": messages})
    assert [one.prompt for one in read_predictions(path)] == [PROMPT]
    assert [one[3] for one in read_answered(path, UnusableLines(path))] == [PROMPT]
    plain = evaluate_file(written(tmp_path / "q.jsonl", ROW), bootstrap=BootstrapSettings(0))
    assert evaluate_file(path, bootstrap=BootstrapSettings(0)) == plain
    dump = "".join(f"{message['role']}\n{message['content']}\n" for message in messages[:-1])
    [found] = read_verl_dump(written(tmp_path / "d.jsonl", {"input": dump, "output": GOLD, "gts": GOLD}))
    assert found.prompt.startswith("<|query_start|>it<")


@pytest.mark.parametrize(
    "ending", ["\nassistant\n", "<|im_end|>\n<|im_start|>assistant\n", "\nassistant\n<think>\n\n</think>\n\n"]
)
def test_the_chat_template_is_no_part_of_verls_last_turn(ending: str, tmp_path: Path) -> None:
    image = "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
    dump = f"user\n{PROMPT} see<|img_id_start|>0<|img_id_end|>{image}{ending}"
    [found] = read_verl_dump(written(tmp_path / "d.jsonl", {"input": dump, "output": GOLD, "gts": GOLD}))
    assert parse_dialogue(found.messages, "").utterances[-1] == Utterance(3, "a", "b see", (0,))


def test_a_dialogue_id_is_needed_by_a_comparison_only(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", without("dialogue_id"), {**ROW, "dialogue_id": None})
    assert [one.dialogue_id for one in read_predictions(path)] == ["", ""]
    assert evaluate_file(path).samples == 2


def test_a_json_list_is_read_as_its_rows(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "logprobs": {"content": [{"logprob": -math.inf}]}}]
    (tmp_path / "p.json").write_text(json.dumps(rows, indent=2))
    assert [one.logprobs for one in read_predictions(tmp_path / "p.json")] == [(), (-9999.0,)]
    assert evaluate_file(tmp_path / "p.json") == evaluate_file(written(tmp_path / "p.jsonl", *rows))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_another_encoding_is_named(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps(ROW), encoding=encoding)
    for read in (lambda path: list(read_predictions(path)), evaluate_file):
        with pytest.raises(FFRError, match=r"p\.jsonl: UTF-16, expected UTF-8; convert it: iconv -f UTF-16"):
            read(tmp_path / "p.jsonl")


def test_an_answer_of_verl_that_was_cut_off_before_it_said_anything_is_none(tmp_path: Path) -> None:
    empty = GOLD.replace("1, 2", "").replace("0", "")
    row = {"input": PROMPT, "output": " ", "gts": empty, "cut_off": 1.0}
    result = evaluate_file(written(tmp_path / "1.jsonl", row, {**row, "cut_off": 0.0}), row_format="verl")
    assert (result.unanswered["any"], result.malformed["empty"]) == (1, 1)


def test_what_swift_infer_writes_is_read(tmp_path: Path) -> None:
    """ms-swift 4.6: no `dialogue_id` unless told to keep it, `logprobs` null, images with `bytes`."""
    row = {
        **without("dialogue_id"),
        "logprobs": None,
        "images": [{"bytes": None, "path": "a.jpg"}],
        "dataset": "d.json",
    }
    [found] = read_predictions(written(tmp_path / "swift.jsonl", row))
    assert (found.images, found.logprobs, found.extra) == (("a.jpg",), (), {"dataset": "d.json"})
