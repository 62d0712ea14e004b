"""The recipes as verl's own trainers compose them, and what a user sees when something is wrong."""

from __future__ import annotations

import io
import os
import shlex
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import RunPython  # type: ignore[import-not-found]
from omegaconf import OmegaConf
from rich.console import Console

from ffr_verl.demo.pipeline import print_commands
from ffr_verl.demo.stages import DemoSettings
from ffr_verl.integrations.verl.preflight import verl_problems
from ffr_verl.model_families import FAMILIES
from ffr_verl.recipes import recipe_names, recipe_path, trainer_of

TRAINER = {
    "ffr_sft": "sft_trainer",
    "ffr_sft_cpu": "sft_trainer",
    "ffr_grpo": "main_ppo",
    "ffr_grpo_cpu": "main_ppo",
    "ffr_grpo_online": "main_ppo",
    "ffr_grpo_online_cpu": "main_ppo",
    "ffr_grpo_published": "main_ppo",
    "ffr_grpo_published_cpu": "main_ppo",
    "ffr_gdpo": "main_ppo",
    "ffr_gdpo_cpu": "main_ppo",
    "ffr_sft_qwen2_5_vl": "sft_trainer",
    "ffr_sft_qwen3_vl": "sft_trainer",
    "ffr_sft_qwen3_5": "sft_trainer",
    "ffr_grpo_qwen2_5_vl": "main_ppo",
    "ffr_grpo_qwen3_vl": "main_ppo",
    "ffr_grpo_qwen3_5": "main_ppo",
}

# Nodes where verl takes any key: ours, those of Ray and transformers, and hydra's own.
OPEN_NODES = (
    "hydra.",
    "data.ffr",
    "data.image_key",
    "data.apply_chat_template_kwargs",
    "reward.custom_reward_function.reward_kwargs",
    "trainer.v1.sampler.sampler_kwargs",
    "trainer.v1.sampler.custom_sampler",
    "actor_rollout_ref.model.override_config",
    "model.override_config",
    "ray_kwargs.ray_init",
)
# Keys that verl reads and leaves out of its YAML, with the place that reads them.
READ_BUT_NOT_LISTED = {
    "actor_rollout_ref.rollout.limit_images": "workers/rollout",
    "actor_rollout_ref.rollout.enable_sleep_mode": "workers",
    "actor_rollout_ref.actor.fsdp_config.mixed_precision": "workers",
    "actor_rollout_ref.ref.fsdp_config.mixed_precision": "workers",
    "engine.mixed_precision": "workers",
    "data.num_workers": "trainer",
    "transfer_queue.backend": "trainer",
}


def leaves(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, dict) and node:
        for key, child in node.items():
            yield from leaves(child, f"{prefix}{key}.")
    else:
        yield prefix[:-1]


def test_every_recipe_has_its_trainer_here() -> None:
    assert {name: trainer_of(name) for name in recipe_names()} == TRAINER


@pytest.mark.parametrize("name", TRAINER)
def test_a_recipe_resolves(composed: Callable[..., Any], name: str) -> None:
    config = composed(TRAINER[name], f"+recipe={name}")
    assert config.data.custom_cls.name in ("FFRDataset", "FFRSFTDataset")
    assert config.hydra.callbacks.ffr_verl._target_ == "ffr_verl.integrations.verl.preflight.RecipeCallback"
    assert config.hydra.callbacks.ffr_verl.get("platform") == ("cpu" if name.endswith("_cpu") else None)
    assert "recipe" not in config, "a recipe that is not found becomes a plain value"


@pytest.mark.parametrize("name", TRAINER)
def test_every_key_of_a_recipe_is_one_that_verl_knows(composed: Callable[..., Any], name: str) -> None:
    known = OmegaConf.to_container(composed(TRAINER[name]), resolve=False)
    known_keys = set(leaves(known))
    known_keys |= {key.rsplit(".", depth)[0] for key in known_keys for depth in range(1, key.count(".") + 1)}
    path = recipe_path(name)
    recipe = yaml.safe_load(path.read_text())
    shared = [part for part in recipe.pop("defaults", []) if part.startswith("_") and part != "_self_"]
    parts = [recipe, *[yaml.safe_load(path.with_name(f"{part}.yaml").read_text()) for part in shared]]
    unknown = [
        key
        for part in parts
        for key in (leaves(part) if part else ())
        if not key.startswith(OPEN_NODES) and not key.startswith(tuple(READ_BUT_NOT_LISTED)) and key not in known_keys
    ]
    assert not unknown


