"""What the report's page shows of each prediction: plain values that become its JSON."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ffr_verl.dialogues import Dialogue, parse_dialogue
from ffr_verl.fragments import AnswerStyle, Fragment, MalformedReason, parse_either, parse_fragment, parse_gold
from ffr_verl.predictions import Prediction, info_of
from ffr_verl.rewards.coherence import CoherenceMode
from ffr_verl.rewards.config import RewardConfig
from ffr_verl.rewards.diagnosis import diagnose
from ffr_verl.rewards.f1 import f1_reward
from ffr_verl.rewards.ffr import compute_score
from ffr_verl.samplers.reward_metrics import is_component

UNANSWERED = "unanswered"  # stands for the fault of a row without an answer

# A model that never stops must not fill the page.
_LONGEST_ANSWER, _LONGEST_TEXT = 4_000, 20_000


def reward_settings(
    kwargs: Mapping[str, Any] | None = None,
    *,
    embeddings: str | None = None,
    coherence_mode: CoherenceMode | None = None,
    answer_style: AnswerStyle | None = None,
) -> dict[str, Any]:
    """The `reward_kwargs` of `compute_score` for the report: given ones or the defaults, and MCC shown beside them."""
    config = RewardConfig.from_kwargs(kwargs or {})
    embeddings = embeddings or config.embeddings
    found = {**(kwargs or {}), "answer_style": answer_style or config.answer_style}
    if embeddings is not None:
        found |= {"embeddings": embeddings, "coherence_mode": coherence_mode or config.coherence_mode}
    weights = {name: weight for name, weight in config.weights if name != "coherence" or embeddings is not None}
    return {**found, "weights": {**weights, "mcc": weights.get("mcc", 0.0)}}


def told_rewards(told: Mapping[str, Any]) -> dict[str, float]:
    """The score, advantage and components of an answer that verl or our replay buffer wrote down.

    Example:
        >>> told_rewards({"score": 1.5, "f1": 1, "step": 3, "gold_images": 2, "malformed": "", "micro_joint_f1": 0.5})
        {'score': 1.5, 'f1': 1.0}
    """
    names = [name for name in ("score", "advantage") if name in told]
    names += [name for name in told if name not in (*names, "step", "reward") and is_component(name)]
    values = {name: told[name] for name in names}
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def _clipped(text: str, longest: int) -> str:
    rest = len(text) - longest
    return text if rest <= 0 else f"{text[:longest]} … ({rest:,} more characters)"


def _ids(fragment: Fragment) -> dict[str, list[int]]:
    return {"utterances": list(fragment.utterance_ids), "images": list(fragment.image_ids)}


class ReportRows:
    """Collects rows, with the rewards of `reward_settings`; a dialogue that several rows ask of is kept once."""

    def __init__(self, rewards: Mapping[str, Any]) -> None:
        self._rewards, config = rewards, RewardConfig.from_kwargs(rewards)
        self._style: AnswerStyle = config.answer_style
        self.components = tuple([one.name for one in config.components])
        ours = {name: weight for name, weight in rewards["weights"].items() if name not in self.components}
        self._without_components = {**rewards, "components": {}, "weights": ours}
        self.f1 = functools.partial(  # of an answer and its gold
            f1_reward,
            length_penalty=config.length_penalty,
            utterance_weight=config.utterance_weight,
            image_weight=config.image_weight,
            style=config.answer_style,
        )
        self._at: dict[Any, int] = {}
        self._image_at: dict[str, int] = {}
        self.rows: list[dict[str, Any]] = []  # in the order in which they were added
        self.dialogues: list[dict[str, Any]] = []  # that the rows name by position

    @property
    def image_names(self) -> list[str]:
        """Paths as they stand in the rows, that the dialogues name by position."""
        return list(self._image_at)

    def add(self, prediction: Prediction, other: Prediction | None = None) -> None:
        """Add a prediction, and another model's to the same row; an `FFRError` for an embedding store that cannot be
        opened."""
        dialogue, row = self._row(prediction, prediction.line)
        info = info_of(prediction, dialogue or Dialogue(prediction.dialogue_id, (), ""))
        rewards = self._rewards if dialogue is not None else self._without_components
        scores = compute_score("report", prediction.rewarded, prediction.labels, info, **rewards)
        if dialogue is None:
            del scores["mcc"]  # the dialogue's size is not known
        if self._rewards.get("embeddings") is None:
            del scores["coherence"]
        answer = self._answer(prediction, dialogue, scores)
        self.rows.append({**row, **answer, "other": None if other is None else self._other(other)})

    def add_group(self, name: str, step: str, answers: Sequence[Prediction]) -> None:
        """Add the answers to one prompt, with the rewards that their `extra` says."""
        dialogue, row = self._row(answers[0], name)
        group = []
        for one in answers:
            answer = self._answer(one, dialogue, told_rewards(one.extra))
            fault = one.extra.get("malformed")  # by the reward manager, who saw special tokens too
            if isinstance(fault, str) and not one.error:
                is_read = fault in ("", MalformedReason.REPEATED_ID, MalformedReason.ID_OUTSIDE_DIALOGUE)
                answer |= {"fault": fault or None, "malformed": not is_read}
            group.append(answer)
        means = {
            key: round(sum(one["rewards"][key] for one in group) / len(group), 4)
            for key in group[0]["rewards"]
            if all(key in one["rewards"] for one in group)
        }
        self.rows.append({**row, "step": step, "rewards": means, "group": group})

    def _row(self, prediction: Prediction, name: int | str) -> tuple[Dialogue | None, dict[str, Any]]:
        dialogue, problem = None, None
        try:
            dialogue = parse_dialogue(prediction.messages, prediction.dialogue_id)
        except ValueError as error:
            problem = str(error)
        return dialogue, {
            "line": name,
            "id": prediction.dialogue_id,
            "query": "" if dialogue is None else dialogue.query,
            "dialogue": self._dialogue(prediction, dialogue, problem),
            "gold": _ids(parse_gold(prediction.labels) or Fragment((), ())),
            "goldAnswer": _clipped(prediction.labels, _LONGEST_ANSWER),
        }

    def _answer(
        self, prediction: Prediction, dialogue: Dialogue | None, rewards: Mapping[str, float]
    ) -> dict[str, Any]:
        predicted = parse_either(prediction.response, style=self._style)
        shown = info_of(prediction, dialogue) if dialogue else None
        reason = diagnose(prediction.response, prediction.labels, extra_info=shown, style=self._style).malformed
        fault = UNANSWERED if prediction.error else None if reason is None else reason.value
        return {
            "predicted": _ids(predicted),
            "outside": _ids(_outside(predicted, dialogue)),
            "answer": _clipped(prediction.response, _LONGEST_ANSWER),
            "malformed": parse_fragment(prediction.response, style=self._style) is None and not prediction.error,
            "fault": fault,
            "error": prediction.error and _clipped(prediction.error, _LONGEST_ANSWER),
            "rewards": {name: round(value, 4) for name, value in rewards.items()},
        }

    def _other(self, other: Prediction) -> dict[str, Any]:
        """What the page shows of another model's prediction."""
        return {
            "predicted": _ids(parse_either(other.response, style=self._style)),
            "answer": _clipped(other.error or other.response, _LONGEST_ANSWER),
            "f1": round(self.f1(other.rewarded, other.labels), 4),
        }

    def _dialogue(self, prediction: Prediction, dialogue: Dialogue | None, problem: str | None) -> int:
        key: Any = prediction.prompt if dialogue is None else (dialogue.utterances, prediction.images)
        if key not in self._at:
            self._at[key] = len(self.dialogues)
            made: dict[str, Any] = {
                "problem": problem,
                "text": _clipped(prediction.prompt, _LONGEST_TEXT),
                "turns": [],
            }
            if dialogue is not None:
                made = {"turns": self._turns(dialogue, prediction.images)}
            self.dialogues.append(made)
        return self._at[key]

    def _turns(self, dialogue: Dialogue, images: Sequence[str]) -> list[dict[str, Any]]:
        turns, names = [], iter(images)
        for utterance in dialogue.utterances:
            turn: dict[str, Any] = {
                "id": utterance.id,
                "speaker": utterance.speaker,
                "text": _clipped(utterance.text, _LONGEST_TEXT),
            }
            shown = []
            for identifier, caption in itertools.zip_longest(utterance.image_ids, utterance.captions):
                name = next(names, None)  # empty where the row has bytes alone
                at = self._image_at.setdefault(name, len(self._image_at)) if name else None
                shown.append({"id": identifier, "at": at, **({"caption": caption} if caption else {})})
            if shown:
                turn["images"] = shown
            turns.append(turn)
        return turns


def _outside(predicted: Fragment, dialogue: Dialogue | None) -> Fragment:
    if dialogue is None:
        return Fragment((), ())
    known = {utterance.id for utterance in dialogue.utterances}, set(dialogue.image_ids)
    named = predicted.utterance_ids, predicted.image_ids
    outside = ([one for one in ids if one not in there] for ids, there in zip(named, known, strict=True))
    return Fragment(*[tuple(dict.fromkeys(ids)) for ids in outside])
