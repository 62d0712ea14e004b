"""verl's replay buffers with a polling interval, a group filter with a tolerance, the rewards' training curves,
advantages of our own, micro metrics in validation, and what the curriculum learns from.

verl builds a custom replay buffer without its own filter settings, so they come through `sampler_kwargs`.
"""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transfer_queue as tq
from tensordict import NonTensorStack, TensorDict
from verl.trainer.ppo.v1.replay_buffer import FILTER_GROUPS_REWARD_METRIC, ReplayBuffer, ReplayBufferAsync

from ffr_verl.errors import FFRError
from ffr_verl.integrations.verl import ROW_NUMBER
from ffr_verl.integrations.verl.advantages import publish
from ffr_verl.integrations.verl.stalls import StallWatch
from ffr_verl.integrations.verl.validation import ValidationTotals, note_result
from ffr_verl.samplers.advantages import AdvantageConfig, IdCredit, ScoredAnswer, advantages_of
from ffr_verl.samplers.reward_metrics import REWARD_ERROR, has_spread, reward_metrics, strata_metrics
from ffr_verl.samplers.rollout_dump import write_rollouts
from ffr_verl.samplers.sampler import active_sampler
from ffr_verl.settings import SamplerConfig

logger = logging.getLogger(__name__)

_NO_ANSWERS = "no materializable trajectories"  # in verl's message, which names a key that would ask again for ever


