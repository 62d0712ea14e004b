"""Every thing of verl 0.9.1 that is not its documented interface and that we rely on; another version fails here,
loudly.

One test a thing. Where the reason for code of ours is a fault of verl, the test shows the fault: once it is gone, so
can the code be.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import verl
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from verl import DataProto
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.utils.tracking import Tracking

from ffr_verl.integrations.verl import SUPPORTED_VERL, preflight
from ffr_verl.integrations.verl.advantages import compute_ffr_advantage
from ffr_verl.integrations.verl.cpu_platform import PlatformCPU
from ffr_verl.integrations.verl.live_runs import FIRST_JOB

VERL = Path(verl.__file__).parent
V1 = VERL / "trainer" / "ppo" / "v1"


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_version() -> None:
    assert verl.__version__ == importlib.metadata.version("verl") == SUPPORTED_VERL


def test_plugins_come_from_entry_points_of_this_group_when_verl_is_imported() -> None:
    source = (VERL / "__init__.py").read_text()
    assert '"verl.plugins"' in source
    assert "VERL_USE_EXTERNAL_PLUGINS" in source


def test_a_failing_plugin_is_logged_at_debug_only() -> None:
    """The reason for our own WARNING."""
    source = (VERL / "__init__.py").read_text()
    assert "verl.plugins" in source
    handler = source[source.index("_ep.load()") :][:400]
    assert "except" in handler
    assert "debug" in handler
    assert "warning" not in handler


def test_platform_interface() -> None:
    from verl.plugin.platform import PlatformBase, PlatformRegistry, get_platform, set_platform

    assert PlatformRegistry.get("cpu") is PlatformCPU
    assert not PlatformBase.__abstractmethods__ - set(vars(PlatformCPU))
    assert parameters(set_platform) == ["platform"]
    assert not parameters(get_platform)
    platform = PlatformCPU()
    assert (platform.device_name, platform.communication_backend_name()) == ("cpu", "gloo")
    assert platform.ray_resource_name() == "GPU"
    assert not platform.is_platform_available(), "never chosen by detection"


def test_device_module_has_every_name_that_verl_calls() -> None:
    called = set()
    for path in VERL.rglob("*.py"):
        if "megatron" not in str(path) and "npu" not in path.name:
            called |= set(re.findall(r"get_torch_device\(\)\.(\w+)", path.read_text(encoding="utf-8")))
    # Profiling and the memory snapshots of verl.utils.memory_utils, which the recipes leave off.
    unused = {"memory", "Event", "Stream", "get_device_properties", "memory_stats", "memory_snapshot"}
    unused |= {"nvtx", "graph", "CUDAGraph", "default_stream", "current_blas_handle", "synchronize_all"}
    module = PlatformCPU().device_module
    assert len(called) > 8
    assert not {name for name in called - unused if not hasattr(module, name)}


def test_backend_name_that_verl_builds_and_torch_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason for the wrapper of `init_process_group`."""
    from verl.utils import distributed

    source = inspect.getsource(distributed)
    assert source.count('f"cpu:gloo,{get_device_name()}:{get_nccl_backend()}"') == 2
    assert source.count("torch.distributed.init_process_group(") == 2
    with pytest.raises(ValueError, match="Duplicate"):
        torch.distributed.BackendConfig("cpu:gloo,cpu:gloo")  # type: ignore[attr-defined]


def test_engine_device_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cuda")
    # Not the class itself: another test of the process may have registered `FrozenVisionTowerEngine`.
    assert issubclass(EngineRegistry.get_engine_cls("language_model", "fsdp2"), FSDPEngineWithLMHead)


def test_vllm_version_is_asked_of_a_distribution_called_vllm() -> None:
    """The reason for the metadata finder."""
    source = (VERL / "third_party" / "vllm" / "__init__.py").read_text()
    assert "from importlib.metadata import PackageNotFoundError, version" in source
    assert 'package_name = "vllm"' in source


def test_replay_buffer_takes_these_settings_and_a_custom_one_gets_none_of_them() -> None:
    from verl.trainer.ppo.v1 import trainer_base
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    assert parameters(ReplayBuffer.__init__)[1:] == [
        "trainer_mode",
        "trainer_config",
        "max_off_policy_threshold",
        "max_off_policy_strategy",
        "sampler_kwargs",
        "poll_interval",
        "refill_fn",
        "filter_groups_metric",
        "train_batch_size",
        "gen_batch_size",
        "max_inflight_gen_batches",
        "sync_refill_failed_groups",
    ]
    source = inspect.getsource(trainer_base)
    assert 'sampler_config.get("custom_sampler", None)' in source


