"""`ffr-verl prepare`: what it writes, and that it refuses broken rows by name and writes nothing."""

from __future__ import annotations

import copy
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console
from rich.text import Text

from ffr_verl import cli
from ffr_verl.data import parquet_writer
from ffr_verl.data.demo import demo_rows
from ffr_verl.data.prepare import prepare
from ffr_verl.data.statistics import table_rows
from ffr_verl.data.tokens import estimated_tokens
from ffr_verl.dialogues import parse_dialogue
from ffr_verl.errors import FFRError
from ffr_verl.fragments import parse_fragment
from ffr_verl.rewards import compute_score

Row = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = list(demo_rows(tmp_path / "images", rows=12, seed=3, image_share=0.5))
    assert any(row["images"] for row in rows)
    (tmp_path / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    return tmp_path


def rows_of(folder: Path) -> list[Row]:
    return json.loads((folder / "train.json").read_text(encoding="utf-8"))


def run(folder: Path, rows: list[Row] | None = None, **options: Any) -> Any:
    source = folder / "train.json"
    if rows is not None:
        source.write_text(json.dumps(rows), encoding="utf-8")
    return prepare(source, images_root=folder, output=folder / "out", split="train", **options)


def test_both_files_hold_what_verl_needs(folder: Path) -> None:
    rows = rows_of(folder)
    summary = run(folder)
    assert summary.rows == len(rows) == summary.statistics["dialogues"]
    rl, sft = (pq.read_table(path).to_pylist() for path in (summary.rl_path, summary.sft_path))
    for index, (row, rl_row, sft_row) in enumerate(zip(rows, rl, sft, strict=True)):
        dialogue = parse_dialogue(row["messages"], row["dialogue_id"])
        assert rl_row["prompt"] == row["messages"][:-1]
        assert rl_row["images"] == row["images"] == sft_row["images"]
        assert rl_row["data_source"] == "ffr/mldr"
        assert rl_row["ability"] == "ffr"
        assert rl_row["reward_model"] == {"style": "rule", "ground_truth": row["solution"]}
        assert rl_row["extra_info"] == {
            "index": index,
            "split": "train",
            "dialogue_id": row["dialogue_id"],
            "query": dialogue.query,
            "utterance_ids": [utterance.id for utterance in dialogue.utterances],
            "image_ids": list(range(len(row["images"]))),
            "window": None,
            "image_utterances": list(dialogue.image_utterances),
            "images": row["images"],
        }
        assert sft_row["messages"] == row["messages"]


def test_absolute_paths_become_relative_so_that_the_data_can_move(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    expected = [path.read_bytes() for path in (run(folder).rl_path, run(folder).sft_path)]
    for base in (folder, link):
        rows = rows_of(folder)
        for row in rows:
            row["images"] = [str(base / name) for name in row["images"]]
        source = folder / "absolute.json"
        source.write_text(json.dumps(rows))
        made = prepare(source, images_root=base, output=folder / "out", split="train")
        assert [path.read_bytes() for path in (made.rl_path, made.sft_path)] == expected


def test_the_pixel_bound_is_that_of_the_run(folder: Path) -> None:
    for name in {name for row in rows_of(folder) for name in row["images"]}:
        Image.new("RGB", (1120, 560)).save(folder / name)
    means = [run(folder, max_pixels=bound).statistics["image_tokens_mean"] for bound in (1_000_000, 156_800)]
    assert means[0] == pytest.approx(4 * means[1])  # type: ignore[operator]
    for name in {name for row in rows_of(folder) for name in row["images"]}:
        Image.new("RGB", (2800, 28)).save(folder / name)
    with pytest.raises(FFRError, match=r"image_size [\s\S]*is 2800 x 28: a side vanishes within 50,176 pixels"):
        run(folder, max_pixels=50_176)


def test_json_lines_and_image_objects_give_the_same_files(folder: Path) -> None:
    summary = run(folder)
    expected = pq.read_table(summary.rl_path).to_pylist()
    lines = [{**row, "images": [{"path": path} for path in row["images"]]} for row in rows_of(folder)]
    source = folder / "train.jsonl"
    source.write_text("\ufeff" + "\n\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    again = prepare(source, images_root=folder, output=folder / "out", split="train")
    assert pq.read_table(again.rl_path).to_pylist() == expected


def test_every_gold_answer_earns_the_full_reward(folder: Path) -> None:
    summary = run(folder)
    for row in pq.read_table(summary.rl_path).to_pylist():
        gold = row["reward_model"]["ground_truth"]
        scores = compute_score(row["data_source"], gold, gold, row["extra_info"])
        assert (scores["f1"], scores["format"], scores["exact_match"]) == (1.0, 1.0, 1.0)


def test_a_refused_call_leaves_earlier_files_as_they_were(folder: Path) -> None:
    before = {path: path.read_bytes() for path in (run(folder).rl_path, run(folder).sft_path)}
    rows = copy.deepcopy(rows_of(folder))
    rows[3].pop("solution")
    with pytest.raises(FFRError):
        run(folder, rows)
    assert {path: path.read_bytes() for path in before} == before
    assert sorted((folder / "out").iterdir()) == sorted(before)


def test_missing_source_root_and_bad_split(folder: Path) -> None:
    with pytest.raises(FFRError, match=r"absent\.json: no such file"):
        prepare(folder / "absent.json", images_root=folder, output=folder / "out", split="train")
    with pytest.raises(FFRError, match=r"--images-root: .*: no such folder"):
        prepare(folder / "train.json", images_root=folder / "no", output=folder / "out", split="train")
    with pytest.raises(FFRError, match=r"--split: found 'a/b'"):
        prepare(folder / "train.json", images_root=folder, output=folder / "out", split="a/b")


def test_a_full_disk_is_one_message_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(FFRError, match=r"out: the disk is full"):
        run(folder)
    assert not (folder / "out").exists()


def test_output_that_is_a_file_is_one_message(folder: Path) -> None:
    (folder / "out").write_text("x", encoding="utf-8")
    with pytest.raises(FFRError, match="out: File exists"):
        run(folder)


def test_real_dialogues_go_through_whole(real_data: Path, tmp_path: Path) -> None:
    summary = prepare(real_data / "train.json", images_root=real_data, output=tmp_path, split="train")
    assert summary.rows == len(json.loads((real_data / "train.json").read_text(encoding="utf-8"))) == 985
    assert pq.read_metadata(summary.rl_path).num_rows == pq.read_metadata(summary.sft_path).num_rows == 985
    other = prepare(
        real_data / "val.json", images_root=real_data, output=tmp_path, split="val", against=[summary.rl_path]
    )
    assert not summary.problems.rows
    assert not other.problems.rows, "the splits have ids in common, and no dialogue"
    means = [
        (summary.statistics[name] * 985 + other.statistics[name] * 195) / 1180  # type: ignore[operator]
        for name in ("row_turns_mean", "row_images_mean")
    ]
    assert means == pytest.approx([23.9, 3.2], abs=0.07), "as its README says; exactly 23.90 and 3.26"
    rows = [row for name in ("train", "val") for row in json.loads((real_data / f"{name}.json").read_text())]
    assert means[0] == pytest.approx(
        np.mean([row["messages"][1]["content"].count("<|utt_id_start|>") for row in rows]), abs=1e-3
    )
    assert means[1] == pytest.approx(np.mean([len(row["images"]) for row in rows]), abs=1e-3)


def test_the_same_input_gives_the_same_bytes(folder: Path) -> None:
    first = run(folder)
    before = [path.read_bytes() for path in (first.rl_path, first.sft_path)]
    again = run(folder)
    assert [path.read_bytes() for path in (again.rl_path, again.sft_path)] == before


def test_the_same_bytes_in_another_process_too(folder: Path) -> None:
    rows = rows_of(folder)
    rows[3]["solution"] = "no answer"
    (folder / "train.json").write_text(json.dumps(rows))
    program = """
import sys
from pathlib import Path
from ffr_verl.data.prepare import prepare
from ffr_verl.data.windows import WindowSettings
cut = WindowSettings(3, 2, "published")
out = Path(sys.argv[1])
for split, options in (("a", {"report": out / "r.json"}), ("b", {"embed_images": True, "window": cut})):
    prepare(Path("train.json"), images_root=Path(), output=out, split=split, skip_invalid=True, **options)
"""
    found = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", program, seed], check=True, cwd=folder, env=environment)
        found.append({file.name: file.read_bytes() for file in (folder / seed).iterdir()})
    assert found[0] == found[1]
    written = {f"{split}.{name}" for split in "ab" for name in ("rl.parquet", "sft.parquet", "rejected.jsonl")}
    assert set(found[0]) == {"r.json", *written}


def test_a_terminal_shows_a_bar_and_the_closing_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100, height=40)
    for place in ("prepare", "console"):
        monkeypatch.setattr(f"ffr_verl.cli.{place}.console", terminal)
    arguments = ["prepare", str(folder / "train.json"), "--output", str(folder / "out")]  # images beside the rows
    monkeypatch.setattr(sys, "argv", ["ffr-verl", *arguments, "--split", "train"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert isinstance(terminal.file, io.StringIO)
    shown = Text.from_ansi(terminal.file.getvalue()).plain
    assert "preparing train ━" in shown
    for line in ("turns of a dialogue", "images of a dialogue", "dispersion", "prompt tokens of a row", "empty golds"):
        assert f"│ {line}" in shown
    assert f"wrote {folder / 'out' / 'train.rl.parquet'}" in shown.replace("\n", "")


def test_images_in_the_files(folder: Path) -> None:
    paths = pq.read_table(run(folder).rl_path).column("images").to_pylist()
    summary = run(folder, embed_images=True)
    for file in (summary.rl_path, summary.sft_path):
        images = pq.read_table(file).column("images").to_pylist()
        assert [[image["path"] for image in held] for held in images] == paths
        assert all(image["bytes"] == (folder / image["path"]).read_bytes() for held in images for image in held)


def test_row_groups_stay_small_with_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_writer, "_ROW_GROUP_BYTES", 2000)
    assert pq.read_metadata(run(folder, embed_images=True).rl_path).num_row_groups > 2


def test_statistics(folder: Path) -> None:
    rows = rows_of(folder)
    figures = run(folder).statistics
    dialogues = [parse_dialogue(row["messages"], "") for row in rows]
    golds = [parse_fragment(row["solution"]) for row in rows]
    filled = [gold.utterance_ids for gold in golds if gold is not None and gold.utterance_ids]
    assert figures["rows"] == figures["dialogues"] == len(rows)
    assert figures["turns_mean"] == pytest.approx(np.mean([len(one.utterances) for one in dialogues]), abs=1e-4)
    assert figures["row_images_p95"] == pytest.approx(np.percentile([len(r["images"]) for r in rows], 95), abs=1e-4)
    assert figures["gold_utterances_mean"] == pytest.approx(np.mean([len(ids) for ids in filled]), abs=1e-4)
    assert figures["dispersion_mean"] == pytest.approx(
        np.mean([(ids[-1] - ids[0] + 1) / len(ids) for ids in filled]), abs=1e-4
    )
    assert figures["empty_gold_share"] == pytest.approx(1 - len(filled) / len(rows), abs=1e-4)
    tokens = [estimated_tokens(row["messages"][:-1], [4] * len(row["images"])) for row in rows]
    assert figures["estimated_tokens_mean"] == pytest.approx(np.mean(tokens), abs=1e-4)
    assert figures["image_tokens_mean"] == pytest.approx(4 * np.mean([len(r["images"]) for r in rows]), abs=1e-4)


def test_the_closing_table(folder: Path) -> None:
    lines = {name: (mean, most) for name, mean, most in table_rows(run(folder).statistics)}
    assert list(lines) == [
        "rows",
        "dialogues",
        "turns of a dialogue",
        "images of a dialogue",
        "turns of a row",
        "images of a row",
        "gold utterances, where not empty",
        "gold images, where not empty",
        "dispersion (span / size, 1 = dense)",
        "image tokens of a row",
        "prompt tokens of a row, about",
        "empty golds",
    ]
    assert all(most for name, (_, most) in lines.items() if name not in ("rows", "dialogues", "empty golds"))
