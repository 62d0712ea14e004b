"""What a source says is in the result, or `prepare` says that it is not; what is the same is seen to be the same."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from ffr_verl.cli import app, main
from ffr_verl.data import parquet_writer
from ffr_verl.data.compose import ComposeSettings, build
from ffr_verl.data.inspection import render_row
from ffr_verl.data.parquet_files import check_images
from ffr_verl.data.prepare import PrepareSummary, prepare
from ffr_verl.data.windows import WindowSettings
from ffr_verl.dialogues import Utterance, extra_info, parse_dialogue
from ffr_verl.embeddings.store import split_dialogue_id
from ffr_verl.errors import FFRError
from ffr_verl.files import check_output, lock_folder, whole_folder, whole_or_nothing
from ffr_verl.images import resolve_image
from ffr_verl.rewards import batch

Row = dict[str, Any]
RAW: Row = {
    "dialogue_id": "w1",
    "dialogue": [
        {"speaker": "Ann", "utterance": "look at him"},
        {"speaker": "Bob", "utterance": [{"image_url": "cat.png"}]},
    ],
    "query_text": "the cat",
    "gt_turns": [1],
}
GOLD = "<|utt_ids_start|>[1]<|utt_ids_end|>;<|img_ids_start|>[0]<|img_ids_end|>"


def mldr(lines: str = "", **change: Any) -> Row:
    lines = lines or (
        "<|utt_id_start|>0<|utt_id_end|> Ann: look at him\n"
        "<|utt_id_start|>1<|utt_id_end|> Bob: <|img_id_start|>0<|img_id_end|><image>"
    )
    user = f"<|query_start|>the cat<|query_end|>\n{lines}"
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": GOLD}]
    return {"dialogue_id": "w1", "images": ["cat.png"], "solution": GOLD, "messages": messages, **change}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64)).save(tmp_path / "cat.png")
    return tmp_path


def run(folder: Path, rows: list[Row], *, split: str = "t", **options: Any) -> PrepareSummary:
    source = folder / f"{split}.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    kind = "dialogue" if "dialogue" in rows[0] else "mldr"
    options = {"images_root": folder, "output": folder / "out", "source_format": kind, **options}
    return prepare(source, split=split, **options)


def turn(number: int = 0, **fields: Any) -> Row:
    turns = [{**one, **(fields if place == number else {})} for place, one in enumerate(RAW["dialogue"])]
    return {**RAW, "dialogue": turns}


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (turn(image_url="dog.png"), "dialogue[0].image_url"),
        (turn(images=["dog.png"]), "dialogue[0].images"),
        (turn(shared_image=[{"image_url": "http://x.org/1", "id": 3}]), "dialogue[0].shared_image"),
        (turn(imageUrls={"first": "dog"}), "dialogue[0].imageUrls"),
        (turn(attached="dog.JPG"), "dialogue[0].attached"),
        (turn(text="and more words"), "dialogue[0].text"),
        (turn(text="ook at h"), "dialogue[0].text"),
        ({**turn(1, utterance=[{"image_url": "cat.png"}, "11.png"]), "images": ["cat.png", "1.png"]}, "images"),
        (turn(1, utterance=[{"image_url": "cat.png", "text": "words beside it"}]), "dialogue[1].utterance[0].text"),
        ({**RAW, "images": ["dog.png"]}, "images"),
        ({**RAW, "videos": ["v.mp4"]}, "videos"),
        ({**RAW, "queries": [{"query_text": "a dog", "gt_turns": []}]}, "query_text"),
        ({**RAW, "queries": [{"query_text": "the cat", "gt_turns": [], "image": "d.png"}]}, "queries[0].image"),
        (mldr(videos=["v.mp4"]), "videos"),
        (mldr(image="dog.png"), "image"),
        (
            mldr(messages=[{**mldr()["messages"][0], "images": ["dog.png"]}, mldr()["messages"][1]]),
            "messages[0].images",
        ),
    ],
)
def test_a_field_that_looks_like_content_and_is_not_read_is_an_error(folder: Path, row: Row, field: str) -> None:
    with pytest.raises(FFRError) as told:
        run(folder, [row])
    assert "unread_field (1 row): move the content to a field that is read" in str(told.value)
    assert f"field {field!r}: is not read: " in str(told.value)


@pytest.mark.parametrize(
    "row",
    [
        turn(avatar_image="me.png", lang="en", message_id="m17", images=[], text=None, image_count=2),
        turn(text="look at him", image_embedding=[0.25, 1.5]),
        {**RAW, "images": ["cat.png"], "topic": "pets", "summary": "of all", "source_url": "http://x.org"},
        mldr(query="the cat", response=GOLD, logprobs={"content": [{"logprob": -0.5}]}, image_paths=["cat.png"]),
    ],
)
def test_fields_beside_the_dialogue_and_fields_that_repeat_it_are_fine(folder: Path, row: Row) -> None:
    assert not run(folder, [row]).problems.rows


LINES = [
    (" Ann: hello", "Ann", "hello", True),
    (" : hello", "", "hello", True),
    (" Ann: see http://x.org: now", "Ann", "see http://x.org: now", True),
    (" 小明：看这里 http://x.org/a", "小明", "看这里 http://x.org/a", False),
    (" Ann:hello", "Ann", "hello", False),
    (" http://x.org/a", "", "http://x.org/a", False),
    (" at 12:30 then", "", "at 12:30 then", False),
    (" 12:30 then", "", "12:30 then", False),
    (" hello\nand note: this", "", "hello\nand note: this", False),
    (" Ann:hello, note: later", "Ann:hello, note", "later", False),
]


@pytest.mark.parametrize(("line", "speaker", "text", "is_plain"), LINES)
def test_the_words_of_a_line_are_not_taken_for_its_speaker(
    folder: Path, line: str, speaker: str, text: str, is_plain: bool
) -> None:
    row = mldr(
        f"<|utt_id_start|>0<|utt_id_end|>{line}\n<|utt_id_start|>1<|utt_id_end|> Bob: "
        "<|img_id_start|>0<|img_id_end|><image>"
    )
    assert parse_dialogue(row["messages"], "d").utterances[0] == Utterance(0, speaker, text)
    warned = run(folder, [row]).problems.table(errors=False)
    assert ("odd_line (1 row)" in warned) == (not is_plain), warned


def test_an_id_in_the_middle_of_a_line_is_told(folder: Path) -> None:
    row = mldr(mldr()["messages"][0]["content"].partition("\n")[2].replace("\n", " "))
    warned = run(folder, [row]).problems.table(errors=False)
    assert "1 utterances start in the middle of a line, the first at '<|utt_id_start|>1<|utt_id_end|> Bob: " in warned


def test_the_same_picture_under_another_path_is_the_same_dialogue(folder: Path) -> None:
    """Whatever its path looks like, through a link, from another root, and after the folder has moved."""
    (folder / "link.png").symlink_to("cat.png")
    (folder / "sub").mkdir()
    (folder / "below").symlink_to(folder)
    train = run(folder, [RAW], split="train").rl_path
    held = folder.parent / f"{folder.name}_moved"
    held.mkdir()
    (held / "cat.png").write_bytes((folder / "cat.png").read_bytes())
    for root, name in (
        (folder, "./cat.png"),
        (folder, "sub/../below//cat.png"),
        (folder, "link.png"),
        (folder, str(folder / "cat.png")),
        (folder.parent, f"{folder.name}/cat.png"),
        (held, "cat.png"),
    ):
        row = {**turn(1, utterance=[{"image_url": name}]), "dialogue_id": "other"}
        with pytest.raises(FFRError, match=r"other_split \(1 row\)"):
            run(folder, [row], split="val", images_root=root, against=[train])
    with pytest.raises(FFRError, match=r"contradiction \(1 row\)"):
        run(folder, [RAW, {**turn(1, utterance=[{"image_url": "./cat.png"}]), "gt_turns": [0]}])
    Image.new("RGB", (32, 32)).save(folder / "dog.png")
    assert run(folder, [turn(1, utterance=[{"image_url": "dog.png"}])], split="val", against=[train]).rows == 1


def test_the_order_of_gold_ids_is_no_contradiction(folder: Path) -> None:
    golds = [
        f"<|utt_ids_start|>[{ids}]<|utt_ids_end|>;<|img_ids_start|>[0]<|img_ids_end|>" for ids in ("0, 1", "1, 0")
    ]
    rows = []
    for gold in golds:
        row = mldr(solution=gold)
        row["messages"][1]["content"] = gold
        rows.append(row)
    assert {kind.value for kind in run(folder, rows).problems.rows} == {"repeated_row"}


@pytest.mark.parametrize("gold", [f"{GOLD}\n", f" {GOLD} ", f"<think>1?</think><answer>{GOLD}</answer>"])
def test_a_gold_that_can_be_read_is_taken_without_white_space_around_it(folder: Path, gold: str) -> None:
    row = mldr(solution=gold)
    row["messages"][1]["content"] = gold
    (made,) = pq.read_table(run(folder, [row]).rl_path).to_pylist()
    assert made["reward_model"]["ground_truth"] == gold.strip()
    windows = WindowSettings(1, 1, "global")
    made = pq.read_table(run(folder, [row], window=windows).rl_path).to_pylist()[1]
    assert made["reward_model"]["ground_truth"].replace("1?", "") == gold.strip().replace("1?", "")


BASE64 = "iVBORw0KGgo" * 1000


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (turn(1, utterance=[{"image_url": BASE64}]), r"iVBORw0KGgo.*: base64 or another text of 11,000 characters"),
        (turn(1, utterance=[{"image_url": BASE64[:99]}]), r"iVBORw0KGgo.*: base64 or another text of 99 characters"),
        (turn(1, utterance=[{"image_url": f"data:image/png;base64,{BASE64}"}]), "data:image/png;base64,.*: base64 or"),
        (
            turn(0, utterance=f"see data:image/png;base64,{BASE64}"),
            "holds a file as base64 .data:image/png;base64,iVBO",
        ),
        (mldr(images=[BASE64]), "base64 or another text of 11,000 characters; write it to a file"),
        (turn(1, utterance=[{"image_url": {"url": BASE64}}]), "found {'image_url': {'url': 'iVBO"),
        ({**RAW, "gt_turns": BASE64}, "found 'iVBO"),
        ({**RAW, "query_text": [BASE64, 3], "gt_turns": [[], []]}, "found 3, expected a text"),
    ],
)
def test_a_picture_as_base64_is_refused_in_a_line_that_can_be_read(folder: Path, row: Row, reason: str) -> None:
    with pytest.raises(FFRError, match=reason) as told:
        run(folder, [row], report=folder / "r.json")
    assert len(str(told.value)) + (folder / "r.json").stat().st_size < 4000


@pytest.mark.parametrize("text", ['{"a": 1, "b": {"c": 1, "c": 2}}', '[{"a": 0},\n {"b": {"c": [], "c": 2}}]'])
def test_a_key_that_stands_twice_is_an_error(folder: Path, text: str) -> None:
    (folder / "rows.json").write_text(text)
    line = text.count("\n") + 1
    with pytest.raises(FFRError, match=rf"rows\.json: line {line}: the key 'c' stands twice in an object"):
        prepare(folder / "rows.json", images_root=folder, output=folder / "out", split="t")


def test_a_pipe_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(FFRError, match="pipe: a pipe or a device, which is not read; save it as a file first"):
        prepare(folder / "pipe", images_root=folder, output=folder / "out", split="t")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("cat.png/r.json", r"r\.json: .*; give another --report"),
        ("out", "--report .*out: a folder; give the name of a file"),
        ("t.jsonl", r"--report .*t\.jsonl: is read by this command"),
        ("out/t.rl.parquet", r"--report .*t\.rl\.parquet: is read by this command"),
    ],
)
def test_a_report_that_cannot_be_written_is_said_before_anything_is(folder: Path, place: str, message: str) -> None:
    run(folder, [RAW])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(FFRError, match=message):
        run(folder, [RAW], report=folder / place, captions=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_report_does_not_take_the_place_of_the_queries(folder: Path) -> None:
    (folder / "chat.json").write_text(json.dumps([RAW]))
    (folder / "q.txt").write_text("a cat\n")
    arguments = [folder / "chat.json", "--split", "t", "--output", folder / "out", "--query-file", folder / "q.txt"]
    asked = CliRunner().invoke(app, ["prepare", *map(str, arguments), "--report", str(folder / "q.txt"), "--force"])
    assert "q.txt: is read by this command" in str(asked.exception)
    assert (folder / "q.txt").read_text() == "a cat\n"


def test_an_output_that_another_output_will_be_is_refused(folder: Path) -> None:
    with pytest.raises(FFRError, match=r"--report .*t\.rl\.parquet: is read by this command"):
        run(folder, [RAW], report=folder / "out" / "t.rl.parquet")
    assert not (folder / "out" / "t.rl.parquet").exists()


@pytest.mark.parametrize("killed", [False, True])
def test_a_folder_that_was_about_to_be_replaced_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """Between the two renames the command ends, with an exception or without a chance to tidy up."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    if killed:
        left = tmp_path / f".model.{platform.node()}.999999999.aa.partial"
        left.mkdir()
        (tmp_path / "model").rename(left / "old")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "model"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]


