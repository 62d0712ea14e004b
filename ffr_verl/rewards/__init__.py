"""Rewards for fragment retrieval; plain functions of one completion and one gold answer, both as text.

Light: importing them loads neither torch nor verl. `ffr_verl.rewards.batch` has the same for TRL and ms-swift.
"""

from __future__ import annotations

from ffr_verl.rewards.exact_match import exact_match_reward
from ffr_verl.rewards.f1 import f1_reward
from ffr_verl.rewards.ffr import RewardConfig, compute_score
from ffr_verl.rewards.format import format_reward
from ffr_verl.rewards.mcc import mcc_reward

__all__ = ["RewardConfig", "compute_score", "exact_match_reward", "f1_reward", "format_reward", "mcc_reward"]
