"""The check that a recipe carries into every run.

Hydra runs `RecipeCallback` after it has composed the config and before verl's main function, so a misspelled key, a
missing file or another verl stops the job in seconds, in the terminal, before Ray or an engine has started.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import math
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import yaml
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException
from hydra.experimental.callback import Callback
from omegaconf import OmegaConf

from ffr_verl.data.parquet_files import (
    Kind,
    as_list,
    check_columns,
    check_images,
    check_model_family,
    check_pages,
    check_pair,
    holds_images,
    images_root,
    open_parquet,
    read_schema,
    sampled_rows,
)
from ffr_verl.data.tokens import PromptTokens
from ffr_verl.dialogues import IMAGE
from ffr_verl.doors import parse_door
from ffr_verl.embeddings.store import EmbeddingStore
from ffr_verl.errors import INSTALL_FLASH_ATTENTION, INSTALL_STACK, FFRError, did_you_mean, error_lines, first_line
from ffr_verl.fragments import NEEDED_TAGS, Fragment, parse_gold
from ffr_verl.integrations.verl import INSTALL_VERL, SUPPORTED_VERL
from ffr_verl.integrations.verl.checkpoint_folders import CONTENTS, Stage, check_resume
from ffr_verl.integrations.verl.live_runs import check_no_other_run, joined_cluster
from ffr_verl.integrations.verl.training_rows import TrainingRows
from ffr_verl.integrations.verl.validation import MICRO_METRICS
from ffr_verl.model_families import ModelFamily, family_of_model, has_chat_template, is_absent, read_json
from ffr_verl.ray_clusters import check_cluster, check_nodes
from ffr_verl.recipes import leaves, recipe_names, recipe_path, unknown_keys
from ffr_verl.rewards import CoherenceScorer, RewardConfig
from ffr_verl.rewards.components import Component, resolved
from ffr_verl.rewards.config import REWARD_NODES, reward_node
from ffr_verl.rewards.ffr import score_keys
from ffr_verl.rewards.relevance import check_queries, relevance_reward
from ffr_verl.samplers.curriculum import RowDifficulty
from ffr_verl.samplers.difficulty_file import DifficultyFile, row_keys
from ffr_verl.samplers.sampler import CurriculumSampler, needs_difficulty, rehearse
from ffr_verl.settings import (
    BEST_CHECKPOINT,
    BUFFER_NODE,
    BUFFER_PATH,
    BUFFER_SETTING,
    DATASET_PATHS,
    ORDER_NAMES,
    AdvantageConfig,
    CurriculumConfig,
    DataConfig,
    SamplerConfig,
    refuse_unknown_keys,
)

logger = logging.getLogger(__name__)
select = OmegaConf.select  # `None` where a key is missing, or must be given (`???`)

_LEAST_FREE_BYTES = 256 * 2**20
ORDER_NODE = f"{CurriculumConfig.node}.order"
_T = TypeVar("_T")
_LOGGER_PACKAGES = ("wandb", "mlflow", "swanlab", "tensorboard", "clearml", "trackio")  # each called as its logger
_TRL_CLASS = "AutoModelForCausalLMWithValueHead"


class RecipeCallback(Callback):
    """Hydra callback of every recipe (`hydra.callbacks.ffr_verl`): checks the run, and makes verl run on the CPU in
    this process and those it starts where `platform` is `cpu`.
    """

    def __init__(self, platform: Literal["cpu"] | None = None, **unknown: Any) -> None:
        with _problems_end_the_process():
            refuse_unknown_keys(unknown, allowed=["platform"], where="hydra.callbacks.ffr_verl")
            if platform not in (None, "cpu"):
                raise FFRError(
                    f"hydra.callbacks.ffr_verl.platform: found {platform!r}; give cpu, or null for verl's own choice"
                )
        self.platform = platform

    def on_run_start(self, config: Any, **_kwargs: Any) -> None:
        """Relative paths of rewards and orders of one's own become absolute: workers have other folders. The slots
        that a recipe asks of a local Ray are left out where the run joins a cluster, which has its own."""
        with _problems_end_the_process():
            resolve_doors(config)
            ray_init = select(config, "ray_kwargs.ray_init")
            if ray_init is not None and joined_cluster(ray_init.get("address")) is not None:
                ray_init.update({name: None for name in ("num_cpus", "num_gpus") if name in ray_init})

    def on_job_start(self, config: Any, **_kwargs: Any) -> None:
        with _problems_end_the_process():
            try:
                found = find_problems(config, starts=True)
                for text in found.unknown:
                    sys.stderr.write(f"ffr-verl: note: {text}\n")
                found.stop()
            except FFRError:
                raise
            except Exception:  # Hydra would leave out what comes after it, too
                logger.exception("the check before the run has an error of its own; the run goes on without it")
            if "actor_rollout_ref" not in config:
                _single_process_group_defaults()
        if self.platform == "cpu":
            from ffr_verl.integrations.verl import cpu_platform

            cpu_platform.activate()
            cpu_platform.share_cores(select(config, "trainer.n_gpus_per_node") or 1)


@contextmanager
def _problems_end_the_process() -> Iterator[None]:
    """Hydra turns an exception of a callback into a warning, so a failed check ends the process, with status 2."""
    try:
        yield
    except FFRError as error:
        sys.stderr.write(error_lines(error))
        sys.stderr.flush()
        raise SystemExit(2) from None


def _single_process_group_defaults() -> None:
    """verl's SFT trainer reads torchrun's variables; without torchrun this process is the only one of its group."""
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return
    wanted = os.environ.get("MASTER_PORT", "0")
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", int(wanted)))
        except (OSError, ValueError, OverflowError) as error:
            raise FFRError(
                f"MASTER_PORT={wanted}: {error}; unset MASTER_PORT for a free one, or give another"
            ) from None
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def resolve_doors(config: Any) -> None:
    """Make the paths in `reward_kwargs.components` and `data.ffr.curriculum.order` absolute, in place."""
    order = select(config, ORDER_NODE)
    if isinstance(order, str) and (door := parse_door(order, where=ORDER_NODE)).file is not None:
        OmegaConf.update(config, ORDER_NODE, str(door))
    for place in [f"reward.{node}.components" for node in REWARD_NODES]:
        if isinstance(select(config, place), Mapping):
            OmegaConf.update(config, place, resolved(select(config, place)))


class Findings(NamedTuple):
    """Messages that name key or file and the remedy; and what does not stop the run: what it goes without, and what is
    not ours and so was not looked at."""

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    unknown: tuple[str, ...] = ()  # of the notes, those that a run's start says, too: keys that verl does not have

    def stop(self) -> None:
        """Raise an `FFRError` with a line for each problem, if there is any."""
        if self.problems:
            raise FFRError("\nffr-verl: error: ".join(self.problems))


def find_problems(config: Any, *, starts: bool = False) -> Findings:
    """Everything that would stop the run of a composed config, looked for before anything is started: our own keys,
    versions, data files with every image in them, model, embedding store, difficulty file, checkpoint to resume from,
    disk, and that all nodes of a cluster have these. Another run that is alive, beside which this one would hang, is a
    problem only where this one `starts` now.
    """
    problems: list[str] = []
    unknown = _unknown_key_notes(config)
    notes = [*unknown]

    def attempt(check: Callable[..., _T], *arguments: Any) -> _T | None:
        try:
            return check(*arguments)
        except FFRError as error:
            problems.extend(str(error).split("\n"))
            return None

    is_grpo = "actor_rollout_ref" in config
    attempt(_check_verl)
    attempt(_check_trl)
    attempt(_check_loggers, config)
    data_config = attempt(DataConfig.from_mapping, select(config, "data.ffr") or {}) or DataConfig()
    rewards = sampler = cluster = None
    if is_grpo:
        before = len(problems)
        rewards = attempt(_reward_config, config)
        if rewards is None and len(problems) == before:
            notes.append("the reward is not ours: its keyword arguments were not checked")
        if rewards is not None and rewards.embeddings is None and dict(rewards.weights).get("coherence"):
            notes.append("no embeddings are given: the coherence reward is 0 and its weight does not count")
        if select(config, f"{BUFFER_NODE}.path") == BUFFER_PATH:
            kwargs = select(config, SamplerConfig.node) or {}
            sampler = attempt(SamplerConfig.from_mapping, kwargs)
        if len(problems) == before:
            attempt(_check_advantages, config, sampler, rewards)
            attempt(_check_metric_names, sampler, data_config, rewards)
            notes += _lost_checkpoints(config, sampler)
        attempt(_check_vllm)
        attempt(_check_weight_sync, config)
        attempt(_check_parallel_sizes, config)
        address = select(config, "ray_kwargs.ray_init.address")
        try:
            check_no_other_run(address)
            cluster = joined_cluster(address)
            if cluster is not None:
                check_cluster(cluster, where=f"the Ray cluster at {cluster}")
        except FFRError as error:
            cluster = None
            (problems if starts else notes).append(str(error))
    if select(config, "data.custom_cls.path") not in DATASET_PATHS:
        notes.append("the dataset is not ours: data files and images were not checked")
    else:
        before = len(problems)
        attempt(_check_files, config, "rl" if is_grpo else "sft", data_config)
        if len(problems) == before:
            notes += attempt(_overlong_prompts, config, "rl" if is_grpo else "sft") or []
        curriculum = data_config.curriculum
        if is_grpo and curriculum.difficulty is None and attempt(needs_difficulty, curriculum.order):
            notes.append(
                f"data.ffr.curriculum.order={curriculum.order} needs a difficulty file, and none is given: the rows "
                "come in the order of the file"
            )
        if is_grpo and len(problems) == before:
            attempt(_check_curriculum, config, data_config, rewards is not None and rewards.is_micro)
            before = len(problems)
            if rewards is not None and rewards.embeddings is not None:
                attempt(_check_embeddings, config, rewards)
            if rewards is not None and len(problems) == before:
                for component in rewards.components:
                    attempt(_try_component, config, rewards, component)
    attempt(_check_model, config, "actor_rollout_ref.model" if is_grpo else "model")
    if rewards is not None:
        attempt(_check_answer_tags, config, rewards)
    attempt(_check_folder, config, "grpo" if is_grpo else "sft", starts)
    if cluster is not None and not problems:
        attempt(_check_nodes, cluster, config, data_config, rewards)
    return Findings(tuple(problems), tuple(notes), tuple(unknown))


def verl_problems(config: Any) -> list[str]:
    """What verl's own main function refuses in the actor's settings of a composed `main_ppo` config, such as batch
    sizes that do not suit each other. In a run it looks itself, right after `find_problems`."""
    from verl.utils.config import omega_conf_to_dataclass

    node, trainer = config.actor_rollout_ref, config.trainer
    try:
        actor = omega_conf_to_dataclass(node.actor)
        actor.validate(trainer.n_gpus_per_node * trainer.nnodes, config.data.train_batch_size, node.model)
    except (ValueError, AssertionError, TypeError, InstantiationException) as error:
        return [f"actor_rollout_ref.actor: verl refuses it: {first_line(error.__cause__ or error)}"]
    return []


def _unknown_key_notes(config: Any) -> list[str]:
    """Of a composed config, with Hydra's own node, the keys that verl does not have: those of a recipe of one's own,
    and those given with `+` that are near one of verl's."""
    recipe, overrides = select(config, "hydra.runtime.choices.recipe"), select(config, "hydra.overrides.task") or []
    new = {one.lstrip("+").partition("=")[0] for one in overrides if one.startswith("+")} - {"recipe"}
    if recipe is None or (recipe in recipe_names() and not new):
        return []
    defaults = composed("main_ppo" if "actor_rollout_ref" in config else "sft_trainer", [])
    found = unknown_keys(_without_hydra(config), defaults)
    return [
        f"{key}: verl has no such key; {hint}it may do nothing"
        for key, hint in found
        if hint or not any(f"{key}.".startswith(f"{one}.") for one in new)
    ]


