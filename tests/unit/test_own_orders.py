"""Orders of one's own: the one of docs/curriculum.md, and what goes wrong in others."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from doc_examples import written_example

from ffr_verl.errors import FFRError
from ffr_verl.samplers import CurriculumConfig, CurriculumSampler, RowDifficulty
from ffr_verl.samplers.sampler import ORDERS, rehearse
from ffr_verl.settings import ORDER_NAMES

COUNT = 12


def rows_of(count: int = COUNT) -> RowDifficulty:
    """Rows with 12, 11, … turns, every third of another pool."""
    rows = RowDifficulty.unknown(np.zeros(count, bool))
    strata = np.where(np.arange(count) % 3 == 0, 1, 0)
    return RowDifficulty(
        rows.f1, rows.entropy, rows.levels, rows.is_negative, strata, ("long", "short"), turns=np.arange(count, 0, -1)
    )


@pytest.fixture
def config(tmp_path: Path) -> CurriculumConfig:
    file = written_example("curriculum.md", "shortest_first.py", tmp_path)
    return CurriculumConfig.from_mapping({"order": f"{file}:ShortestFirst", "settings": {"weights": {"long": 3}}})


def test_every_order_that_a_recipe_may_name_has_its_class() -> None:
    assert set(ORDERS) == set(ORDER_NAMES)


def test_the_order_of_the_docs(config: CurriculumConfig) -> None:
    """Three rows of the one pool to one of the other, the shortest of each first."""
    sampler = CurriculumSampler(rows_of(), config)
    assert len(sampler) == COUNT
    assert list(itertools.islice(sampler, 8)) == [11, 10, 9, 8, 7, 5, 6, 4]
    metrics = sampler.update({11: 0.5})
    assert {name: metrics[f"ffr/curriculum/drawn/{name}"] for name in ("long", "short")} == {"long": 6, "short": 2}
    assert metrics["ffr/curriculum/coverage"] == pytest.approx(8 / 12)


@pytest.mark.parametrize("cut", [0, 1, 7, 12, 20])
def test_it_resumes_with_the_same_rows(config: CurriculumConfig, cut: int, tmp_path: Path) -> None:
    def drawn(sampler: CurriculumSampler, count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count:
            found += itertools.islice(sampler, count - len(found))
        return found

    whole = drawn(CurriculumSampler(rows_of(), config), 40)
    stopped = CurriculumSampler(rows_of(), config)
    before = drawn(stopped, cut)
    state = copy.deepcopy(stopped.state_dict())
    drawn(stopped, 5)
    # The file may lie elsewhere when the run is resumed.
    moved = written_example("curriculum.md", "shortest_first.py", tmp_path / "elsewhere")
    resumed = CurriculumSampler(rows_of(), msgspec.structs.replace(config, order=f"{moved}:ShortestFirst"))
    resumed.load_state_dict(state)
    assert before + drawn(resumed, 40 - cut) == whole
    other = msgspec.structs.replace(config, settings={"weights": {"long": 2}})
    with pytest.raises(FFRError, match="belongs to another order"):
        CurriculumSampler(rows_of(), other).load_state_dict(state)


ORDER = """
from ffr_verl.samplers import Order
class Mine(Order):
    drawn = 0
    def row_at(self, epoch, position):
        self.drawn += 1
        return {row}
    {more}
class Alone:
    def row_at(self, epoch, position): return 0
number = 1
"""


@pytest.mark.parametrize(
    ("row", "more", "message"),
    [
        ("99", "", r"Mine: row_at\(0, 0\) gave 99; expected the number of a row, 0 to 11"),
        ("-1", "", r"gave -1; expected"),
        ("None", "", r"gave None; expected"),
        ("'3'", "", r"gave '3'; expected"),
        ("1 / 0", "", r"Mine: row_at raised ZeroDivisionError: division by zero \(mine\.py, line 7\)"),
        ("position", "def observe(self, rows, deviations): return [1]", r"Mine: observe gave \[1\]; expected metrics"),
        ("position", "def __len__(self): return 0", r"Mine: has no rows"),
        ("position", "def __len__(self): return 12 - self.drawn", r"Mine: __len__ gave 12, then 8; an epoch has"),
        ("position", "fingerprint = 'abc'", r"Mine: its fingerprint raised TypeError"),
        ("exit(3)", "", r"Mine: row_at raised SystemExit: 3"),
        ("position", "def state_dict(self): return lambda: 0", r"Mine: its state_dict cannot be saved"),
        (
            "self.drawn % 12",
            "",
            r"Mine: does not resume: after 4 rows it gives row 5 at place 0, and 1 when its state",
        ),
    ],
)
def test_what_is_wrong_with_an_order_names_it(tmp_path: Path, row: str, more: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(ORDER.format(row=row, more=more))
    config = CurriculumConfig.from_mapping({"order": f"{tmp_path / 'mine.py'}:Mine"})
    with pytest.raises(FFRError, match=rf"data\.ffr\.curriculum\.order=.*{message}"):
        rehearse(rows_of(), config, step=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "MINE:Alone"}, "Alone has no __len__, observe, state_dict, load_state_dict; a subclass of"),
        ({"order": "MINE:number"}, r"number is of type int, expected a class"),
        ({"order": "MINE:Min"}, r"there is no Min in it; did you mean 'Mine'\?"),
        ({"order": "elsewhere.py:Mine"}, r"elsewhere\.py:Mine: no such file on .*same path on every machine"),
        ({"order": "pkg://no_such_package:Mine"}, r"cannot be imported: ModuleNotFoundError"),
        ({"order": "pkg://no_such_package"}, r"order: found 'pkg://no_such_package', expected pkg://module:name"),
        ({"order": "ascendin"}, r"order: found 'ascendin', .*; did you mean 'ascending'\? or one of your own: pkg"),
        ({"order": "file", "settings": {"a": 1}}, r"curriculum\.settings: is of orders of one's own, file reads none"),
    ],
)
def test_what_is_no_order(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    (tmp_path / "mine.py").write_text(ORDER.format(row=0, more=""))
    settings["order"] = settings["order"].replace("MINE", str(tmp_path / "mine.py"))
    with pytest.raises(FFRError, match=message):
        CurriculumSampler(rows_of(), CurriculumConfig.from_mapping(settings))
