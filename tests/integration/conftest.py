"""Fixtures that use the real stack: fresh processes, the composed config, the tiny model's files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ffr_verl.integrations.verl.preflight import compose_run

ROOT = Path(__file__).parents[2]
DENSE_FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]
RunPython = Callable[..., subprocess.CompletedProcess[str]]


def clean_environment() -> dict[str, str]:
    """This process's variables without those that choose a platform or a process group."""
    chosen = ("VERL_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "PYTEST_", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if not name.startswith(chosen)}


@pytest.fixture
def run_python(tmp_path: Path) -> RunPython:
    """Run a Python in a fresh process in an empty folder; gives status, stdout and stderr."""

    def run(
        *arguments: str, environment: Mapping[str, str] | None = None, python: str | Path = sys.executable
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(python), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
            cwd=tmp_path,
            env={**clean_environment(), **(environment or {})},
        )

    run.folder = tmp_path  # type: ignore[attr-defined]
    return run


@pytest.fixture
def composed() -> Callable[..., Any]:
    """The config that a trainer of verl composes for overrides, in this process."""
    return lambda trainer, *overrides: compose_run(trainer, overrides)


@pytest.fixture(scope="session")
def family_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model of each family in `DENSE_FAMILIES`; written as `base_model` is."""
    folder = tmp_path_factory.mktemp("families")
    code = (
        "import pathlib; from ffr_verl.demo.base_model import *; from ffr_verl.model_families import FAMILIES\n"
        f"for name in {DENSE_FAMILIES}:\n"
        f"    write_base_model(pathlib.Path({str(folder)!r}) / name, family=FAMILIES[name], seed=0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=240)
    return folder
