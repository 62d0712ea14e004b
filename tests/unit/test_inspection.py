"""A row as a person reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers

from ffr_verl.data.demo import demo_rows
from ffr_verl.data.inspection import render_row
from ffr_verl.data.prepare import prepare
from ffr_verl.dialogues import Dialogue, Utterance
from ffr_verl.errors import FFRError
from ffr_verl.fragments import Fragment, format_fragment


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = list(demo_rows(tmp_path / "images", rows=6, seed=3, image_share=0.5, empty_share=0.0))
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    prepare(tmp_path / "rows.json", images_root=tmp_path, output=tmp_path, split="t")
    prepare(tmp_path / "rows.json", images_root=tmp_path, output=tmp_path, split="packed", embed_images=True)
    return tmp_path


def shown(file: Path, row: int, **options: object) -> str:
    console = Console(width=160, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(render_row(file, row, **options))  # type: ignore[arg-type]
    return capture.get()


@pytest.mark.parametrize("name", ["t.rl.parquet", "t.sft.parquet", "rows.json"])
def test_turns_images_query_and_gold(folder: Path, name: str) -> None:
    row = json.loads((folder / "rows.json").read_text())[2]
    text = shown(folder / name, 2, root=folder)
    assert f"row 2: dialogue {row['dialogue_id']}" in text
    assert row["solution"] in text
    assert all(f"{image} (56 x 56 PNG, 4 tokens)" in text for image in row["images"])
    gold = [line for line in text.splitlines() if line.startswith("│ * ")]
    assert len(gold) == json.loads(row["solution"][17:].split("]")[0] + "]").__len__()


@pytest.mark.parametrize(
    ("response", "marks", "told"),
    [
        (
            format_fragment(Fragment((0, 2), (0,))),
            ["*+", "", "+"],
            "gold (*): 1 utterance, 0 images, answer (+): 2",
        ),
        ("I think [0]", ["*", "", ""], "gold (*): 1 utterance, 0 images, answer: malformed (missing_tag)"),
    ],
)
def test_a_prediction_shows_its_answer_beside_the_gold(
    tmp_path: Path, response: str, marks: list[str], told: str
) -> None:
    turns = (Utterance(0, "a", "hi"), Utterance(1, "b", "yes"), Utterance(2, "a", "look", (0,)))
    prompt = [{"role": "user", "content": Dialogue("d", turns, "q").to_prompt("Give the ids.")}]
    row = {"dialogue_id": "d", "messages": prompt, "images": ["cat.png"], "response": response}
    row["labels"] = format_fragment(Fragment((0,), ()))
    (tmp_path / "pred.jsonl").write_text(json.dumps(row))
    text = shown(tmp_path / "pred.jsonl", 0)
    assert told in " ".join(text.split())
    parts = [{"role": "user", "content": [{"type": "text", "text": prompt[0]["content"]}]}]
    (tmp_path / "part.jsonl").write_text(json.dumps({**row, "messages": parts}))
    assert shown(tmp_path / "part.jsonl", 0) == text.replace("pred.jsonl", "part.jsonl")
    cells = [line.split("│") for line in text.splitlines() if re.match(r"│ [*+ ]+│ \d", line)]
    assert [cell[1].strip() for cell in cells] == marks
    assert ("image 0: cat.png (give --images-root to look at it) +" in text) == (marks[0] == "*+")


def test_images_in_the_file_and_without_a_root(folder: Path) -> None:
    for name in ("packed.rl.parquet", "packed.sft.parquet"):
        assert "(56 x 56 PNG, 4 tokens, in the file)" in shown(folder / name, 2)
    assert "(56 x 56 PNG, 4 tokens)" in shown(folder / "rows.json", 2), "as `prepare` finds it"
    (folder / "images").rename(folder / "gone")
    assert "no such file" in shown(folder / "t.rl.parquet", 2)


def test_a_relative_root(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert "(56 x 56 PNG, 4 tokens)" in shown(folder / "rows.json", 2, root=Path(folder.name))


def test_text_of_a_row_is_no_markup(tmp_path: Path) -> None:
    raw = {"dialogue_id": "[red]", "dialogue": [{"speaker": "[b]", "utterance": "[/red] [bold]x"}]}
    raw |= {"query_text": "[link=x]", "gt_turns": []}
    (tmp_path / "raw.jsonl").write_text(json.dumps(raw))
    text = shown(tmp_path / "raw.jsonl", 0)
    for piece in ("dialogue [red]", "[b]", "[/red] [bold]x", "[link=x]", "gold: empty"):
        assert piece in text


def test_what_a_terminal_cannot_take_is_written_as_a_code(tmp_path: Path) -> None:
    raw = {"dialogue_id": "d\x07", "dialogue": [{"speaker": "\x1b[31m", "utterance": "a \x1b]0;x\x07\r b"}]}
    raw |= {"query_text": "q\x1b", "gt_turns": [0]}
    user = "<|query_start|>\ud83d<|query_end|><|utt_id_start|>0<|utt_id_end|> a: b"
    mldr = {"dialogue_id": 1, "messages": [{"role": "user", "content": user}], "images": [], "solution": "x"}
    (tmp_path / "raw.jsonl").write_text(json.dumps(raw))
    (tmp_path / "mldr.jsonl").write_text(json.dumps(mldr))
    text = shown(tmp_path / "raw.jsonl", 0)
    assert not set("\x07\x1b\r") & set(text)
    for piece in (r"dialogue d\x07", r"\x1b[31m", r"a \x1b]0;x\x07\r b", r"q\x1b"):
        assert piece in text
    assert r"\ud83d" in shown(tmp_path / "mldr.jsonl", 0)


def test_prompt_tokens_are_those_of_prepare(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    row = json.loads((folder / "rows.json").read_text())[2]
    assert row["images"]
    (folder / "one.json").write_text(json.dumps([row]))
    summary = prepare(folder / "one.json", images_root=folder, output=folder, split="one", tokenizer=str(folder))
    expected = f"{summary.statistics['prompt_tokens_mean']:,.0f} prompt tokens"
    for name, root in (("t.rl.parquet", None), ("packed.rl.parquet", None), ("rows.json", folder)):
        assert expected in " ".join(shown(folder / name, 2, root=root, tokenizer=str(folder)).split())
    (folder / "images").rename(folder / "gone")
    text = shown(folder / "t.rl.parquet", 2, tokenizer=str(folder))
    assert "prompt tokens and those of images that were not read" in " ".join(text.split())


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [3], "images": []},
        {"messages": "hi"},
        {"messages": [{"role": "user", "content": 4}]},
        {"messages": [{"role": "system", "content": None}, {"role": "user", "content": None}]},
        {"dialogue": 3},
        {"dialogue": [{"utterance": "x"}], "query_text": 3, "gt_turns": []},
    ],
)
def test_a_broken_row_is_one_message(tmp_path: Path, row: dict[str, object]) -> None:
    (tmp_path / "broken.json").write_text(json.dumps([row]))
    with pytest.raises(FFRError, match=r"broken\.json: row 0: "):
        shown(tmp_path / "broken.json", 0)


def test_a_broken_system_message_does_not_hide_the_row(folder: Path) -> None:
    row = json.loads((folder / "rows.json").read_text())[2]
    row["messages"][0]["content"] = None
    (folder / "broken.json").write_text(json.dumps([row]))
    assert row["solution"] in shown(folder / "broken.json", 0)


@pytest.mark.parametrize("images", ["cat.png", 5, [3], [None], [{}]])
def test_broken_images_of_a_row_are_shown(tmp_path: Path, images: object) -> None:
    user = "<|query_start|>q<|query_end|><|utt_id_start|>0<|utt_id_end|> a: <|img_id_start|>0<|img_id_end|><image>"
    row = {"dialogue_id": 1, "messages": [{"role": "user", "content": user}], "images": images, "solution": "x"}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    assert re.search("image 0: .*(no path|no such file|is a folder)", shown(tmp_path / "rows.json", 0, root=tmp_path))


def test_other_files_are_one_message(folder: Path) -> None:
    (folder / "broken.parquet").write_bytes(b"PAR1" + bytes(100))
    pq.write_table(pa.table({"a": [1]}), folder / "other.parquet")
    for name, message in (("broken.parquet", "not a parquet file"), ("other.parquet", "no column messages, images")):
        with pytest.raises(FFRError, match=message):
            shown(folder / name, 0)


def test_what_is_not_there(folder: Path) -> None:
    for name, row, message in (
        ("none.parquet", 0, "no such file"),
        ("t.rl.parquet", 6, r"has 6 rows, there is no row 6 \(the first is 0\)"),
        ("broken.json", 0, "row 0: no message of role 'user'"),
    ):
        (folder / "broken.json").write_text('[{"messages": [], "images": []}]')
        with pytest.raises(FFRError, match=message):
            shown(folder / name, row)
