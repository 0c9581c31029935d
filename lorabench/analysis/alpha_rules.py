"""Which arms stand for LoRA in a comparison: those whose alpha follows one rule, such as the paper's 32, or 2r.

An experiment on the parametrization has several values at one rank, of which one is the standard.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import pandas as pd

from lorabench.analysis.arms import ALPHA, arm_labels, is_standard, with_arm_columns
from lorabench.analysis.comparison import COMPARED
from lorabench.analysis.fit_rows import MIN_LRS

_TEXTS = {0.0: "alpha {:.3g}", 1.0: "alpha = {:.3g} r", 0.5: "alpha = {:.3g} sqrt(r)"}


class AlphaRule(NamedTuple):
    """Alpha as a factor times a power of the rank."""

    power: float
    factor: float

    def __str__(self) -> str:
        return _TEXTS[self.power].format(self.factor).replace(" 1 r", " r").replace(" 1 sqrt", " sqrt")

    def holds(self, arms: pd.DataFrame) -> pd.Series[bool]:
        """Return which arms or runs of LoRA follow the rule; an alpha that is not stated follows every rule."""
        alpha, rank = arms["alpha"].astype(float), arms["rank"].astype(float)
        return alpha.isna() | ((alpha / (self.factor * rank**self.power) - 1).abs() < 1e-3)


PAPERS = AlphaRule(0.0, ALPHA)
"""The paper's rule."""


def alpha_rule(runs: pd.DataFrame) -> AlphaRule:
    """Return the rule by which LoRA is judged in a comparison; without a stated alpha it is the paper's.

    Of the rules that the highest rank with MIN_LRS learning rates follows, on all layers if there are such arms, it is
    the one that most ranks with as many follow. Of several it is the paper's, or else the one with most runs, or whose
    alpha is nearest to the paper's.
    """
    by_arm = _otherwise_standard(runs).groupby(["rank", "placement", "alpha"], dropna=False)
    arms = by_arm["lr"].agg(["nunique", "size"]).reset_index()
    arms = arms[arms["nunique"] >= MIN_LRS] if (arms["nunique"] >= MIN_LRS).any() else arms
    on_all = arms[arms["placement"].isna() | arms["placement"].eq("all")]
    highest = on_all if len(on_all) else arms
    highest = highest[highest["rank"] == highest["rank"].max()].dropna(subset=["alpha"])
    pairs = highest[["alpha", "rank"]].to_numpy(float)
    rules = [AlphaRule(power, alpha / rank**power) for alpha, rank in pairs.tolist() for power in _TEXTS]

    def order(rule: AlphaRule) -> tuple[float, ...]:
        follow, alpha = arms[rule.holds(arms)], rule.factor * float(highest["rank"].max()) ** rule.power
        ranks = len(follow[["rank", "placement"]].drop_duplicates())
        return ranks, rule == PAPERS, int(follow["size"].sum()), -abs(math.log(alpha / ALPHA))

    return max(rules, key=order, default=PAPERS)


def alpha_rules(runs: pd.DataFrame) -> set[AlphaRule]:
    """Return the rules of all comparisons that have LoRA."""
    others = _with_other_alphas(runs)
    with_papers = sum(map(len, others)) < len(_otherwise_standard(runs))
    return {*map(alpha_rule, others), *([PAPERS] if with_papers else [])}


def judged_arms(runs: pd.DataFrame) -> pd.Series[bool]:
    """Return which runs are FullFT, or LoRA of the arms that stand for it in their comparison (see `alpha_rule`)."""
    judged = is_standard(runs)
    for rows in _with_other_alphas(runs):
        judged[rows.index] = alpha_rule(rows).holds(rows)
    return judged


def remarks_on_alpha(runs: pd.DataFrame, run_ids: Collection[str]) -> list[str]:
    """Return the rule of alpha in the comparisons of a verdict on some of the runs, and the arms that are left out, if
    it is not the paper's or they have ranks that no other arm has. A verdict on several alphas has no remark."""
    remarks = []
    for rows in _with_other_alphas(runs) if len(run_ids) else []:
        rule, behind = alpha_rule(rows), rows["run_id"].isin(run_ids)
        judged = rule.holds(rows)
        if not behind.any() or (behind & ~judged).any():
            continue
        others = rows[~judged]
        if rule != PAPERS or not set(others["rank"]) <= set(rows.loc[judged, "rank"]):
            out = ", ".join(dict.fromkeys(arm_labels(others.sort_values(["rank", "alpha"]))))
            remarks.append(f"LoRA is judged at {rule}" + (f", and {out} left out" if out else ""))
    return sorted(set(remarks))


def _otherwise_standard(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of LoRA whose parametrization is the paper's but for alpha."""
    runs = with_arm_columns(runs)
    return runs[is_standard(runs.assign(alpha=np.nan)) & (runs["method"] == "lora")]


def _with_other_alphas(runs: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the runs of LoRA of each comparison that has alphas other than the paper's."""
    lora = _otherwise_standard(runs)
    other = lora["alpha"].notna() & lora["alpha"].ne(ALPHA)
    if not other.any():
        return []
    return [rows for _, rows in lora.groupby(COMPARED, dropna=False) if other[rows.index].any()]
