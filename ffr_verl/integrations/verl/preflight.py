"""The check that a recipe carries into every run.

Hydra runs `RecipeCallback` after it has composed the config and before verl's main function, so a misspelled key, a
missing file or another verl stops the job in seconds, in the terminal, before Ray or an engine has started.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from ffr_verl.data.parquet_files import (
    Kind,
    as_list,
    check_columns,
    check_images,
    check_model_family,
    dialogues_of_rows,
    images_root,
)
from ffr_verl.embeddings.store import EmbeddingStore
from ffr_verl.errors import FFRError
from ffr_verl.fragments import TAGS
from ffr_verl.integrations.verl import SUPPORTED_VERL
from ffr_verl.integrations.verl.checkpoint_folders import CONTENTS, check_resume
from ffr_verl.model_families import ModelFamily, family_of_model, has_chat_template, looks_local
from ffr_verl.rewards import CoherenceScorer, RewardConfig
from ffr_verl.samplers.difficulty_file import DifficultyFile, row_keys
from ffr_verl.samplers.sampler import ORDERS, CurriculumSampler
from ffr_verl.settings import DataConfig, SamplerConfig, refuse_unknown_keys

__all__ = ["CONFIG_NAMES", "Findings", "RecipeCallback", "check_run", "compose_run", "find_problems"]

logger = logging.getLogger(__name__)

_LEAST_FREE_BYTES = 256 * 2**20
_DATASETS = ("pkg://ffr_verl.integrations.verl.datasets", "pkg://ffr_verl.data.datasets")  # the second: older copies
# What verl calls the config of each trainer.
CONFIG_NAMES = {"main_ppo": "ppo_trainer", "sft_trainer": "sft_trainer_engine"}
_T = TypeVar("_T")
_TRL_CLASS = "AutoModelForCausalLMWithValueHead"


class RecipeCallback(Callback):
    """Hydra callback of every recipe: sets the platform and checks the run (`hydra.callbacks.ffr_verl`).

    Args:
        platform: `"cpu"` makes verl run on the CPU in this process and those it starts; `None` leaves verl's choice.

    Hydra turns an exception of a callback into a warning, so a failed check prints its message and ends the process
    with status 2.
    """

    def __init__(self, platform: Literal["cpu"] | None = None, **unknown: Any) -> None:
        try:
            refuse_unknown_keys(unknown, allowed=["platform"], where="hydra.callbacks.ffr_verl")
            if platform not in (None, "cpu"):
                raise FFRError(
                    f"hydra.callbacks.ffr_verl.platform: found {platform!r}; give cpu, or null for verl's own choice"
                )
        except FFRError as error:
            _stop(error)
        self.platform = platform

    def on_job_start(self, config: Any, **_kwargs: Any) -> None:
        try:
            check_run(config)
            if "actor_rollout_ref" not in config:
                _single_process_group_defaults()
        except FFRError as error:
            _stop(error)
        if self.platform == "cpu":
            from ffr_verl.integrations.verl import cpu_platform

            cpu_platform.activate()


def _stop(error: FFRError) -> NoReturn:
    sys.stderr.write(f"ffr-verl: error: {error}\n")
    sys.stderr.flush()
    raise SystemExit(2)


def _single_process_group_defaults() -> None:
    """verl's SFT trainer reads torchrun's variables; without torchrun this process is the only one of its group."""
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return
    wanted = os.environ.get("MASTER_PORT", "0")
    with closing(socket.socket()) as probe:
        try:
            probe.bind(("127.0.0.1", int(wanted)))
        except (OSError, ValueError, OverflowError) as error:
            raise FFRError(
                f"MASTER_PORT={wanted}: {error}; unset MASTER_PORT for a free one, or give another"
            ) from None
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _select(config: Any, key: str) -> Any:
    """The value at a dotted key; `None` where it is missing, `"???"` where it must be given."""
    node = config
    for part in key.split("."):
        if isinstance(node, DictConfig) and OmegaConf.is_missing(node, part):
            return "???"
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return node


@dataclass(frozen=True, slots=True)
class Findings:
    """What the check found.

    Attributes:
        problems: a message each, which names the key or file and the remedy.
        unchecked: what is not ours, and so was not looked at.
    """

    problems: tuple[str, ...]
    unchecked: tuple[str, ...]


def find_problems(config: Any) -> Findings:
    """Everything that would stop the run of a composed config, looked for before anything is started.

    Checks the keys of ours (`data.ffr`, `reward.custom_reward_function.reward_kwargs`,
    `trainer.v1.sampler.sampler_kwargs`), verl's version and that an installed TRL suits it, that vLLM is there for
    GRPO, the data files and every image in them, flash attention where it is asked for, a local model's files, that
    the embedding store and the difficulty file belong to the data, free disk space, and that the checkpoint to
    resume from is whole.
    """
    problems: list[str] = []
    unchecked: list[str] = []

    def attempt(check: Callable[..., _T], *arguments: Any) -> _T | None:
        try:
            return check(*arguments)
        except FFRError as error:
            problems.append(str(error))
            return None

    is_grpo = "actor_rollout_ref" in config
    attempt(_check_verl)
    attempt(_check_trl)
    data_config = attempt(DataConfig.from_mapping, _select(config, "data.ffr") or {}) or DataConfig()
    rewards = sampler = None
    if is_grpo:
        before = len(problems)
        rewards = attempt(_reward_config, config)
        if rewards is None and len(problems) == before:
            unchecked.append("the reward is not ours: its keyword arguments were not checked")
        place = str(_select(config, "trainer.v1.sampler.custom_sampler.path"))
        if place == "pkg://ffr_verl.samplers":
            kwargs = _select(config, "trainer.v1.sampler.sampler_kwargs") or {}
            sampler = attempt(SamplerConfig.from_mapping, kwargs)
        if len(problems) == before:
            attempt(_check_advantages, config, sampler, rewards)
        attempt(_check_vllm)
        attempt(_check_adapter, config)
    if str(_select(config, "data.custom_cls.path")) not in _DATASETS:
        unchecked.append("the dataset is not ours: data files and images were not checked")
    else:
        before = len(problems)
        attempt(_check_files, config, "rl" if is_grpo else "sft", data_config)
        if is_grpo and len(problems) == before:
            attempt(_check_curriculum, config, data_config, rewards is not None and rewards.is_micro)
            if rewards is not None and rewards.embeddings is not None:
                attempt(_check_embeddings, config, rewards.embeddings)
    attempt(_check_model, config, "actor_rollout_ref.model" if is_grpo else "model")
    if rewards is not None:
        attempt(_check_answer_tags, config)
    attempt(_check_disk, _select(config, "trainer.default_local_dir"))
    attempt(_check_resume, config, "grpo" if is_grpo else "sft")
    return Findings(tuple(problems), tuple(unchecked))


def check_run(config: Any) -> None:
    """Refuse a composed config that cannot train, see `find_problems`.

    Raises:
        FFRError: a line for each problem.
    """
    if problems := find_problems(config).problems:
        raise FFRError("\nffr-verl: error: ".join(problems))


def compose_run(trainer: str, overrides: Sequence[str], *, config_dir: Path | None = None) -> Any:
    """The config that a trainer of verl composes for a command line, with Hydra's own node.

    Args:
        trainer: `main_ppo` or `sft_trainer`.
        overrides: as they stand on the command line.
        config_dir: its `--config-dir`.

    Raises:
        FFRError: Hydra cannot compose it, as for a recipe that is not there or a key that verl does not know.
    """
    import verl  # noqa: F401  # loads the plugin, as `python -m verl.trainer...` does

    given = list(overrides)
    if config_dir is not None:
        given.append(f"hydra.searchpath=[file://{config_dir.absolute()}]")
    try:
        with initialize_config_module("verl.trainer.config", version_base=None):
            return compose(CONFIG_NAMES[trainer], overrides=given, return_hydra_config=True)
    except HydraException as error:
        raise FFRError(" ".join(str(error).split())) from None


def _check_adapter(config: Any) -> None:
    """FSDP1 does not shard on one device (NO_SHARD), and verl 0.9.1 finds no adapter in it: seen on an H100."""
    node = "actor_rollout_ref"
    devices = (_select(config, "trainer.n_gpus_per_node") or 0) * (_select(config, "trainer.nnodes") or 1)
    has_adapter = _select(config, f"{node}.model.lora_rank") and not _select(config, f"{node}.model.lora.merge")
    if devices == 1 and has_adapter and _select(config, f"{node}.actor.strategy") == "fsdp":
        raise FFRError(
            f"{node}.actor.strategy=fsdp: on one device verl hands vLLM an empty LoRA adapter, which ends the run; "
            f"give {node}.actor.strategy=fsdp2 {node}.actor.fsdp_config.strategy=fsdp2 "
            f"{node}.ref.fsdp_config.strategy=fsdp2"
        )


def _check_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise FFRError("vllm is not installed; GRPO generates with it. `make install`, or pip install 'ffr-verl[gpu]'")


def _check_verl() -> None:
    found = importlib.metadata.version("verl")
    if found != SUPPORTED_VERL:
        raise FFRError(
            f"verl {found} is installed, the recipes are written for and tested with {SUPPORTED_VERL}: "
            f"pip install 'verl=={SUPPORTED_VERL}'"
        )


def _check_trl() -> None:
    """verl takes a class from TRL whenever TRL is installed, to patch it; newer TRL has it no more."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent
    places = (folder / "experimental" / "ppo" / "__init__.py", folder / "__init__.py")
    if not any(place.is_file() and _TRL_CLASS in place.read_text(encoding="utf-8") for place in places):
        raise FFRError(
            f"trl is installed and has no {_TRL_CLASS}, which verl {SUPPORTED_VERL} imports wherever it finds trl: "
            "its workers would fail; pip uninstall trl, and keep it in an environment of its own"
        )