class _FFRSampling:
    """What both buffers add to verl's; mixed in before verl's class."""

    partitions: dict[str, dict[str, dict[str, Any]]]
    pending_keys: dict[str, set[str]]
    running_keys: dict[str, set[str]]
    finished_keys: dict[str, set[str]]
    failure_keys: dict[str, set[str]]
    filter_groups_metric: str | None
    train_batch_size: int | None
    _dapo_classification_cache: dict[str, dict[str, float | None]]

    def __init__(self, *, sampler_kwargs: Mapping[str, Any] | None, **kwargs: Any) -> None:
        config = SamplerConfig.from_mapping(sampler_kwargs or {})
        super().__init__(
            sampler_kwargs=sampler_kwargs,  # type: ignore[call-arg]  # not read by verl's own class
            poll_interval=config.poll_interval,
            filter_groups_metric=config.filter_groups_metric if config.filter_groups else None,
            train_batch_size=config.train_batch_size,
            gen_batch_size=1,
            max_inflight_gen_batches=config.max_inflight_gen_batches,
            **kwargs,
        )
        self.ffr_config = config
        self._filtered: set[str] = set()  # groups, in this step
        self._filter_is_off = False
        self._observed: set[str] = set()  # groups that are still here
        self._deviations: dict[int, list[float]] = {}
        self._confusions: list[Any] = []
        self._validation = ValidationTotals()
        self._stalls = StallWatch(config.stall_timeout)

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[Any, dict[str, Any]]:
        """verl's `sample`; for training batches with the metrics of the sampled answers and of the curriculum, which
        learns how the policy did, and with their advantages; for validation with the micro metrics in each row."""
        self._filtered, self._filter_is_off = set(), False
        self._stalls.waits_for((global_steps, partition_id))
        try:
            batch, metrics = super().sample(  # type: ignore[misc]
                global_steps=global_steps, partition_id=partition_id, batch_size=batch_size
            )
        except RuntimeError as error:
            if _NO_ANSWERS not in str(error):
                raise
            raise FFRError(
                f"step {global_steps}: no group has an answer, each of them failed: a process of the rollout or of "
                "the reward has died, or raises every time; the first error above says which. The same command "
                "resumes from the newest checkpoint"
            ) from None
        self._stalls.left()
        if not batch.keys:
            return batch, metrics
        answers = _Answers.of(partition_id, list(batch.keys))
        if partition_id == "val":
            self._validate(global_steps, answers)
            self._dump(global_steps, answers, {})
            return batch, metrics
        metrics = {**metrics, **self._reward_metrics(answers)}
        advantages: dict[str, np.ndarray] = {}
        if self.ffr_config.advantage is not None:
            advantages = _publish_advantages(answers, self.ffr_config.advantage)
        self._dump(global_steps, answers, advantages)
        return batch, {**metrics, **self._end_step()}

    def _wait_for_next_poll(self, partition_id: str, last_debug_time: float) -> float:
        """verl's, which goes on for ever; the end of `stall_timeout` ends it."""
        groups = (self.pending_keys, self.running_keys, self.finished_keys, self.failure_keys)
        self._stalls.waits_for((len(self.partitions[partition_id]), *[len(keys[partition_id]) for keys in groups]))
        return super()._wait_for_next_poll(partition_id, last_debug_time)  # type: ignore[misc, no-any-return]

    def _validate(self, step: int, answers: _Answers) -> None:
        """Put the micro metrics into the rows, so that verl's mean over them is the metric."""
        if not all("confusion" in info for info in answers.infos.values()):
            return  # another reward manager
        found = self._validation.add(step, list(answers.sources.values()), list(answers.infos.values()))
        read = [list(lengths)[-1] for lengths in answers.lengths.values()]  # by verl, of each session
        data = tq.kv_batch_get(keys=read, partition_id=answers.partition, select_fields=["extra_fields"])
        extras = [
            {**getattr(extra, "data", extra), "reward_extra_info": {**answers.infos[session], **found[source]}}
            for extra, (session, source) in zip(list(data["extra_fields"]), answers.sources.items(), strict=True)
        ]
        fields = TensorDict({"extra_fields": NonTensorStack(*extras)}, batch_size=len(read))
        tq.kv_batch_put(keys=read, partition_id=answers.partition, fields=fields)
        note_result(step, self._validation.metrics())

    def _dump(self, step: int, answers: _Answers, advantages: Mapping[str, np.ndarray]) -> None:
        """Write down what verl's own dumps lack: the components of training answers, and whose row they answer."""
        if self.ffr_config.dump_dir is None:
            return
        keys = {session: list(lengths)[-1] for session, lengths in answers.lengths.items()}  # the last output's
        data = tq.kv_batch_get(keys=[*keys.values()], partition_id=answers.partition, select_fields=["extra_info"])
        told = []
        for (session, key), extra in zip(keys.items(), list(data["extra_info"]), strict=True):
            row = getattr(extra, "data", extra) or {}
            found = {"uid": key, "dialogue_id": str(row.get("dialogue_id", "")), "images": row.get("images")}
            if key in advantages:
                found["advantage"] = float(np.mean(advantages[key]))
            told.append({**found, "reward": answers.rewards[session], **answers.infos[session]})
        folder = Path(self.ffr_config.dump_dir).expanduser()
        write_rollouts(folder / "validation" if answers.partition == "val" else folder, step, told)

    def _reward_metrics(self, answers: _Answers) -> dict[str, float]:
        self._observe(answers)
        groups = answers.values(FILTER_GROUPS_REWARD_METRIC)
        flat, flat_f1 = (
            {uid for uid, values in found.items() if not has_spread(values, min_std=self.ffr_config.min_std)}
            for found in (groups, answers.values("f1"))
        )
        evicted = len(self._filtered)
        metrics = {
            "ffr/groups/without_spread": (len(flat) + evicted) / (len(groups) + evicted),
            "ffr/groups/flat_in_f1_only": len(flat_f1 - flat) / len(groups),
            **reward_metrics(answers.infos.values()),
        }
        sampler = active_sampler()
        if sampler is not None and answers.rows:
            metrics |= strata_metrics(
                [(sampler.stratum(answers.rows[one.split("_")[0]]), info) for one, info in answers.infos.items()]
            )
        return metrics

    def _observe(self, answers: _Answers) -> None:
        """Remember, once, how well the policy did on the rows of groups that are trained on or evicted."""
        sampler = active_sampler()
        if sampler is None:
            return
        infos = {one: info for one, info in answers.infos.items() if one.split("_")[0] not in self._observed}
        self._confusions += [json.loads(one["confusion"]) for one in infos.values() if "confusion" in one]
        for uid, values in answers.values(sampler.config.online.metric).items():
            if uid in answers.rows and uid not in self._observed:
                self._deviations.setdefault(answers.rows[uid], []).append(float(np.std(values)))
        self._observed |= {one.split("_")[0] for one in infos}

    def _end_step(self) -> dict[str, float]:
        sampler = active_sampler()
        if sampler is None:
            return {}
        deviations = {row: float(np.mean(values)) for row, values in self._deviations.items()}
        confusions, self._deviations, self._confusions = self._confusions, {}, []
        metrics = sampler.update(deviations)
        if sampler.micro is not None:
            sampler.micro.observe(confusions)
            metrics |= {f"ffr/micro/{kind}_f1": value for kind, value in sampler.micro.f1().items()}
        self._observed &= {key.split("_")[0] for keys in self.partitions.values() for key in keys}
        return metrics

    def _dapo_filtered_keys(self, partition_id: str) -> tuple[set[str], Counter[float]]:
        """verl's group filter, with `min_std` for its exact 0 and an end to it: the finished groups to evict, and how
        many of them lie at each (rounded mean) metric value."""
        if partition_id == "val" or self.filter_groups_metric is None:
            return set(), Counter()
        cache, metric = self._dapo_classification_cache[partition_id], self.filter_groups_metric
        finished = self.finished_keys[partition_id]
        for uid in cache.keys() - finished:
            del cache[uid]
        new = finished - cache.keys()
        answers = _Answers.of(partition_id, [key for key in self.partitions[partition_id] if key.split("_")[0] in new])
        self._observe(answers)
        groups = answers.values(metric)
        if lacking := new - groups.keys():
            raise RuntimeError(
                f"trainer.v1.sampler.sampler_kwargs.filter_groups_metric: no {metric!r} in the rewards of "
                f"{len(lacking)} groups; give `reward`, or a key that the reward function returns"
            )
        for uid, values in groups.items():
            flat = not has_spread(values, min_std=self.ffr_config.min_std)
            cache[uid] = round(float(np.mean(values)), 3) if flat else None
        if self._filter_is_off:
            return set(), Counter()
        filtered = {uid: value for uid, value in cache.items() if value is not None}
        limit = self.ffr_config.max_filtered_batches * (self.train_batch_size or 0)
        if filtered and limit and len(self._filtered | filtered.keys()) > limit:
            self._filter_is_off = True
            logger.warning(
                "more than %d groups of this step had no spread in %r above %g: the filter rests until the next step. "
                "Raise rollout.temperature, or train on rows of another difficulty.",
                limit,
                metric,
                self.ffr_config.min_std,
            )
            return set(), Counter()
        self._filtered |= filtered.keys()
        return set(filtered), Counter(filtered.values())


