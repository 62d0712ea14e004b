"""verl's advantage estimator `ffr` (`algorithm.adv_estimator=ffr`): the advantages that the replay buffer made.

verl's v1 trainer hands estimators the rewards' sum and a name of each answer's group, not the reward's components,
while the replay buffer, in the same process, sees them. So `FFRReplayBuffer` makes the advantages, gives them to
`publish`, and names each answer by its key where verl would have the group's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from verl.trainer.ppo.core_algos import register_adv_est

from ffr_verl.errors import FFRError
from ffr_verl.settings import BUFFER_SETTING

ESTIMATOR = "ffr"
_published: dict[str, np.ndarray] = {}


def publish(advantages: Mapping[str, np.ndarray]) -> None:
    """Make the advantages of the batch that is trained on next known, by the answers' keys."""
    _published.clear()
    _published.update(advantages)


@register_adv_est(ESTIMATOR)
def compute_ffr_advantage(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: np.ndarray, config: Any = None, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The published advantages as verl wants them: advantages and returns, the same, float32 of the mask's shape.

    `response_mask`, of shape `(answers, tokens)`, is 1 on the tokens of a response; `index` is the key of each answer,
    and verl's padding, which has another one, gets 0. `token_level_rewards` and `config` are not read.
    """
    advantages = torch.zeros(response_mask.shape, dtype=torch.float32, device=response_mask.device)
    known = 0
    for row, key in enumerate(index):
        values = _published.get(str(key))
        if values is not None:
            known += 1
            advantages[row, : len(values)] = torch.as_tensor(values[: response_mask.shape[1]])
    if not known:
        raise FFRError(
            "algorithm.adv_estimator=ffr: no advantages for these answers; it needs our replay buffer "
            f"({BUFFER_SETTING}) with sampler_kwargs.advantage"
        )
    advantages = advantages * response_mask
    return advantages, advantages