def test_keys_that_verl_does_not_list_are_read_by_it() -> None:
    import verl

    for key, folder in READ_BUT_NOT_LISTED.items():
        last = key.rsplit(".", 1)[1]
        files = (Path(verl.__file__).parent / folder).rglob("*.py")
        assert any(last in path.read_text(encoding="utf-8") for path in files), key


@pytest.mark.parametrize(
    ("cpu", "gpu"),
    [
        ("ffr_sft_cpu", "ffr_sft"),
        ("ffr_grpo_cpu", "ffr_grpo"),
        ("ffr_grpo_online_cpu", "ffr_grpo_online"),
        ("ffr_grpo_published_cpu", "ffr_grpo_published"),
        ("ffr_gdpo_cpu", "ffr_gdpo"),
    ],
)
def test_a_cpu_recipe_keeps_what_its_parent_says(composed: Callable[..., Any], cpu: str, gpu: str) -> None:
    """Only what the CPU needs differs: none of the published settings."""
    parent, child = (composed(TRAINER[name], f"+recipe={name}") for name in (gpu, cpu))
    for key in (
        "data.ffr",
        "algorithm",
        "reward.custom_reward_function",
        "optim",
        "trainer.v1.sampler.sampler_kwargs.advantage",
        "actor_rollout_ref.actor.ppo_mini_batch_size",
        "actor_rollout_ref.actor.optim.lr",
        "actor_rollout_ref.actor.kl_loss_coef",
        "actor_rollout_ref.actor.clip_ratio_high",
        "actor_rollout_ref.model.lora_rank",
        "actor_rollout_ref.rollout.n",
        "actor_rollout_ref.rollout.top_p",
        "model.lora_rank",
        "data.max_length",
    ):
        values = [OmegaConf.select(config, key, default=None) for config in (parent, child)]
        assert values[0] == values[1], key


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_familys_recipe_differs_in_model_and_folder_only(
    composed: Callable[..., Any], stage: str, family: str
) -> None:
    trainer, found = TRAINER[f"ffr_{stage}"], []
    for name in (f"ffr_{stage}", f"ffr_{stage}_{family}"):
        config: Any = OmegaConf.to_container(composed(trainer, f"+recipe={name}"), resolve=False)
        assert f"ffr_{config['trainer'].pop('experiment_name')}" == name, "its checkpoints lie apart"
        kwargs = FAMILIES[family].template_kwargs if name.endswith(family) else {}
        assert config["data"].pop("apply_chat_template_kwargs") == kwargs
        del config["hydra"]
        if stage == "sft":
            assert config["model"].pop("path").startswith("Qwen/")
        found.append(config)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("trainer", "overrides", "key", "value"),
    [
        ("main_ppo", ["+recipe=ffr_grpo"], "actor_rollout_ref.rollout.n", 8),
        ("main_ppo", ["+recipe=ffr_grpo", "actor_rollout_ref.rollout.n=4"], "actor_rollout_ref.rollout.n", 4),
        ("main_ppo", ["actor_rollout_ref.rollout.n=4", "+recipe=ffr_grpo"], "actor_rollout_ref.rollout.n", 4),
        ("main_ppo", ["+recipe=ffr_grpo_cpu", "trainer.n_gpus_per_node=2"], "trainer.n_gpus_per_node", 2),
        ("sft_trainer", ["+recipe=ffr_sft_cpu", "model.lora_rank=0"], "model.lora_rank", 0),
        ("sft_trainer", ["+recipe=ffr_sft", "data.ffr.max_pixels=3136"], "data.ffr.max_pixels", 3136),
    ],
)
def test_the_command_line_wins(
    composed: Callable[..., Any], trainer: str, overrides: list[str], key: str, value: Any
) -> None:
    assert OmegaConf.select(composed(trainer, *overrides), key) == value


