"""A row as a person reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from ffr_verl.data.demo import demo_rows
from ffr_verl.data.inspection import render_row
from ffr_verl.data.prepare import prepare
from ffr_verl.errors import FFRError


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


def test_images_in_the_file_and_without_a_root(folder: Path) -> None:
    assert "in the file, " in shown(folder / "packed.rl.parquet", 2)
    assert "give --images-root to look at it" in shown(folder / "rows.json", 2)
    (folder / "images").rename(folder / "gone")
    assert "no such file" in shown(folder / "t.rl.parquet", 2)


def test_text_of_a_row_is_no_markup(tmp_path: Path) -> None:
    raw = {"dialogue_id": "[red]", "dialogue": [{"speaker": "[b]", "utterance": "[/red] [bold]x"}]}
    raw |= {"query_text": "[link=x]", "gt_turns": []}
    (tmp_path / "raw.jsonl").write_text(json.dumps(raw))
    text = shown(tmp_path / "raw.jsonl", 0)
    for piece in ("dialogue [red]", "[b]", "[/red] [bold]x", "[link=x]", "gold: empty"):
        assert piece in text


def test_what_is_not_there(folder: Path) -> None:
    for name, row, message in (
        ("none.parquet", 0, "no such file"),
        ("t.rl.parquet", 6, r"has 6 rows, there is no row 6 \(the first is 0\)"),
        ("broken.json", 0, "row 0: no message of role 'user'"),
    ):
        (folder / "broken.json").write_text('[{"messages": [], "images": []}]')
        with pytest.raises(FFRError, match=message):
            shown(folder / name, row)
