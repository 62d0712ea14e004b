"""Where programs written before 0.1.0 look for verl's reward manager."""

from ffr_verl.integrations.verl.reward_manager import FFRRewardManager, closing_tokens, decode_answer

__all__ = ["FFRRewardManager", "closing_tokens", "decode_answer"]
