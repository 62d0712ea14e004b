"""`evaluate`: how good answers are, and the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ffr_verl.dialogues import parse_dialogue
from ffr_verl.errors import FFRError
from ffr_verl.evaluation.bootstrap import BootstrapSettings, resampled_metrics
from ffr_verl.evaluation.breakdowns import BREAKDOWNS, part_names, parts_of
from ffr_verl.evaluation.counts import FAULTS, RowCounts, count_rows
from ffr_verl.evaluation.row_statistics import (
    MALFORMED,
    MODALITIES,
    REWARD_SETTINGS,
    chunks,
    metric_rows,
    metrics_of_sums,
    nested,
    row_statistics,
    width,
)
from ffr_verl.fragments import AnswerStyle
from ffr_verl.predictions import (
    Answered,
    Prediction,
    PredictionFormat,
    UnusableLines,
    answered,
    info_of,
    prediction_of,
    read_answered,
    read_predictions,
)
from ffr_verl.rewards.ffr import RewardConfig

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Of some rows. docs/evaluation.md defines every number."""

    # `utterance`, `image` and `joint`, each with `precision`, `recall`, `f1` and `mcc`: of counts summed over the
    # rows, and means over the rows.
    micro: Mapping[str, Mapping[str, float]]
    macro: Mapping[str, Mapping[str, float]]
    # Means of the rewards `f1`, `f1_utterances`, `f1_images`, `format` and `exact_match`, as verl's validation reports
    # them for the same `reward_settings`, and of components of one's own.
    rewards: Mapping[str, float]
    # `malformed`, `outside` (name ids that the dialogue does not have), `empty` and `gold_empty` are shares of the
    # rows; `utterances`, `gold_utterances`, `images` and `gold_images` mean numbers of ids.
    answers: Mapping[str, float]
    macro_where_gold: Mapping[str, float]  # macro f1 of `utterance` and of `image` where the gold has such ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Part(Metrics):
    """The rows of a part of a break-down: its name, the rows in it, and how many of their answers have a fault."""

    name: str
    samples: int
    malformed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult(Metrics):
    """How good answers are."""

    samples: int  # rows that were evaluated
    skipped: int  # lines left out (`lenient`)
    repeated: int  # rows of a dialogue, query and gold answer that an earlier row is of; they count like any other
    # `length_penalty`, `utterance_weight` and `image_weight` of the rewards, and where they are `from`.
    reward_settings: Mapping[str, Any]
    malformed: Mapping[str, int]  # answers by their first fault, and `any`
    unanswered: Mapping[str, int]  # rows with an `error`, by what it says, and `any`; 0 in `macro` and `rewards`
    # Predicted ids that the dialogue does not have, of each modality, and `answers` that have such.
    ids_outside: Mapping[str, int]
    breakdowns: Mapping[str, Sequence[Part]]  # of each break-down, the parts that have rows
    # The metrics with `(low, high)` in place of each number, and what they were made with; `None` without resamples.
    intervals: Mapping[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the file of `ffr-verl evaluate --json`: plain dicts, lists, numbers and texts."""
        return dataclasses.asdict(self)

    def to_rows(self) -> list[dict[str, Any]]:
        """A line for all rows and each part of a break-down, each average and each modality.

        The columns are `breakdown`, `part`, `samples`, `average`, `modality`, the four metrics and, of all rows, their
        intervals as `…_low` and `…_high` (`None` elsewhere).
        """
        lines = metric_rows({"breakdown": "all", "part": "all", "samples": self.samples}, self, self.intervals)
        for breakdown, parts in self.breakdowns.items():
            for part in parts:
                lines += metric_rows({"breakdown": breakdown, "part": part.name, "samples": part.samples}, part, None)
        return lines

    def to_pandas(self) -> pandas.DataFrame:
        """The lines of `to_rows` as a frame; an `FFRError` when pandas is not installed."""
        try:
            import pandas
        except ImportError:
            raise FFRError("pandas is not installed: pip install pandas, or use to_rows()") from None
        return pandas.DataFrame(self.to_rows())


def evaluate(
    records: Iterable[Prediction | Mapping[str, Any]],
    *,
    style: AnswerStyle = "plain",
    reward_kwargs: Mapping[str, Any] | None = None,
    bootstrap: BootstrapSettings | None = None,
) -> EvaluationResult:
    """How good answers are.

    Args:
        records: predictions, or rows with `response`, `labels` (the gold answer) and `messages`; each is looked at
            once and not kept.
        style: of the answers, `plain` or `reasoning`.
        reward_kwargs: of the recipe, for the rewards; their defaults otherwise.
        bootstrap: how intervals are made; by default 1,000 resamples, seed 0.

    Raises:
        FFRError: for a record that is no prediction or has a malformed gold answer, and when there are none.

    Source: micro as published; the rest is ours.

    Example:
        >>> gold = "<|utt_ids_start|>[0, 1]<|utt_ids_end|>;<|img_ids_start|>[0]<|img_ids_end|>"
        >>> answer = "<|utt_ids_start|>[1]<|utt_ids_end|>;<|img_ids_start|>[0]<|img_ids_end|>"
        >>> turns = "".join(f"<|utt_id_start|>{turn}<|utt_id_end|> a: …" for turn in range(4))
        >>> prompt = turns + "<|img_id_start|>0<|img_id_end|><image>"
        >>> row = {"response": answer, "labels": gold, "messages": [{"role": "user", "content": prompt}]}
        >>> result = evaluate([row])
        >>> result.micro["utterance"]["precision"], result.micro["utterance"]["recall"]
        (1.0, 0.5)
        >>> result.to_dict()["malformed"]["any"]
        0
    """
    return result_of(count_records(records, style=style, reward_kwargs=reward_kwargs), bootstrap=bootstrap)


def evaluate_file(
    path: str | Path,
    *,
    row_format: PredictionFormat = "ffr",
    style: AnswerStyle = "plain",
    reward_kwargs: Mapping[str, Any] | None = None,
    lenient: bool = False,
    bootstrap: BootstrapSettings | None = None,
    on_skipped: Callable[[int, str], None] = lambda line, reason: None,
) -> EvaluationResult:
    """`evaluate` of a file, quicker than through `read_predictions`, which says what the path, `row_format`, `lenient`
    and `on_skipped` are, and what errors there are."""
    path = Path(path)
    unusable = UnusableLines(path, lenient=lenient, on_skipped=on_skipped)
    reward = RewardConfig.from_kwargs(reward_kwargs or {})
    counts = count_file(path, unusable, row_format=row_format, style=style, reward=reward)
    return result_of(counts, skipped=unusable.count, bootstrap=bootstrap)


def count_records(
    records: Iterable[Prediction | Mapping[str, Any]],
    *,
    style: AnswerStyle = "plain",
    reward_kwargs: Mapping[str, Any] | None = None,
) -> RowCounts:
    """The counts of records, see `evaluate`."""
    if isinstance(records, str | Path):
        raise TypeError("records, expected rows; a file is evaluated by evaluate_file")

    reward = RewardConfig.from_kwargs(reward_kwargs or {})
    own = _OwnScores("record", reward, style)

    def rows() -> Iterator[Answered]:
        for number, record in enumerate(records):
            try:
                one = record if isinstance(record, Prediction) else prediction_of(number, record)
            except ValueError as error:
                raise FFRError(f"record {number}: {error}") from None
            own.row, own.number = one, number
            yield number, *answered(one)[1:]

    def refuse(number: int, reason: str) -> None:
        raise FFRError(f"record {number}: {reason}")

    counts = count_rows(rows(), refuse, style=style, reward=reward, own=own if reward.components else None)
    if not len(counts):
        raise FFRError("no records to evaluate")
    return counts


def count_file(
    path: Path,
    unusable: UnusableLines,
    *,
    row_format: PredictionFormat,
    style: AnswerStyle,
    reward: RewardConfig,
    on_position: Callable[[int], None] = lambda position: None,
) -> RowCounts:
    """The counts of a file's rows, see `evaluate_file`."""
    if reward.components:
        own = _OwnScores(f"{path}: line", reward, style)
        found = own.watched(read_predictions(path, row_format=row_format, unusable=unusable))
        counts = count_rows(found, unusable.add, style=style, reward=reward, own=own)
    else:
        rows = read_answered(path, unusable, row_format=row_format, on_position=on_position)
        counts = count_rows(rows, unusable.add, style=style, reward=reward)
    if not len(counts):
        raise unusable.no_rows()
    return counts


class _OwnScores:
    """Scores rows by the components of one's own, while they are counted."""

    def __init__(self, where: str, reward: RewardConfig, style: AnswerStyle) -> None:
        self._where, self._reward, self._style = where, reward, style
        self.row: Prediction | None = None  # that is counted now, and its number
        self.number = 0

    def watched(self, predictions: Iterable[Prediction]) -> Iterator[Answered]:
        for one in predictions:
            self.row, self.number = one, one.line
            yield answered(one)

    def __call__(self) -> list[float]:
        """Of the row; 0 where there is no answer."""
        row, components, info = self.row, self._reward.components, None
        assert row is not None
        if row.error:
            return [0.0] * len(components)
        try:
            if any(one.needs_dialogue for one in components):
                info = info_of(row, parse_dialogue(row.messages, row.dialogue_id))
            embeddings = self._reward.embeddings
            return [
                one.value(row.response, row.labels, info, style=self._style, embeddings=embeddings)
                for one in components
            ]
        except ValueError as error:
            raise FFRError(f"{self._where} {self.number}: {error}") from None


def result_of(
    counts: RowCounts,
    *,
    skipped: int = 0,
    bootstrap: BootstrapSettings | None = None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> EvaluationResult:
    """The result of counted rows, at least one; `on_rows` is told how many of them the resamples have seen."""
    total, parts = _sums(counts)
    own = [one.name for one in counts.reward.components]
    settings = BootstrapSettings() if bootstrap is None else bootstrap
    intervals = None
    if settings.resamples:
        [resampled] = resampled_metrics([counts], settings, on_rows=on_rows)
        intervals = settings.intervals(resampled, own)
    fault = np.bincount(counts.column("fault"), minlength=len(FAULTS) + 2).tolist()
    outside = {modality: counts.column(f"{modality}_outside") for modality in MODALITIES[:2]}
    return EvaluationResult(
        samples=len(counts),
        skipped=skipped,
        repeated=counts.repeated,
        reward_settings={
            "from": "defaults" if counts.reward == RewardConfig() else "reward_kwargs",
            **{name: getattr(counts.reward, name) for name in REWARD_SETTINGS},
        },
        **nested(metrics_of_sums(total, len(counts)).tolist(), own),
        malformed={
            "any": int(counts.has_fault.sum()),
            **{one.value: fault[place] for place, one in enumerate(FAULTS, start=1)},
        },
        # The first entry, and it stands also where a reason is the word.
        unanswered={"any": 0} | {**counts.errors} | {"any": int(counts.is_unanswered.sum())},
        ids_outside={
            **{modality: int(column.sum(dtype=np.int64)) for modality, column in outside.items()},
            "answers": int(((outside["utterance"] > 0) | (outside["image"] > 0)).sum()),
        },
        breakdowns=parts,
        intervals=intervals,
    )


def _sums(counts: RowCounts) -> tuple[np.ndarray, dict[str, list[Part]]]:
    """The statistics summed over all rows, and the parts of the break-downs."""
    total, own = np.zeros(width(counts)), [one.name for one in counts.reward.components]
    sums = {name: np.zeros((len(part_names(name)), len(total))) for name in BREAKDOWNS}
    samples = {name: np.zeros(len(part_names(name)), dtype=np.int64) for name in BREAKDOWNS}
    for chunk in chunks(len(counts)):
        some = counts.of(chunk)
        statistics = row_statistics(some)
        total += statistics.sum(axis=0)
        for name in BREAKDOWNS:
            part_of = parts_of(some, name)
            samples[name] += np.bincount(part_of, minlength=len(samples[name]))
            # No matrix product, whose threads wait for each other beside other work.
            for part in range(len(samples[name])):
                sums[name][part] += statistics[part_of == part].sum(axis=0)
    parts = {
        name: [
            Part(
                name=part,
                samples=rows,
                malformed=int(values[MALFORMED]),
                **nested(metrics_of_sums(values, rows).tolist(), own),
            )
            for part, rows, values in zip(part_names(name), samples[name].tolist(), sums[name], strict=True)
            if rows
        ]
        for name in BREAKDOWNS
    }
    return total, parts
