"""The programs that pages of docs/ show, as files: what users copy is what the tests run."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["written_example"]

_DOCS = Path(__file__).parents[1] / "docs"


def written_example(page: str, name: str, folder: Path) -> Path:
    """Write the block of a page that begins with the comment `# NAME` as that file, and return its path."""
    text = (_DOCS / page).read_text(encoding="utf-8")
    found = re.search(rf"```python\n# {re.escape(name)}\n(.*?)```", text, re.DOTALL)
    assert found is not None, f"docs/{page} has no block for {name}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(found[1], encoding="utf-8")
    return folder / name
