"""The pictures of README.md: a dialogue with the fragment that a query asks for, and a screenshot of a report.

python tools/readme_pictures.py                                       # docs/images/dialogue-{light,dark}.svg
python tools/readme_pictures.py --report demo/report.html     # and docs/images/report-{light,dark}.png
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from xml.sax.saxutils import escape

from ffr_verl.fragments import Fragment, format_fragment

FOLDER = Path(__file__).parents[1] / "docs" / "images"
QUERY = "the plan to go back to the lake"
GOLD = Fragment((1, 2, 5, 6), (0,))
TURNS = (
    ("Ann", "Who brings the projector on Monday?", ""),
    ("Ben", "I can. Look what was still on my phone:", "lake"),
    ("Ann", "The lake! We have to go there again", ""),
    ("Ben", "Tom, did the new screws fit?", ""),
    ("Tom", "They did, see:", "shelf"),
    ("Ann", "Could we take the boat out in June?", ""),
    ("Tom", "The second weekend is fine for me", ""),
    ("Ben", "Monday at ten then, in room 4", ""),
)
PICTURES = {
    "lake": '<rect width="96" height="60" rx="5" fill="#bfe3f5"/><circle cx="76" cy="14" r="7" fill="#ffd75e"/>'
    '<path d="M0 38 24 12 44 32 58 20 96 42V46H0Z" fill="#5f8a6b"/>'
    '<path d="M0 40H96V55a5 5 0 0 1-5 5H5a5 5 0 0 1-5-5Z" fill="#3f86b8"/><path d="M40 47h18l-4 6H44Z" fill="#fff"/>',
    "shelf": '<rect width="96" height="60" rx="5" fill="#efe6da"/>'
    '<path d="M14 36H82v5H14ZM22 41v9M74 41v9" fill="#8a5a33" stroke="#8a5a33" stroke-width="3"/>'
    '<path d="M24 14h9v22h-9Zm11 4h8v18h-8Zm10-6h7v24h-7Z" fill="#4f6d9a"/>'
    '<circle cx="68" cy="27" r="9" fill="#5f8a6b"/>',
}
THEMES = {
    "light": {
        "page": "#ffffff",
        "line": "#d0d7de",
        "text": "#1f2328",
        "dim": "#59636e",
        "bubble": "#f3f4f6",
        "lit": "#fff3c4",
        "edge": "#b58a00",
    },
    "dark": {
        "page": "#0d1117",
        "line": "#3d444d",
        "text": "#f0f6fc",
        "dim": "#9198a1",
        "bubble": "#1c2129",
        "lit": "#4a3b06",
        "edge": "#e3b341",
    },
}


def dialogue_svg(theme: str) -> str:
    """The dialogue; what the query asks for is lit."""
    colour = THEMES[theme]
    said = (
        f"A query, “{QUERY}”, and a chat in which utterances {GOLD.utterance_ids} and image {GOLD.image_ids} are lit"
    )
    parts = [_text(24, 38, "query", colour["dim"]), _text(92, 38, f"“{QUERY}”", colour["text"], weight=600)]
    top, image = 56, 0
    for number, (speaker, text, picture) in enumerate(TURNS):
        is_gold = number in GOLD.utterance_ids
        height, width = (70 if picture else 30), 90 + round(7.4 * len(f"{speaker} {text}")) + (112 if picture else 0)
        look = (
            f'fill="{colour["lit"]}" stroke="{colour["edge"]}" stroke-width="1.5"'
            if is_gold
            else f'fill="{colour["bubble"]}"'
        )
        parts.append(f'<rect x="62" y="{top}" width="{width}" height="{height}" rx="9" {look}/>')
        middle = top + height // 2 + 5
        parts.append(
            _text(
                36, middle, str(number), colour["edge"] if is_gold else colour["dim"], weight=600 if is_gold else 400
            )
        )
        parts.append(_text(76, middle, speaker, colour["dim"]))
        parts.append(_text(116, middle, text, colour["text"]))
        if picture:
            left = 62 + width - 106
            parts.append(f'<g transform="translate({left} {top + 5})">{PICTURES[picture]}</g>')
            parts.append(
                _text(
                    left + 112, middle, f"image {image}", colour["edge"] if image in GOLD.image_ids else colour["dim"]
                )
            )
            image += 1
        top += height + 7
    parts.append(_text(24, top + 24, "answer", colour["dim"]))
    parts.append(
        _text(
            92,
            top + 24,
            format_fragment(GOLD),
            colour["text"],
            family="ui-monospace,Menlo,Consolas,monospace",
            size=13,
        )
    )
    look = f'fill="{colour["page"]}" stroke="{colour["line"]}"'
    frame = f'<rect x=".5" y=".5" width="779" height="{top + 43}" rx="12" {look}/>'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 {top + 44}" role="img" aria-label="{escape(said)}">'
    )
    return "\n".join([head, frame, *parts, "</svg>", ""])


def _text(
    x: int, y: int, text: str, fill: str, *, weight: int = 400, family: str = "system-ui,sans-serif", size: int = 15
) -> str:
    look = f'font-family="{family}" font-size="{size}" font-weight="{weight}" fill="{fill}"'
    return f'<text x="{x}" y="{y}" {look}>{escape(text)}</text>'


def screenshots(report: Path) -> None:
    """The top of a report in both colour schemes, as a reader's browser shows it."""
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("FFR_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for theme in ("light", "dark"):
            page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme=theme)  # type: ignore[arg-type]
            page.goto(report.resolve().as_uri())
            page.wait_for_timeout(1500)
            page.screenshot(path=FOLDER / f"report-{theme}.png")
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="the report to photograph")
    report = parser.parse_args().report
    FOLDER.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        (FOLDER / f"dialogue-{theme}.svg").write_text(dialogue_svg(theme), encoding="utf-8")
    if report is not None:
        screenshots(report)


if __name__ == "__main__":
    main()
