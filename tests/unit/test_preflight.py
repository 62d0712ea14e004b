"""Each thing that would stop a run is one message that names key or file and the remedy."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from ffr_verl.data.parquet_files import recorded_root
from ffr_verl.data.prepare import prepare
from ffr_verl.data.tokens import PromptTokens
from ffr_verl.embeddings import image_key, query_key, utterance_key, write_store
from ffr_verl.errors import FFRError
from ffr_verl.integrations.verl import preflight
from ffr_verl.integrations.verl.live_runs import FIRST_JOB, joined_cluster, live_runs
from ffr_verl.settings import BEST_CHECKPOINT


@pytest.fixture(scope="module")
def parquet(demo_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows, because each check opens every image of them."""
    folder = tmp_path_factory.mktemp("few")
    for split in ("train", "heldout"):
        rows = json.loads((demo_set / f"{split}.json").read_text())[:8]
        (folder / f"{split}.json").write_text(json.dumps(rows))
        prepare(folder / f"{split}.json", images_root=demo_set, output=folder, split=split)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        (folder / name).write_text(json.dumps({"model_type": "qwen2_vl"} if name == "config.json" else {}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def grpo(parquet: Path, model: Path, tmp_path: Path) -> dict[str, Any]:
    """As much of a composed GRPO config as the check reads."""
    return {
        "data": {
            "train_files": str(parquet / "train.rl.parquet"),
            "val_files": [str(parquet / "heldout.rl.parquet")],
            "custom_cls": {"path": "pkg://ffr_verl.integrations.verl.datasets"},
            "ffr": {"images_root": None, "max_pixels": 602112},
        },
        "reward": {
            "custom_reward_function": {
                "path": "pkg://ffr_verl.rewards",
                "reward_kwargs": {"weights": {"f1": 1.0, "format": 0.3}},
            }
        },
        "actor_rollout_ref": {"model": {"path": str(model), "use_remove_padding": False, "override_config": {}}},
        "ray_kwargs": {"ray_init": {"address": "ray://127.0.0.1:1"}},  # so another run of this machine does not matter
        "trainer": {
            "default_local_dir": str(tmp_path / "checkpoints"),
            "v1": {
                "sampler": {
                    "custom_sampler": {"path": "pkg://ffr_verl.samplers"},
                    "sampler_kwargs": {"poll_interval": 0.5},
                }
            },
        },
    }


def check(config: dict[str, Any]) -> None:
    preflight.find_problems(OmegaConf.create(config), starts=True).stop()


def put(config: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        config = config[part]
    config[last] = value


@pytest.mark.parametrize(
    ("trainer", "rollout", "message"),
    [
        ({"n_gpus_per_node": 1}, {}, None),
        ({"n_gpus_per_node": 1, "strategy": "fsdp"}, {}, r"strategy=fsdp: on one device .* give .*strategy=fsdp2"),
        ({"n_gpus_per_node": 8, "strategy": "fsdp"}, {}, None),
        ({"v1.trainer_mode": "separate_async"}, {}, r"separate_async: .*the base weights only.* give .*merge=true"),
        ({"v1.trainer_mode": "separate_async", "merge": True}, {}, None),
        ({"v1.trainer_mode": "separate_async", "lora_rank": 0}, {}, None),
        ({"device": "cpu"}, {}, None),
        ({"device": "cpu", "lora_rank": 0}, {}, r"lora_rank=0: on a CPU verl cannot hand vLLM whole weights"),
        ({"device": "cpu", "merge": True}, {}, r"lora_rank=8: on a CPU .* give .*lora_rank=8 .*lora\.merge=false"),
        ({"n_gpus_per_node": 8}, {"tensor_model_parallel_size": 4}, None),
        (
            {"n_gpus_per_node": 8, "nnodes": 2},
            {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 4},
            None,
        ),
        ({"n_gpus_per_node": 8}, {"tensor_model_parallel_size": 3}, r"=3 .*an engine takes 3 devices.* into 1 x 8 "),
        ({"n_gpus_per_node": 2}, {"tensor_model_parallel_size": 4}, r"=4 .*an engine takes 4 devices.* into 1 x 2 "),
        ({"n_gpus_per_node": 3, "nnodes": 2}, {"data_parallel_size": 2}, r"takes 2 devices.* into 2 x 3 "),
        ({"n_gpus_per_node": 8}, {"tensor_model_parallel_size": 8}, r"size=8: the model has 12 attention heads"),
    ],
)
def test_devices_engines_and_the_way_of_the_weights(
    grpo: dict[str, Any], model: Path, trainer: dict[str, Any], rollout: dict[str, Any], message: str | None
) -> None:
    strategy, merge = trainer.pop("strategy", "fsdp2"), trainer.pop("merge", False)
    grpo["actor_rollout_ref"] |= {"actor": {"strategy": strategy}, "rollout": rollout}
    grpo["actor_rollout_ref"]["model"] |= {"lora_rank": trainer.pop("lora_rank", 8), "lora": {"merge": merge}}
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", "num_attention_heads": 12}))
    for key, value in trainer.items():
        put(grpo, f"trainer.{key}", value)
    if message is None:
        check(grpo)
        return
    with pytest.raises(FFRError, match=message):
        check(grpo)


@pytest.mark.parametrize(
    ("address", "left"), [("local", {"num_cpus": 8, "num_gpus": 1}), ("127.0.0.1:6379", {"num_cpus": None})]
)
def test_a_run_that_joins_a_ray_cluster_asks_for_no_slots(address: str, left: dict[str, Any]) -> None:
    """Ray refuses them there, and a `*_cpu` recipe gives them."""
    given = {"num_cpus": 8, **({"num_gpus": 1} if "num_gpus" in left else {})}
    config = OmegaConf.create({"ray_kwargs": {"ray_init": {"address": address, **given}}})
    preflight.RecipeCallback().on_run_start(config)
    assert config.ray_kwargs.ray_init == {"address": address, **left}


def process(arguments: Sequence[str], **environment: str) -> subprocess.Popen[bytes]:
    """That sleeps under the given command line."""
    alive = subprocess.Popen(
        [arguments[0], "-c", "import time; time.sleep(60)", *arguments[1:]],
        executable=sys.executable,
        env={**os.environ, **environment},
    )
    while not Path(f"/proc/{alive.pid}/cmdline").read_bytes().startswith(arguments[0].encode()):
        time.sleep(0.01)
    return alive


@pytest.mark.parametrize(
    ("arguments", "environment", "is_in_the_way"),
    [
        (("python", "-m", "verl.trainer.main_ppo", "+recipe=ffr_grpo"), {}, True),
        (("python", "-m", "verl.trainer.main_ppo"), {"RAY_ADDRESS": "10.0.0.1:6379"}, False),
        (("ray::vLLMHttpServer",), {"RAY_JOB_ID": FIRST_JOB}, True),
        (("ray::vLLMHttpServer",), {"RAY_JOB_ID": "02000000"}, False),
        (("grep", "-r", "verl.trainer.main_ppo"), {}, False),
        (("ray::WorkerOfSomethingElse",), {"RAY_JOB_ID": FIRST_JOB}, False),
    ],
)
def test_another_run_beside_which_this_one_would_hang(
    monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str], environment: dict[str, str], is_in_the_way: bool
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    alive = process(arguments, **environment)
    try:
        assert (alive.pid in [run.pid for run in live_runs()]) == is_in_the_way
    finally:
        alive.kill()
        alive.wait()
    assert alive.pid not in [run.pid for run in live_runs()]


@pytest.mark.parametrize(
    ("given", "environment", "cluster"),
    [
        (None, {}, None),
        (None, {"RAY_ADDRESS": "h:1"}, "h:1"),
        (None, {"TMPDIR": "HERE"}, "auto"),
        (None, {"TMPDIR": "HERE", "RAY_TMPDIR": "/nowhere"}, None),
        ("auto", {}, "auto"),
        ("local", {"RAY_ADDRESS": "h:1"}, None),
        ("h:1", {"RAY_ADDRESS": "local"}, "h:1"),
        ("auto", {"RAY_ADDRESS": "local"}, None),
    ],
)
def test_the_cluster_that_ray_joins(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: str | None,
    environment: dict[str, str],
    cluster: str | None,
) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").touch()
    for name in ("RAY_ADDRESS", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TMPDIR": "/nowhere", **environment}.items():
        monkeypatch.setenv(name, value.replace("HERE", str(tmp_path)))
    assert joined_cluster(given) == cluster


def test_another_run_is_named_with_what_to_do(grpo: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    put(grpo, "ray_kwargs.ray_init.address", "local")
    alive = process(("python", "-m", "verl.trainer.main_ppo"))
    try:
        with pytest.raises(
            FFRError, match=r"another GRPO run is alive .*\(pid \d+, since 20.*\); .*wait for its end, or"
        ):
            check(grpo)
        found = preflight.find_problems(OmegaConf.create(grpo))
        assert not found.problems, "of a run that does not start now"
        assert "another GRPO run is alive" in found.notes[0]
        put(grpo, "ray_kwargs.ray_init.address", "ray://10.0.0.1:10001")
        check(grpo)
    finally:
        alive.kill()
        alive.wait()


def test_all_problems_are_said_at_once(grpo: dict[str, Any]) -> None:
    put(grpo, "data.ffr.max_pixel", 1)
    put(grpo, "trainer.v1.sampler.sampler_kwargs", {"pol_interval": 1})
    put(grpo, "actor_rollout_ref.model.path", "./absent")
    found = preflight.find_problems(OmegaConf.create(grpo))
    assert [text.split(":")[0] for text in found.problems] == [
        "data.ffr.max_pixel",
        "trainer.v1.sampler.sampler_kwargs.pol_interval",
        "actor_rollout_ref.model.path",
    ]
    assert [note.split(":")[0] for note in found.notes] == [
        "data.ffr.curriculum.order=published needs a difficulty file, and none is given"
    ]


def test_what_is_not_ours_is_said_to_be_unchecked(grpo: dict[str, Any]) -> None:
    put(grpo, "reward.custom_reward_function.path", "mine.py")
    put(grpo, "reward.reward_manager", {"name": "naive"})
    put(grpo, "data.custom_cls.path", "mine.py")
    put(grpo, "algorithm", {"adv_estimator": "grpo"})
    put(grpo, "trainer.v1.sampler.sampler_kwargs.advantage", None)
    found = preflight.find_problems(OmegaConf.create(grpo))
    assert found.notes == (
        "the reward is not ours: its keyword arguments were not checked",
        "the dataset is not ours: data files and images were not checked",
    )
    assert not found.problems


def test_nodes_of_a_cluster_are_asked_for_what_is_read_there(
    grpo: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Data, images, model, and files of rewards of one's own; after everything else was found to be there."""
    (tmp_path / "mine.py").write_text("def brevity(completion, solution):\n    return 0.5\n")
    door = f"{tmp_path}/mine.py:brevity"
    put(grpo, "reward.custom_reward_function.reward_kwargs.components", {"brevity": door})
    put(grpo, "ray_kwargs", {"ray_init": {"address": "h:1"}})
    asked = list[tuple[str, list[str]]]()
    monkeypatch.setattr(preflight, "check_cluster", lambda address, where: None)
    monkeypatch.setattr(preflight, "check_nodes", lambda address, paths, where: asked.append((address, paths)))
    assert not preflight.find_problems(OmegaConf.create(grpo)).problems
    data = [grpo["data"]["train_files"], grpo["data"]["val_files"][0]]
    ((address, paths),) = asked
    assert address == "h:1"
    model, root = grpo["actor_rollout_ref"]["model"]["path"], recorded_root(data[0])
    assert set(paths) == {str(tmp_path / "mine.py"), *data, str(model), str(root)}
    put(grpo, "data.ffr.max_pixel", 1)
    preflight.find_problems(OmegaConf.create(grpo))
    assert len(asked) == 1, "what is wrong here is told first"


def test_a_good_config_passes(grpo: dict[str, Any]) -> None:
    check(grpo)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.ffr.max_pixel", 1, r"data\.ffr\.max_pixel: unknown key; did you mean 'max_pixels'\?"),
        ("data.ffr.max_pixels", 0, r"data\.ffr\.max_pixels: found 0"),
        ("data.ffr.min_pixels", 700_000, r"data\.ffr\.min_pixels: found 700000, more than max_pixels"),
        ("data.ffr.images_root", 3, r"data\.ffr\.images_root: found 3"),
        ("data.train_files", "???", r"data\.train_files is not given"),
        ("data.train_files", None, r"data\.train_files is not given"),
        ("data.val_files", None, r"data\.val_files is not given"),
        ("data.train_files", "no/such.rl.parquet", r"data\.train_files: no/such\.rl\.parquet: no such file"),
        ("data.val_files", ["no.parquet"], r"data\.val_files: no\.parquet: no such file"),
        ("data.train_files", __file__, r"test_preflight\.py: not a parquet file"),
        (
            "reward.custom_reward_function.reward_kwargs.length_penality",
            0.9,
            r"reward_kwargs\.length_penality: unknown key; did you mean 'length_penalty'\?",
        ),
        ("trainer.v1.sampler.sampler_kwargs.poll_intervall", 1, r"sampler_kwargs\.poll_intervall: unknown key"),
        ("trainer.v1.sampler.sampler_kwargs.poll_interval", 0, r"sampler_kwargs\.poll_interval: found 0"),
        ("trainer.v1.sampler.sampler_kwargs.filter_groups", True, r"sampler_kwargs\.train_batch_size is missing"),
        (
            "trainer.v1.sampler.sampler_kwargs.best_checkpoint",
            "micro_f1",
            r"sampler_kwargs\.best_checkpoint: no metric 'micro_f1'; did you mean 'micro_joint_f1'\? there are micro_",
        ),
        (
            "trainer.v1.sampler.sampler_kwargs",
            {"filter_groups": True, "train_batch_size": 8, "filter_groups_metric": "f2"},
            r"sampler_kwargs\.filter_groups_metric: no metric 'f2'; there are reward, score, f1",
        ),
        (
            "data.ffr.curriculum",
            {"order": "online", "online": {"metric": "f2"}},
            r"curriculum\.online\.metric: no metric 'f2'; there are reward,",
        ),
        ("trainer.logger", ["console", "wanbd"], r"trainer\.logger: found 'wanbd'; did you mean 'wandb'\?"),
        ("trainer.logger", "clearml", r"trainer\.logger: clearml is not installed; pip install clearml"),
        ("actor_rollout_ref.model.path", None, r"actor_rollout_ref\.model\.path is not given"),
        ("actor_rollout_ref.model.path", "./models/sft", r"model\.path: \./models/sft: no such folder"),
    ],
)
def test_settings(grpo: dict[str, Any], key: str, value: Any, message: str) -> None:
    put(grpo, key, value)
    with pytest.raises(FFRError, match=message):
        check(grpo)


@pytest.mark.parametrize(
    ("estimator", "norm", "mode", "advantage", "message"),
    [
        ("grpo", True, "published", None, None),
        ("grpo", False, "micro", None, None),
        ("ffr", True, "micro_f1_mcc", {"credit": "id"}, None),
        ("ffr", True, "published", {"credit": "components", "components": {"f1": 1.0}}, None),
        ("gdpo", True, "published", None, r"adv_estimator=gdpo: verl 0\.9\.1's own fails .*give \+recipe=ffr_gdpo"),
        ("ffr", True, "micro", None, r"adv_estimator=ffr: .*advantage is not given; give .*credit: id"),
        ("grpo", False, "micro", {"credit": "id"}, r"advantage is not read with .*=grpo; give .*=ffr, or .*=null"),
        ("ffr", True, "pooled", {"credit": "id"}, r"credit=id: with f1_mode=pooled an id has no worth of its own"),
        ("grpo", True, "micro", None, r"norm_adv_by_std_in_grpo: with f1_mode=micro a reward's size is what"),
        ("ffr", True, "micro", {"credit": "ids"}, r"advantage\.credit: found 'ids', expected one of answer, id"),
    ],
)
def test_reward_and_advantages_suit_each_other(
    grpo: dict[str, Any], estimator: str, norm: bool, mode: str, advantage: Any, message: str | None
) -> None:
    grpo["algorithm"] = {"adv_estimator": estimator, "norm_adv_by_std_in_grpo": norm}
    put(grpo, "reward.custom_reward_function.reward_kwargs.f1_mode", mode)
    put(grpo, "trainer.v1.sampler.sampler_kwargs.advantage", advantage)
    if message is None:
        check(grpo)
        return
    with pytest.raises(FFRError, match=message):
        check(grpo)


def test_metrics_that_nothing_uses_are_not_asked_for(grpo: dict[str, Any]) -> None:
    """verl's `algorithm.filter_groups.metric` may be anything while the filter is off."""
    put(grpo, "trainer.v1.sampler.sampler_kwargs.filter_groups_metric", "acc")
    put(grpo, "data.ffr.curriculum", {"order": "shuffled", "online": {"metric": "acc"}})
    check(grpo)


@pytest.mark.parametrize("name", ["micro_joint_f1", "micro_image_mcc", "f1_images", "score", None])
def test_checkpoints_are_chosen_by_what_a_validation_has(grpo: dict[str, Any], name: str | None) -> None:
    put(grpo, "trainer.v1.sampler.sampler_kwargs.best_checkpoint", name)
    check(grpo)


@pytest.mark.parametrize(
    ("frequencies", "most", "notes"),
    [
        ((50, 50), 2, []),
        ((50, 25), 2, []),
        ((25, 50), None, []),
        ((20, 14), 2, ["is that of each 140th step only"]),
        ((-1, 14), 2, ["both must be above 0"]),
        ((50, -1), 2, ["both must be above 0"]),
        ((20, 14), 1, ["is that of each 140th step only", "give 2 or more"]),
    ],
)
def test_settings_that_lose_the_best_checkpoint_are_noted(
    grpo: dict[str, Any], frequencies: tuple[int, int], most: int | None, notes: list[str]
) -> None:
    put(grpo, "trainer.v1.sampler.sampler_kwargs.best_checkpoint", "micro_joint_f1")
    put(grpo, "trainer.save_freq", frequencies[0])
    put(grpo, "trainer.test_freq", frequencies[1])
    put(grpo, "trainer.max_actor_ckpt_to_keep", most)
    assert not [one for one in preflight.find_problems(OmegaConf.create(grpo)).notes if "best checkpoint" in one]
    put(grpo, "trainer.checkpoint_callback_class", BEST_CHECKPOINT)
    found = [one for one in preflight.find_problems(OmegaConf.create(grpo)).notes if "best checkpoint" in one]
    assert [note.endswith(end) for note, end in zip(found, notes, strict=True)] == [True] * len(notes)


def test_workers_do_not_know_where_the_policy_stands(grpo: dict[str, Any]) -> None:
    grpo["algorithm"] = {"adv_estimator": "grpo", "norm_adv_by_std_in_grpo": False}
    put(grpo, "data.dataloader_num_workers", 2)
    check(grpo)
    put(grpo, "reward.custom_reward_function.reward_kwargs.f1_mode", "micro")
    with pytest.raises(FFRError, match=r"dataloader_num_workers: found 2; the micro reward asks the rows"):
        check(grpo)


@pytest.mark.parametrize("place", ["ffr_verl.integrations.verl.datasets", "ffr_verl.data.datasets"])
def test_the_data_of_copied_recipes_are_checked_too(grpo: dict[str, Any], place: str) -> None:
    put(grpo, "data.custom_cls.path", f"pkg://{place}")
    put(grpo, "data.train_files", "no/such.rl.parquet")
    with pytest.raises(FFRError, match="no such file"):
        check(grpo)


@pytest.mark.parametrize("order", ["shuffled", "online"])
def test_orders_without_a_difficulty_file_are_not_reordered_either(grpo: dict[str, Any], order: str) -> None:
    put(grpo, "data.ffr.curriculum", {"order": order})
    put(grpo, "data.shuffle", False)
    check(grpo)
    put(grpo, "data.shuffle", True)
    with pytest.raises(FFRError, match=rf"data\.shuffle: found True; with data\.ffr\.curriculum\.order={order} give"):
        check(grpo)


@pytest.mark.parametrize("name", ["owner/model-of-the-hub", "gpt2", "hdfs://cluster/models/sft"])
def test_names_that_are_fetched_are_left_to_verl(
    grpo: dict[str, Any],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What cannot be looked at is not judged as some other model would be without a word."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    put(grpo, "actor_rollout_ref.model.path", name)
    check(grpo)
    (message,) = caplog.messages
    assert name in message
    assert "sizes of images" in message.lower()


def test_what_qwen3_5_needs_is_said(grpo: dict[str, Any], model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "qwen3_5"}))
    with pytest.raises(
        FFRError, match=r"enable_thinking is not given: the chat template of qwen3_5 begins each answer"
    ):
        check(grpo)
    put(grpo, "data.apply_chat_template_kwargs", {"enable_thinking": False})
    check(grpo)
    put(grpo, "trainer.device", "cpu")
    for dtype in ("bfloat16", "float32"):
        put(grpo, "actor_rollout_ref.rollout", {"dtype": dtype})
        if dtype == "bfloat16":
            check(grpo)
    with pytest.raises(FFRError, match=r"rollout\.dtype: vLLM's CPU build runs qwen3_5 in bfloat16 only; give"):
        check(grpo)


def test_a_missing_folder_beside_others_is_no_hub_name(
    grpo: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    put(grpo, "actor_rollout_ref.model.path", "models/sft")
    with pytest.raises(FFRError, match=r"model\.path: models/sft: no such folder"):
        check(grpo)


def test_rewards_and_buffers_of_others_are_not_checked(grpo: dict[str, Any]) -> None:
    put(grpo, "reward.custom_reward_function", {"path": "mine.py", "reward_kwargs": {"anything": 1}})
    put(grpo, "trainer.v1.sampler", {"custom_sampler": {"path": "mine.py"}, "sampler_kwargs": {"anything": 1}})
    check(grpo)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", r"config\.json is missing; not a Hugging Face model folder.*ffr-verl merge"),
        ("tokenizer_config.json", r"tokenizer_config\.json is missing"),
        ("preprocessor_config.json", r"the model has no processor"),
        ("chat_template.jinja", r"the model has no chat template, so prompts cannot be written"),
    ],
)
def test_incomplete_models(grpo: dict[str, Any], model: Path, name: str, message: str) -> None:
    (model / name).unlink()
    with pytest.raises(FFRError, match=message):
        check(grpo)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.json"])
def test_a_chat_template_may_stand_in_other_files(grpo: dict[str, Any], model: Path, name: str) -> None:
    (model / "chat_template.jinja").unlink()
    (model / name).write_text(json.dumps({"chat_template": "{{ messages }}"}))
    check(grpo)


def test_a_recipe_may_bring_the_chat_template(grpo: dict[str, Any], model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    put(grpo, "actor_rollout_ref.model.custom_chat_template", "{{ messages }}")
    check(grpo)


def test_a_checkpoint_that_was_cut_short(grpo: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / "global_step_3").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    put(grpo, "trainer.default_local_dir", str(folder))
    check(grpo)
    put(grpo, "trainer.resume_mode", "auto")
    with pytest.raises(FFRError, match=r"global_step_3: the checkpoint was cut short: data\.pt"):
        check(grpo)
    put(grpo, "actor_rollout_ref.actor", {"checkpoint": {"load_contents": ["model"]}})
    with pytest.raises(FFRError, match=r"cut short: data\.pt, actor/model_world_size_1_rank_0\.pt missing"):
        check(grpo)


def test_a_checkpoint_of_another_number_of_ranks(grpo: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in ("data.pt", *[f"actor/{kind}_world_size_2_rank_0.pt" for kind in ("model", "optim", "extra_state")]):
        (folder / "global_step_3" / name).parent.mkdir(parents=True, exist_ok=True)
        np.savez((folder / "global_step_3" / name).open("wb"))  # an archive
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    grpo["trainer"] |= {"default_local_dir": str(folder), "resume_mode": "auto", "nnodes": 2, "n_gpus_per_node": 1}
    check(grpo)
    put(grpo, "trainer.n_gpus_per_node", 2)
    with pytest.raises(FFRError, match=r"global_step_3: written by 2 ranks, and this run has 4"):
        check(grpo)


def test_an_sft_file_for_grpo(grpo: dict[str, Any], parquet: Path) -> None:
    put(grpo, "data.train_files", str(parquet / "train.sft.parquet"))
    with pytest.raises(FFRError, match=r"train\.sft\.parquet: no column prompt"):
        check(grpo)


def write_tokenizer(model: Path) -> None:
    """One to which each word is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(model / "tokenizer.json"))


def test_rows_that_are_too_long_for_the_run(grpo: dict[str, Any], parquet: Path, model: Path) -> None:
    write_tokenizer(model)
    prompts = [row["prompt"] for row in pq.read_table(parquet / "train.rl.parquet").to_pylist()]
    counts = [PromptTokens(str(model)).count(prompt, [1] * str(prompt).count("<image>")) for prompt in prompts]
    key = "data.max_prompt_length"
    put(grpo, "data.val_files", [])
    for limit, overlong in ((10**6, 0), (min(counts), sum(count > min(counts) for count in counts))):
        put(grpo, key, limit)
        found = preflight.find_problems(OmegaConf.create(grpo))
        said = f"of 8 rows looked at, {overlong} with more than {key}={limit} tokens of text, up to {max(counts):,}"
        assert not found.problems
        assert (said in str(found.notes)) == bool(overlong)
    put(grpo, key, 10)
    with pytest.raises(
        FFRError, match=r"train\.rl\.parquet: of 8 rows looked at, 8 .*none of them fits: raise data\.max"
    ):
        check(grpo)
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(FFRError, match=r"actor_rollout_ref\.model\.path: .*model: .*; give a model's folder"):
        check(grpo)


@pytest.mark.parametrize(("truncation", "is_refused"), [("error", True), ("right", False)])
def test_sft_rows_that_are_too_long(
    parquet: Path, model: Path, tmp_path: Path, truncation: str, *, is_refused: bool
) -> None:
    write_tokenizer(model)
    config = {
        "data": {
            "train_files": str(parquet / "train.sft.parquet"),
            "max_length": 10,
            "truncation": truncation,
            "custom_cls": {"path": "pkg://ffr_verl.integrations.verl.datasets"},
        },
        "model": {"path": str(model)},
        "trainer": {"default_local_dir": str(tmp_path / "checkpoints")},
    }
    found = preflight.find_problems(OmegaConf.create(config))
    said = "of 8 rows looked at, 8 with more than data.max_length=10 tokens"
    assert said in str(found.problems if is_refused else found.notes)
    assert ("the first one would end the run" in str(found.problems)) == is_refused


def test_images_that_are_gone(grpo: dict[str, Any], tmp_path: Path) -> None:
    put(grpo, "data.ffr.images_root", str(tmp_path))
    with pytest.raises(FFRError, match=r"row \d+: image .*: no such file \(images root"):
        check(grpo)


def test_another_verl(grpo: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    actual = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.7.0" if name == "verl" else actual(name))
    with pytest.raises(FFRError, match=r"verl 0\.7\.0 is installed.*pip install 'verl\[verl-core\]==0\.9\.1'"):
        check(grpo)


@pytest.mark.parametrize(
    ("module", "change", "message"),
    [
        ("vllm", lambda config: None, "vllm is not installed; GRPO generates with it"),
        (
            "flash_attn",
            lambda config: put(config, "actor_rollout_ref.model.use_remove_padding", True),
            r"use_remove_padding is on and flash_attn is not installed: pip install flash-attn",
        ),
    ],
)
def test_missing_packages(
    grpo: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    change: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    actual = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else actual(name))
    change(grpo)
    with pytest.raises(FFRError, match=message):
        check(grpo)
    if module == "flash_attn":  # transformers has its own attention on Ascend
        there = {module: None, "torch_npu": actual("json")}
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: there[name] if name in there else actual(name))
        check(grpo)


@pytest.mark.parametrize(
    ("files", "is_usable"),
    [
        ({"__init__.py": ""}, False),
        ({"__init__.py": "AutoModelForCausalLMWithValueHead"}, True),
        ({"__init__.py": "", "experimental/ppo/__init__.py": "AutoModelForCausalLMWithValueHead"}, True),
    ],
    ids=["without the class", "older", "old"],
)
def test_a_trl_that_breaks_verl(
    grpo: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], is_usable: bool
) -> None:
    for name, text in files.items():
        file = tmp_path / "site" / "trl" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "site")
    if is_usable:
        check(grpo)
        return
    with pytest.raises(FFRError, match=r"trl is installed and has no AutoModelForCausalLM.*pip uninstall trl"):
        check(grpo)


@pytest.fixture
def with_store(grpo: dict[str, Any], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The config with an embedding store that holds the keys of these files, the first ones only where asked."""

    def make(*files: str, keys: int | None = None) -> dict[str, Any]:
        wanted = []
        for file in files:
            for row in pq.read_table(file, columns=["extra_info"]).column("extra_info").to_pylist():
                wanted += [utterance_key(row["dialogue_id"], identifier) for identifier in row["utterance_ids"]]
                wanted += [image_key(name) for name in row["images"]]
        names = list(dict.fromkeys(wanted or ["utt:elsewhere:0"]))[:keys]
        write_store(tmp_path / "store", ((name, np.ones(4)) for name in names), model="test")
        put(grpo, "reward.custom_reward_function.reward_kwargs.embeddings", str(tmp_path / "store"))
        return grpo

    return make


def test_a_store_of_this_data(grpo: dict[str, Any], with_store: Any, caplog: pytest.LogCaptureFixture) -> None:
    check(with_store(grpo["data"]["train_files"], *grpo["data"]["val_files"]))
    assert not caplog.records


def test_a_store_of_other_data(with_store: Any) -> None:
    with pytest.raises(FFRError, match=r"reward_kwargs\.embeddings: .*store has no vector for .*train\.rl\.parquet"):
        check(with_store())


def test_a_store_of_the_training_rows_only(grpo: dict[str, Any], with_store: Any) -> None:
    with pytest.raises(FFRError, match=r"has no vector for .*heldout\.rl\.parquet.*ffr-verl embed"):
        check(with_store(grpo["data"]["train_files"]))


def test_a_store_of_a_part_is_a_warning(
    grpo: dict[str, Any], with_store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    put(grpo, "data.val_files", grpo["data"]["train_files"])
    check(with_store(grpo["data"]["train_files"], keys=3))
    assert "utterances and images looked for in" in caplog.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, r"reward_kwargs\.embeddings: .*no such folder; give the --output of `ffr-verl embed`"),
        (lambda folder: folder.mkdir(), r"no embedding store: manifest\.json is missing"),
        (lambda folder: folder.write_text("x"), r"a file, but an embedding store is a folder"),
    ],
)
def test_no_store(grpo: dict[str, Any], tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "store")
    put(grpo, "reward.custom_reward_function.reward_kwargs.embeddings", str(tmp_path / "store"))
    with pytest.raises(FFRError, match=message):
        check(grpo)


def test_answer_tags_that_are_special_need_our_reward_manager(grpo: dict[str, Any], model: Path) -> None:
    def write(*, special: bool, tag: str = "<|utt_ids_start|>") -> None:
        tokens = [{"content": tag, "special": special}, {"content": "<|im_end|>", "special": True}]
        (model / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))

    put(grpo, "reward.reward_manager", {"name": "naive"})
    write(special=False)
    check(grpo)
    write(special=True)
    with pytest.raises(FFRError, match=r"reward_manager\.name=naive: it drops special tokens.*name=ffr"):
        check(grpo)
    put(grpo, "reward.reward_manager", {"name": "ffr"})
    check(grpo)
    put(grpo, "reward.reward_manager", {"name": "naive"})
    write(special=True, tag="</think>")
    check(grpo)  # of plain answers
    put(grpo, "reward.custom_reward_function.reward_kwargs.answer_style", "reasoning")
    with pytest.raises(FFRError, match="it drops special tokens, and </think> is one"):
        check(grpo)
    write(special=True, tag="<answer>")  # may be missing
    check(grpo)


def test_settings_of_the_reward_manager_alone(grpo: dict[str, Any]) -> None:
    put(grpo, "reward", {"reward_manager": {"name": "ffr"}, "reward_kwargs": {"coherence_mod": "published"}})
    with pytest.raises(FFRError, match=r"coherence_mod: unknown key; did you mean 'coherence_mode'\?"):
        check(grpo)


def test_a_full_disk(grpo: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=3 * 2**20))
    with pytest.raises(FFRError, match=r"trainer\.default_local_dir: .*: 3 MiB are free there"):
        check(grpo)


