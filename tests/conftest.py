"""Fixtures for all tests: a drawn data set, its parquet files, real dialogues where they are given."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import typer.main
import typer.testing

from ffr_verl.data.demo import write_demo_set
from ffr_verl.data.prepare import prepare

# A busy machine is no fault of the code: nothing here is timed. Every run draws other examples.
hypothesis.settings.register_profile("ffr", deadline=None, max_examples=50)
hypothesis.settings.load_profile("ffr")


@pytest.fixture(scope="session", autouse=True)
def commands_are_built_once() -> Iterator[None]:
    """Typer builds all of its commands at each call, ten times as long as a refused command takes."""
    built = functools.cache(typer.main.get_command)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", built)
        patch.setattr(typer.testing, "_get_command", built)
        yield


@pytest.fixture(scope="session")
def demo_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train.json`, `heldout.json` and their images; some dialogues have no image."""
    folder = tmp_path_factory.mktemp("demo_set")
    write_demo_set(folder, train_rows=160, heldout_rows=16, seed=1)
    return folder


@pytest.fixture(scope="session")
def parquet(demo_set: Path) -> Path:
    """A folder with `train` and `heldout` as `.rl.parquet` and `.sft.parquet`."""
    output = demo_set / "parquet"
    for split in ("train", "heldout"):
        prepare(demo_set / f"{split}.json", images_root=demo_set, output=output, split=split)
    return output


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real dialogues in the MLDR format; they are not part of this repository."""
    folder = os.environ.get("FFR_REAL_DATA")
    if not folder:
        pytest.skip("FFR_REAL_DATA is not set: no real dialogues here")
    return Path(folder)


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by another process: verl filters prompts in a fork, which hangs once torch has used threads here."""
    folder = tmp_path_factory.mktemp("models") / "base"
    code = f"import pathlib; from ffr_verl.demo.base_model import *; write_base_model(pathlib.Path({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
    return folder
