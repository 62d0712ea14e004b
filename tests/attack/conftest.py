"""What the attacks share: how many, on what, and how a command is run and judged."""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ffr_verl.cli import main
from ffr_verl.data.prepare import prepare
from ffr_verl.errors import FFRError

ATTACKS = int(os.environ.get("FFR_ATTACKS", "40"))  # of a kind; `make attack` sets more
SEED = int(os.environ.get("FFR_ATTACK_SEED", "0"))
HELD: Counter[str] = Counter()


@pytest.fixture
def source() -> random.Random:
    """Of what is drawn; another one with FFR_ATTACK_SEED."""
    return random.Random(SEED)


@pytest.fixture(scope="session")
def small(demo_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `t` as RL and SFT files, `held` with its images in them, `pred.jsonl`, answers to `t`, and
    `short.jsonl`, short dialogues."""
    folder = tmp_path_factory.mktemp("small")
    for split, embed in (("t", False), ("held", True)):
        prepare(demo_set / "heldout.json", images_root=demo_set, output=folder, split=split, embed_images=embed)
    with (folder / "short.jsonl").open("w") as file:
        for number in range(10):
            turns = [{"speaker": "p", "utterance": f"turn {turn} of {number}"} for turn in range(4)]
            one = {"dialogue_id": f"s{number}", "topic": f"topic {number}", "query_text": "q", "dialogue": turns}
            file.write(json.dumps(one) + "\n")
    with (folder / "pred.jsonl").open("w") as file:
        for row in pq.read_table(folder / "t.rl.parquet").to_pylist():
            gold, info = row["reward_model"]["ground_truth"], row["extra_info"]
            logprobs = {"content": [{"logprob": -0.25}, {"logprob": -0.5}]}
            one = {"response": gold, "labels": gold, "messages": row["prompt"], "images": row["images"]}
            one |= {"dialogue_id": info["dialogue_id"], "logprobs": logprobs}
            file.write(json.dumps(one) + "\n")
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., int]:
    """Run a command in this process; its exit status is 0, or 2 with one message. Anything else fails the test."""

    def run(*arguments: Any, said: list[str] | None = None) -> int:
        monkeypatch.setattr(sys, "argv", ["ffr-verl", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
        except SystemExit as ended:
            status = ended.code or 0
        else:
            status = 0
        told, error = capsys.readouterr()
        (said if said is not None else []).extend([told, error])
        assert status in (0, 2), (status, error)
        assert status == 0 or "error" in error.lower(), error
        return int(status)

    return run


def judged(kind: str, attempt: Callable[[], Any], good: Any, place: Path) -> None:
    """Count what an attack came to: an `FFRError` that names the place, or a result equal to the good one."""
    error, found = outcome(attempt)
    assert error is None or str(place) in error, error
    assert error is not None or found == good, f"{kind}: silently another result"
    HELD[f"{kind}: {'equal' if error is None else 'told'}"] += 1


def outcome(attempt: Callable[[], Any]) -> tuple[str | None, Any]:
    """The message of an `FFRError`, or the result; any other exception fails the test."""
    try:
        return None, attempt()
    except FFRError as error:
        return str(error), None


def pytest_terminal_summary(terminalreporter: Any) -> Iterator[None] | None:
    """Say what was tried."""
    for name, count in sorted(HELD.items()):
        terminalreporter.write_line(f"attack: {name} {count}")
    return None
