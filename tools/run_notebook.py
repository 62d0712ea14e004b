"""Run the cells of docs/tutorial.ipynb in an empty folder and keep what they print as their outputs.

python tools/run_notebook.py          # after a change to its cells; tests/integration/test_tutorial.py runs them too
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"


def run_cells(notebook: dict[str, Any], folder: Path) -> list[str]:
    """What each code cell prints, in order; an exception of a cell is raised."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    before = Path.cwd()
    os.chdir(folder)
    try:
        for number, cell in enumerate(notebook["cells"]):
            if cell["cell_type"] == "code":
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
                printed.append(out.getvalue())
    finally:
        os.chdir(before)
    return printed


def shown(notebook: dict[str, Any]) -> list[str]:
    """What the file shows under each code cell."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return ["".join(line for output in cell["outputs"] for line in output["text"]) for cell in cells]


def main() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        printed = iter(run_cells(notebook, Path(folder)))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            text = next(printed).splitlines(keepends=True)
            cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": text}] if text else []
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
