"""The page on other trainers: how long its snippets are, and its ms-swift plugin, called as ms-swift 4.6 documents it:
`orms[NAME](args)(completions, **columns)`.

ms-swift itself is not installed: its base class and registry are stood in for by what its documentation says of them.
"""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ffr_verl import Fragment, format_fragment
from ffr_verl.embeddings import write_store

PAGE = (Path(__file__).parents[2] / "docs" / "other_trainers.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("trainer", ["verl", "TRL", "ms-swift"])
def test_ten_lines_are_enough(trainer: str) -> None:
    block = re.search(rf"\n## {trainer}.*?```\w+\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    assert 0 < len([line for line in block.group(1).splitlines() if line.strip()]) <= 10


class ORM:
    """`swift.rewards.ORM`: made with the trainer's arguments, called with the completions and the row's columns."""

    def __init__(self, args: Any = None, **kwargs: Any) -> None:
        self.args = args

    def __call__(self, **kwargs: Any) -> list[float]:
        raise NotImplementedError


def test_the_plugin_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = re.search(r"```python\n(.*?)```", PAGE[PAGE.index("## ms-swift") :], re.DOTALL)
    assert found is not None
    rewards = types.ModuleType("swift.rewards")
    orms: dict[str, type[ORM]] = {}
    rewards.__dict__.update(ORM=ORM, orms=orms)
    monkeypatch.setitem(sys.modules, "swift", types.ModuleType("swift"))
    monkeypatch.setitem(sys.modules, "swift.rewards", rewards)
    monkeypatch.chdir(tmp_path)
    vectors = {"utt:d:0": np.array([1.0, 0.0]), "utt:d:1": np.array([1.0, 1.0])}
    write_store(tmp_path / "data" / "embeddings", vectors.items(), model="toy")
    exec(compile(found.group(1), "docs/other_trainers.md", "exec"), {"__name__": "ffr_plugin"})

    assert sorted(orms) == ["ffr_coherence", "ffr_f1", "ffr_format"]
    gold = format_fragment(Fragment((0, 1), ()))
    prompt = (
        "<|query_start|>q<|query_end|>\n<|utt_id_start|>0<|utt_id_end|> a: x\n<|utt_id_start|>1<|utt_id_end|> b: y"
    )
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "the completion"}]
    columns = {
        "solution": [gold, gold],
        "dialogue_id": ["d", "d"],
        "messages": [messages, messages],
        "images": [[], []],
        "trainer_state": None,
    }
    values = {name: reward(args=object())([gold, "no idea"], **columns) for name, reward in orms.items()}
    assert values == {
        "ffr_f1": [1.0, 0.0],
        "ffr_coherence": [pytest.approx(0.5**0.5), 0.0],
        "ffr_format": [1.0, 0.0],
    }