def test_rejects_do_not_take_the_place_of_the_source(folder: Path) -> None:
    """As when the rows that were left out are mended in place and prepared again."""
    (folder / "out").mkdir()
    source = folder / "out" / "t.rejected.jsonl"
    source.write_text(json.dumps(RAW))
    for force in (False, True):
        with pytest.raises(FFRError, match=r"t\.rejected\.jsonl: is read by this command"):
            prepare(
                source, images_root=folder, output=folder / "out", split="t", source_format="dialogue", force=force
            )
    with pytest.raises(FFRError, match=r"t\.rejected\.jsonl: is there already"):
        run(folder, [RAW], force=False)
    assert source.read_text() == json.dumps(RAW)


def test_a_report_replaces_nothing_but_a_report(folder: Path) -> None:
    (folder / "notes.txt").write_text("precious")
    with pytest.raises(FFRError, match=r"notes\.txt: is there already"):
        run(folder, [RAW], report=folder / "notes.txt", force=False)
    assert (folder / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize("pid", ["²", "9" * 23, "999999999"])
def test_names_like_those_of_work_in_progress_are_left_alone(tmp_path: Path, pid: str) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "old").touch()
    (tmp_path / f".o.json.{platform.node()}.{pid}.aa.partial").symlink_to(tmp_path / "precious")
    with whole_or_nothing([tmp_path / "o.json"]) as (temporary,):
        temporary.write_text("{}")
    assert (tmp_path / "o.json").read_text() == "{}"
    assert (tmp_path / "precious" / "old").exists()


