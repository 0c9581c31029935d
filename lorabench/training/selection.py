"""Select the best learning rate of a sweep on the validation split."""

from __future__ import annotations

from typing import Any


def best_lr(records: list[dict[str, Any]]) -> float | None:
    """Return the LR with the lowest final validation NLL, in RL with the highest final validation reward.

    If several LRs are equally good, the lowest is returned; None if every run diverged.

    Args:
        records: records of runs that differ in their LR only.
    """
    scored = []
    for record in records:
        outcome = record["outcome"]
        nll, reward = outcome.get("final_valid_nll"), outcome.get("final_valid_reward")
        if nll is not None or reward is not None:
            scored.append((-reward if nll is None else nll, record["spec"]["lr"]))
    return min(scored)[1] if scored else None
