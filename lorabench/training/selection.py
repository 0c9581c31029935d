"""The loss by which a sweep selects its learning rates: that of the validation split."""

from __future__ import annotations

import math
from typing import Any


def validation_loss(record: dict[str, Any]) -> float:
    """Return a run's final validation NLL in nats per token, in RL minus its final validation reward; infinite if the
    run diverged."""
    outcome = record["outcome"]
    nll, reward = outcome.get("final_valid_nll"), outcome.get("final_valid_reward")
    if nll is None and reward is None:
        return math.inf
    loss = float(-reward if nll is None else nll)
    return math.inf if math.isnan(loss) else loss
