"""Rewards for fragment retrieval; plain functions of one completion and one gold answer, both as text.

Light: importing them loads neither torch nor verl. `ffr_verl.rewards.batch` has the same for TRL and ms-swift,
`ffr_verl.integrations.verl.reward_manager` is verl's reward manager `ffr`.
"""

from __future__ import annotations

from ffr_verl.rewards.coherence import CoherenceMode, CoherenceScorer, coherence_reward
from ffr_verl.rewards.config import RewardConfig
from ffr_verl.rewards.diagnosis import Diagnosis, diagnose
from ffr_verl.rewards.exact_match import exact_match_reward
from ffr_verl.rewards.f1 import f1_reward
from ffr_verl.rewards.ffr import compute_score
from ffr_verl.rewards.format import format_reward
from ffr_verl.rewards.mcc import mcc_reward

__all__ = [
    "CoherenceMode",
    "CoherenceScorer",
    "Diagnosis",
    "RewardConfig",
    "coherence_reward",
    "compute_score",
    "diagnose",
    "exact_match_reward",
    "f1_reward",
    "format_reward",
    "mcc_reward",
]
