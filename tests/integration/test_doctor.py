"""`ffr-verl doctor` in a fresh process: what it proves here, and how it fails."""

from __future__ import annotations

from pathlib import Path

from conftest import RunPython  # type: ignore[import-not-found]

from ffr_verl.recipes import recipe_names


def test_it_passes_here_and_names_what_it_saw(run_python: RunPython, parquet: Path) -> None:
    files = [f"--data={parquet / name}" for name in ("train.rl.parquet", "train.sft.parquet")]
    run = run_python("-m", "ffr_verl", "doctor", *files, environment={"COLUMNS": "200"})
    assert run.returncode == 0, run.stdout + run.stderr
    for name in recipe_names():
        assert f"+recipe={name} through" in run.stdout
    for expected in ("verl 0.9.1", "plugin loaded", "platform", "vLLM imports", "free memory", "160 rows"):
        assert expected in run.stdout


def test_it_fails_with_the_way_to_mend_it(run_python: RunPython, tmp_path: Path) -> None:
    run = run_python(
        "-m",
        "ffr_verl",
        "doctor",
        "--data=absent.parquet",
        environment={"COLUMNS": "200", "VERL_USE_EXTERNAL_PLUGINS": "none"},
    )
    assert run.returncode == 1
    lines = [line for line in run.stdout.splitlines() if "FAIL" in line]
    assert any("plugin loaded" in line for line in lines)
    assert any("+recipe=ffr_grpo through" in line for line in lines)
    assert any("absent.parquet" in line for line in lines)
    assert "unset VERL_USE_EXTERNAL_PLUGINS" in run.stdout
