"""Training curves out of what the reward returned."""

from __future__ import annotations

import numpy as np
import pytest

from ffr_verl.errors import FFRError
from ffr_verl.fragments import MalformedReason
from ffr_verl.samplers import SamplerConfig
from ffr_verl.samplers.reward_metrics import has_spread, reward_metrics

COLUMNS = ("score", "f1", "malformed", "predicted_utterances", "gold_utterances", "missing_embeddings")
ANSWERS = [
    dict(zip(COLUMNS, values, strict=True))
    for values in ((1.3, 1.0, "", 4, 2, 1), (0.3, 0.0, "repeated_id", 2, 2, 0), (0.0, 0.5, "bad_id_list", 0, 5, 0))
]


def test_components_have_four_statistics() -> None:
    metrics = reward_metrics(ANSWERS)
    assert metrics["ffr/reward/f1/mean"] == pytest.approx(0.5)
    assert metrics["ffr/reward/f1/std"] == pytest.approx(np.std([1.0, 0.0, 0.5]))
    assert metrics["ffr/reward/f1/min"] == 0.0
    assert metrics["ffr/reward/f1/max"] == 1.0
    assert metrics["ffr/reward/score/mean"] == pytest.approx(1.6 / 3)


def test_every_reason_has_a_curve() -> None:
    metrics = reward_metrics(ANSWERS)
    shares = {reason.value: metrics[f"ffr/malformed/{reason.value}"] for reason in MalformedReason}
    assert shares.pop("repeated_id") == shares.pop("bad_id_list") == pytest.approx(1 / 3)
    assert set(shares.values()) == {0.0}
    assert metrics["ffr/malformed/any"] == pytest.approx(2 / 3)


def test_sizes_and_missing_vectors_are_means() -> None:
    metrics = reward_metrics(ANSWERS)
    assert metrics["ffr/size/predicted_utterances"] == pytest.approx(2.0)
    assert metrics["ffr/size/gold_utterances"] == pytest.approx(3.0)
    assert metrics["ffr/missing_embeddings"] == pytest.approx(1 / 3)
    assert not [name for name in metrics if "reward/predicted" in name or "reward/missing" in name]


def test_another_reward_manager_gives_the_components_alone() -> None:
    metrics = reward_metrics([{"f1": 1.0, "verdict": "good", "passed": True}, {"f1": 0.0}])
    assert set(metrics) == {f"ffr/reward/f1/{statistic}" for statistic in ("mean", "std", "min", "max")}
    assert reward_metrics([]) == {}


@pytest.mark.parametrize(
    ("values", "min_std", "expected"),
    [
        ([1.0, 1.0, 1.0], 0.0, False),
        ([1.0, 1.0, 1.0 + 1e-9], 0.0, True),
        ([1.0, 1.0019], 0.001, False),
        ([1.0, 1.0021], 0.001, True),
        ([1.0], 0.5, True),
    ],
)
def test_spread(values: list[float], min_std: float, expected: bool) -> None:
    assert has_spread(values, min_std=min_std) is expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_std": -0.1}, r"sampler_kwargs\.min_std: found -0\.1, expected `float` >= 0"),
        ({"min_std": "a"}, r"sampler_kwargs\.min_std: found 'a'"),
        ({"min_std": float("inf")}, r"sampler_kwargs\.min_std: found inf"),
        ({"max_filtered_batches": -1}, r"sampler_kwargs\.max_filtered_batches: found -1, expected `int` >= 0"),
        ({"max_filtered_batches": 1.5}, r"sampler_kwargs\.max_filtered_batches: found 1\.5"),
        ({"min_sdt": 0.1}, r"sampler_kwargs\.min_sdt: unknown key; did you mean 'min_std'\?"),
    ],
)
def test_settings_are_checked(values: dict[str, object], message: str) -> None:
    with pytest.raises(FFRError, match=message):
        SamplerConfig.from_mapping(values)