def _check_files(config: Any, kind: Kind, data_config: DataConfig) -> None:
    is_first = os.environ.get("RANK", "0") == "0"
    family = _family_of_run(config, "actor_rollout_ref.model" if kind == "rl" else "model") if is_first else None
    for key in ("data.train_files", "data.val_files"):
        value = _select(config, key)
        if value is None and key == "data.val_files" and kind == "sft":
            continue
        if value in (None, "???"):
            raise FFRError(f"{key} is not given; add {key}=PATH (a NAME.{kind}.parquet of `ffr-verl prepare`)")
        files = as_list(value)
        for name in files:
            if "://" in name:
                return  # verl copies it here first, and the dataset checks it then
            if not Path(name).expanduser().is_file():
                raise FFRError(f"{key}: {name}: no such file; `ffr-verl prepare` writes NAME.{kind}.parquet")
        files = [str(Path(name).expanduser()) for name in files]
        check_columns(files, kind)
        if is_first and family is None:
            check_images(files, images_root(files, data_config), sample=False)
        elif family is not None:
            check_model_family(files, family)
            root = images_root(files, data_config)
            check_images(files, root, sample=False, max_pixels=data_config.max_pixels, family=family)


def _family_of_run(config: Any, node: str) -> ModelFamily | None:
    """The family of the model, by its own files; `None` where those cannot be looked at yet."""
    path = str(_select(config, f"{node}.path"))
    if path in ("None", "???"):
        return None  # said with what else is wrong with the model
    if "://" in path:
        logger.warning(
            "%s.path: %s is not here yet: sizes of images are checked when the datasets are made", node, path
        )
        return None
    return None if _is_absent(path) else family_of_model(path)