def test_outputs_that_are_no_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, message in (("pipe", "a pipe or a device"), ("dangling", "is there already"), ("loop", "is there alr")):
        with pytest.raises(FFRError, match=message):
            check_output(tmp_path / name, force=name == "pipe", example="x.json", inputs=[tmp_path / "in"])
    (tmp_path / "work").mkdir()
    os.mkfifo(tmp_path / "work" / "lock")
    with pytest.raises(FFRError, match="lock: a pipe or a device, where ffr-verl keeps work in progress; remove it"):
        lock_folder(tmp_path / "work")


@pytest.mark.parametrize(
    "arguments",
    [
        "score --data in --predictions in --output d.parquet --chart in --force",
        "score --data d.parquet --predictions in --output in.parquet --chart in --force",
        "build d.json in --dialogues 3 --image-map in --force",
        "label d.json --endpoint http://127.0.0.1:9/v1 --output in --prompts in --force",
        "label d.json --endpoint http://127.0.0.1:9/v1 --output in --image-map in --force",
        "ask d.json x --model m --html in --template in --force",
        "evaluate in --json in --force",
        "evaluate d.json --json out.txt --csv none/../out.txt",
    ],
)
def test_outputs_that_are_read_or_written_by_the_command_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("in", "d.json", "d.parquet"):
        (tmp_path / name).write_text("precious")
    monkeypatch.setattr(sys, "argv", ["ffr-verl", *arguments.split()])
    with pytest.raises(SystemExit, match="2"):
        main()
    error = capsys.readouterr().err
    assert "is read by this command" in error or "given for --json and for --csv" in error
    assert (tmp_path / "in").read_text() == "precious"


