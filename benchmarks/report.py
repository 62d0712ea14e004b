"""How long a report of 2,000 rows takes to write, to open and to filter in headless Chromium.

    python -m benchmarks.report [--rows 2000] [--photos 6000]

Every row has a dialogue of its own of about 25 turns and 3 images; `--photos` different pictures are drawn for them.
Times in the browser are up to the next frame on the screen, and medians of several goes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ffr_verl.data.demo import demo_rows
from ffr_verl.evaluation.report import ReportSettings, write_report
from ffr_verl.fragments import Fragment, format_fragment, parse_leniently

__all__ = ["write_photos", "write_predictions"]

_GOES = 7
# Runs in the page: sets a control, and tells the milliseconds until the list is on the screen.
_ACT = """([selector, value]) => new Promise((resolve) => {
  const control = document.querySelector(selector);
  const started = performance.now();
  if (control.type === "checkbox") control.checked = value;
  else control.value = value;
  control.dispatchEvent(new Event("input", { bubbles: true }));
  const wait = () => requestAnimationFrame(() => setTimeout(() => resolve(performance.now() - started)));
  if (control.type === "search") setTimeout(wait, 60);
  else wait();
})"""
_KEY = """() => new Promise((resolve) => {
  const started = performance.now();
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "j", bubbles: true }));
  requestAnimationFrame(() => setTimeout(() => resolve(performance.now() - started)));
})"""


def write_photos(folder: Path, count: int) -> list[str]:
    """JPEG files of 800 x 600 that a compressor finds about as hard as photographs; their names."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize(
            (800, 600), Image.Resampling.BICUBIC
        )
        fine = Image.fromarray(rng.integers(0, 255, (75, 100, 3), dtype=np.uint8)).resize(
            (800, 600), Image.Resampling.BICUBIC
        )
        Image.blend(coarse, fine, 0.25).save(folder / f"{number}.jpg", quality=80)
        names.append(f"{folder.name}/{number}.jpg")
    return names


def write_predictions(folder: Path, rows: int, photos: list[str]) -> Path:
    """JSONL of answers, a third of them right and a tenth malformed."""
    path = folder / "pred.jsonl"
    rng = random.Random(0)
    unused = iter(photos)
    with path.open("w", encoding="utf-8") as file:
        for row in demo_rows(folder / "emblems", rows=rows, turns_per_topic=(7, 10), image_share=0.12):
            gold = parse_leniently(row["solution"])
            kept = tuple(one for one in gold.utterance_ids if rng.random() < 0.8)
            answer = row["solution"] if rng.random() < 0.33 else format_fragment(Fragment(kept, gold.image_ids[:1]))
            answer = answer[: len(answer) // 2] if rng.random() < 0.1 else answer
            images = [next(unused, rng.choice(photos)) for _ in row["images"]]
            line: dict[str, Any] = {"response": answer, "labels": row["solution"], "messages": row["messages"][:-1]}
            file.write(json.dumps({**line, "images": images, "dialogue_id": row["dialogue_id"]}) + "\n")
    return path


def _in_browser(report: Path) -> Iterator[tuple[str, list[float]]]:
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("FFR_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        sys.exit("no Chromium was found; install one, or give FFR_CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        opening = []
        for _ in range(_GOES):
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            started = time.perf_counter()
            page.goto(report.as_uri())
            page.wait_for_selector("html[data-ready]")
            page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
            opening.append(1e3 * (time.perf_counter() - started))
            page.close()
        yield "open, until the first dialogue is on the screen", opening
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.goto(report.as_uri())
        page.wait_for_selector("html[data-ready]")
        for label, selector, values in (
            ("filter: F1 below 0.5, on and off", "[name=worst]", [True, False]),
            ("filter: malformed, on and off", "[name=malformed]", [True, False]),
            ("filter: at least 24 turns, and back", "[name=least]", ["24", ""]),
            ("order: worst first, and back", "[name=order]", ["worst", "file"]),
            ("search, 60 ms of waiting for the next letter included", "[name=text]", ["gui", "guitar and", "zzz", ""]),
        ):
            yield label, [page.evaluate(_ACT, [selector, value]) for _ in range(_GOES) for value in values]
        yield "next row by key", [page.evaluate(_KEY) for _ in range(10 * _GOES)]
        browser.close()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=2_000)
    parser.add_argument("--photos", type=int, default=6_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = write_photos(folder / "photos", options.photos)
        predictions = write_predictions(folder, options.rows, photos)
        summary = write_report(predictions, folder / "report.html", ReportSettings())
        write = sys.stdout.write
        write(f"{summary.rows:,} rows, {summary.pictures:,} different pictures, {summary.size / 1e6:.1f} MB, ")
        write(f"written in {summary.seconds:.1f} s\n")
        for label, times in _in_browser(folder / "report.html"):
            write(f"{label:<58}{statistics.median(times):7.0f} ms, at most {max(times):.0f} ms\n")


if __name__ == "__main__":
    main()
