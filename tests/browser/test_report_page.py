"""The report in a browser: what a person sees, clicks and types."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import HOSTILE, Report, write  # type: ignore[import-not-found]
from playwright.sync_api import Page, expect

from ffr_verl.dialogues import parse_dialogue
from ffr_verl.evaluation.report import ReportSettings
from ffr_verl.fragments import Fragment, parse_fragment, parse_leniently
from ffr_verl.rewards import f1_reward

OpenPage = Callable[..., Page]


def f1_of(row: dict[str, Any]) -> float:
    return f1_reward(row["response"], row["labels"])


def turns_of(row: dict[str, Any]) -> int:
    return len(parse_dialogue(row["messages"], row["dialogue_id"]).utterances)


def shown_lines(page: Page) -> list[int]:
    """Numbers of the rows in the list, in its order."""
    links = page.locator("#rows a").evaluate_all("links => links.map(link => link.getAttribute('href'))")
    return [int(href.removeprefix("#row-")) for href in links]


def current_row(page: Page) -> int:
    return int(page.locator("#where a").inner_text().removeprefix("Row "))


def names_ids_outside(row: dict[str, Any]) -> bool:
    dialogue, predicted = parse_dialogue(row["messages"], "d"), parse_leniently(row["response"])
    known = {utterance.id for utterance in dialogue.utterances}
    return not known.issuperset(predicted.utterance_ids) or not set(dialogue.image_ids).issuperset(predicted.image_ids)


def lines_with(report: Report, has: Callable[[dict[str, Any]], bool]) -> list[int]:
    return [line for line, row in enumerate(report.rows, start=1) if has(row)]


# ---- what is shown


def test_it_shows_the_summary_the_curves_and_all_rows(report: Report, open_page: OpenPage) -> None:
    page = open_page(report)
    expect(page).to_have_title("Fragment retrieval report")
    assert shown_lines(page) == list(range(1, 61))
    for name in ("Summary", "Training: Rewards", "Dialogues"):
        expect(page.get_by_role("heading", name=name, exact=True)).to_be_visible()
    assert page.locator("table.bars:visible").count() == 7
    expect(
        page.get_by_role("img", name="f1. training answers: first 0.000, last 0.700, highest 0.700")
    ).to_be_visible()


@pytest.mark.parametrize("line", [2, 4, 8, 12, 16])
def test_a_dialogue_is_a_chat_with_its_fragments_marked(line: int, report: Report, open_page: OpenPage) -> None:
    page = open_page(report, f"#row-{line}")
    row = report.rows[line - 1]
    dialogue = parse_dialogue(row["messages"], "d")
    gold, predicted = parse_leniently(row["labels"]), parse_leniently(row["response"])

    def mark(identifier: int, golds: tuple[int, ...], answers: tuple[int, ...]) -> str:
        marks = {(True, True): "Found", (True, False): "Missed", (False, True): "Wrong", (False, False): ""}
        return marks[identifier in golds, identifier in answers]

    expect(page.locator("#query")).to_contain_text(dialogue.query)
    bubbles = page.locator("#chat > li")
    assert bubbles.count() == len(dialogue.utterances)
    for number, utterance in enumerate(dialogue.utterances):
        bubble = bubbles.nth(number)
        assert bubble.locator(".id").inner_text() == str(utterance.id)
        assert "".join(bubble.locator("p").all_inner_texts()) == utterance.text
        expected = mark(utterance.id, gold.utterance_ids, predicted.utterance_ids)
        assert "".join(bubble.locator(".who .mark").all_inner_texts()) == expected
        captions = bubble.locator("figcaption").all_inner_texts()
        assert [re.sub(r"\s+", " ", one).strip() for one in captions] == [
            f"image {one} {mark(one, gold.image_ids, predicted.image_ids)}".strip() for one in utterance.image_ids
        ]
    expect(page.locator(".rewards > div").nth(1)).to_have_text(re.compile(rf"F1\s*{f1_of(row):.3f}"))


def test_marks_differ_by_label_icon_and_border_too(report: Report, open_page: OpenPage) -> None:
    page = open_page(report)
    looks = page.locator(".keys-of-marks .mark").evaluate_all(
        "all => all.map(one => [one.textContent, one.querySelector('use').getAttribute('href'),"
        " getComputedStyle(one).borderTopStyle])"
    )
    assert len(looks) == 3
    assert all(len(set(column)) == 3 for column in zip(*looks, strict=True))


def test_pictures_are_decoded_and_a_missing_one_is_labelled(report: Report, open_page: OpenPage) -> None:
    [line] = lines_with(report, lambda row: "images/none.png" in row["images"])
    page = open_page(report, f"#row-{line}")
    absent = page.locator(".absent")
    expect(absent).to_have_count(1)
    expect(absent).to_contain_text("no such file")
    expect(absent).to_contain_text("images/none.png")
    pictures = page.locator(".picture img")
    assert pictures.count() == len(report.rows[line - 1]["images"]) - 1
    widths = "all => Promise.all(all.map(async (one) => { await one.decode(); return one.naturalWidth }))"
    assert all(pictures.evaluate_all(widths))
    assert pictures.evaluate_all("all => all.every(one => one.alt)")
    expect(page.get_by_text("Images that could not be shown: 1 of")).to_be_visible()


def test_faults_are_explained(report: Report, open_page: OpenPage) -> None:
    page = open_page(report, "#row-4")
    expect(page.locator(".fault")).to_contain_text("text outside")
    expect(page.locator("details.raw")).to_have_attribute("open", "")
    expect(page.locator("details.raw pre").first).to_have_text(report.rows[3]["response"])
    page.evaluate("location.hash = '#row-6'")
    expect(page.locator(".fault").nth(1)).to_have_text("Outside the dialogue: utterances 77; images 88")


def test_a_prompt_without_a_dialogue_is_shown_as_it_is(hostile_report: Report, open_page: OpenPage) -> None:
    page = open_page(hostile_report, "#row-2")
    expect(page.locator(".fault", has_text="The dialogue cannot be read")).to_be_visible()
    expect(page.locator("#inside > pre")).to_contain_text("no dialogue here")
    assert "null" not in page.locator("#inside").inner_text()


def test_a_printed_report_keeps_its_charts_and_leaves_the_tools_out(report: Report, open_page: OpenPage) -> None:
    page = open_page(report)
    page.emulate_media(media="print")
    bars = page.locator("progress")
    assert bars.count() > 10
    assert bars.evaluate_all("all => all.every(one => getComputedStyle(one).display !== 'none')")
    for tool in (".dialogue > .bar", ".skip", ".filters", ".status"):
        expect(page.locator(tool).first).to_be_hidden()


# ---- filters


@pytest.mark.parametrize(
    ("label", "has"),
    [
        ("F1 below 0.5", lambda row: f1_of(row) < 0.5),
        ("malformed", lambda row: parse_fragment(row["response"]) is None),
        ("empty gold", lambda row: parse_leniently(row["labels"]) == Fragment((), ())),
        ("ids outside", names_ids_outside),
    ],
)
def test_a_filter_shows_the_rows_that_have_it(
    label: str, has: Callable[[dict[str, Any]], bool], report: Report, open_page: OpenPage
) -> None:
    page = open_page(report)
    expected = lines_with(report, has)
    assert 0 < len(expected) < 60
    box = page.get_by_role("checkbox", name=label)
    box.check()
    assert sorted(shown_lines(page)) == expected
    expect(page.locator("#count")).to_have_text(f"{len(expected)} of 60 rows")
    expect(page.locator(".pill", has_text=label)).to_contain_text(str(len(expected)))
    assert current_row(page) in expected
    page.get_by_role("button", name="Show all").click()
    assert len(shown_lines(page)) == 60


def test_rows_without_an_answer_have_a_filter_and_their_reason(
    report: Report, open_page: OpenPage, tmp_path: Path
) -> None:
    reason = "400: <b>too long</b>"
    rows = [report.rows[0], {**report.rows[1], "response": "", "error": reason}]
    page = open_page(write(tmp_path, rows), "#row-2")
    expect(page.locator(".fault")).to_contain_text(f"no answer: there is no answer, or no whole one. {reason}")
    expect(page.locator("#count")).to_have_text("2 rows")
    page.get_by_role("checkbox", name="no answer").check()
    assert shown_lines(page) == [2]
    page.get_by_role("searchbox").fill("nothing has this text")
    expect(page.get_by_text("No row fits these filters.")).to_be_in_viewport()
    expect(open_page(report).get_by_role("checkbox", name="no answer")).to_have_count(0)


def test_rows_where_another_model_is_better_are_found(report: Report, open_page: OpenPage, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    rows = [{**row, "response": row["labels"]} for row in report.rows[:30]]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    page = open_page(write(tmp_path, report.rows, ReportSettings(compare=other)))
    expected = [line for line in lines_with(report, lambda row: f1_of(row) < 1) if line <= 30]
    page.get_by_role("checkbox", name="F1 below that of other.jsonl").check()
    shown = shown_lines(page)
    assert sorted(shown) == expected
    assert [f1_of(report.rows[line - 1]) for line in shown] == sorted(
        f1_of(report.rows[line - 1]) for line in expected
    )
    expect(page.locator(".fragments tbody tr").nth(2)).to_contain_text("other.jsonl, F1 1.00")
    page.evaluate("location.hash = '#row-31'")
    expect(page.locator("#where")).to_contain_text("Row 31")
    expect(page.locator(".fragments tbody tr")).to_have_count(2)


def test_the_worst_come_first(report: Report, open_page: OpenPage) -> None:
    page = open_page(report)
    page.get_by_role("checkbox", name="F1 below 0.5").check()
    found = [f1_of(report.rows[line - 1]) for line in shown_lines(page)]
    assert found == sorted(found)
    page.get_by_role("button", name="Show all").click()
    page.get_by_label("Order").select_option("longest")
    lengths = [turns_of(report.rows[line - 1]) for line in shown_lines(page)]
    assert lengths == sorted(lengths, reverse=True)


def test_filters_combine_with_length_and_text(report: Report, open_page: OpenPage) -> None:
    page = open_page(report)
    page.get_by_label("least number of turns").fill("5")
    page.get_by_label("greatest number of turns").fill("8")
    assert shown_lines(page) == lines_with(report, lambda row: 5 <= turns_of(row) <= 8)
    page.get_by_role("checkbox", name="malformed").check()
    both = lines_with(report, lambda row: 5 <= turns_of(row) <= 8 and parse_fragment(row["response"]) is None)
    assert shown_lines(page) == both
    page.get_by_role("button", name="Show all").click()
    page.get_by_role("searchbox").fill("GUITAR")
    expected = lines_with(report, lambda row: "guitar" in row["messages"][1]["content"])
    expect(page.locator("#rows li")).to_have_count(len(expected))
    assert shown_lines(page) == expected
    page.get_by_role("searchbox").fill(report.rows[6]["dialogue_id"])
    expect(page.locator("#rows li")).to_have_count(1)
    assert shown_lines(page) == [7]
    page.get_by_role("searchbox").fill("nothing has this")
    expect(page.get_by_text("No row fits these filters.")).to_be_visible()


# ---- addresses and keys


def test_every_row_has_an_address(report: Report, open_page: OpenPage) -> None:
    page = open_page(report, "#row-17")
    assert current_row(page) == 17
    expect(page.locator("#dialogue")).to_be_in_viewport()
    page.evaluate("location.hash = '#row-55'")
    assert page.locator("#rows a[aria-current=true]").get_attribute("href") == "#row-55"
    expect(page.locator("#rows a[aria-current=true]")).to_be_in_viewport(ratio=0.9)
    page.locator("#rows a", has_text=f"#23 · {report.rows[22]['dialogue_id']}").click()
    assert current_row(page) == 23
    assert page.url.endswith("#row-23")
    assert current_row(open_page(report, "#row-999")) == 1, "one that does not exist is passed over"


def test_rows_and_marks_are_reached_by_keys(report: Report, open_page: OpenPage) -> None:
    page = open_page(report, "#row-2")
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("k")
    assert current_row(page) == 3
    expect(page.locator("#rows a[aria-current=true]")).to_have_attribute("href", "#row-3")
    expect(page.locator("#said")).to_contain_text(f"Row 3, F1 {f1_of(report.rows[2]):.2f}")
    page.keyboard.press("l")
    for key, expected in (("ArrowDown", 4), ("End", 60), ("ArrowDown", 60), ("ArrowUp", 59), ("Home", 1)):
        page.keyboard.press(key)
        assert current_row(page) == expected
        expect(page.locator("#rows a:focus")).to_have_attribute("href", f"#row-{expected}")
    page.keyboard.press("Enter")
    expect(page.locator("#dialogue")).to_be_focused()
    page.keyboard.press("n")
    first = page.locator("#chat > .has-mark").first
    expect(first).to_be_focused()
    page.keyboard.press("n")
    expect(page.locator("#chat > .has-mark").nth(1)).to_be_focused()
    page.keyboard.press("p")
    expect(first).to_be_focused()
    page.keyboard.press("o")
    assert page.locator("#chat > li:visible").count() == page.locator("#chat > .has-mark").count()


def test_the_search_takes_letters_as_letters(report: Report, open_page: OpenPage) -> None:
    page = open_page(report)
    page.keyboard.press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.type("jackpot?")
    expect(page.get_by_role("searchbox")).to_have_value("jackpot?")
    page.get_by_role("searchbox").fill("guitar")
    page.keyboard.press("Enter")
    expect(page.locator("#rows a:focus")).to_have_count(1)
    assert "guitar" in report.rows[current_row(page) - 1]["messages"][1]["content"]


def test_single_keys_can_be_turned_off(report: Report, open_page: OpenPage) -> None:
    page = open_page(report)
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keys")).to_be_visible()
    page.keyboard.press("j")
    page.get_by_label("Use these single keys").uncheck()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog", name="Keys")).to_be_hidden()
    page.keyboard.press("j")
    assert current_row(page) == 1


def test_tab_goes_through_the_page_once(report: Report, open_page: OpenPage) -> None:
    page = open_page(report)
    page.keyboard.press("Tab")
    skip = page.get_by_role("link", name="Skip to the rows")
    expect(skip).to_be_focused()
    expect(skip).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.locator("#rows a:focus")).to_have_attribute("href", "#row-1")
    page.evaluate("document.activeElement.blur()")
    page.evaluate("document.querySelector('.skip').focus()")
    names = []
    while page.keyboard.press("Tab") or page.evaluate("document.activeElement !== document.body"):
        names.append(
            page.evaluate(
                "(() => { const one = document.activeElement; return one.getAttribute('aria-label')"
                " || one.labels?.[0]?.textContent.trim() || one.textContent.trim() })()"
            )
        )
    wanted = [
        "Skip to the dialogue",
        "Dialogues",
        "Keys ?",
        "Dark theme",
        "Metrics",
        "Search queries, dialogues, answers and ids",
    ]
    order = [
        next(at for at, name in enumerate(names) if name.startswith(one))
        for one in [*wanted, "least number", "Row 1", "Next row"]
    ]
    assert order == sorted(order)
    assert all(names), "every stop has a name"
    assert ["demo_" in name for name in names].count(True) == 1, f"the list is one stop: {names}"


# ---- safety


def test_a_hostile_dialogue_does_nothing(hostile_report: Report, open_page: OpenPage) -> None:
    page = open_page(hostile_report)
    page.evaluate("() => { window.hit = () => { window.wasHit = true } }")
    for line in range(1, len(hostile_report.rows) + 1):
        text = HOSTILE[(line - 1) // 2]
        page.evaluate(f"location.hash = '#row-{line}'")
        expect(page.locator("#where a")).to_have_text(f"Row {line}")
        expect(page.locator("#rows a[aria-current=true] .meta")).to_contain_text(text.split("\u2028")[0].strip())
        expect(page.locator("details.raw pre").first).to_have_text(text)
        if line % 2:
            assert page.locator("#chat p").all_text_contents() == [text.strip(), text.strip()]
            assert page.locator("#query").inner_text().endswith(text.split("\u2028")[-1].strip())
        page.locator("#inside").click(position={"x": 5, "y": 5})
    page.get_by_role("searchbox").fill(HOSTILE[1])
    expect(page.locator("#rows li")).to_have_count(2)
    assert page.evaluate("window.wasHit") is None
    assert page.locator("iframe, #inside script, #rows script, a[href^=javascript], [onerror], [onload]").count() == 0
    assert page.title() == HOSTILE[0] + HOSTILE[2]


def test_the_policy_stops_what_were_smuggled_in(report: Report, browser: Any) -> None:
    """What would happen if the escaping failed: the page's own rules refuse it."""
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(report.path.as_uri())
    refused = page.evaluate(
        """() => {
          const complaints = [];
          const attempt = (act) => {
            try { act(); complaints.push(null); } catch (error) { complaints.push(error.name); }
          };
          attempt(() => { document.body.innerHTML = "<img src=x onerror='window.wasHit = 1'>"; });
          attempt(() => { document.createElement("script").textContent = "window.wasHit = 1"; });
          return complaints;
        }"""
    )
    assert refused == ["TypeError", "TypeError"]
    stopped = page.evaluate(
        """() => new Promise((resolve) => {
          const stopped = [];
          document.addEventListener("securitypolicyviolation", (event) => {
            stopped.push(event.effectiveDirective);
            if (stopped.length === 3) resolve(stopped.sort());
          });
          const picture = new Image();
          picture.src = "http://127.0.0.1:9/x.png";
          const button = document.createElement("button");
          button.setAttribute("style", "color: red");
          const frame = document.createElement("iframe");
          frame.src = "http://127.0.0.1:9/";
          document.body.append(picture, button, frame);
        })"""
    )
    assert stopped == ["frame-src", "img-src", "style-src-attr"]
    assert page.evaluate("window.wasHit") is None
    context.close()