def test_our_replay_buffer_is_built_from_the_recipes_settings() -> None:
    from ffr_verl.errors import FFRError
    from ffr_verl.samplers import FFRReplayBuffer

    def build(**settings: Any) -> FFRReplayBuffer:
        return FFRReplayBuffer(
            trainer_mode="sync",
            trainer_config=OmegaConf.create({}),
            max_off_policy_threshold=None,
            max_off_policy_strategy="drop",
            sampler_kwargs=OmegaConf.create(settings),
            refill_fn=lambda *_: None,
        )

    buffer = build(poll_interval=0.1, filter_groups=True, train_batch_size=8)
    assert (buffer.poll_interval, buffer.filter_groups_metric, buffer.train_batch_size) == (0.1, "reward", 8)
    assert build(poll_interval=0.1, train_batch_size=8).filter_groups_metric is None
    with pytest.raises(FFRError, match="unknown key"):
        build(pol_interval=1)


def test_replay_buffer_members_that_ours_reads_and_overrides() -> None:
    """The group filter, and what it keeps of finished groups."""
    from collections import defaultdict

    from verl.trainer.ppo.v1 import replay_buffer

    buffer = replay_buffer.ReplayBuffer
    assert replay_buffer.FILTER_GROUPS_REWARD_METRIC == "reward"
    assert parameters(buffer.sample) == ["self", "global_steps", "partition_id", "batch_size"]
    assert parameters(buffer._dapo_filtered_keys) == ["self", "partition_id"]
    assert "self._dapo_filtered_keys(partition_id)" in inspect.getsource(buffer.sample) + inspect.getsource(
        buffer._terminal_eviction_reasons
    )
    built = buffer(
        trainer_mode="sync",
        trainer_config=OmegaConf.create({}),
        max_off_policy_threshold=None,
        max_off_policy_strategy="drop",
        sampler_kwargs=None,
    )
    assert "no materializable trajectories" in inspect.getsource(replay_buffer)
    assert parameters(buffer._wait_for_next_poll) == ["self", "partition_id", "last_debug_time"]
    assert "self._wait_for_next_poll(" in inspect.getsource(buffer.sample)
    groups = ("pending_keys", "running_keys", "finished_keys", "failure_keys")
    for name in ("partitions", *groups, "_dapo_classification_cache"):
        assert isinstance(getattr(built, name), defaultdict)


def test_verls_group_filter_keeps_groups_that_differ_by_nothing_to_speak_of() -> None:
    """The reason for `min_std`."""
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    assert "float(np.std(values)) == 0.0" in inspect.getsource(ReplayBuffer._dapo_filtered_keys)


def test_where_the_metrics_of_a_step_come_from() -> None:
    """What `sample` returns beside the batch is logged; the rewards' components are nowhere else."""
    source = (VERL / "trainer" / "ppo" / "v1" / "trainer_base.py").read_text()
    assert "batch, off_policy_metrics = self.replay_buffer.sample(" in source
    assert "metrics.update(off_policy_metrics)" in source


def test_keys_and_fields_of_answers_in_the_transfer_queue() -> None:
    source = (VERL / "trainer" / "ppo" / "v1" / "agent_loop_tq.py").read_text()
    assert 'keys.append(f"{uid}_{session_id}_{i}")' in source
    assert 'output.extra_fields["reward_extra_info"] = final_output.extra_fields["reward_extra_info"]' in source
    reader = (VERL / "trainer" / "ppo" / "v1" / "replay_buffer.py").read_text()
    assert 'select_fields=["rm_scores"] if use_canonical_reward else ["extra_fields"]' in reader


def test_estimators_are_handed_the_rewards_sum_and_a_name_of_each_answers_group() -> None:
    """And nothing of what the reward is made of, so ours takes its advantages from the replay buffer, by that name."""
    source = inspect.getsource(PPOTrainer._compute_advantage)
    wanted = '["uid", "response_mask", "rm_scores", "rollout_log_probs", "old_log_probs", "ref_log_prob", "values"]'
    assert f"fields = {wanted}" in source
    assert 'data.non_tensor_batch["uid"] = np.array(data.batch.pop("uid").tolist(), dtype=object)' in source
    assert "adv_estimator=self.config.algorithm.adv_estimator" in source
    assert get_adv_estimator_fn("ffr") is compute_ffr_advantage
    source = inspect.getsource(compute_advantage)
    assert 'adv_kwargs["index"] = data.non_tensor_batch["uid"]' in source
    source = inspect.getsource(PPOTrainer._step_once)
    assert source.index("self.replay_buffer.sample(") < source.index("self._compute_advantage("), "in one process"


