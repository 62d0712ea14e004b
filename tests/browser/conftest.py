"""A headless Chromium without a network, and reports to open in it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from ffr_verl.data.demo import demo_rows
from ffr_verl.dialogues import Dialogue, Utterance
from ffr_verl.evaluation.report import ReportSettings, write_report
from ffr_verl.fragments import Fragment, format_fragment, parse_fragment

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
)
AXE = "axe-core@4.14.1"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# One hostile text for every place that a text of a row can come to stand in.
HOSTILE = (
    "</script><script>hit()</script><!-- ",
    "<img src=x onerror=hit()><svg onload=hit()></svg>",
    "\"'><iframe src='javascript:parent.hit()'></iframe><a href=\"javascript:hit()\">here</a>",
    "${hit()} {{ hit() }} \u2028hit()//",
)


@dataclass
class Report:
    """A report that was written: its file, and the predictions in it."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = os.environ.get("FFR_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not chromium:
        pytest.skip(
            f"no Chromium was found ({', '.join(NAMES)} or FFR_CHROMIUM): the report is not tested in a browser"
        )
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=list(ARGUMENTS))
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str | None:
    """The script of axe-core, from the npm registry; `None` where that is not to be had."""
    folder = tmp_path_factory.mktemp("axe")
    try:
        subprocess.run(["npm", "pack", "--silent", AXE], cwd=folder, check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        script = archive.extractfile("package/axe.min.js")
        return None if script is None else script.read().decode()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open a report. When the test ends: no network was asked, no dialog opened, nothing was complained of."""
    events: list[str] = []
    contexts = []

    def open_report(report: Report, anchor: str = "", **options: Any) -> Page:
        options = {"viewport": {"width": 1280, "height": 800}, "offline": True, **options}
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        address = report.path.as_uri()
        page.on("console", lambda message: events.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: events.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (events.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("popup", lambda popup: events.append(f"popup: {popup.url}"))
        page.on("framenavigated", lambda frame: frame.url.startswith(address) or events.append(f"went to {frame.url}"))
        page.on(
            "request",
            lambda request: (
                request.url.startswith((address, "data:image/webp;")) or events.append(f"request: {request.url[:200]}")
            ),
        )
        page.goto(address + anchor)
        if options.get("java_script_enabled", True):
            page.wait_for_selector("html[data-ready]", timeout=10_000)
        return page

    yield open_report
    for context in contexts:
        context.close()
    assert events == []


def perturbed(row: dict[str, Any], number: int, rng: random.Random) -> str:
    """An answer to a row: right, partly right, malformed, or with ids that the dialogue does not have."""
    gold = parse_fragment(row["solution"])
    assert gold is not None
    utterances, images = list(gold.utterance_ids), list(gold.image_ids)
    if number % 10 == 3:
        return "It is about " + format_fragment(gold)
    if number % 10 == 4:
        return "I do not know"
    if number % 10 == 5:
        return format_fragment(Fragment((*gold.utterance_ids, 77), (*gold.image_ids, 88)))
    if number % 2:
        utterances = [one + 1 for one in utterances[:-1]]
        images = images[1:] if rng.random() < 0.5 else [*images, 0]
    return format_fragment(Fragment(tuple(utterances), tuple(dict.fromkeys(images))))


def write(folder: Path, rows: list[dict[str, Any]], settings: ReportSettings | None = None) -> Report:
    predictions = folder / "pred.jsonl"
    predictions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_report(predictions, folder / "report.html", settings)
    return Report(folder / "report.html", rows)


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Sixty rows of drawn dialogues; one image is missing."""
    folder = tmp_path_factory.mktemp("report")
    rng = random.Random(0)
    rows: list[dict[str, Any]] = []
    missing = "images/none.png"
    for number, row in enumerate(demo_rows(folder / "images", rows=60, seed=4)):
        images = row["images"]
        if len(images) > 2 and missing not in [name for one in rows for name in one["images"]]:
            images = [missing, *images[1:]]
        fields = {"labels": row["solution"], "response": perturbed(row, number, rng), "images": images}
        rows.append({**fields, "messages": row["messages"][:-1], "dialogue_id": row["dialogue_id"]})
    (folder / "log.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "data": {"ffr/reward/f1/mean": step / 10, "val-aux/ffr/f1/mean@1": step / 12}})
            + "\n"
            for step in range(8)
        )
    )
    return write(folder, rows, ReportSettings(training=(folder / "log.jsonl",)))


@pytest.fixture(scope="session")
def hostile_report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Rows whose every text would run a script, if it were anything but text."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = []
    for text in HOSTILE:
        turns = (
            Utterance(0, text, text, (0,), (text.replace("<", " <"),)),
            Utterance(1, "user2", text),
        )
        prompt = Dialogue("d", turns, text).to_prompt(text, captions=True)
        labels = format_fragment(Fragment((0,), (0,)))
        for messages in (prompt, f"no dialogue here {text}"):
            content = [{"role": "user", "content": messages}]
            rows.append(
                {"response": text, "labels": labels, "messages": content, "images": [text], "dialogue_id": text}
            )
    return write(folder, rows, ReportSettings(title=HOSTILE[0] + HOSTILE[2]))