def _is_absent(path: str) -> bool:
    """Whether it is a path that does not exist; a name without a slash may be one of the hub's first models."""
    return "/" in path and looks_local(path) and not Path(path).expanduser().is_dir()


def _check_advantages(config: Any, sampler: SamplerConfig | None, rewards: RewardConfig | None) -> None:
    """That reward, advantages and replay buffer suit each other."""
    estimator = str(_select(config, "algorithm.adv_estimator"))
    key, node = "algorithm.adv_estimator", "trainer.v1.sampler.sampler_kwargs.advantage"
    advantage = None if sampler is None else sampler.advantage
    if estimator == "gdpo":
        raise FFRError(
            f"{key}=gdpo: verl {SUPPORTED_VERL}'s own fails in trainer v1, which hands it no reward components; "
            "give +recipe=ffr_gdpo"
        )
    if estimator == "ffr" and advantage is None:
        raise FFRError(
            f"{key}=ffr: {node} is not given; give {node}={{credit: id}}, with our replay buffer "
            "(trainer.v1.sampler.custom_sampler: {path: pkg://ffr_verl.samplers, name: FFRReplayBuffer}), or "
            f"{key}=grpo for verl's own"
        )
    if estimator != "ffr" and advantage is not None:
        raise FFRError(f"{node} is not read with {key}={estimator}; give {key}=ffr, or {node}=null")
    if rewards is None:
        return
    if advantage is not None and advantage.credit == "id" and not rewards.is_micro:
        raise FFRError(
            f"{node}.credit=id: with f1_mode={rewards.f1_mode} an id has no worth of its own; give "
            "f1_mode=micro_f1_mcc, or credit=answer"
        )
    if rewards.is_micro and estimator == "grpo" and _select(config, "algorithm.norm_adv_by_std_in_grpo") is not False:
        raise FFRError(
            f"algorithm.norm_adv_by_std_in_grpo: with f1_mode={rewards.f1_mode} a reward's size is what an id is "
            "worth, and the group's deviation undoes it; give algorithm.norm_adv_by_std_in_grpo=false, or "
            f"{key}=ffr"
        )


