"""`ffr-verl report`: what is in the file, and that nothing from data can be anything but text there."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ffr_verl.cli import app
from ffr_verl.data.prepare import prepare
from ffr_verl.dialogues import Dialogue, Utterance
from ffr_verl.embeddings import write_store
from ffr_verl.errors import FFRError
from ffr_verl.evaluation import evaluate, read_predictions
from ffr_verl.evaluation.report import ReportSettings, write_report
from ffr_verl.evaluation.report.page import script_json
from ffr_verl.evaluation.report.rows import ReportRows, reward_settings
from ffr_verl.fragments import Fragment, format_fragment
from ffr_verl.rewards import compute_score

EVIL = (
    "</script><script>alert(1)</script>",
    "<!-- <script>",
    "<img src=x onerror=alert(1)>",
    "]]></style><style>*{display:none}</style>",
    '"><svg onload=alert(1)>',
    "{{ 7 * 7 }}{% raw %}",
    "a\u2028b\u2029c\x00\x1b[31m",
    "half a pair: \ud83d",
    "&lt;b&gt; &amp;",
)


def answer(utterances: tuple[int, ...] = (), images: tuple[int, ...] = ()) -> str:
    return format_fragment(Fragment(utterances, images))


def row(
    response: str, labels: str = answer((1,), (0,)), *, query: str = "a cat", text: str = "look", **fields: Any
) -> dict[str, Any]:
    utterances = (
        Utterance(0, "user1", "hello"),
        Utterance(1, "user2", text, (0,)),
        Utterance(2, "user1", "nice", (1,)),
    )
    prompt = Dialogue("d", utterances, query).to_prompt("Give the ids.")
    return {
        "response": response,
        "labels": labels,
        "messages": [{"role": "user", "content": prompt}],
        "images": ["images/cat.png", "images/dog.png"],
        "dialogue_id": "d",
        **fields,
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With `images/cat.png` and `images/dog.png`."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (600, 300), "red").save(tmp_path / "images" / "cat.png")
    Image.new("RGB", (30, 40), "blue").save(tmp_path / "images" / "dog.png")
    return tmp_path


def report_of(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> str:
    write_report(write_rows(folder / "pred.jsonl", rows), folder / "r.html", ReportSettings(**settings), force=True)
    return (folder / "r.html").read_text(encoding="utf-8")


def embedded(page: str, name: str = 'id="report-data"') -> Any:
    found = re.search(rf'<script type="application/json" {name}>(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


class Elements(HTMLParser):
    """Every start tag of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


# ---- escaping


@pytest.mark.parametrize("text", EVIL)
def test_json_in_a_script_element_is_the_value_and_cannot_end_it(text: str) -> None:
    made = str(script_json({"text": text, text: [text]}))
    assert json.loads(made) == {"text": text, text: [text]}
    assert not re.search("[<>&\u2028\u2029\ud800-\udfff]", made)


def test_hostile_data_adds_no_element_to_the_page(folder: Path) -> None:
    tame = Elements(report_of(folder, [row("tame", images=["none.png", "none.png"])] * len(EVIL))).tags
    rows = [
        row(text, text=text.replace("\x00", ""), query=text, dialogue_id=text, images=[text, text]) for text in EVIL
    ]
    page = report_of(folder, rows, title=EVIL[0] + EVIL[4])
    found = Elements(page).tags
    # One <li> for each image that is not there, and each row names another.
    assert [tag for tag, _ in found if tag != "li"] == [tag for tag, _ in tame if tag != "li"]
    assert not [name for _, attributes in found for name in attributes if name.startswith("on")]
    data = embedded(page)
    assert [one["query"] for one in data["rows"]] == list(EVIL)
    assert [one["answer"] for one in data["rows"]] == list(EVIL)
    assert html.escape(EVIL[0] + EVIL[4], quote=False).replace('"', "&#34;") in page
    assert "49" not in re.findall(r"<title>(.*?)</title>", page)[0]


def test_the_page_allows_its_own_script_and_style_only(folder: Path) -> None:
    page = report_of(folder, [row(answer((1,), (0,)))])
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy.group(1).startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy.group(1)
    for tag in ("style", "script"):
        [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy.group(1)


def test_nothing_of_the_page_lies_elsewhere(folder: Path) -> None:
    for tag, attributes in Elements(report_of(folder, [row(answer((1,), (0,)))])).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "action", "data", "srcset"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)


# ---- rows


