"""docs/tutorial.ipynb runs, with the tiny model, and prints what it shows."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import RunPython  # type: ignore[import-not-found]

ROOT = Path(__file__).parents[2]
CODE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from tools.run_notebook import NOTEBOOK, run_cells, shown
notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
from pathlib import Path
print(json.dumps([run_cells(notebook, Path(sys.argv[2])), shown(notebook)]))
"""


def test_the_tutorial_runs_and_prints_what_it_shows(run_python: RunPython, tmp_path: Path) -> None:
    run = run_python("-c", CODE, str(ROOT), str(tmp_path))
    assert run.returncode == 0, run.stderr
    printed, shown = json.loads(run.stdout.splitlines()[-1])
    assert printed[:3] == shown[:3], "python tools/run_notebook.py writes what the cells print now"
    assert "as said: micro joint F1 0.00" in printed[4], "another machine may choose other tokens, but no format"
    assert "</html>" in (tmp_path / "tutorial" / "report.html").read_text(encoding="utf-8")