def test_what_verl_refuses_is_found_before_the_run(composed: Callable[..., Any]) -> None:
    for recipe in [name for name in TRAINER if TRAINER[name] == "main_ppo"]:
        assert verl_problems(composed("main_ppo", f"+recipe={recipe}")) == []
    config = composed("main_ppo", "+recipe=ffr_grpo_cpu", "actor_rollout_ref.actor.ppo_mini_batch_size=128")
    (problem,) = verl_problems(config)
    assert problem.startswith("actor_rollout_ref.actor: verl refuses it: train_batch_size (64) must be >= ")
    config = composed("main_ppo", "+recipe=ffr_grpo", "actor_rollout_ref.actor.loss_agg_mode=tokens")
    (problem,) = verl_problems(config)
    assert problem == "actor_rollout_ref.actor: verl refuses it: Invalid loss_agg_mode: tokens"


def test_an_edited_copy_is_used(run_python: RunPython) -> None:
    assert run_python("-m", "ffr_verl", "recipe", "copy", "ffr_sft_cpu", "mine").returncode == 0
    copy = run_python.folder / "mine" / "recipe" / "my_ffr_sft_cpu.yaml"  # type: ignore[attr-defined]
    copy.write_text(copy.read_text() + "\noptim:\n  lr: 7e-4\n")
    arguments = ("-m", "verl.trainer.sft_trainer", "--config-dir", "mine", "+recipe=my_ffr_sft_cpu", "--cfg", "job")
    run = run_python(*arguments)
    assert run.returncode == 0, run.stderr
    config = OmegaConf.create(run.stdout)
    assert config.optim.lr == 7e-4
    assert config.optim.lr_warmup_steps_ratio == 0.05, "inherited from the packaged recipe"
    options = ("--config-dir", "mine", "+recipe=my_ffr_sft_cpu", "++model.mine=1", "+trainer.nnode=1")
    check = ("-m", "ffr_verl", "check", *options, "model.pth=x", "data.train_flies=y", "optim={lrr:1}")
    once = copy.read_text()
    copy.write_text(f"{once}trainer:\n  total_epoch: 2\n")
    run = run_python(*check)
    assert run.returncode == 2
    assert "found duplicate key trainer" in run.stderr
    assert "Traceback" not in run.stderr
    copy.write_text(once.replace("\ntrainer:\n", "\ntrainer:\n  total_epoch: 2\n"))
    run = run_python(*check)
    assert run.returncode == 2
    notes = [
        "trainer.total_epoch: verl has no such key; did you mean 'total_epochs'? it may do nothing",
        "trainer.nnode: verl has no such key; did you mean 'nnodes'? it may do nothing",
    ]
    assert run.stdout.splitlines() == [f"note: {note}" for note in notes], "what + gives is new, unless it is near"
    errors = {"model.pth": "path", "data.train_flies": "train_files", "optim.lrr": "lr"}
    for line, (key, meant) in zip(run.stderr.splitlines(), errors.items(), strict=False):
        assert line.startswith(f"ffr-verl: error: {key}: unknown key; did you mean '{meant}'"), line
    not_given = ["ffr-verl: error: data.train_files", "ffr-verl: error: model.path"]
    assert [line.split(" is not given")[0] for line in run.stderr.splitlines()][3:] == not_given
    run = run_python("-m", "verl.trainer.sft_trainer", *options)
    assert [line for line in run.stderr.splitlines() if "note:" in line] == [f"ffr-verl: note: {one}" for one in notes]
    assert [line.split(" is not given")[0] for line in run.stderr.splitlines()][-2:] == not_given