def test_names_that_are_no_utf8_are_fine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9"))
    odd.mkdir()
    (folder / "cat.png").rename(odd / "cat.png")
    (odd / "rows.jsonl").write_text(json.dumps(RAW))
    arguments = f"--format dialogue --images-root {odd} --output {odd / 'out'} --split t --report {odd / 'r.json'}"
    monkeypatch.setattr(sys, "argv", ["ffr-verl", "prepare", str(odd / "rows.jsonl"), *arguments.split()])
    with pytest.raises(SystemExit, match="0"):
        main()
    made = odd / "out" / "t.rl.parquet"
    assert json.loads((odd / "r.json").read_text())["rows_written"] == 1
    assert check_images([str(made)], odd, sample=True) == 1
    render_row(made, 0)
    with pytest.raises(FFRError, match="other_split"):
        run(folder, [RAW], images_root=odd, against=[made], split="val")
    with pytest.raises(FFRError, match="--split: found"):
        run(folder, [RAW], split="caf\udce9", images_root=odd)


def test_an_image_name_that_is_no_utf8_is_refused(folder: Path) -> None:
    with pytest.raises(FFRError, match=r"bad_text \(1 row\)[\s\S]*images\[0\]': holds half of a surrogate pair"):
        run(folder, [turn(1, utterance=[{"image_url": "caf\udce9.png"}])])