def test_verls_gdpo_fails_in_its_v1_trainer() -> None:
    """The reason for credit=components and the check before the run: what it reads is not in the batch there."""
    mask = torch.ones(2, 3)
    batch = DataProto.from_dict(
        tensors={"token_level_rewards": mask, "response_mask": mask}, non_tensors={"uid": np.array(["a", "a"], object)}
    )
    config = OmegaConf.create({"gdpo_reward_keys": ["f1"]})
    with pytest.raises(KeyError, match="prompts"):
        compute_advantage_for_multi_trajectories(batch, ["a_0_0", "a_1_0"], "gdpo", config=config)


def test_rollout_dumps_and_score_metrics_read_the_rewards_not_our_names() -> None:
    source = inspect.getsource(PPOTrainer._log_rollout_data)
    assert 'scores = data["rm_scores"].sum(dim=1).tolist()' in source
    assert 'reward_extra_infos_dict = {"uid": [batch.keys[i] for i in sorted_indices]}' in source


def test_validation_averages_what_the_rows_hold_when_the_buffer_has_given_them() -> None:
    source = inspect.getsource(PPOTrainer._validate)
    sampled, read = source.index("self.replay_buffer.sample("), source.index('"extra_fields"]')
    assert sampled < read
    assert 'partition_id="val"' in source
    assert "keep only the highest index per session" in source
    source = inspect.getsource(PPOTrainer.fit)
    assert source.index("self._save_checkpoint()") < source.index("val_metrics: dict = self._validate()")
    source = inspect.getsource(PPOTrainer._save_checkpoint)
    assert "self.checkpoint_callback.on_save(" in source


def test_reward_manager_interface() -> None:
    from verl.experimental.reward_loop import reward_manager
    from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
    from verl.trainer.ppo import reward

    assert reward_manager.get_reward_manager_cls("ffr").__module__ == "ffr_verl.integrations.verl.reward_manager"
    assert parameters(RewardManagerBase.__init__) == ["self", "config", "tokenizer", "compute_score"]
    assert parameters(RewardManagerBase.run_single) == ["self", "data"]
    assert parameters(reward.load_reward_manager) == ["config", "tokenizer", "reward_kwargs"]
    source = inspect.getsource(reward.resolve_reward_manager_cls)
    assert "from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls" in source, (
        "the module whose import registers ours"
    )


def test_verls_reward_managers_drop_special_tokens() -> None:
    """The reason for the reward manager `ffr`."""
    folder = VERL / "experimental" / "reward_loop" / "reward_manager"
    assert "skip_special_tokens=True" in (folder / "naive.py").read_text()


def test_a_class_of_trl_is_imported_wherever_trl_is_installed() -> None:
    """The reason why the recipes refuse a TRL without it."""
    source = (VERL / "models" / "transformers" / "monkey_patch.py").read_text()
    after = source[source.index("if is_trl_available():") :][:400]
    assert "from trl.experimental.ppo import AutoModelForCausalLMWithValueHead" in after
    assert "from trl import AutoModelForCausalLMWithValueHead" in after


def test_dataset_methods_that_ours_override() -> None:
    from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
    from verl.utils.dataset.rl_dataset import RLHFDataset

    assert parameters(RLHFDataset.__init__) == [
        "self",
        "data_files",
        "tokenizer",
        "config",
        "processor",
        "max_samples",
    ]
    assert parameters(RLHFDataset._build_messages) == ["self", "example", "key"]
    assert parameters(MultiTurnSFTDataset.__init__)[:6] == [
        "self",
        "parquet_files",
        "tokenizer",
        "config",
        "processor",
        "max_samples",
    ]
    assert parameters(MultiTurnSFTDataset._build_messages) == ["self", "example"]
    for dataset in (RLHFDataset, MultiTurnSFTDataset):
        assert "self.image_key" in inspect.getsource(dataset)


def test_sft_collator_fails_on_rows_with_and_without_images() -> None:
    """The reason why `FFRSFTDataset` always gives `multi_modal_inputs`."""
    from verl.utils.dataset.dataset_utils import DatasetPadMode, SFTTensorCollator

    collate = SFTTensorCollator(DatasetPadMode.NO_PADDING)
    text = {"input_ids": torch.arange(3)}
    image = {"input_ids": torch.arange(4), "multi_modal_inputs": {"pixel_values": torch.zeros(4, 2)}}
    with pytest.raises(KeyError, match="multi_modal_inputs"):
        collate([text, image])
    assert len(collate([{**text, "multi_modal_inputs": {}}, image])["multi_modal_inputs"]) == 2


