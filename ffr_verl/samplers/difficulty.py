"""How hard a row is, by the SFT model's own answer to it; levels and the published selection.

Source: the authors' released difficulty-aware curriculum; `mean_logprob` and dispersion are ours. Answers are read
leniently here, as published: the first pair of tags anywhere in the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import msgspec
import numpy as np

from ffr_verl.errors import FFRError
from ffr_verl.fragments import Fragment
from ffr_verl.metrics import list_f_score
from ffr_verl.settings import LevelShares

Level = Literal["easy", "middle", "confusing", "hard"]
LEVELS: tuple[Level, ...] = get_args(Level)

# Shares of each level's rows that are kept, best f1 first.
PUBLISHED_SHARES: Mapping[str, float] = msgspec.structs.asdict(LevelShares())
_NO_LOGPROBS = 10.0


def token_entropy(logprobs: Sequence[float]) -> float:
    """Entropy of the chosen tokens' probabilities, scaled to sum to 1; 10.0 without any.

    It grows with the length of the answer as well as with its evenness: n equally likely tokens give log n, in nats.
    `logprobs` are natural logarithms of the probabilities.

    Source: published.

    Example:
        >>> round(token_entropy([-0.1, -0.1]), 4), token_entropy([])
        (0.6931, 10.0)
    """
    if not len(logprobs):
        return _NO_LOGPROBS
    values = np.asarray(logprobs, dtype=np.float64)
    probabilities = np.exp(values - values.max())
    probabilities /= probabilities.sum()
    return float(-(probabilities * np.log(probabilities + 1e-12)).sum())


def mean_logprob(logprobs: Sequence[float]) -> float:
    """Mean log-probability of the chosen tokens: a confidence that does not depend on length. NaN without any.

    Source: ours.
    """
    return float(np.mean(logprobs)) if len(logprobs) else float("nan")


def _set_f1(predicted: Sequence[int], gold: Sequence[int]) -> float:
    guess, truth = set(predicted), set(gold)
    return float(list_f_score(len(guess & truth), len(guess), len(truth), length_penalty=1.0))


def difficulty_f1(predicted: Fragment, gold: Fragment) -> float:
    """Mean of the set F1 of utterances and images; where the gold has none, 1 for none predicted and 0 otherwise.

    Source: published.
    """
    return (_set_f1(predicted.utterance_ids, gold.utterance_ids) + _set_f1(predicted.image_ids, gold.image_ids)) / 2


def _checked(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        bad = int(np.flatnonzero(~np.isfinite(array))[0]) if array.ndim == 1 else -1
        raise FFRError(
            f"{name}: found {array[bad]} in row {bad}, expected a number" if bad >= 0 else f"{name}: no list"
        )
    return array


def assign_levels(f1: Sequence[float] | np.ndarray, entropy: Sequence[float] | np.ndarray) -> np.ndarray:
    """The level of each row, by the quartiles of all rows (linear percentiles).

    `easy`: f1 at least its third quartile and entropy at most its first; `middle`: f1 at least the median, entropy at
    most the median; `confusing`: f1 at least the first quartile, entropy at most the third; `hard`: the rest. The
    first that fits. See `difficulty_f1` and `token_entropy`.

    Raises:
        FFRError: for lists of different lengths, or a value that is no number.

    Source: published.

    Example:
        >>> assign_levels([1.0, 0.9, 0.5, 0.0], [0.1, 0.2, 0.3, 2.0]).tolist()
        ['easy', 'middle', 'confusing', 'hard']
    """
    scores, entropies = _checked("f1", f1), _checked("entropy", entropy)
    if len(scores) != len(entropies):
        raise FFRError(f"f1 and entropy: {len(scores)} and {len(entropies)} rows")
    levels = np.full(len(scores), "hard", dtype="<U9")
    if not len(scores):
        return levels
    f1_quartiles, entropy_quartiles = np.percentile(scores, [25, 50, 75]), np.percentile(entropies, [25, 50, 75])
    for number, level in ((0, "confusing"), (1, "middle"), (2, "easy")):
        levels[(scores >= f1_quartiles[number]) & (entropies <= entropy_quartiles[2 - number])] = level
    return levels


def select_rows(
    levels: Sequence[str] | np.ndarray,
    f1: Sequence[float] | np.ndarray,
    is_negative: Sequence[bool] | np.ndarray,
    *,
    shares: Mapping[str, float] = PUBLISHED_SHARES,
) -> np.ndarray:
    """The published selection: row numbers in training order, easy to hard; int64.

    Rows with an empty gold are dropped from easy and middle. Of each level the share of `shares` is kept, the best f1
    first (of equals the earlier row), at least one where the share is above 0. Kept rows of middle and confusing stand
    by falling f1, those of easy and hard in the order of the file.

    Args:
        levels: of each row, see `assign_levels`.
        f1: of each row.
        is_negative: whether a row's gold is empty.
        shares: kept of each level, in [0, 1]; a level left out is dropped.

    Raises:
        FFRError: for lists of different lengths, an unknown level or a share out of range.

    Source: published, with its shares as default.

    Example:
        >>> levels = ["hard", "easy", "middle", "middle", "easy"]
        >>> select_rows(levels, [0.0, 1.0, 0.8, 0.9, 1.0], [False, False, False, False, True]).tolist()
        [1, 3, 0]
    """
    scores, names, negative = _checked("f1", f1), np.asarray(levels), np.asarray(is_negative, dtype=bool)
    if not len(scores) == len(names) == len(negative):
        raise FFRError(f"levels, f1 and is_negative: {len(names)}, {len(scores)} and {len(negative)} rows")
    unknown = sorted(({str(name) for name in np.unique(names)} | set(shares)) - set(LEVELS))
    if unknown:
        raise FFRError(f"levels: found {', '.join(unknown)}; expected {', '.join(LEVELS)}")
    selected = []
    for level in LEVELS:
        share = shares.get(level, 0.0)
        if not 0.0 <= share <= 1.0:
            raise FFRError(f"shares.{level}: found {share}, expected 0 to 1")
        rows = np.flatnonzero((names == level) & ~(negative & (level in ("easy", "middle"))))
        if not share or not len(rows):
            continue
        count = max(1, int(len(rows) * share + 1e-9))
        best = np.argsort(-scores[rows], kind="stable")[:count]
        selected.append(rows[best] if level in ("middle", "confusing") else np.sort(rows[best]))
    return np.concatenate(selected) if selected else np.empty(0, dtype=np.int64)