def test_real_commands_end_with_one_clear_message(run_python: RunPython, parquet: Path, base_model: Path) -> None:
    """What a user sees; each of these ends before Ray or an engine starts."""
    rl, sft = f"data.train_files={parquet / 'train.rl.parquet'}", f"data.train_files={parquet / 'train.sft.parquet'}"
    model = f"actor_rollout_ref.model.path={base_model}"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        taken.listen()
        cases: list[tuple[list[str], dict[str, str], str]] = [
            (["main_ppo", "+recipe=ffr_grop"], {}, "Could not find 'recipe/ffr_grop'"),
            (
                ["main_ppo", "+recipe=ffr_grpo_cpu", model, "+data.ffr.max_pixel=9", rl],
                {},
                "data.ffr.max_pixel: unknown",
            ),
            (["main_ppo", "+recipe=ffr_grpo_cpu", model], {}, "data.train_files is not given"),
            (["sft_trainer", "+recipe=ffr_sft_cpu", f"model.path={base_model}", rl], {}, "no column messages"),
            (["sft_trainer", "+recipe=ffr_sft", sft], {}, "flash_attn is not installed"),
            (
                ["sft_trainer", "+recipe=ffr_sft_cpu", f"model.path={base_model}", sft],
                {"MASTER_PORT": port},
                f"MASTER_PORT={port}: [Errno 98] Address already in use; unset MASTER_PORT for a free one",
            ),
        ]
        for (trainer, *overrides), environment, message in cases:
            run = run_python("-m", f"verl.trainer.{trainer}", *overrides, environment=environment)
            assert run.returncode != 0
            assert message in run.stderr, (overrides, run.stderr[-2000:])
            assert "Traceback" not in run.stderr, (overrides, run.stderr[-2000:])


@pytest.mark.parametrize("flash_attention", [True, False])
def test_the_gpu_demo_composes(
    composed: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flash_attention: bool
) -> None:
    if flash_attention:
        (tmp_path / "flash_attn.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
    console = Console(file=io.StringIO())
    print_commands(tmp_path, DemoSettings(stack="gpu"), console)
    assert isinstance(console.file, io.StringIO)
    commands = [shlex.split(line) for line in console.file.getvalue().splitlines()]
    for trainer, node in (("sft_trainer", "model"), ("main_ppo", "actor_rollout_ref.model")):
        (command,) = (command for command in commands if f"verl.trainer.{trainer}" in command)
        config = composed(trainer, *command[command.index(f"verl.trainer.{trainer}") + 1 :])
        assert config.trainer.n_gpus_per_node == 1
        assert OmegaConf.select(config, f"{node}.use_remove_padding") is flash_attention
        wanted = None if flash_attention else "sdpa"
        assert OmegaConf.select(config, f"{node}.override_config.attn_implementation") == wanted


def test_what_copied_recipes_name_is_still_there(run_python: RunPython) -> None:
    code = """
from hydra.utils import get_object
for name in ("preflight.RecipeCallback", "data.datasets.FFRDataset", "data.datasets.FFRSFTDataset",
             "samplers.FFRReplayBuffer", "samplers.FFRReplayBufferAsync", "rewards.compute_score"):
    get_object(f"ffr_verl.{name}")
import ffr_verl.qwen2_vl.text_only, ffr_verl.qwen2_vl.frozen_vision_tower
from verl.workers.engine.base import EngineRegistry
assert "FrozenVisionTowerEngine" in str(EngineRegistry._engines), EngineRegistry._engines
"""
    run = run_python("-c", code, environment={"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda"})
    assert run.returncode == 0, run.stderr[-2000:]


def test_processes_of_a_cluster_get_what_the_cpu_needs(composed: Callable[..., Any]) -> None:
    from ffr_verl.integrations.verl.cpu_platform import CPU_ENVIRONMENT

    assert composed("main_ppo", "+recipe=ffr_grpo_cpu").ray_kwargs.ray_init.runtime_env.env_vars == CPU_ENVIRONMENT


@pytest.mark.parametrize(("given", "ranks", "threads"), [(None, 1, 6), (None, 4, 1), (None, 8, 1), ("3", 1, 3)])
def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch, given: str | None, ranks: int, threads: int) -> None:
    from ffr_verl.integrations.verl.cpu_platform import share_cores

    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(6)))
    monkeypatch.setenv("OMP_NUM_THREADS", given or "")
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    share_cores(ranks)
    assert os.environ["OMP_NUM_THREADS"] == str(threads)