def compose_run(
    trainer: str, overrides: Sequence[str], *, config_dir: Path | None = None, refused: list[str] | None = None
) -> Any:
    """The config that `main_ppo` or `sft_trainer` composes for a command line, with Hydra's own node.

    An `FFRError` when Hydra cannot, as for a recipe that is not there or a key that verl does not know; with a list of
    `refused` such keys are told there and left out.
    """
    import verl  # noqa: F401  # loads the plugin, as `python -m verl.trainer...` does

    quoted = str(config_dir and config_dir.absolute()).replace('"', '\\"')
    folders = [] if config_dir is None else [f'hydra.searchpath=["file://{quoted}"]']
    try:
        # In a run Hydra is there, with verl's configs.
        there = GlobalHydra.instance().is_initialized()
        with nullcontext() if there else initialize_config_module("verl.trainer.config", version_base=None):
            name = {"main_ppo": "ppo_trainer", "sft_trainer": "sft_trainer_engine"}[trainer]
            return compose(name, overrides=[*overrides, *folders], return_hydra_config=True)
    except HydraException as error:
        absent = re.search("Could not (?:find|load) 'recipe/([^']+)'", str(error))
        if absent and config_dir is None:
            recipe_path(absent[1])  # its error lists ours only
        unknown = re.match(r"Could not override '([^']+)'", str(error))
        if unknown and unknown[1] in [one.partition("=")[0] for one in overrides]:
            key, further = unknown[1], list[str]()
            others = [one for one in overrides if one.partition("=")[0] != key]
            rest = compose_run(trainer, others, config_dir=config_dir, refused=further)
            known = [name for name, _ in leaves(_without_hydra(rest))]
            inner = str(getattr(error.__cause__, "full_key", ""))  # of KEY={...}
            key = inner if inner.startswith(f"{key}.") else key
            node, _, last = key.rpartition(".")
            beside = [name.removeprefix(f"{node}.") for name in known if name.startswith(f"{node}.")]
            inside = [name for name in known if name.endswith(f".{key}")]
            same = [name for name in known if name.rpartition(".")[2] == last]
            hint = did_you_mean(last, beside) or did_you_mean(key, inside or same)
            text = f"{key}: unknown key; {hint}a key that is to be new is given as +{key}=..."
            if refused is None or key == "recipe":  # without a recipe there is nothing to check
                raise FFRError("\nffr-verl: error: ".join([text, *further])) from None
            refused += [text, *further]
            return rest
        raise FFRError(" ".join(str(error).split())) from None
    except yaml.YAMLError as error:
        raise FFRError(f"a recipe is no YAML: {' '.join(str(error).split())}") from None