def test_a_failed_check_ends_the_process_with_status_2(
    grpo: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    put(grpo, "data.train_files", "absent.parquet")
    with pytest.raises(SystemExit) as caught:
        preflight.RecipeCallback().on_job_start(OmegaConf.create(grpo))
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("ffr-verl: error: data.train_files: absent.parquet: no such file")


@pytest.mark.parametrize("options", [{"plattform": "cpu"}, {"platform": "tpu"}])
def test_the_callbacks_own_keys_are_checked(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        preflight.RecipeCallback(**options)
    assert "hydra.callbacks.ffr_verl.plat" in capsys.readouterr().err


PARTS = """
from ffr_verl.samplers import Order
def lengths(completion, solution, *, extra_info):
    return {expression}
class Backwards(Order):
    def row_at(self, epoch, position):
        return len(self) - {place}
"""


def test_rewards_of_ones_own_are_tried(grpo: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "parts.py"
    file.write_text(PARTS.format(expression="len(extra_info['utterance_ids']) / 100", place="1 - position"))
    kwargs = "reward.custom_reward_function.reward_kwargs"
    put(grpo, f"{kwargs}.components", {"lengths": f"{file}:lengths"})
    check(grpo)
    broken = tmp_path / "broken.py"
    broken.write_text(PARTS.format(expression="1 / len(completion)", place="1"))
    put(grpo, f"{kwargs}.components", {"lengths": f"{broken}:lengths"})
    with pytest.raises(FFRError, match=r"reward lengths .*broken\.py:lengths\): dialogue .*raised ZeroDivisionError"):
        check(grpo)
    put(grpo, f"{kwargs}.components", {"lengths": f"{file}:length"})
    with pytest.raises(FFRError, match=r"components\.lengths: .*there is no length in it; did you mean 'lengths'"):
        check(grpo)


def test_gdpo_wants_components_that_are_there(grpo: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text(PARTS.format(expression="0.5", place="1"))
    put(grpo, "algorithm", {"adv_estimator": "ffr"})
    put(grpo, "reward.custom_reward_function.reward_kwargs.components", {"mine": f"{tmp_path / 'parts.py'}:lengths"})
    node = "trainer.v1.sampler.sampler_kwargs.advantage"
    put(grpo, node, {"credit": "components", "components": {"f1_utterances": 0.5, "mine": 0.5}})
    check(grpo)
    put(grpo, node, {"credit": "components", "components": {"f1_utterances": 0.5, "mien": 0.5}})
    with pytest.raises(FFRError, match=r"advantage\.components\.mien: unknown key; did you mean 'mine'"):
        check(grpo)


def test_a_store_without_queries_is_refused_for_relevance(grpo: dict[str, Any], parquet: Path, tmp_path: Path) -> None:
    vectors, queries = dict[str, np.ndarray](), dict[str, np.ndarray]()
    for file in ("train.rl.parquet", "heldout.rl.parquet"):
        for info in pq.read_table(parquet / file).column("extra_info").to_pylist():
            for one in info["utterance_ids"]:
                vectors[utterance_key(info["dialogue_id"], one)] = np.array([1.0, one])
            queries[query_key(info["query"])] = np.ones(2)
    kwargs = "reward.custom_reward_function.reward_kwargs"
    put(grpo, f"{kwargs}.components", {"near": "pkg://ffr_verl.rewards.relevance:relevance_reward"})
    for name, held in (("older", vectors), ("store", {**vectors, **queries})):
        write_store(tmp_path / name, held.items(), model="toy")
        put(grpo, f"{kwargs}.embeddings", str(tmp_path / name))
        if name == "store":
            check(grpo)
            continue
        with pytest.raises(
            FFRError, match=r"embeddings: .*older: holds no queries, .*make it again with `ffr-verl emb"
        ):
            check(grpo)


def test_orders_of_ones_own_are_rehearsed(grpo: dict[str, Any], tmp_path: Path) -> None:
    file, broken = tmp_path / "parts.py", tmp_path / "broken.py"
    file.write_text(PARTS.format(expression="0", place="1 - position"))
    broken.write_text(PARTS.format(expression="0", place="0"))
    put(grpo, "data.train_batch_size", 8)
    put(grpo, "data.ffr.curriculum", {"order": f"{file}:Backwards"})
    check(grpo)
    put(grpo, "data.shuffle", True)
    with pytest.raises(FFRError, match=r"data\.shuffle: found True; .*Backwards give data\.shuffle=False"):
        check(grpo)
    put(grpo, "data.shuffle", False)
    put(grpo, "data.ffr.curriculum.order", f"{broken}:Backwards")
    with pytest.raises(FFRError, match=r"Backwards: row_at\(0, 0\) gave \d+; expected the number of a row, 0 to \d+"):
        check(grpo)
    put(grpo, "data.ffr.curriculum.order", f"{file}:Backward")
    with pytest.raises(FFRError, match=r"curriculum\.order: .*there is no Backward in it; did you mean 'Backwards'"):
        check(grpo)


def test_an_order_that_is_not_tried_is_said(grpo: dict[str, Any], tmp_path: Path) -> None:
    """Without the difficulty file that it wants the rows come in the order of the file."""
    file = tmp_path / "parts.py"
    file.write_text(f"{PARTS.format(expression='0', place='0')}    needs_difficulty = True\n")
    put(grpo, "data.ffr.curriculum", {"order": f"{file}:Backwards"})
    found = preflight.find_problems(OmegaConf.create(grpo))
    assert not found.problems
    assert any("Backwards needs a difficulty file, and none is given: the rows come in" in one for one in found.notes)


def test_paths_are_made_absolute_once(grpo: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Hydra copies the config for the run: workers have other folders."""
    monkeypatch.chdir(tmp_path)
    put(grpo, "data.ffr.curriculum", {"order": "orders/mine.py:Mine"})
    given = {"a": "rewards/a.py:a", "b": {"function": "b.py:b", "most": 3}, "c": "pkg://mine:c", "relevance": None}
    put(grpo, "reward.custom_reward_function.reward_kwargs.components", given)
    config = OmegaConf.create(grpo)
    preflight.RecipeCallback().on_run_start(config)
    assert config.data.ffr.curriculum.order == f"{tmp_path}/orders/mine.py:Mine"
    assert config.reward.custom_reward_function.reward_kwargs.components == {
        **given,
        "a": f"{tmp_path}/rewards/a.py:a",
        "b": {"function": f"{tmp_path}/b.py:b", "most": 3},
    }
