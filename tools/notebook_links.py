"""A hook of mkdocs: links of a notebook to pages (`pipeline.md`, as GitHub and Jupyter follow them) lead to those of
the site.

mkdocs does so for pages in Markdown only, and does not look for dead links in notebooks.
"""

from __future__ import annotations

import logging
import re
from typing import Any

logger = logging.getLogger("mkdocs.hooks.notebook_links")


def on_page_content(html: str, *, page: Any, files: Any, **_: Any) -> str:
    """Called with the content of each page; a warning, which `--strict` makes an error, tells of a dead link."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def there(link: re.Match[str]) -> str:
        target = files.get_file_from_path(link[1])
        if target is None:
            logger.warning("%s: no page %s", page.file.src_uri, link[1])
            return link[0]
        return f'href="{target.url_relative_to(page.file)}{link[2]}"'

    return re.sub(r'href="([^":#]+\.md)(#[^"]*|)"', there, html)
