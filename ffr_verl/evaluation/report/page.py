"""The page itself: a template, its style and its script, and the data, in one text that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ffr_verl import __version__
from ffr_verl.evaluation.report.charts import RunCharts
from ffr_verl.evaluation.report.pictures import Pictures
from ffr_verl.evaluation.report.rows import UNANSWERED, ReportRows
from ffr_verl.evaluation.report.summary import FAULTS

# Rows with an F1 below it are the worst of the page's filter.
WORST_BELOW = 0.5

_BATCH = 50

# Inside <script> an HTML parser looks for `</script` and `<!--`; U+2028 and U+2029 end a line of JavaScript. Half a
# surrogate pair, which JSON may hold, is no UTF-8.
_NEVER_IN_SCRIPT = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def script_json(value: Any) -> Markup:
    """JSON to stand inside a `<script>` element, whatever texts it holds."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(_NEVER_IN_SCRIPT.sub(lambda found: f"\\u{ord(found.group()):04x}", text))


def _own_file(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _csp_hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _environment() -> Environment:
    # Not by the file's name: it ends in .j2, which jinja2 does not take for HTML.
    return Environment(
        loader=PackageLoader("ffr_verl.evaluation.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render_fragments(**values: Any) -> str:
    """Fill the template `fragments.html.j2`, which needs no script; every text in the values is escaped."""
    css = _own_file("report.css")
    template = _environment().get_template("fragments.html.j2")
    page = template.render(version=__version__, css=Markup(css), css_hash=_csp_hash(css), **values)
    return page.encode("utf-8", "replace").decode("utf-8")


def page_data(
    rows: ReportRows,
    pictures: Pictures,
    *,
    most_reward: float = 0.0,
    other: str | None = None,
    steps: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What `report.js` shows: rows, dialogues, images and faults. With `steps` the rows are groups of answers."""
    images: list[dict[str, Any]] = []
    for name in rows.image_names:
        found = pictures.of_name[name]
        images.append({"name": name, "problem": found} if isinstance(found, str) else {"name": name, "picture": found})
    scores = [abs(one["rewards"].get("score", 0.0)) for row in rows.rows for one in row.get("group", ())]
    return {
        "rows": rows.rows,
        "dialogues": rows.dialogues,
        "images": images,
        "faults": {
            UNANSWERED: {"label": "no answer", "meaning": "there is no answer, or no whole one."},
            **{reason.value: {"label": label, "meaning": text} for reason, (label, text) in FAULTS.items()},
        },
        "worstBelow": WORST_BELOW,
        "mostReward": max([most_reward, *scores]) or 1.0,
        "components": rows.components,
        "areGroups": steps is not None,
        "other": other,
    }


def render_page(
    *,
    data: Mapping[str, Any],
    charts: RunCharts,
    pictures: Sequence[Mapping[str, Any]],
    follow: int = 0,
    summary: Mapping[str, Any] | None = None,
    steps: Sequence[str] = (),
    **values: Any,
) -> str:
    """Fill the template `page.html.j2` with values; every text in them is escaped.

    The data are those of `page_data`, which name the pictures by position; `summary` is of predictions.
    """
    # The page allows this style and this script alone, by their hashes; nothing that data might smuggle in runs.
    css, js = [_own_file("report.css")], [_own_file("page.js")]
    if charts.sections:
        licence = _own_file("uplot/LICENSE")
        css.insert(0, _own_file("uplot/uPlot.min.css"))
        js += [f"/*\n{licence}\n*/", _own_file("uplot/uPlot.iife.min.js"), _own_file("charts.js")]
    if data["rows"]:
        js.append(_own_file("report.js"))
    style, script = "\n".join(css), "\n".join([*js, "ffr.start();\n"])
    drawn = [chart.data for section in charts.sections for chart in section.charts]
    page = (
        _environment()
        .get_template("page.html.j2")
        .render(
            version=__version__,
            css=Markup(style),
            js=Markup(script),
            css_hash=_csp_hash(style),
            js_hash=_csp_hash(script),
            data=script_json({**data, "picturesInBatch": _BATCH, "charts": drawn}),
            has_rows=bool(data["rows"]),
            are_groups=data["areGroups"],
            pictures=[script_json(pictures[at : at + _BATCH]) for at in range(0, len(pictures), _BATCH)],
            charts=charts,
            follow=follow,
            summary=summary,
            steps=steps,
            **values,
        )
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # a file's name may hold what is no UTF-8