def test_row_groups_stay_small_with_long_texts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_writer, "_ROW_GROUP_BYTES", 10_000)
    rows = [{**turn(utterance=f"{number} " + "x" * 6000), "dialogue_id": f"d{number}"} for number in range(8)]
    made = run(folder, rows)
    for path in (made.rl_path, made.sft_path):
        assert [pq.read_metadata(path).row_group(group).num_rows for group in range(4)] == [2] * 4


def test_the_links_of_a_hub_cache_lead_to_its_own_blobs_only(tmp_path: Path) -> None:
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "r1"
    blobs, other = tmp_path / "datasets--a--b" / "blobs", tmp_path / "datasets--c--d" / "blobs"
    for place in (snapshot / "images", blobs, other, tmp_path / "plain"):
        place.mkdir(parents=True)
    for blob in (blobs / "1f", other / "1f", tmp_path / "secret"):
        Image.new("RGB", (64, 64)).save(blob, "PNG")
    (snapshot / "images" / "cat.png").symlink_to("../../../blobs/1f")
    for name, target in (("other", other / "1f"), ("out", tmp_path / "secret"), ("blobs", blobs)):
        (snapshot / name).symlink_to(target)
    (tmp_path / "plain" / "cat.png").symlink_to(blobs / "1f")
    for root, name in ((snapshot, "images/cat.png"), (snapshot / "images", "cat.png"), (snapshot, "./images/cat.png")):
        assert resolve_image(root, name) == blobs / "1f"
    for root, name in (
        (snapshot, "other"),
        (snapshot, "out"),
        (snapshot, "blobs/1f"),
        (snapshot, "../../blobs/1f"),
        (snapshot, str(blobs / "1f")),
        (tmp_path / "plain", "cat.png"),
    ):
        with pytest.raises(ValueError, match="leaves the images root"):
            resolve_image(root, name)
    row = turn(1, utterance=[{"image_url": str(snapshot / "images" / "cat.png")}])
    (made,) = pq.read_table(run(tmp_path, [row], images_root=snapshot).rl_path).to_pylist()
    assert made["images"] == ["images/cat.png"], "not the blob's name"