def test_rows_without_images_crash_verls_qwen2_vl_and_not_ours(base_model: Path) -> None:
    """The reason for `ffr_verl.integrations.verl.text_only`."""
    from verl.models.transformers import qwen2_vl

    model = AutoModelForImageTextToText.from_pretrained(base_model)
    tokens = AutoTokenizer.from_pretrained(base_model)("soup and pepper again", return_tensors="pt")["input_ids"]
    original: Any = inspect.unwrap(qwen2_vl._get_input_embeds)
    qwen2_vl._get_input_embeds = original
    try:
        with pytest.raises(AttributeError, match="mean"):
            original(model.model, tokens)
        from ffr_verl.integrations.verl import text_only

        assert text_only.is_needed()
        assert text_only.install()
        assert text_only.install(), "a second call changes nothing"
        embeds, mask = qwen2_vl._get_input_embeds(model.model, tokens, torch.ones_like(tokens))
        assert torch.equal(embeds, model.get_input_embeddings()(tokens))
        assert mask is not None
        embeds.sum().backward()
        vision = [parameter.grad for parameter in model.model.visual.parameters()]
        assert any(gradient is not None for gradient in vision), "every rank runs the vision tower"
        assert all(gradient is None or not gradient.any() for gradient in vision)
    finally:
        qwen2_vl._get_input_embeds = original