def rows_of(records: list[dict[str, Any]], folder: Path, **rewards: Any) -> ReportRows:
    rows = ReportRows(
        reward_settings(**{"embeddings": None, "coherence_mode": "continuous", "answer_style": "plain", **rewards})
    )
    for prediction in read_predictions(write_rows(folder / "rows.jsonl", records)):
        rows.add(prediction)
    return rows


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (answer((1,), (0,)), {"malformed": False, "fault": None, "f1": 1.0}),
        (answer((1, 1), (0,)), {"malformed": False, "fault": "repeated_id", "f1": 0.8167}),
        (answer((1, 9), (0,)), {"malformed": False, "fault": "id_outside_dialogue", "f1": 0.8167}),
        ("I think " + answer((1,), (0,)), {"malformed": True, "fault": "text_outside", "f1": 0.0}),
        ("", {"malformed": True, "fault": "empty", "f1": 0.0}),
        ("no idea", {"malformed": True, "fault": "missing_tag", "f1": 0.0}),
    ],
)
def test_a_row_tells_its_faults_and_rewards(response: str, expected: Mapping[str, Any], tmp_path: Path) -> None:
    [made] = rows_of([row(response)], tmp_path).rows
    assert {"malformed": made["malformed"], "fault": made["fault"], "f1": made["rewards"]["f1"]} == pytest.approx(
        expected, abs=1e-4
    )
    assert made["outside"]["utterances"] == ([9] if "9" in response else [])


def test_a_malformed_answer_is_read_leniently_for_the_marks(tmp_path: Path) -> None:
    [made] = rows_of([row("So: " + answer((1, 2), (0,)))], tmp_path).rows
    assert made["predicted"] == {"utterances": [1, 2], "images": [0]}
    assert made["rewards"]["score"] == 0.0


def test_rewards_are_those_of_compute_score(tmp_path: Path) -> None:
    response, labels = answer((0, 1), (0,)), answer((1,), (0, 1))
    [made] = rows_of([row(response, labels)], tmp_path).rows
    info = {"utterance_ids": [0, 1, 2], "images": ["a", "b"]}
    weights = {"f1": 1.0, "format": 0.3, "mcc": 0.0}
    expected = compute_score("", response, labels, info, weights=weights)
    del expected["coherence"]  # not computed without a store
    assert made["rewards"] == pytest.approx(expected, abs=1e-4)


def test_coherence_comes_from_the_store(tmp_path: Path) -> None:
    vectors = {"utt:d:0": (1, 0), "utt:d:1": (0.6, 0.8), "utt:d:2": (0, 1), "img:images/cat.png": (0.6, 0.8)}
    write_store(tmp_path / "store", [(key, np.array(one, np.float32)) for key, one in vectors.items()], model="none")
    [made] = rows_of([row(answer((0, 1)))], tmp_path, embeddings=str(tmp_path / "store")).rows
    assert made["rewards"]["coherence"] == pytest.approx(0.6, abs=1e-3)
    assert made["rewards"]["score"] == pytest.approx(sum(made["rewards"][name] for name in ("f1", "coherence")) + 0.3)


def test_a_dialogue_of_several_rows_is_kept_once(tmp_path: Path) -> None:
    rows = rows_of([row("a", query="one"), row("b", query="two"), row("c", text="other")], tmp_path)
    assert [one["dialogue"] for one in rows.rows] == [0, 0, 1]
    assert [one["query"] for one in rows.rows] == ["one", "two", "a cat"]
    assert rows.image_names == ["images/cat.png", "images/dog.png"]
    assert rows.dialogues[0]["turns"][1] == {
        "id": 1,
        "speaker": "user2",
        "text": "look",
        "images": [{"id": 0, "at": 0}],
    }


def test_captions_and_images_without_a_path_are_told(tmp_path: Path) -> None:
    turns = (Utterance(0, "a", "", (0, 1), ("a cat", "")),)
    prompt = Dialogue("d", turns, "q").to_prompt("…", captions=True)
    rows = rows_of([row("x", messages=[{"role": "user", "content": prompt}], images=["cat.png"])], tmp_path)
    [turn] = rows.dialogues[0]["turns"]
    assert turn["images"] == [{"id": 0, "at": 0, "caption": "a cat"}, {"id": 1, "at": None}]


def test_a_prompt_that_holds_no_dialogue_is_shown_as_it_is(tmp_path: Path) -> None:
    rows = rows_of([row("x", messages=[{"role": "user", "content": "What is in it?"}])], tmp_path)
    [dialogue] = rows.dialogues
    assert dialogue["text"] == "What is in it?"
    assert "query_start" in dialogue["problem"]
    assert "mcc" not in rows.rows[0]["rewards"]