def _check_curriculum(config: Any, data_config: DataConfig, is_micro: bool) -> None:
    """That the difficulty file belongs to the training rows, and nothing reorders them."""
    curriculum = data_config.curriculum
    key = "data.ffr.curriculum.difficulty"
    if is_micro and _select(config, "data.dataloader_num_workers"):
        raise FFRError(
            f"data.dataloader_num_workers: found {_select(config, 'data.dataloader_num_workers')}; the micro reward "
            "asks the rows where the policy stands, which worker processes do not know: give "
            "data.dataloader_num_workers=0"
        )
    if curriculum.difficulty is not None or not (
        curriculum.order == "file" or ORDERS[curriculum.order].needs_difficulty
    ):
        for name, wanted in (("data.shuffle", False), ("data.dataloader_num_workers", 0)):
            found = _select(config, name)
            if found is not None and found != wanted:
                raise FFRError(
                    f"{name}: found {found}; with data.ffr.curriculum.order={curriculum.order} give {name}={wanted}, "
                    "or the rows come in another order"
                )
    if curriculum.difficulty is None:
        return
    files = as_list(_select(config, "data.train_files"))
    if any("://" in name for name in files):
        return
    files = [str(Path(name).expanduser()) for name in files]
    try:
        rows = DifficultyFile(curriculum.difficulty).of_rows(row_keys(files), name=files[0])
    except FFRError as error:
        raise FFRError(f"{key}: {error}") from None
    count, batch = len(CurriculumSampler(rows, curriculum)), _select(config, "data.train_batch_size")
    if isinstance(batch, int) and count < batch:
        raise FFRError(
            f"data.ffr.curriculum: {count} rows are left of {len(rows)}, fewer than data.train_batch_size={batch}; "
            "raise shares, or give a smaller batch"
        )


def _reward_config(config: Any) -> RewardConfig | None:
    """The settings of our reward, however it is asked for; `None` when another one is."""
    path = _select(config, "reward.custom_reward_function.path")
    if str(path) == "pkg://ffr_verl.rewards":
        return RewardConfig.from_kwargs(_select(config, "reward.custom_reward_function.reward_kwargs") or {})
    if not path and _select(config, "reward.reward_manager.name") == "ffr":
        return RewardConfig.from_kwargs(_select(config, "reward.reward_kwargs") or {})
    return None


def _check_answer_tags(config: Any) -> None:
    """verl's own reward managers drop special tokens, and with them the tags of the answer."""
    manager = _select(config, "reward.reward_manager.name")
    folder = Path(str(_select(config, "actor_rollout_ref.model.path"))).expanduser()
    if manager == "ffr" or not (folder / "tokenizer.json").is_file():
        return
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens") or ()
    special = [token["content"] for token in added if token.get("special") and token.get("content") in TAGS]
    if special:
        raise FFRError(
            f"reward.reward_manager.name={manager}: it drops special tokens, and {special[0]} is one in {folder}, so "
            "every answer would be malformed; give reward.reward_manager.name=ffr"
        )


def _check_embeddings(config: Any, path: str) -> None:
    """That the store opens, and holds the utterances and images of the data files (of rows spread over them)."""
    key = "reward.custom_reward_function.reward_kwargs.embeddings"
    try:
        scorer = CoherenceScorer(EmbeddingStore.open(path))
    except FFRError as error:
        raise FFRError(f"{key}: {error}") from None
    for files in ("data.train_files", "data.val_files"):
        for name in as_list(_select(config, files) or ()):
            if "://" in name:
                continue
            wanted, lacking = 0, list[str]()
            for info in dialogues_of_rows(str(Path(name).expanduser())):
                wanted += len(set(info["utterance_ids"])) + len(set(info["images"] or ()))  # a picture may repeat
                lacking += scorer.missing_of(info)
            if wanted and len(lacking) == wanted:
                raise FFRError(
                    f"{key}: {path} has no vector for {name} ({lacking[0]} ...); make the store of this data: "
                    f"ffr-verl embed {name} --model NAME --output {path}"
                )
            if lacking:
                logger.warning(
                    "%s: %s lacks %d of %d utterances and images looked for in %s (%s ...): they are left out of "
                    "coherence; `ffr-verl embed` takes several data files at once",
                    key,
                    path,
                    len(lacking),
                    wanted,
                    name,
                    lacking[0],
                )


