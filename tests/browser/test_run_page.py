"""A run's page in a browser: its curves, its groups of answers, and how it follows a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import HOSTILE, Report  # type: ignore[import-not-found]
from playwright.sync_api import Page, expect
from test_report_page import WIDTHS, faults_of  # type: ignore[import-not-found]

from ffr_verl.data.demo import demo_rows
from ffr_verl.evaluation.report import RunPageSettings, write_run_page

OpenPage = Callable[..., Page]
NONE = "<|utt_ids_start|>[]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_page(folder: Path, **settings: Any) -> Report:
    places = tuple(sorted(one for one in folder.iterdir() if one.is_dir()))
    write_run_page(folder / "run.html", RunPageSettings(places, **settings), force=True)
    return Report(folder / "run.html")


def write_run(folder: Path, *, factor: float = 1.0) -> None:
    values = {"ffr/reward/f1/mean": 0.01, "ffr/reward/f1/std": 0.0, "actor/kl_loss": 0.002, "timing_s/step": 3.0}
    log = []
    for step in range(1, 31):
        data = {name: value * step * factor for name, value in values.items()}
        log.append({"step": step, "data": {**data, "actor/lr": 1e-5}})
    write_lines(folder / "log.jsonl", log)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Two runs; one wrote down two steps of six prompts with four answers."""
    folder = tmp_path_factory.mktemp("runs")
    for name, factor in (("first", 1.0), ("second", 2.0)):
        write_run(folder / name, factor=factor)
    for step in (1, 30):
        dump = []
        for number, row in enumerate(demo_rows(folder / "first" / "images", rows=6, seed=step)):
            prompt = row["messages"][1]["content"].replace("<image>", "")
            answers = [row["solution"], NONE, "I do not know", row["solution"] if number else NONE]
            for at, answer in enumerate(answers):
                told = {"input": f"user\n{prompt}\nassistant\n", "output": answer, "gts": row["solution"]}
                score = 0.5 if number == 1 else 1.0 - at / 4
                dump.append({**told, "step": step, "score": score, "f1": score / 2, "uid": f"{number}_{at}_0"})
        write_lines(folder / "first" / "rollouts" / f"{step}.jsonl", dump)
    return run_page(folder)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_can_be_read_at_every_width(
    width: int, scheme: str, run: Report, open_page: OpenPage, axe: str | None
) -> None:
    page = open_page(run, "#row-rollouts-30-2", viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator(".fold > summary").first.click()
    assert faults_of(page, axe) == []
    inks = page.locator(".plot canvas:visible").evaluate_all(
        "all => all.map((one) => new Set(one.getContext('2d').getImageData(0, 0, one.width, one.height).data).size)"
    )
    assert len(inks) == 3
    assert min(inks) > 10, "curves are drawn, those of an opened section too"


def test_runs_are_overlaid_and_a_step_is_read_by_keys(run: Report, open_page: OpenPage) -> None:
    page = open_page(run)
    expect(page.get_by_role("region", name="Runs at their last step").get_by_role("rowheader")).to_have_text(
        ["first", "second"]
    )
    chart = page.locator("figure", has_text="f1").first
    expect(chart.locator(".u-legend .u-label")).to_have_text(["step", "first", "second"])
    expect(chart.locator(".u-legend .u-value")).to_have_text(["30", "0.3", "0.6"])
    chart.get_by_role("img").focus()
    page.keyboard.press("Home")
    expect(chart.locator(".u-legend .u-value")).to_have_text(["1", "0.01", "0.02"])
    page.keyboard.press("ArrowRight")
    expect(chart.locator(".u-legend .u-value")).to_have_text(["2", "0.02", "0.04"])
    expect(page.locator("figure", has_text="KL").locator(".u-value").first).to_have_text("2")
    page.get_by_text("Metrics with one value").click()
    expect(page.get_by_role("rowheader", name="actor/lr")).to_be_visible()


def test_answers_of_a_group_stand_side_by_side(run: Report, open_page: OpenPage) -> None:
    page = open_page(run)
    expect(page.locator("#count")).to_have_text("12 groups")
    answers = page.locator(".answers tbody tr")
    expect(answers).to_have_count(5)
    expect(answers.nth(1)).to_contain_text("1.000")
    expect(answers.nth(3)).to_contain_text("missing tag")
    page.get_by_role("button", name="Answer 3").click()
    expect(page.locator("details.raw pre").first).to_have_text("I do not know")
    page.keyboard.press("a")
    expect(page.get_by_role("button", name="Answer 4")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("combobox", name="Step").select_option("rollouts 1")
    expect(page.locator("#count")).to_have_text("6 of 12 groups")
    page.get_by_role("checkbox", name="no spread").check()
    expect(page.locator("#where a")).to_have_text("Group rollouts-1-2")


def test_it_loads_itself_again_while_the_run_goes_on(tmp_path: Path, open_page: OpenPage) -> None:
    write_run(tmp_path / "run")
    page = open_page(run_page(tmp_path, follow=1))
    page.locator(".fold > summary").first.click()
    write_run(tmp_path / "run", factor=3.0)
    run_page(tmp_path, follow=1)
    expect(page.locator("figure", has_text="f1").first.locator(".u-value").nth(1)).to_have_text("0.9", timeout=10_000)
    expect(page.locator(".fold").first).to_have_attribute("open", "")
    page.get_by_role("button", name="Follows the run").click()
    page.evaluate("window.isOld = true")
    page.wait_for_timeout(1_500)
    assert page.evaluate("window.isOld"), "it stops when it is told to"


def test_hostile_answers_do_nothing(tmp_path: Path, open_page: OpenPage) -> None:
    write_lines(tmp_path / "run" / "log.jsonl", [{"step": step, "data": {HOSTILE[0]: step / 2}} for step in (1, 2)])
    lines = f"<|utt_id_start|>0<|utt_id_end|> a: {HOSTILE[1]}"
    prompt = f"user\n<|query_start|>{HOSTILE[2]}<|query_end|>\n{lines}\nassistant\n"
    row = {"input": prompt, "gts": NONE, "step": 1, "score": 0.5, HOSTILE[0]: 0.5, "malformed": HOSTILE[1]}
    write_lines(
        tmp_path / "run" / "r" / "1.jsonl",
        [{**row, "output": text, "uid": f"0_{at}_0"} for at, text in enumerate(HOSTILE)],
    )
    page = open_page(run_page(tmp_path, title=HOSTILE[0]))
    page.evaluate("() => { window.hit = () => { window.wasHit = true } }")
    page.locator(".fold > summary").first.click()
    expect(page.locator("figure h3")).to_have_text(HOSTILE[0])
    for at in range(4):
        page.get_by_role("button", name=f"Answer {at + 1}").click()
        expect(page.locator("details.raw pre").first).to_have_text(HOSTILE[at])
    assert page.evaluate("window.wasHit") is None
    assert page.locator("iframe, #inside script, [onerror], [onload], a[href^=javascript]").count() == 0
