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

__all__ = ["render_fragments", "render_page", "script_json"]

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


def render_page(*, data: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]], **values: Any) -> str:
    """Fill the template `page.html.j2` with values; every text in them is escaped.

    The data are for `report.js`: rows, dialogues, images, faults; they name the pictures by position.
    """
    # The page allows this style and this script alone, by their hashes; nothing that data might smuggle in runs.
    css, js = _own_file("report.css"), _own_file("report.js")
    page = (
        _environment()
        .get_template("page.html.j2")
        .render(
            version=__version__,
            css=Markup(css),
            js=Markup(js),
            css_hash=_csp_hash(css),
            js_hash=_csp_hash(js),
            data=script_json({**data, "picturesInBatch": _BATCH}),
            pictures=[script_json(pictures[at : at + _BATCH]) for at in range(0, len(pictures), _BATCH)],
            **values,
        )
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # a file's name may hold what is no UTF-8