def _check_model(config: Any, node: str) -> None:
    if (
        _select(config, f"{node}.use_remove_padding")
        and _select(config, f"{node}.override_config.attn_implementation") in (None, "flash_attention_2")
        and importlib.util.find_spec("flash_attn") is None
    ):
        raise FFRError(
            f"{node}.use_remove_padding is on and flash_attn is not installed: pip install flash-attn==2.8.3 "
            f"--no-build-isolation, or train slower with {node}.use_remove_padding=false "
            f"+{node}.override_config.attn_implementation=sdpa; without a GPU use the *_cpu recipes"
        )
    key = f"{node}.path"
    path = _select(config, key)
    if path in (None, "???"):
        raise FFRError(f"{key} is not given; add {key}=FOLDER (for GRPO: the SFT model after `ffr-verl merge`)")
    folder = Path(str(path)).expanduser()
    if not folder.is_dir():
        if "://" in str(path):
            return  # verl fetches it
        if _is_absent(str(path)):
            raise FFRError(f"{key}: {path}: no such folder; give a Hugging Face folder, or the name of a hub model")
        return
    for name, remedy in (
        ("config.json", "not a Hugging Face model folder; a verl checkpoint becomes one through `ffr-verl merge`"),
        (
            "tokenizer_config.json",
            "save the base model's tokenizer there: AutoTokenizer.from_pretrained(BASE).save_pretrained(...)",
        ),
    ):
        if not (folder / name).is_file():
            raise FFRError(f"{key}: {path}: {name} is missing; {remedy}")
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise FFRError(
            f"{key}: {path}: the model has no processor (preprocessor_config.json), so images cannot be read; "
            "save the base model's: AutoProcessor.from_pretrained(BASE).save_pretrained(...)"
        )
    family, key_of_thought = family_of_model(folder), "data.apply_chat_template_kwargs.enable_thinking"
    if family.template_kwargs and _select(config, key_of_thought) is None:
        raise FFRError(
            f"{key_of_thought} is not given: the chat template of {family.name} begins each answer with a thought "
            f"then; give +{key_of_thought}=false"
        )
    if node != "model" and _select(config, "trainer.device") == "cpu":
        rollout = "actor_rollout_ref.rollout.dtype"
        if family.cpu_dtype not in ("float32", _select(config, rollout)):
            raise FFRError(
                f"{rollout}: vLLM's CPU build runs {family.name} in {family.cpu_dtype} only; give "
                f"{rollout}={family.cpu_dtype}"
            )
    if not has_chat_template(folder) and not _select(config, f"{node}.custom_chat_template"):
        raise FFRError(
            f"{key}: {path}: the model has no chat template, so prompts cannot be written; save the base model's "
            "processor there: AutoProcessor.from_pretrained(BASE).save_pretrained(...)"
        )


def _check_resume(config: Any, stage: Literal["sft", "grpo"]) -> None:
    folder = _select(config, "trainer.default_local_dir")
    if _select(config, "trainer.resume_mode") != "auto" or not isinstance(folder, str) or "://" in folder:
        return
    node = "actor_rollout_ref.actor.checkpoint" if stage == "grpo" else "checkpoint"
    contents = _select(config, f"{node}.load_contents") or tuple(CONTENTS)
    one_node = _select(config, "trainer.nnodes") in (None, 1)
    step = check_resume(Path(folder).expanduser(), stage, contents=contents, all_ranks=one_node)
    if step is not None:
        logger.info("the run resumes from step %d in %s", step, folder)


def _check_disk(folder: Any) -> None:
    if not isinstance(folder, str) or "://" in folder:
        return
    place = Path(folder).expanduser().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < _LEAST_FREE_BYTES:
        raise FFRError(
            f"trainer.default_local_dir: {folder}: {free / 2**20:.0f} MiB are free there, a checkpoint needs more; "
            "free some, or give another folder"
        )
