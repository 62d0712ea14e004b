"""What a curriculum must know of the rows of a training run: difficulty, strata, and where the policy starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ffr_verl.errors import FFRError
from ffr_verl.fragments import Fragment, parse_gold
from ffr_verl.rewards.reading import row_universes
from ffr_verl.samplers.curriculum import GOLD_STRATA, RowDifficulty
from ffr_verl.samplers.difficulty_file import DifficultyFile, row_key
from ffr_verl.samplers.micro_estimate import SCORED_ANSWERS
from ffr_verl.settings import CurriculumConfig

_UNSCORED_ANSWERS = 32.0


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """Of the rows of RL files, in their order."""

    difficulty: RowDifficulty  # with strata
    # Where the policy starts in the micro metric and how many answers that counts for, see `MicroEstimate`: what the
    # difficulty file says, or a neutral guess at half of the gold ids.
    micro_start: tuple[np.ndarray, float]

    @classmethod
    def of(cls, rows: Any, config: CurriculumConfig, files: Sequence[str]) -> TrainingRows:
        """Look at every row of a table of Hugging Face datasets; an `FFRError` for a difficulty file of other rows,
        and for strata columns that the data do not have."""
        columns = config.strata if isinstance(config.strata, list) else []
        lacking = [name for name in columns if name not in rows.column_names]
        if lacking:
            known = ", ".join(rows.column_names)
            raise FFRError(f"data.ffr.curriculum.strata: {files[0]} has no column {lacking[0]}; it has {known}")
        keys, kinds, turns, sizes, values = [], [], [], [], []
        for batch in rows.select_columns(["extra_info", "reward_model", *columns]).iter(batch_size=4096):
            own = [batch[name] for name in columns]
            for info, reward, *of_columns in zip(batch["extra_info"], batch["reward_model"], *own, strict=True):
                solution = reward["ground_truth"]
                gold = parse_gold(solution) or Fragment((), ())
                keys.append(row_key(info["dialogue_id"], info["query"], solution))
                kinds.append(2 if gold.image_ids else 1 if gold.utterance_ids else 0)
                turns.append(len(info["utterance_ids"] or ()))
                utterances, images = row_universes(info)
                sizes.append((len(gold.utterance_ids), utterances, len(gold.image_ids), images))
                values.append(", ".join([f"{name}={one}" for name, one in zip(columns, of_columns, strict=True)]))
        difficulty = RowDifficulty.unknown(np.array(kinds) == 0)
        scored: np.ndarray | None = None
        if config.difficulty is not None:
            file = DifficultyFile(config.difficulty)
            difficulty = file.of_rows(np.array(keys, dtype=np.int64), name=files[0])
            scored = file.mean_hits
        strata: np.ndarray | None = None
        names: tuple[str, ...] = ("all",)
        if config.strata == "gold":
            strata, names = np.array(kinds, dtype=np.int32), GOLD_STRATA
        elif columns:
            different, numbers = np.unique(np.array(values), return_inverse=True)
            strata, names = numbers.astype(np.int32), tuple(different.tolist())
        sums = np.array(sizes, dtype=np.float64).reshape(-1, 4)
        golds, (gold, universe) = sums[:, [0, 2]], sums.mean(axis=0).reshape(2, 2).T
        # How far answers may differ in the micro reward: by what their gold ids are worth, a list of the usual length
        # a quarter, and by what they name beside these.
        spread = 0.25 + 0.25 * (golds / np.maximum(gold, 1e-9)).sum(axis=1)
        hits, predicted = (0.5 * gold, gold) if scored is None else scored
        start = np.stack([hits, predicted, gold, universe], axis=-1)
        difficulty = dataclasses.replace(
            difficulty, strata=strata, strata_names=names, spread=spread, turns=np.array(turns, dtype=np.int32)
        )
        return cls(difficulty, (start, _UNSCORED_ANSWERS if scored is None else SCORED_ANSWERS))