# ---- light, dark, narrow, without JavaScript

CONTRAST = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8")
WIDTHS = (390, 1280, 1920)


def faults_of(page: Page, axe: str | None) -> list[str]:
    """What axe-core finds, WCAG 2 A and AA and best practice; where it is not to be had, texts of poor contrast."""
    if axe is None:
        result = page.evaluate(CONTRAST)
        assert result["seen"] > 100
        return list(result["poor"])
    page.evaluate(axe)
    found = page.evaluate("async () => (await axe.run(document)).violations")
    return [f"{one['id']}: {node['html'][:200]}" for one in found for node in one["nodes"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(scheme: str, report: Report, open_page: OpenPage, axe: str | None) -> None:
    page = open_page(report, "#row-4", color_scheme=scheme)
    ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 380) == (scheme == "light")
    for line in (4, 6, 8):
        page.evaluate(f"location.hash = '#row-{line}'")
        expect(page.locator("#where a")).to_have_text(f"Row {line}")
        assert faults_of(page, axe) == []


def test_the_toggle_beats_the_preference_and_is_remembered(report: Report, open_page: OpenPage) -> None:
    page = open_page(report, color_scheme="dark")
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    dark = page.evaluate(ground)
    page.get_by_role("button", name="Light theme").click()
    light = page.evaluate(ground)
    assert light != dark
    page.reload()
    assert page.evaluate(ground) == light
    page.keyboard.press("t")
    assert page.evaluate(ground) == dark


@pytest.mark.parametrize("width", [320, 390, 768, 1280, 1920])
def test_nothing_sticks_out_on_a_narrow_screen(width: int, report: Report, open_page: OpenPage) -> None:
    page = open_page(report, "#row-6", viewport={"width": width, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#rows a").nth(2).click()
    expect(page.locator("#query")).to_be_in_viewport()


def test_without_javascript_the_summary_is_there(report: Report, open_page: OpenPage) -> None:
    page = open_page(report, java_script_enabled=False)
    expect(page.get_by_role("heading", name="Summary")).to_be_visible()
    expect(page.get_by_text("The dialogues below need JavaScript")).to_be_visible()