def test_rows_without_an_answer_are_told_apart(folder: Path) -> None:
    partly = row(answer((1,), (0,)), query="two", error="1 of 2 windows have no answer: 400: no")
    write_rows(folder / "other.jsonl", [row("x"), row("", query="two", error="500: busy")])
    page = report_of(
        folder, [row("", error="400: too long"), partly, row("x", query="three")], compare=folder / "other.jsonl"
    )
    found = embedded(page)["rows"]
    assert [one["fault"] for one in found] == ["unanswered", "unanswered", "missing_tag"]
    assert [one["malformed"] for one in found] == [False, False, True]
    assert [one["error"] for one in found] == ["400: too long", partly["error"], None]
    assert {one["rewards"]["f1"] for one in found} == {0.0}
    assert "Rows without an answer, or without a whole one, which count as 0 in macro and rewards: 2." in page
    assert "Rows of other.jsonl without an answer" in page
    assert 'name="unanswered"' in page
    assert 'name="unanswered"' not in report_of(folder, [row("x")])


def test_an_answer_without_end_is_cut(tmp_path: Path) -> None:
    [made] = rows_of([row("z" * 100_000)], tmp_path).rows
    assert len(made["answer"]) < 5_000
    assert "96,000 more characters" in made["answer"]


# ---- the file


def test_the_summary_shows_what_evaluate_found(folder: Path) -> None:
    responses = [answer((1,), (0,)), answer((0, 2), (1,)), "no idea", answer()]
    page = report_of(folder, [row(one) for one in responses])
    result = evaluate(read_predictions(folder / "pred.jsonl"))
    cells = [float(found) for found in re.findall(r"<td>([-\d.]+)<br>", page)]
    expected = [
        values[name]
        for average in (result.micro, result.macro)
        for values in average.values()
        for name in ("precision", "recall", "f1", "mcc")
    ]
    assert cells == pytest.approx(expected, abs=6e-4)
    assert f"{result.rewards['f1']:.3f}" in page


def test_the_difference_from_another_model_is_shown(folder: Path) -> None:
    right, wrong = answer((1,), (0,)), answer((0, 2), (0,))
    write_rows(folder / "other.jsonl", [row(wrong, query=str(number)) for number in range(40)])
    page = report_of(folder, [row(right, query=str(number)) for number in range(41)], compare=folder / "other.jsonl")
    assert "Difference from other.jsonl" in page
    assert "on the 40 rows that both have" in page
    differences = re.findall(r"<td>(?:<b>)?([-+][\d.]+\*?)", page)
    assert len(differences) == 24
    assert differences[:4] == ["+1.000*", "+1.000*", "+1.000*", "+2.000*"]
    assert differences[4:8] == ["+0.000"] * 4, "the images are the same"
    shown = [one["other"] for one in embedded(page)["rows"]]
    assert shown[40] is None
    assert shown[0] == {"predicted": {"utterances": [0, 2], "images": [0]}, "answer": wrong, "f1": 0.5}
    assert embedded(page)["other"] == "other.jsonl"


def test_a_row_that_is_there_twice_is_compared_with_its_own(folder: Path) -> None:
    write_rows(folder / "other.jsonl", [row(answer((0,), ())), row("no", error="500: busy"), row("x", query="else")])
    page = report_of(folder, [row("x"), row("y"), row("z")], compare=folder / "other.jsonl")
    shown = [one["other"] and one["other"]["answer"] for one in embedded(page)["rows"]]
    assert shown == [answer((0,), ()), "500: busy", None]


def test_rewards_are_those_of_the_run_when_they_are_given(folder: Path) -> None:
    file = folder / "kwargs.yaml"
    file.write_text("{length_penalty: 0.5, weights: {f1: 2.0, format: 0.5}, answer_style: reasoning}")
    response = f"<think>{answer((0,))}</think><answer>{answer((1, 2), (0,))}</answer>"
    page = report_of(folder, [row(response)], reward_kwargs=file)
    [made] = embedded(page)["rows"]
    assert made["rewards"]["f1"] == pytest.approx((2 / 3 * 0.5 + 1) / 2, abs=1e-4)
    assert made["rewards"]["score"] == pytest.approx(2 * made["rewards"]["f1"] + 0.5, abs=1e-3)
    assert made["predicted"] == {"utterances": [1, 2], "images": [0]}
    assert "as in training with the settings of kwargs.yaml" in page
    assert "as in training with the defaults" in report_of(folder, [row(response)])


def test_a_report_says_that_rows_are_repeated(folder: Path) -> None:
    assert "1 of 2 row is a repeat of another" in report_of(folder, [row("x"), row("y")])
    assert "repeat of another" not in report_of(folder, [row("x"), row("y", query="else")])


def test_an_output_that_exists_stays(folder: Path) -> None:
    predictions = write_rows(folder / "pred.jsonl", [row("x")])
    (folder / "r.html").write_text("mine")
    with pytest.raises(FFRError, match=r"is there already.*--force"):
        write_report(predictions, folder / "r.html")
    (folder / "pred.jsonl").write_text("{}")
    with pytest.raises(FFRError, match="line 1"):
        write_report(predictions, folder / "r.html", force=True)
    assert (folder / "r.html").read_text() == "mine", "a failure leaves the old file"
    assert not list(folder.glob(".*"))


