"""The practical recipe from runs: does LoRA match full fine-tuning, and at which learning rate and rank?

Every arm is taken at its fitted minimum. LoRA matches if its loss is that of full fine-tuning or lower, by the rule of
the claims on equal losses (`Comparison.equal_losses`). In RL all losses are error rates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd

from lorabench.analysis.alpha_rules import judged_arms
from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import COMPARED, NEEDED_BY, Arm, Comparison, Judging, Task, comparisons
from lorabench.analysis.estimate import unknown
from lorabench.analysis.finding import Finding
from lorabench.analysis.invariances import with_lr_grid
from lorabench.analysis.optima import ratio_interval
from lorabench.analysis.rules import Margin
from lorabench.claims.reinforcement import if_learned, rewarded_errors
from lorabench.store.checks import is_rl
from lorabench.store.io import with_all_columns

MatchAnswer = Literal["yes", "no", "undecided"]


@dataclass(frozen=True)
class LrRatioEstimate:
    """The optimal LR of LoRA over that of full fine-tuning, with its 95% interval. NaN where not known."""

    estimate: float
    low: float
    high: float
    problems: tuple[str, ...]
    """Why the ratio does not count; empty if both optima are resolved."""


@dataclass(frozen=True)
class Choice:
    """An arm at its fitted optimum. NaN where not known."""

    label: str
    rank: int | None
    trainable_params: int | None
    lr: float
    """The LR to use: the optimal LR in two digits, no further out than the grid."""
    lr_opt: float
    """The fitted optimal LR, with its 95% interval (lr_low, lr_high)."""
    lr_low: float
    lr_high: float
    resolved: bool
    """Whether the grid resolves the optimal LR."""
    loss: float
    """The fitted minimum of the test loss."""
    n_seeds: int
    gap: Finding | None = None
    """Whether LoRA's loss is that of full fine-tuning or lower; None for full fine-tuning. The estimate is in nats per
    token, in RL in error rate; above 0 LoRA is worse."""
    ratio: LrRatioEstimate | None = None
    """Over full fine-tuning."""

    @property
    def answer(self) -> MatchAnswer:
        """Whether the arm is as good as full fine-tuning, or better."""
        answers: dict[str, MatchAnswer] = {"confirmed": "yes", "contradicted": "no"}
        return answers.get(self.gap.verdict, "undecided") if self.gap else "undecided"


@dataclass(frozen=True)
class RankRecommendation:
    """The recommendation from the runs of one model, dataset, batch size and length."""

    setting: Arm
    """Its task, model, dataset, batch_size and steps, which all arms have in common."""
    answer: MatchAnswer
    """Yes: some rank matches. No: no rank that was tried matches. Undecided: no rank is known to match, some may."""
    fullft: Choice
    lora: tuple[Choice, ...]
    """The LoRA arms on all layers, ascending in rank."""
    use: Choice
    """The lowest rank that matches and than which no higher rank is better by the margin. Without one, it is the rank
    with the lowest fitted loss among those that give the answer."""
    margin: Margin
    """The smallest difference of losses that matters."""


def measured_recipe(
    runs: pd.DataFrame, curves: pd.DataFrame | None = None, judging: Judging | None = None
) -> list[RankRecommendation]:
    """Recommend a rank and LR for each comparison of full fine-tuning and LoRA on all layers, with MIN_LRS or more LRs.

    Of LoRA, the arms that stand for it count (see `judged_arms`). A task that lacks columns of NEEDED_BY is left out.
    There are the errors of `check_runs`.
    """
    recommendations: list[RankRecommendation] = []
    rl, curves = is_rl(runs), pd.DataFrame() if curves is None else curves
    by_task: dict[Task, pd.DataFrame] = {"sft": runs[~rl], "rl": runs[rl]}
    for task, chosen in by_task.items():
        if chosen.empty or not set(NEEDED_BY[task]) <= set(chosen.columns):
            continue
        standard = with_all_columns(chosen[judged_arms(chosen)], "runs")
        standard = rewarded_errors(standard) if task == "rl" else standard
        on_all_layers = standard[standard["placement"].isna() | standard["placement"].eq("all")]
        for comparison in comparisons(with_lr_grid(on_all_layers), curves, judging):
            if comparison.fullft and comparison.lora:
                recommendations.append(_recommendation(comparison, comparison.fullft))
    return recommendations


def _recommendation(comparison: Comparison, fullft: Arm) -> RankRecommendation:
    lora = []
    for arm in comparison.lora.values():
        gap = comparison.equal_losses(arm, fullft, better_too=True)
        gap = if_learned(comparison, gap, [fullft]) if comparison.is_rl else gap
        log_ratio = comparison.fit.log_ratio(arm_label(arm), arm_label(fullft))
        problems = tuple(problem.text for problem in comparison.problems([arm, fullft], resolved=True))
        ratio = LrRatioEstimate(math.exp(log_ratio.value), *ratio_interval(log_ratio), problems)
        lora.append(replace(_choice(comparison, arm), gap=gap, ratio=ratio))
    answers: tuple[MatchAnswer, ...] = ("yes", "undecided", "no")
    answer = min((choice.answer for choice in lora), key=answers.index)
    giving = [choice for choice in lora if choice.answer == answer]
    margin = comparison.margin
    enough = [
        choice
        for number, choice in enumerate(lora)
        if choice.answer == "yes" and all(choice.loss - higher.loss < margin.value for higher in lora[number + 1 :])
    ]
    best = min(giving, key=lambda choice: math.inf if math.isnan(choice.loss) else choice.loss)
    setting = {"task": "rl" if comparison.is_rl else "sft", **{name: fullft[name] for name in COMPARED}}
    use = enough[0] if enough else best
    return RankRecommendation(setting, answer, _choice(comparison, fullft), tuple(lora), use, margin)


def _choice(comparison: Comparison, arm: Arm) -> Choice:
    label, fit = arm_label(arm), comparison.fit
    params = comparison.rows[label]["trainable_params"].dropna()
    optimum, minimum = fit.optima.get(label, unknown()), fit.minima.get(label, unknown())
    low, high = optimum.interval()
    lr_opt, grid = math.exp(optimum.value), fit.grids.get(label)
    lr = math.nan
    if grid is not None and not math.isnan(lr_opt):
        lr = min(max(float(f"{lr_opt:.1e}"), float(grid.lrs[0])), float(grid.lrs[-1]))
    return Choice(
        label=label,
        rank=arm["rank"],
        trainable_params=int(params.iloc[0]) if len(params) else None,
        lr=lr,
        lr_opt=lr_opt,
        lr_low=math.exp(low),
        lr_high=math.exp(high),
        resolved=fit.resolved.get(label, False),
        loss=minimum.value,
        n_seeds=len(fit.seeds.get(label, ())),
    )