def composed(trainer: str, overrides: Sequence[str], *, config_dir: Path | None = None) -> dict[str, Any]:
    """What `compose_run` gives, without Hydra's own node; interpolations as they stand."""
    return _without_hydra(compose_run(trainer, overrides, config_dir=config_dir))


def _without_hydra(config: Any) -> dict[str, Any]:
    found = OmegaConf.to_container(config, resolve=False)
    assert isinstance(found, dict)
    return {str(name): value for name, value in found.items() if name != "hydra"}


def _check_loggers(config: Any) -> None:
    """verl asks for them only when Ray and the models are up; that a package is missing would end the run then."""
    from verl.utils.tracking import Tracking

    given = select(config, "trainer.logger") or []
    for name in as_list(given):
        if name not in Tracking.supported_backend:
            hint = did_you_mean(name, Tracking.supported_backend)
            raise FFRError(f"trainer.logger: found {name!r}; {hint}verl has {', '.join(Tracking.supported_backend)}")
        if name in _LOGGER_PACKAGES and importlib.util.find_spec(name) is None:
            raise FFRError(f"trainer.logger: {name} is not installed; pip install {name}, or leave it out")


def _check_weight_sync(config: Any) -> None:
    """That the policy's weights reach the rollout; the contract tests show each fault on this verl.

    Of separate_async verl's issue 7495 tells the same; a change for it (7496) was open in August 2026.
    """
    node, mode = "actor_rollout_ref", "trainer.v1.trainer_mode"
    devices = (select(config, "trainer.n_gpus_per_node") or 0) * (select(config, "trainer.nnodes") or 1)
    lora_rank = select(config, f"{node}.model.lora_rank")
    has_adapter = lora_rank and not select(config, f"{node}.model.lora.merge")
    # FSDP1 does not shard on one device (NO_SHARD), and verl 0.9.1 finds no adapter in it: seen on an H100.
    if devices == 1 and has_adapter and select(config, f"{node}.actor.strategy") == "fsdp":
        raise FFRError(
            f"{node}.actor.strategy=fsdp: on one device verl hands vLLM an empty LoRA adapter, which ends the run; "
            f"give {node}.actor.strategy=fsdp2 {node}.actor.fsdp_config.strategy=fsdp2 "
            f"{node}.ref.fsdp_config.strategy=fsdp2"
        )
    if has_adapter and select(config, mode) == "separate_async":
        raise FFRError(
            f"{mode}=separate_async: verl sends the rollout the base weights only, so it would answer with the "
            f"initial policy for ever; give {node}.model.lora.merge=true, or {mode}=colocate_async"
        )
    if lora_rank is not None and not has_adapter and select(config, "trainer.device") == "cpu":
        raise FFRError(
            f"{node}.model.lora_rank={lora_rank}: on a CPU verl cannot hand vLLM whole weights, and the run would "
            f"hang; give {node}.model.lora_rank=8 {node}.model.lora.merge=false"
        )