def test_rows_with_images_go_to_verls_own_function(base_model: Path, parquet: Path) -> None:
    from PIL import Image
    from verl.models.transformers import qwen2_vl

    from ffr_verl.integrations.verl import text_only

    model = AutoModelForImageTextToText.from_pretrained(base_model)
    processor = AutoProcessor.from_pretrained(base_model)
    inputs = processor(
        text=["look at this <|vision_start|><|image_pad|><|vision_end|>"],
        images=[Image.new("RGB", (56, 56), (200, 30, 30))],
        return_tensors="pt",
    )
    arguments = (inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"], None, inputs["image_grid_thw"])
    with torch.no_grad():
        text_only.install()
        ours = qwen2_vl._get_input_embeds(model.model, *arguments)[0]
        verls = qwen2_vl._get_input_embeds.__wrapped__(model.model, *arguments)[0]
    assert torch.equal(ours, verls)


def test_freeze_vision_tower_is_read_by_nothing() -> None:
    """The reason why the recipes freeze it through `exclude_modules`."""
    readers = [path.name for path in VERL.rglob("*.py") if "freeze_vision_tower" in path.read_text(encoding="utf-8")]
    assert readers == ["actor.py"], "verl/workers/config/actor.py only declares it"


def test_checkpoint_names_that_merge_looks_for() -> None:
    source = (VERL / "utils" / "checkpoint" / "fsdp_checkpoint_manager.py").read_text()
    assert 'f"model_world_size_{self.world_size}_rank_{self.rank}.pt"' in source
    assert '"huggingface"' in source
    assert "lora_train_meta.json" in "".join(path.read_text() for path in (VERL / "utils" / "checkpoint").glob("*.py"))
    assert "lora_alpha" in (VERL / "model_merger" / "base_model_merger.py").read_text()


def test_an_engine_of_the_vendor_goes_before_the_general_one() -> None:
    """How the vision tower is frozen in full fine-tuning without replacing an engine of verl's."""
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    assert parameters(EngineRegistry.register) == ["model_type", "backend", "device", "vendor"]
    source = inspect.getsource(EngineRegistry.get_engine_cls)
    assert source.index("vendor_key in registry") < source.index("if device in registry")
    assert parameters(FSDPEngineWithLMHead._build_module) == ["self"]
    build = inspect.getsource(FSDPEngineWithLMHead._build_model_optimizer)
    assert build.index("self._build_module()") < build.index("self._build_fsdp_module(")


def test_where_the_curriculum_is_asked_told_and_saved() -> None:
    """What the dataset gives reaches the queue, in the process of the buffer; its state goes into data.pt."""
    from verl.trainer.ppo.v1 import trainer_base

    answers = (VERL / "trainer" / "ppo" / "v1" / "agent_loop_tq.py").read_text()
    assert "field.update(kwargs)" in answers, "ffr_row"
    source = inspect.getsource(trainer_base)
    assert "StatefulDataLoader(" in source
    assert "torch.save(self.train_dataloader.state_dict(), dataloader_local_path)" in source
    assert "self.train_dataloader.load_state_dict(dataloader_state_dict)" in source
    step = inspect.getsource(trainer_base.PPOTrainer.fit)
    assert step.index("self.step(") < step.index("self._save_checkpoint()"), "the step's rewards are in the state"


def test_a_checkpoint_that_is_gone_makes_verl_begin_anew(tmp_path: Path) -> None:
    """The reason for `check_resume`; and the file that it reads."""
    from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("8")
    assert find_latest_ckpt_path(str(tmp_path)) is None
    tracker.write_text("")
    with pytest.raises(ValueError, match="invalid literal"):
        find_latest_ckpt_path(str(tmp_path))


def test_the_merger_writes_bf16() -> None:
    """The reason why logits before and after are compared with a tolerance."""
    assert ".bfloat16()" in (VERL / "model_merger" / "fsdp_model_merger.py").read_text()


def test_loggers_that_the_check_before_a_run_knows() -> None:
    assert set(preflight._LOGGER_PACKAGES) < set(Tracking.supported_backend)


def test_weights_travel_through_a_socket_named_by_the_job_id_and_the_first_job_is_always_the_same() -> None:
    """The reason for `live_runs`: two clusters' first jobs share it. Should verl name it otherwise, that can go."""
    import ray

    folder = VERL / "workers" / "rollout" / "vllm_rollout"
    name = "ipc:///tmp/rl-colocate-zmq-{job_id}-replica-{"
    sender, receiver = (folder / "vllm_rollout.py").read_text(), (folder / "utils.py").read_text()
    assert name in sender
    assert "job_id = ray.get_runtime_context().get_job_id()" in sender
    assert name in receiver
    assert 'job_id = os.environ.get("VERL_RAY_JOB_ID"' in receiver
    assert ray.JobID.from_int(1).hex() == FIRST_JOB
    transfer = (folder / "bucketed_weight_transfer.py").read_text()
    assert "os.remove(ipc_path)" in transfer, (
        "a stale file is no hindrance, and a live one of another run is taken away"
    )
    assert re.search(r"^class vLLMHttpServer\b", (folder / "vllm_async_server.py").read_text(), re.M)
    assert re.search(r"^class TaskRunner", (VERL / "trainer" / "main_ppo.py").read_text(), re.M)


def test_whole_weights_cannot_be_handed_to_vllm_on_a_cpu() -> None:
    """The reason for the guard of full fine-tuning there: what vLLM's loader keeps of a bucket is a view of it."""
    file = VERL / "workers" / "rollout" / "vllm_rollout" / "bucketed_weight_transfer.py"
    spec = importlib.util.spec_from_file_location("bucketed_weight_transfer", file)  # its package asks for vLLM
    assert spec is not None
    assert spec.loader is not None
    transfer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(transfer)
    name = f"ffr-contract-{os.getpid()}"
    sender = transfer.create_shared_memory(64, name)
    try:
        bucket, received = transfer.rebuild_shared_memory(name, 64)
        kept = bucket[:8]  # `BucketedWeightReceiver` hands out such slices, and closes the memory after the last
        del bucket
        with pytest.raises(BufferError, match="cannot close exported pointers exist"):
            received.close()
        del kept
        received.close()
    finally:
        sender.close()
        sender.unlink()
    source = (VERL / "workers" / "rollout" / "vllm_rollout" / "utils.py").read_text()
    assert "lora_weights.update((name, tensor.clone()) for name, tensor in weights)" in source, "an adapter is cloned"


def test_a_separate_rollout_is_sent_the_base_weights_of_an_adapter() -> None:
    """The reason for the guard of separate_async: weights are asked for as if the rollout lacked the base."""
    from verl.utils.fsdp_utils import collect_lora_params
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
    from verl.workers.engine_workers import ActorRolloutRefWorker

    sync = inspect.getsource(ActorRolloutRefWorker.update_weights)
    assert "per_tensor_param, _ = self.actor.engine.get_per_tensor_param()\n" in sync
    asked = inspect.signature(FSDPEngineWithLMHead.get_per_tensor_param).parameters["base_sync_done"]
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    sent = collect_lora_params(module=adapted, layered_summon=False, base_sync_done=asked.default)
    assert sorted(sent) == ["0.bias", "0.weight"], "no part of the adapter"
    assert 'checkpoint_engine.backend != "naive"' in (V1 / "trainer_separate_async.py").read_text()


def test_an_engine_that_does_not_divide_the_devices_is_no_early_error() -> None:
    """The reason for the guard of parallel sizes: verl deals out by whole division."""
    source = (VERL / "workers" / "rollout" / "llm_server.py").read_text()
    assert "num_replicas = world_size // rollout_world_size" in source
