"""The page on other trainers: how long its snippets are. Its code runs in tests/e2e and tests/integration."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ffr_verl.errors import FFRError
from ffr_verl.integrations.ms_swift import register

PAGE = (Path(__file__).parents[2] / "docs" / "other_trainers.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("trainer", ["verl", "TRL", "ms-swift", "EasyR1", "verifiers"])
def test_ten_lines_are_enough(trainer: str) -> None:
    block = re.search(rf"\n## {trainer}.*?```\w+\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    assert 0 < len([line for line in block.group(1).splitlines() if line.strip()]) <= 10


def test_without_ms_swift() -> None:
    with pytest.raises(FFRError, match="ms-swift is not installed: pip install ms-swift"):
        register()