def _check_parallel_sizes(config: Any) -> None:
    """That the devices, and the model's heads, can be dealt out to the engines of the rollout."""
    node = "actor_rollout_ref.rollout"
    per_node, nodes = select(config, "trainer.n_gpus_per_node"), select(config, "trainer.nnodes") or 1
    names = ("tensor_model_parallel_size", "data_parallel_size", "pipeline_model_parallel_size")
    sizes = [select(config, f"{node}.{name}") or 1 for name in names]
    engine = math.prod(sizes)
    given = " ".join(f"{node}.{name}={size}" for name, size in zip(names, sizes, strict=True))
    if per_node and ((per_node * nodes) % engine or (engine < per_node and per_node % engine)):
        raise FFRError(
            f"{given}: an engine takes {engine} devices, which do not go into {nodes} x {per_node} "
            "(trainer.nnodes x trainer.n_gpus_per_node) without a rest"
        )
    if sizes[0] > 1:
        model = read_json(_model_folder(config) / "config.json")
        heads = (model.get("text_config") or model).get("num_attention_heads")
        if heads and heads % sizes[0]:
            raise FFRError(
                f"{node}.{names[0]}={sizes[0]}: the model has {heads} attention heads, which vLLM deals out evenly"
            )


def _model_folder(config: Any) -> Path:
    return Path(str(select(config, "actor_rollout_ref.model.path"))).expanduser()


def _check_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise FFRError(f"vllm is not installed; GRPO generates with it. {INSTALL_STACK}")