class FFRReplayBuffer(_FFRSampling, ReplayBuffer):  # type: ignore[misc]
    """`ReplayBuffer` of verl's sync trainer, configured from `trainer.v1.sampler.sampler_kwargs`.

    See `SamplerConfig` for the keys, docs/rewards.md for what it adds to a step's metrics. Use it through the recipe:

        trainer.v1.sampler.custom_sampler: {path: pkg://ffr_verl.samplers, name: FFRReplayBuffer}
    """


class FFRReplayBufferAsync(_FFRSampling, ReplayBufferAsync):  # type: ignore[misc]
    """The same for verl's async trainers (`trainer.v1.trainer_mode` other than `sync`)."""


def _publish_advantages(answers: _Answers, config: AdvantageConfig) -> dict[str, np.ndarray]:
    """Give the answers' advantages to the estimator `ffr`, which finds them by what stands for the group's name.

    Returns them, by the key of each output.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for session in answers.infos:
        groups[session.split("_")[0]].append(session)
    scored = [[answers.scored(session) for session in sessions] for sessions in groups.values()]
    found: dict[str, np.ndarray] = {}
    for sessions, advantages in zip(groups.values(), advantages_of(scored, config), strict=True):
        for session, values in zip(sessions, advantages, strict=True):
            # Outputs before the last one of a session share what the answer earned.
            found |= {key: np.full(length, values[0]) for key, length in answers.lengths[session].items()}
            found[list(answers.lengths[session])[-1]] = values
    publish(found)
    fields = TensorDict({"uid": NonTensorStack(*found)}, batch_size=len(found))
    tq.kv_batch_put(keys=list(found), partition_id=answers.partition, fields=fields)
    return found


@dataclass(frozen=True, slots=True)
class _Answers:
    """What TransferQueue holds of finished answers, by session.

    A session may have several outputs; verl puts the same reward on each, so the last one stands for all.
    """

    partition: str
    infos: dict[str, Mapping[str, Any]]  # what the reward function returned
    rewards: dict[str, float]
    lengths: dict[str, dict[str, int]]  # tokens of each output, by its key
    sources: dict[str, str]  # `data_source`, in validation
    rows: dict[str, int]  # `ffr_row` of each group, where the dataset gives one

    @classmethod
    def of(cls, partition_id: str, keys: Sequence[str]) -> _Answers:
        """Read them; `FFRError` where the reward could not be told for one, which ends the run."""
        answers = cls(partition_id, {}, {}, defaultdict(dict), {}, {})
        if not keys:
            return answers
        keys = sorted(keys, key=lambda key: (key.rpartition("_")[0], int(key.rpartition("_")[2])))
        is_validation = partition_id == "val"
        further = ["data_source"] if is_validation else [] if active_sampler() is None else [ROW_NUMBER]
        fields = ["rm_scores", "extra_fields", *further]
        data = tq.kv_batch_get(keys=keys, partition_id=partition_id, select_fields=fields)
        for key, scores, *others in zip(keys, *[list(data[name]) for name in fields], strict=True):
            session = key.rpartition("_")[0]
            extra, *values = [getattr(one, "data", one) for one in others]
            info = extra.get("reward_extra_info", {}) if isinstance(extra, dict) else {}
            if REWARD_ERROR in info:
                raise FFRError(info[REWARD_ERROR])
            answers.infos[session] = info
            answers.rewards[session] = float(scores.sum())
            answers.lengths[session][key] = len(scores)
            if is_validation:
                answers.sources[session] = str(values[0])
            elif values and values[0] is not None:
                answers.rows[key.split("_")[0]] = int(values[0])
        return answers

    def scored(self, session: str) -> ScoredAnswer:
        """An answer as `advantages_of` takes it."""
        info = self.infos[session]
        credits = info.get("id_credits")
        ids = [IdCredit(*one) for one in json.loads(credits)] if credits else None
        return ScoredAnswer(list(self.lengths[session].values())[-1], self.rewards[session], info, ids)

    def values(self, metric: str) -> dict[str, list[float]]:
        """A metric of every answer, by group; groups whose answers lack it are left out."""
        found: dict[str, list[float]] = defaultdict(list)
        for session, info in self.infos.items():
            uid = session.split("_")[0]
            if metric == FILTER_GROUPS_REWARD_METRIC:
                found[uid].append(self.rewards[session])
            elif metric in info:
                found[uid].append(float(info[metric]))
        return dict(found)
