"""A wheel, an sdist, an editable install and a git URL: each finds recipes and plugin, in a fresh environment."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, RunPython  # type: ignore[import-not-found]

import ffr_verl
from ffr_verl.recipes import recipe_names

UV = Path(sysconfig.get_path("scripts")) / "uv"


def uv(*arguments: str | Path, cwd: Path) -> None:
    run = subprocess.run([UV, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files of the working tree, as a repository of their own."""
    folder = tmp_path_factory.mktemp("source") / "ffr_verl_source"
    folder.mkdir()
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists() or (ROOT / name).is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *arguments], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built of it."""
    output = tmp_path_factory.mktemp("built")
    uv("build", "--quiet", "--out-dir", output, source, cwd=output)
    return output


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


def test_the_wheel_holds_code_recipes_and_licence_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for name in recipe_names():
        assert f"ffr_verl/conf/recipe/{name}.yaml" in names
    assert "ffr_verl/py.typed" in names
    files = ("page.html.j2", "charts.html.j2", "report.css", "page.js", "charts.js", "report.js")
    for name in (*files, "uplot/uPlot.iife.min.js", "uplot/uPlot.min.css", "uplot/LICENSE"):
        assert f"ffr_verl/evaluation/report/{name}" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert not [name for name in names if name.split("/")[0] not in ("ffr_verl",) and ".dist-info/" not in name]


@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"])
def test_the_core_alone_in_a_fresh_environment(
    pattern: str, built: Path, tmp_path: Path, run_python: RunPython
) -> None:
    """`pip install DIST`: what needs no trainer works, what needs one says how it is installed."""
    (dist,) = built.glob(pattern)
    assert dist.name.startswith(f"ffr_verl-{ffr_verl.__version__}")
    uv("venv", "--quiet", "--python", sys.executable, tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    uv("pip", "install", "--quiet", "--python", python, dist, cwd=tmp_path)
    rewarded = run_python(
        "-c", f"from ffr_verl.rewards import f1_reward as f; print(f({GOLD!r}, {GOLD!r}))", python=python
    )
    assert rewarded.stdout == "1.0\n", rewarded.stderr
    (tmp_path / "pred.jsonl").write_text(json.dumps(PREDICTION) + "\n")
    for arguments in (
        ["recipe", "diff", "ffr_grpo", "ffr_grpo_published"],
        ["evaluate", str(tmp_path / "pred.jsonl"), "--json", str(tmp_path / "r.json")],
    ):
        run = run_python("-m", "ffr_verl", *arguments, python=python)
        assert run.returncode == 0, run.stderr
    checked = run_python("-m", "ffr_verl", "doctor", python=python)
    assert checked.returncode == 1
    assert "mend: pip install 'verl[verl-core]==0.9.1'" in checked.stdout, "the bracket is not markup"
    assert "pip install '.[gpu]' where there is a GPU" in checked.stdout


GOLD = "<|utt_ids_start|>[0]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
PROMPT = "<|query_start|>tea<|query_end|> <|utt_id_start|>0<|utt_id_end|> user1: tea?"
PREDICTION = {
    "response": GOLD,
    "labels": GOLD,
    "messages": [{"role": "user", "content": PROMPT}],
    "dialogue_id": "d",
}

PROBE = """
import ffr_verl, sys
import ffr_verl
from ffr_verl.recipes import recipe_names
print(ffr_verl.__file__)
print(*recipe_names())
import verl
print("ffr_verl.plugin" in sys.modules)
"""


@pytest.mark.parametrize("kind", ["wheel", "editable", "git"])
def test_an_install_trains_and_reports(
    kind: str, source: Path, wheel: Path, tmp_path: Path, run_python: RunPython
) -> None:
    environment = tmp_path / "env"
    uv("venv", "--quiet", "--python", sys.executable, environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    what = {"wheel": [wheel], "editable": ["--editable", source], "git": [f"git+file://{source}"]}[kind]
    uv("pip", "install", "--quiet", "--no-deps", "--python", python, *what, cwd=tmp_path)
    # The engine's packages come from this environment. Its own .pth files, and so its ffr_verl, are not followed from
    # here.
    site = next((environment / "lib").glob("python*")) / "site-packages"
    (site / "engine.pth").write_text(sysconfig.get_path("purelib") + "\n")

    probe = run_python("-c", PROBE, python=python)
    assert probe.returncode == 0, probe.stderr
    place, names, plugin = probe.stdout.splitlines()[-3:]
    assert Path(place).is_relative_to(source if kind == "editable" else environment)
    assert names.split() == recipe_names()
    assert plugin == "True"

    shown = run_python("-m", "verl.trainer.main_ppo", "+recipe=ffr_grpo_cpu", "--cfg", "job", python=python)
    assert "FFRDataset" in shown.stdout, shown.stderr
    assert "ffr_grpo_cpu" not in shown.stdout, "the recipe did not become a plain value"
    command = subprocess.run(
        [environment / "bin" / "ffr-verl", "recipe", "list"], capture_output=True, text=True, check=False
    )
    assert "ffr_sft_cpu" in command.stdout, command.stderr
    (tmp_path / "pred.jsonl").write_text(json.dumps(PREDICTION) + "\n")
    arguments = ["report", str(tmp_path / "pred.jsonl"), "--output", str(tmp_path / "report.html")]
    reported = run_python("-m", "ffr_verl", *arguments, python=python)
    assert reported.returncode == 0, reported.stderr
    assert "</html>" in (tmp_path / "report.html").read_text()
