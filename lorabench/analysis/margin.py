"""Margins of losses: the smallest differences that matter, from rules that are written down before the runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from lorabench.config.margins import SHARE_OF_LOSS, Margins


@dataclass(frozen=True)
class Margin:
    """The smallest difference that matters, and the rule that gives it."""

    value: float
    rule: str
    problem: str | None = None
    """Why the rule can't be applied; the value is then NaN."""


def base_loss(runs: pd.DataFrame, curves: pd.DataFrame) -> float:
    """Return the validation NLL of the base model in nats per token, from the curves' points at step 0; NaN if unknown.

    Args:
        runs: column run_id.
        curves: columns run_id, step, split, metric, value.
    """
    if curves.empty:
        return math.nan
    at_start = (curves["step"] == 0) & (curves["split"] == "validation") & (curves["metric"] == "nll")
    return float(curves.loc[at_start & curves["run_id"].isin(runs["run_id"]), "value"].astype(float).mean())


def loss_margin(margins: Margins, base: float, tuned: float, tuned_arm: str, loss: float) -> Margin:
    """Return the margin of test losses of SFT, in nats per token.

    Args:
        margins: the shares that the preset gives.
        base: the base's validation NLL; NaN if it is not known.
        tuned: the validation NLL of the arm that the gain is measured to.
        tuned_arm: the label of that arm.
        loss: the lowest test NLL, for the margin where the base is not known.
    """
    gain = base - tuned
    if math.isnan(gain):
        value = SHARE_OF_LOSS * loss
        return Margin(value, f"{SHARE_OF_LOSS:.0%} of the loss ({loss:.3f} nats), since the base's loss is not known")
    rule = f"{100 * margins.loss:.3g}% of the gain from the base to {tuned_arm} ({gain:.3f} nats)"
    if gain <= 0:
        return Margin(math.nan, rule, f"{tuned_arm} is no better than the base, so there is no gain to compare with")
    return Margin(margins.loss * gain, rule)


def reward_margin(margins: Margins, base: float, tuned: float, tuned_arm: str) -> Margin:
    """Return the margin of test error rates of RL.

    Args:
        margins: the shares that the preset gives.
        base: the base's test accuracy; NaN if it is not known.
        tuned: the test accuracy of the arm that the gain is measured to.
        tuned_arm: the label of that arm.
    """
    gain = tuned - base
    rule = f"{100 * margins.reward:.3g}% of the gain in accuracy from the base to {tuned_arm} ({gain:.3f})"
    if not gain > 0:
        return Margin(math.nan, rule, f"{tuned_arm} is no better than the base, so there is no gain to compare with")
    return Margin(margins.reward * gain, rule)
