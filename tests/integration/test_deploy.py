"""`deploy/`: what its files run exists and composes; linters and schemas where they are installed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FILES = sorted(path.name for path in DEPLOY.iterdir() if path.name != "README.md")
VARIABLES = {
    **{"$RECIPE": "ffr_grpo", "$MODEL": "models/sft", "$DATA": "data", "$GPUS": "8", "$SLURM_JOB_ID": "7"},
    **{"$SLURM_NNODES": "2", "$SKYPILOT_NUM_NODES": "2", "$SKYPILOT_NUM_GPUS_PER_NODE": "8"},
}


def text_of(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


def training_command(name: str) -> list[str]:
    """The overrides of the one training that a file starts, its variables as they usually are."""
    text = text_of(name).partition("-m verl.trainer.main_ppo")[2].replace("\\\n", " ")
    text = text.partition('"$@"')[0] if name.endswith("slurm") else re.split(r"\n {0,2}\w", text)[0]
    for variable, value in VARIABLES.items():
        text = text.replace(variable, value)
    return shlex.split(text)


def test_every_file_is_listed_and_explained_in_three_lines() -> None:
    readme = text_of("README.md")
    for name in FILES:
        assert f"]({name})" in readme
        lines = [line for line in text_of(name).splitlines() if not line.startswith("#!")]
        assert all(line.startswith("# ") for line in lines[:3]), name
        assert not lines[3].startswith("# "), name


@pytest.mark.parametrize("name", ["train.slurm", "kuberay.yaml", "skypilot.yaml"])
def test_what_is_trained_composes(composed: Callable[..., Any], name: str) -> None:
    overrides = training_command(name)
    assert not [one for one in overrides if "$" in one]
    config = composed("main_ppo", *overrides)
    assert config.trainer.nnodes == 2
    assert config.trainer.n_gpus_per_node == 8
    assert config.data.custom_cls.name == "FFRDataset", "the recipe was found"
    assert config.ray_kwargs.ray_init.num_cpus is None, "Ray refuses a number when it joins a cluster"


@pytest.mark.parametrize("stack", ["cpu", "gpu"])
def test_a_dockerfile_installs_the_lock_and_copies_what_is_there(stack: str) -> None:
    text = text_of(f"Dockerfile.{stack}")
    assert f"pip install --no-deps -r requirements/{stack}.txt" in text
    sources = [one for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for one in line.split()]
    assert sources
    assert all((ROOT / one).exists() for one in sources)
    packaged = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(one in sources for one in re.findall(r'(?:readme|license-files) = \[?"([^"]+)"', packaged))
    if stack == "gpu":
        assert re.search(r"flash-attn==[\d.]+", text)[0] in (ROOT / "README.md").read_text(encoding="utf-8")  # type: ignore[index]


def test_kubernetes_runs_the_ray_of_the_lock_with_a_token() -> None:
    spec = yaml.safe_load(text_of("kuberay.yaml"))["spec"]["rayClusterSpec"]
    assert f"ray=={spec['rayVersion']}" in (ROOT / "requirements" / "gpu.txt").read_text().splitlines()
    assert spec["authOptions"] == {"mode": "token"}
    pods = 1 + sum(group["replicas"] for group in spec["workerGroupSpecs"])
    gpus = {
        group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    }
    command = training_command("kuberay.yaml")
    assert f"trainer.nnodes={pods}" in command
    assert {f"trainer.n_gpus_per_node={one}" for one in gpus} <= set(command)


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `make integration` installs, in front of what this machine has."""
    if folder := os.environ.get("FFR_DEPLOY_PATH"):
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")


def test_pods_are_valid_for_kubernetes(tools: None) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    spec = yaml.safe_load(text_of("kuberay.yaml"))["spec"]["rayClusterSpec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, **group["template"]}
        validate.validate(pod, "1.30", strict=True)


def test_skypilot_takes_the_task() -> None:
    schemas = pytest.importorskip("sky.utils.schemas", reason="skypilot is not installed")
    import jsonschema

    jsonschema.validate(yaml.safe_load(text_of("skypilot.yaml")), schemas.get_task_schema())


def test_scripts_are_what_bash_and_shellcheck_read(tools: None, tmp_path: Path) -> None:
    task = yaml.safe_load(text_of("skypilot.yaml"))
    scripts = {"train.slurm": text_of("train.slurm")}
    scripts |= {f"skypilot.{part}": f"#!/usr/bin/env bash\n{task[part]}" for part in ("setup", "run")}
    for name, script in scripts.items():
        (tmp_path / name).write_text(script)
        subprocess.run(["bash", "-n", str(tmp_path / name)], check=True)
    if not (shellcheck := shutil.which("shellcheck")):
        pytest.skip("shellcheck is not installed; bash -n passed")
    subprocess.run([shellcheck, "--exclude=SC1091", *(str(tmp_path / name) for name in scripts)], check=True)


def test_hadolint_finds_nothing(tools: None) -> None:
    if not (hadolint := shutil.which("hadolint")):
        pytest.skip("hadolint is not installed")
    subprocess.run([hadolint, *(str(DEPLOY / f"Dockerfile.{stack}") for stack in ("cpu", "gpu"))], check=True)


SRUN = """#!/usr/bin/env bash
token="$(stat -c %a "$RAY_AUTH_TOKEN_PATH") $(wc -c <"$RAY_AUTH_TOKEN_PATH")"
echo "$RAY_AUTH_MODE $token ${RAY_ADDRESS:-none} $*" >>calls
case "$*" in
*hostname*) echo 10.0.0.1 ;;
*ray.nodes*) until grep -q -e --head calls && grep -q -e --exclude calls; do :; done ;;  # all have joined
esac
"""


def test_slurm_starts_a_head_the_workers_and_the_trainer_with_one_token(tmp_path: Path) -> None:
    """Slurm's own commands are stood in for; what they are told is what counts."""
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    (tools / "activate").write_text("")
    for name, script in {
        "srun": SRUN,
        "scontrol": "#!/bin/sh\nprintf 'one\\ntwo\\nthree\\n'\n",
        "ffr-verl": '#!/bin/sh\necho "ffr-verl $*" >>calls\n',
        "sleep": "#!/bin/sh\n",
    }.items():
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_NNODES": "3"}
    environment |= {"SLURM_JOB_NODELIST": "x", "SLURM_GPUS_ON_NODE": "4"}
    run = subprocess.run(
        ["bash", str(DEPLOY / "train.slurm"), "trainer.total_epochs=2"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0].startswith("ffr-verl check +recipe=ffr_grpo"), run.stderr
    started = [call for call in calls if call.startswith("token")]
    assert {call.split()[1] for call in started} == {"600"}
    assert {call.split()[2] for call in started} == {"64"}
    joined = "\n".join(started)
    assert "--nodelist=one --overlap ray start --head --node-ip-address=10.0.0.1 --port=6379 --num-gpus=4" in joined
    assert "--nodes=2 --ntasks=2 --exclude=one --overlap ray start --address=10.0.0.1:6379" in joined
    trainer = next(call for call in started if "verl.trainer.main_ppo" in call)
    assert trainer.split()[3] == "10.0.0.1:6379"
    assert trainer.endswith("trainer.nnodes=3 trainer.n_gpus_per_node=4 trainer.total_epochs=2")
    assert not list(tmp_path.glob(".ray-token*")), "the token is removed"