def _check_verl() -> None:
    found = importlib.metadata.version("verl")
    if found != SUPPORTED_VERL:
        raise FFRError(
            f"verl {found} is installed, the recipes are written for and tested with {SUPPORTED_VERL}: {INSTALL_VERL}"
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


def _local_files(config: Any, key: str) -> list[str]:
    """The data files of a key; none where verl fetches one of them first, and the dataset checks them then."""
    names = as_list(select(config, key) or ())
    return [] if any("://" in name for name in names) else [str(Path(name).expanduser()) for name in names]


def _check_nodes(cluster: str, config: Any, data_config: DataConfig, rewards: RewardConfig | None) -> None:
    """That what a GRPO run reads lies on every node of the cluster that it joins."""
    doors = [select(config, ORDER_NODE), *([one.door for one in rewards.components] if rewards is not None else [])]
    files_of_doors = [parse_door(door, where="").file for door in doors if isinstance(door, str)]
    paths = [str(file) for file in files_of_doors if file is not None]
    paths += [rewards.embeddings] if rewards is not None and rewards.embeddings else []
    for key in ("data.train_files", "data.val_files"):
        files = _local_files(config, key)
        paths += files
        if select(config, "data.custom_cls.path") in DATASET_PATHS and not all(map(holds_images, files)):
            paths.append(str(images_root(files, data_config)))
    model = Path(str(select(config, "actor_rollout_ref.model.path"))).expanduser()
    check_nodes(cluster, [*paths, *([str(model)] if model.is_dir() else [])], where=f"the Ray cluster at {cluster}")


def _check_files(config: Any, kind: Kind, data_config: DataConfig) -> None:
    is_first = os.environ.get("RANK", "0") == "0"
    family = _family_of_run(config, "actor_rollout_ref.model" if kind == "rl" else "model") if is_first else None
    for key in ("data.train_files", "data.val_files"):
        if select(config, key) is None:
            if key == "data.val_files" and kind == "sft":
                continue
            raise FFRError(f"{key} is not given; add {key}=PATH (a NAME.{kind}.parquet of `ffr-verl prepare`)")
        files = _local_files(config, key)
        for name in files:
            if not Path(name).is_file():
                raise FFRError(f"{key}: {name}: no such file; `ffr-verl prepare` writes NAME.{kind}.parquet")
        check_columns(files, kind)
        if is_first:
            check_pair(files)
            check_pages(files)
        if files and is_first and family is None:
            check_images(files, images_root(files, data_config), sample=False)
        elif files and family is not None:
            check_model_family(files, family)
            root = images_root(files, data_config)
            check_images(files, root, sample=False, max_pixels=data_config.max_pixels, family=family)


def _overlong_prompts(config: Any, kind: Kind) -> list[str]:
    """What is to be said of rows, of some spread over each file, whose text alone has more tokens than the run takes.

    An `FFRError` where no run is possible: all of an RL file, or one of an SFT file, at which verl ends.
    """
    node, key = ("actor_rollout_ref.model", "data.max_prompt_length") if kind == "rl" else ("model", "data.max_length")
    folder, most = Path(str(select(config, f"{node}.path"))).expanduser(), select(config, key)
    is_other = any(select(config, f"{node}.{name}") for name in ("tokenizer_path", "custom_chat_template"))
    if most is None or is_other or not (folder / "tokenizer.json").is_file():
        return []
    try:
        tokens = PromptTokens(str(folder))
    except FFRError as error:
        raise FFRError(str(error).replace("--tokenizer", f"{node}.path:", 1)) from None
    column, notes = "prompt" if kind == "rl" else "messages", []
    mend = f"raise {key}, or cut the dialogues with `ffr-verl prepare --window`"
    for name in [*_local_files(config, "data.train_files"), *_local_files(config, "data.val_files")]:
        rows = [row[column] for row in sampled_rows(name, (column,))]
        rows = [row[:-1] for row in rows] if kind == "sft" else rows  # an answer makes a row longer, not shorter
        counts = [tokens.count(row, [1] * sum(one["content"].count(IMAGE) for one in row)) for row in rows]
        overlong = sum(count > most for count in counts)
        if not overlong:
            continue
        found = f"{name}: of {len(rows)} rows looked at, {overlong} with more than {key}={most} tokens of text, up to"
        found = f"{found} {max(counts):,}"
        if kind == "sft" and select(config, "data.truncation") == "error":
            raise FFRError(f"{found}; the first one would end the run: {mend}")
        if kind == "rl" and overlong == len(rows):
            raise FFRError(f"{found}; none of them fits: {mend}")
        left_out = "; verl leaves such rows out" if select(config, "data.filter_overlong_prompts") else ""
        notes.append(f"{found}{left_out}: {mend}")
    return notes


def _family_of_run(config: Any, node: str) -> ModelFamily | None:
    """The family of the model, by its own files; `None` where those cannot be looked at yet."""
    path = str(select(config, f"{node}.path"))
    if path == "None":
        return None  # said with what else is wrong with the model
    if "://" in path:
        logger.warning(
            "%s.path: %s is not here yet: sizes of images are checked when the datasets are made", node, path
        )
        return None
    return None if is_absent(path) else family_of_model(path)


def _check_advantages(config: Any, sampler: SamplerConfig | None, rewards: RewardConfig | None) -> None:
    """That reward, advantages and replay buffer suit each other."""
    estimator = select(config, "algorithm.adv_estimator")
    key, node = "algorithm.adv_estimator", AdvantageConfig.node
    advantage = None if sampler is None else sampler.advantage
    if estimator == "gdpo":
        raise FFRError(
            f"{key}=gdpo: verl {SUPPORTED_VERL}'s own fails in trainer v1, which hands it no reward components; "
            "give +recipe=ffr_gdpo"
        )
    if estimator == "ffr" and advantage is None:
        raise FFRError(
            f"{key}=ffr: {node} is not given; give {node}={{credit: id}}, with our replay buffer "
            f"({BUFFER_SETTING}), or {key}=grpo for verl's own"
        )
    if estimator != "ffr" and advantage is not None:
        raise FFRError(f"{node} is not read with {key}={estimator}; give {key}=ffr, or {node}=null")
    if rewards is None:
        return
    if advantage is not None and advantage.credit == "components":
        refuse_unknown_keys(advantage.components, allowed=score_keys(rewards), where=f"{node}.components")
    if advantage is not None and advantage.credit == "id" and not rewards.is_micro:
        raise FFRError(
            f"{node}.credit=id: with f1_mode={rewards.f1_mode} an id has no worth of its own; give "
            "f1_mode=micro_f1_mcc, or credit=answer"
        )
    if rewards.is_micro and estimator == "grpo" and select(config, "algorithm.norm_adv_by_std_in_grpo") is not False:
        raise FFRError(
            f"algorithm.norm_adv_by_std_in_grpo: with f1_mode={rewards.f1_mode} a reward's size is what an id is "
            "worth, and the group's deviation undoes it; give algorithm.norm_adv_by_std_in_grpo=false, or "
            f"{key}=ffr"
        )


def _check_metric_names(sampler: SamplerConfig | None, data_config: DataConfig, rewards: RewardConfig | None) -> None:
    """That what settings in use judge by is among the metrics of a validation, or of a group's answers."""
    if sampler is None or rewards is None:
        return
    of_answers = ("reward", *score_keys(rewards))
    node, curriculum = SamplerConfig.node, data_config.curriculum
    problems = [
        f"{key}: no metric {given!r}; {did_you_mean(given, known)}there are {', '.join(known)}"
        for key, given, known in (
            (f"{node}.best_checkpoint", sampler.best_checkpoint, (*MICRO_METRICS, *of_answers[1:])),
            (
                f"{node}.filter_groups_metric",
                sampler.filter_groups_metric if sampler.filter_groups else None,
                of_answers,
            ),
            (
                f"{curriculum.online.node}.metric",
                curriculum.online.metric if curriculum.order == "online" else None,
                of_answers,
            ),
        )
        if given is not None and given not in known
    ]
    if problems:
        raise FFRError("\n".join(problems))


def _lost_checkpoints(config: Any, sampler: SamplerConfig | None) -> list[str]:
    """What is to be said where `BestCheckpoint` is asked for and cannot have the checkpoint of each validation."""
    used = select(config, "trainer.checkpoint_callback_class") == BEST_CHECKPOINT
    save, test, most = [
        select(config, f"trainer.{name}") for name in ("save_freq", "test_freq", "max_actor_ckpt_to_keep")
    ]
    numbers = isinstance(save, int) and isinstance(test, int)
    if not used or not numbers or sampler is None or sampler.best_checkpoint is None:
        return []
    what = "the best checkpoint"
    if save <= 0 or test <= 0:
        return [f"trainer.save_freq={save}, trainer.test_freq={test}: {what} is not kept; both must be above 0"]
    notes = []
    if save % test and test % save:
        meet = math.lcm(save, test)
        notes.append(f"trainer.save_freq={save}, trainer.test_freq={test}: {what} is that of each {meet}th step only")
    if most == 1:
        notes.append(f"trainer.max_actor_ckpt_to_keep=1: {what} may be gone before its validation; give 2 or more")
    return notes


def _check_curriculum(config: Any, data_config: DataConfig, is_micro: bool) -> None:
    """That the difficulty file belongs to the training rows, and nothing reorders them."""
    curriculum = data_config.curriculum
    if is_micro and (workers := select(config, "data.dataloader_num_workers")):
        raise FFRError(
            f"data.dataloader_num_workers: found {workers}; the micro reward asks the rows where the policy stands, "
            "which worker processes do not know: give data.dataloader_num_workers=0"
        )
    if curriculum.difficulty is not None or not (curriculum.order == "file" or needs_difficulty(curriculum.order)):
        for name, wanted in (("data.shuffle", False), ("data.dataloader_num_workers", 0)):
            found = select(config, name)
            if found is not None and found != wanted:
                raise FFRError(
                    f"{name}: found {found}; with data.ffr.curriculum.order={curriculum.order} give {name}={wanted}, "
                    "or the rows come in another order"
                )
    files = _local_files(config, "data.train_files")
    batch, is_own = select(config, "data.train_batch_size"), curriculum.order not in ORDER_NAMES
    if is_own and curriculum.difficulty is None:
        is_own = not needs_difficulty(curriculum.order)
    if not files or not (is_own or curriculum.difficulty is not None):
        return
    if curriculum.difficulty is not None:
        try:
            rows = DifficultyFile(curriculum.difficulty).of_rows(row_keys(files), name=files[0])
        except FFRError as error:
            raise FFRError(f"data.ffr.curriculum.difficulty: {error}") from None
    if is_own:
        rows = _training_rows(files, curriculum)
        count = rehearse(rows, curriculum, step=batch if isinstance(batch, int) else 1)
    else:
        count = len(CurriculumSampler(rows, curriculum))
    if isinstance(batch, int) and count < batch:
        raise FFRError(
            f"data.ffr.curriculum: {count} rows are left of {len(rows)}, fewer than data.train_batch_size={batch}; "
            "raise shares, or give a smaller batch"
        )


def _training_rows(files: Sequence[str], curriculum: CurriculumConfig) -> RowDifficulty:
    """What an order of one's own is told of the rows, as `FFRDataset` tells it."""
    from datasets import Dataset, concatenate_datasets

    own = curriculum.strata if isinstance(curriculum.strata, list) else []
    tables = []
    for file in files:
        known = read_schema(file).names
        columns = [name for name in ("extra_info", "reward_model", *own) if name in known]
        with open_parquet(file) as parquet:
            tables.append(Dataset(parquet.read(columns=columns)))
    return TrainingRows.of(concatenate_datasets(tables), curriculum, files).difficulty


def _reward_node(config: Any) -> str | None:
    """Where the settings of our reward stand; `None` when another one is asked for."""
    node = reward_node(select(config, "reward") or {})
    return node and f"reward.{node}"


def _reward_config(config: Any) -> RewardConfig | None:
    """The settings of our reward; `None` when another one is asked for."""
    node = _reward_node(config)
    return None if node is None else RewardConfig.from_kwargs(select(config, node) or {})


def _check_answer_tags(config: Any, rewards: RewardConfig) -> None:
    """verl's own reward managers drop special tokens, and with them the tags of the answer."""
    manager = select(config, "reward.reward_manager.name")
    folder = _model_folder(config)
    if manager == "ffr":
        return
    added = read_json(folder / "tokenizer.json").get("added_tokens") or ()
    tags = NEEDED_TAGS[rewards.answer_style]
    special = [token["content"] for token in added if token.get("special") and token.get("content") in tags]
    if special:
        raise FFRError(
            f"reward.reward_manager.name={manager}: it drops special tokens, and {special[0]} is one in {folder}, so "
            "every answer would be malformed; give reward.reward_manager.name=ffr"
        )


def _try_component(config: Any, rewards: RewardConfig, component: Component) -> None:
    """That a reward of one's own scores the gold answer of a row of each data file, and an empty answer."""
    for name in [*_local_files(config, "data.train_files"), *_local_files(config, "data.val_files")]:
        rows = sampled_rows(name, ("reward_model", "extra_info"))
        golds = [row for row in rows if parse_gold(row["reward_model"]["ground_truth"]) != Fragment((), ())]
        for row in (golds or rows)[:1]:
            solution, style = row["reward_model"]["ground_truth"], rewards.answer_style
            component.attempt(solution, row["extra_info"], style=style, embeddings=rewards.embeddings)


def _check_embeddings(config: Any, rewards: RewardConfig) -> None:
    """That the store is as it was written (all of it is read, once a run), and holds the utterances and images of the
    data files (of rows spread over them), and the queries where relevance asks for them."""
    key, path = f"{_reward_node(config)}.embeddings", str(rewards.embeddings)
    asks_queries = any(component.function is relevance_reward for component in rewards.components)
    try:
        store = EmbeddingStore.open(path, verify=os.environ.get("RANK", "0") == "0")
        scorer = CoherenceScorer(store)
    except FFRError as error:
        raise FFRError(f"{key}: {error}") from None
    for name in [*_local_files(config, "data.train_files"), *_local_files(config, "data.val_files")]:
        wanted, lacking = 0, list[str]()
        dialogues = [row["extra_info"] for row in sampled_rows(name, ("extra_info",))]
        for info in dialogues:
            wanted += len(set(info["utterance_ids"])) + len(set(info["images"] or ()))  # a picture may repeat
            lacking += scorer.missing_of(info)
        if wanted and len(lacking) == wanted:
            raise FFRError(
                f"{key}: {path} has no vector for {name} ({lacking[0]} ...); make the store of this data: "
                f"ffr-verl embed {name} --model NAME --output {path}"
            )
        if asks_queries:
            try:
                check_queries(store, dialogues)
            except FFRError as error:
                raise FFRError(f"{key}: {error} ({name})") from None
        if lacking:
            part = f"{len(lacking)} of {wanted} utterances and images looked for in {name} ({lacking[0]} ...)"
            rest = "they are left out of coherence; `ffr-verl embed` takes several data files at once"
            logger.warning("%s: %s lacks %s: %s", key, path, part, rest)


def _check_model(config: Any, node: str) -> None:
    if (
        select(config, f"{node}.use_remove_padding")
        and select(config, f"{node}.override_config.attn_implementation") in (None, "flash_attention_2")
        and importlib.util.find_spec("flash_attn") is None
        # On Ascend transformers has attention of torch_npu's for it; on ROCm it asks for flash_attn as on CUDA.
        and importlib.util.find_spec("torch_npu") is None
    ):
        raise FFRError(
            f"{node}.use_remove_padding is on and flash_attn is not installed: {INSTALL_FLASH_ATTENTION}, "
            f"or train slower with {node}.use_remove_padding=false "
            f"+{node}.override_config.attn_implementation=sdpa; without a GPU use the *_cpu recipes"
        )
    key = f"{node}.path"
    if select(config, key) is None:
        raise FFRError(f"{key} is not given; add {key}=FOLDER (for GRPO: the SFT model after `ffr-verl merge`)")
    path = str(select(config, key))
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if "://" not in path and is_absent(path):
            raise FFRError(f"{key}: {path}: no such folder; give a Hugging Face folder, or the name of a hub model")
        return  # verl fetches it
    save = "AutoProcessor.from_pretrained(BASE).save_pretrained(...)"
    for names, problem in (
        (
            ["config.json"],
            "config.json is missing; not a Hugging Face model folder; a verl checkpoint becomes one through "
            "`ffr-verl merge`",
        ),
        (
            ["tokenizer_config.json"],
            "tokenizer_config.json is missing; save the base model's tokenizer there: "
            "AutoTokenizer.from_pretrained(BASE).save_pretrained(...)",
        ),
        (
            ["preprocessor_config.json", "processor_config.json"],
            "the model has no processor (preprocessor_config.json), so images cannot be read; save the base model's: "
            + save,
        ),
    ):
        if not any((folder / name).is_file() for name in names):
            raise FFRError(f"{key}: {path}: {problem}")
    family, key_of_thought = family_of_model(folder), "data.apply_chat_template_kwargs.enable_thinking"
    if family.template_kwargs and select(config, key_of_thought) is None:
        raise FFRError(
            f"{key_of_thought} is not given: the chat template of {family.name} begins each answer with a thought "
            f"then; give +{key_of_thought}=false"
        )
    if node != "model" and select(config, "trainer.device") == "cpu":
        rollout = "actor_rollout_ref.rollout.dtype"
        if family.cpu_dtype not in ("float32", select(config, rollout)):
            raise FFRError(
                f"{rollout}: vLLM's CPU build runs {family.name} in {family.cpu_dtype} only; give "
                f"{rollout}={family.cpu_dtype}"
            )
    if not has_chat_template(folder) and not select(config, f"{node}.custom_chat_template"):
        raise FFRError(
            f"{key}: {path}: the model has no chat template, so prompts cannot be written; save the base model's "
            f"processor there: {save}"
        )


def _check_folder(config: Any, stage: Stage, starts: bool) -> None:
    """That the disk takes a checkpoint, and that the one to resume from is whole."""
    folder = select(config, "trainer.default_local_dir")
    if not isinstance(folder, str) or "://" in folder:
        return
    place = Path(folder).expanduser().absolute()
    free = shutil.disk_usage(next(one for one in (place, *place.parents) if one.exists())).free
    if free < _LEAST_FREE_BYTES:
        raise FFRError(
            f"trainer.default_local_dir: {folder}: {free / 2**20:.0f} MiB are free there, a checkpoint needs more; "
            "free some, or give another folder"
        )
    if select(config, "trainer.resume_mode") != "auto":
        return
    node = "actor_rollout_ref.actor.checkpoint" if stage == "grpo" else "checkpoint"
    contents = select(config, f"{node}.load_contents") or tuple(CONTENTS)
    nodes, per_node = (select(config, f"trainer.{name}") for name in ("nnodes", "n_gpus_per_node"))
    if stage == "grpo":
        ranks = nodes * per_node if nodes and per_node else None
    else:  # torchrun says it, and without torchrun there is one
        ranks = int(os.environ.get("WORLD_SIZE", 1)) if starts else None
    step = check_resume(Path(folder).expanduser(), stage, contents=contents, all_ranks=nodes in (None, 1), ranks=ranks)
    if step is not None:
        logger.info("the run resumes from step %d in %s", step, folder)