def test_outputs_that_cannot_be_are_refused(folder: Path) -> None:
    predictions = write_rows(folder / "pred.jsonl", [row("x")])
    other = write_rows(folder / "other.jsonl", [row("y")])
    for output, message in (
        (folder, "a folder"),
        (folder / "none" / "r.html", "no folder"),
        (predictions, "is read by this command"),
        (other, "is read by this command"),
    ):
        with pytest.raises(FFRError, match=message):
            write_report(predictions, output, ReportSettings(compare=other), force=True)
    assert json.loads(predictions.read_text())["response"] == "x"
    assert json.loads(other.read_text())["response"] == "y"


def test_of_many_rows_the_worst_are_shown(folder: Path) -> None:
    rows = [row(answer((1,), (0,))), row("bad"), row(answer((1, 2), (0,))), row("bad too")]
    page = report_of(folder, rows, most_rows=3)
    assert [one["line"] for one in embedded(page)["rows"]] == [2, 3, 4]
    assert "The 3 rows of least F1 are shown below; the summary is of all 4." in page


def test_lines_that_cannot_be_used_are_counted(folder: Path) -> None:
    predictions = write_rows(folder / "pred.jsonl", [row("x")])
    with predictions.open("a") as file:
        file.write('{"response": "cut of')
    with pytest.raises(FFRError, match="line 2"):
        write_report(predictions, folder / "r.html")
    summary = write_report(predictions, folder / "r.html", ReportSettings(lenient=True))
    assert (summary.rows, summary.skipped) == (1, 1)
    assert "Lines that could not be used and count nowhere: 1." in (folder / "r.html").read_text()


def test_missing_images_are_counted_and_named(folder: Path) -> None:
    (folder / "images" / "dog.png").unlink()
    page = report_of(folder, [row("x")])
    assert "Images that could not be shown: 1 of 2." in page
    assert embedded(page)["images"] == [
        {"name": "images/cat.png", "picture": 0},
        {"name": "images/dog.png", "problem": "no such file"},
    ]
    [picture] = embedded(page, 'class="report-pictures"')
    assert (picture["width"], picture["height"]) == (240, 120)


def test_the_images_root_is_given_recorded_or_the_predictions_folder(folder: Path, demo_set: Path) -> None:
    prepare(demo_set / "heldout.json", images_root=demo_set, output=demo_set / "parquet_h", split="h")
    first = next(one for one in json.loads((demo_set / "heldout.json").read_text()) if one["images"])
    record = {**first, "labels": first["solution"], "response": first["solution"]}
    elsewhere = write_rows(folder / "elsewhere" / "pred.jsonl", [record])
    for settings, has_pictures in (
        (ReportSettings(), False),
        (ReportSettings(images_root=demo_set), True),
        (ReportSettings(data=demo_set / "parquet_h" / "h.rl.parquet"), True),
    ):
        said: list[str] = []
        summary = write_report(elsewhere, folder / "r.html", settings, force=True, say=said.append)
        assert (summary.pictures > 0) == has_pictures
        assert bool(said) != has_pictures
    with pytest.raises(FFRError, match=r"--images-root .*no such folder"):
        write_report(elsewhere, folder / "r.html", ReportSettings(images_root=folder / "none"), force=True)


def test_a_store_that_is_none_is_refused(folder: Path) -> None:
    with pytest.raises(FFRError, match=r"--embeddings .*no such folder"):
        report_of(folder, [row("x")], embeddings=folder / "none")


def test_the_command(folder: Path) -> None:
    write_rows(folder / "pred.jsonl", [row(answer((1,), (0,)))])
    (folder / "run.jsonl").write_text('{"step": 1, "data": {"critic/score/mean": 0.5}}\n')
    arguments = ["report", str(folder / "pred.jsonl"), "--output", str(folder / "r.html")]
    run = CliRunner().invoke(app, [*arguments, "--training", str(folder / "run.jsonl"), "--title", "Mine"])
    assert run.exit_code == 0, run.output
    assert "1 row, 2 pictures" in run.output
    page = (folder / "r.html").read_text()
    assert "<h1>Mine</h1>" in page
    assert "critic/score/mean" in page


def test_a_file_that_verl_wrote_is_shown_without_pictures(folder: Path) -> None:
    prompt = row("x")["messages"][0]["content"].replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    gold = answer((1,), (0,))
    line = {"input": f"user\n{prompt}\nassistant\n", "output": gold, "gts": gold, "step": 3}
    page = report_of(folder, [{**line, "score": 1.3}], row_format="verl")
    [made] = embedded(page)["rows"]
    assert made["rewards"]["f1"] == 1.0
    assert made["query"] == "a cat"
    assert [one["at"] for one in embedded(page)["dialogues"][0]["turns"][1]["images"]] == [None]