def test_files_that_belong_together_come_from_one_of_two_commands(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    script = (
        "import sys, pathlib\nfrom ffr_verl.files import whole_or_nothing\n"
        "paths = [pathlib.Path(name) for name in sys.argv[2:]]\n"
        "for _ in range(100):\n    with whole_or_nothing(paths) as places:\n"
        "        for place in places:\n            place.write_text(sys.argv[1] * 1000)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    writers = [
        subprocess.Popen([sys.executable, "-c", script, name, *map(str, paths)], env=environment) for name in "xy"
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    first, second = (path.read_text() for path in paths)
    assert first == second in ("x" * 1000, "y" * 1000)
    assert sorted(tmp_path.iterdir()) == paths


def short(number: int, topic: Any, **fields: Any) -> Row:
    turns = [{"speaker": "a", "utterance": f"{number} says {turn}"} for turn in range(3)]
    return {"dialogue_id": f"s{number}", "topic": topic, "dialogue": turns, "query_text": f"about {number}", **fields}


def built(folder: Path, rows: list[Row], **settings: Any) -> list[Row]:
    (folder / "short.jsonl").write_text("\n".join(map(json.dumps, rows)))
    build(folder / "short.jsonl", folder / "long.jsonl", dialogues=60, settings=ComposeSettings(**settings))
    return [json.loads(line) for line in (folder / "long.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("zero", [0, "0", 0.0])
def test_topic_zero_is_a_topic(folder: Path, zero: Any) -> None:
    topics: list[Any] = [zero, 0, 1, 1.0, 2, 3, 4]
    rows = [short(number, topic) for number, topic in enumerate(topics)]
    for made in built(folder, rows, negatives=0.5):
        parts = [int(float(topics[int(part[1:])])) for part in made["parts"]]
        assert len(set(parts)) == 3
        (query,) = made["queries"]
        asked = int(float(topics[int(query["query_text"].split()[1])]))
        assert (asked in parts) == bool(query["gt_turns"])


def test_dialogues_without_a_topic_are_each_of_their_own(folder: Path) -> None:
    rows = [short(number, topic) for number, topic in enumerate([None, float("nan"), "", 0])]
    assert {len(set(made["parts"])) for made in built(folder, rows, negatives=0.0)} == {3}


def test_gold_turns_of_short_dialogues_are_kept(folder: Path) -> None:
    rows = [
        short(0, 0, gt_turns=[2]),
        short(1, 1, query_text=["about 1", "again 1"], gt_turns=[[0, 1], []]),
        short(2, 2),
    ]
    rows += [short(3, 3, queries=[{"query_text": "about 3", "gt_turns": [1]}])]
    del rows[3]["query_text"]
    expected = {"about 0": [2], "about 1": [0, 1], "again 1": [], "about 2": [0, 1, 2], "about 3": [1]}
    seen = set()
    for made in built(folder, rows, topics=4, negatives=0.0, queries=4):
        for query in made["queries"]:
            number = query["query_text"].split()[1]
            texts = [made["dialogue"][turn]["utterance"] for turn in query["gt_turns"]]
            assert texts == [f"{number} says {turn}" for turn in expected[query["query_text"]]]
            seen.add(query["query_text"])
    assert seen == set(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topic": [1]}, r"row 0: field 'topic': found \[1\], expected a text or a number"),
        ({"gt_turns": [7]}, r"row 0: gt_turns: \[7\] are no utterance_idx"),
        ({"images": ["cat.png"]}, "row 0: images: is not read: 'cat.png'"),
    ],
)
def test_short_dialogues_that_would_lose_something_are_refused(folder: Path, change: Row, message: str) -> None:
    with pytest.raises(FFRError, match=message):
        built(folder, [{**short(0, 0), **change}])


def test_both_formats_with_gold_answers_give_what_rewards_know(folder: Path) -> None:
    for name, row in {"mldr": mldr(), "dialogue": RAW}.items():
        (made,) = pq.read_table(run(folder, [row], source_format=name).rl_path).to_pylist()
        dialogue = parse_dialogue(made["prompt"], "w1")
        assert made["extra_info"] == {"index": 0, "window": None, **extra_info(dialogue, made["images"], split="t")}


def test_rewards_know_a_dialogue_from_columns_as_from_extra_info(folder: Path) -> None:
    """Windows with the ids of the whole dialogue, and dialogues of a split that share an id."""
    store = {"utt:d:4": [1.0, 0.0], f"utt:{split_dialogue_id('val', 'd')}:4": [0.0, 1.0], "img:a.png": [0.0, 1.0]}
    user = (
        "<|query_start|>q<|query_end|>\n<|utt_id_start|>4<|utt_id_end|> a: hi <|img_id_start|>7<|img_id_end|><image>"
    )
    answer = "<|utt_ids_start|>[4]<|utt_ids_end|>;<|img_ids_start|>[7]<|img_ids_end|>"
    columns: dict[str, Any] = {
        "messages": [[{"role": "user", "content": user}]],
        "dialogue_id": ["d"],
        "images": [["a.png"]],
        "split": ["val"],
    }
    info = extra_info(parse_dialogue(columns["messages"][0], "d"), ["a.png"], split="val")
    for given in ({"extra_info": [info]}, columns, {**columns, "extra_info": [None]}):
        assert batch.coherence([answer], [answer], store=store, **given) == [1.0]
    assert batch.coherence([answer], [answer], store=store, **{**columns, "split": [None]}) == [0.0]
    no_images = {**columns, "images": [None]}
    assert batch.mcc([answer], [answer], **no_images) == batch.mcc([answer], [answer], **{**columns, "images": [[]]})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"messages": [None], "dialogue_id": ["d"]}, "row 0 of the batch: column messages: no message of role 'user'"),
        ({"messages": [[None]], "dialogue_id": ["d"]}, "row 0 of the batch: column messages: "),
        (
            {"messages": [[{"role": "user", "content": None}]], "dialogue_id": ["d"]},
            "column messages: no <|query_start|>",
        ),
        ({"messages": [mldr()["messages"]], "dialogue_id": [None]}, "row 0 of the batch: column dialogue_id: missing"),
        ({"messages": [mldr()["messages"]]}, "row 0 of the batch: column dialogue_id: missing"),
        ({"messages": [mldr()["messages"]] * 2, "dialogue_id": ["d"]}, "column messages: 2 values for 1 completions"),
        ({"extra_info": [None]}, "needs the dialogue of each row|row 0 of the batch"),
        ({}, "this reward needs the dialogue of each row"),
    ],
)
def test_columns_that_lack_a_dialogue_are_named(columns: Row, message: str) -> None:
    with pytest.raises(FFRError) as told:
        batch.mcc([GOLD], [GOLD], **columns)
    assert any(part in str(told.value) for part in message.split("|row")) or message in str(told.value)


def test_prompts_of_parts_are_read_whatever_else_is_in_them() -> None:
    messages = mldr()["messages"]
    parts = [None, {"type": "text", "text": messages[-2]["content"]}, {"type": "thinking", "text": "hm"}]
    columns: Row = {"messages": [[*messages[:-2], {"role": "user", "content": parts}]], "dialogue_id": ["d"]}
    assert batch.mcc([GOLD], [GOLD], **columns) == batch.mcc([GOLD], [GOLD], messages=[messages], dialogue_id=["d"])
