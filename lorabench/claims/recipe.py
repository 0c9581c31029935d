"""The practical recipe from runs: does LoRA match full fine-tuning, and at which learning rate, rank and placement?

Every arm is taken at its own best learning rate, picked on the validation split. LoRA matches if, on the test split,
its loss minus that of full fine-tuning is below two seed standard deviations with its whole 95% interval, by the rule
of the claims on equal losses (`Comparison.equal_losses`); a better LoRA matches too. In RL all losses are error rates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from lorabench.analysis.arms import arm_label, is_standard
from lorabench.analysis.comparison import NEEDED_BY, Arm, Comparison, Task, comparisons
from lorabench.analysis.finding import Finding, Verdict
from lorabench.analysis.losses import with_losses
from lorabench.analysis.lr_ratio import lr_ratio
from lorabench.analysis.studies import MIN_LRS
from lorabench.claims.rl_shared import if_learned, rewarded_errors
from lorabench.tables.checks import is_rl
from lorabench.tables.io import with_all_columns

MatchAnswer = Literal["yes", "no", "undecided"]

_ANSWERS: Mapping[Verdict, MatchAnswer] = {"confirmed": "yes", "contradicted": "no"}


@dataclass(frozen=True)
class SharedSetting:
    """What all arms of a comparison have in common."""

    task: Task
    model: str
    dataset: str
    batch_size: int
    steps: int | None


@dataclass(frozen=True)
class GapToBaseline:
    """The loss of an arm minus that of another, both at their best LR, paired by seed. NaN where not known."""

    answer: MatchAnswer
    """Whether the arm is as good as the other, or better."""
    estimate: float
    """In nats per token; in RL, in error rate. Above 0 the arm is worse."""
    low: float
    high: float
    reason: str
    run_ids: tuple[str, ...]


@dataclass(frozen=True)
class LrRatioEstimate:
    """The optimal LR of LoRA over that of full fine-tuning, with its 95% bootstrap interval. NaN where not known."""

    estimate: float
    low: float
    high: float
    problems: tuple[str, ...]
    """Why the ratio does not count; empty if both optima are resolved."""


@dataclass(frozen=True)
class Choice:
    """An arm at its best LR. NaN where not known."""

    label: str
    rank: int | None
    placement: str | None
    trainable_params: int | None
    lr_best: float
    """The LR of the grid with the lowest validation loss."""
    lr_opt: float
    """The optimal LR, interpolated between the LRs of the grid, with its 95% bootstrap interval (lr_low, lr_high)."""
    lr_low: float
    lr_high: float
    resolved: bool
    loss: float
    """The mean test loss at the best LR over its seeds."""
    n_seeds: int
    gap: GapToBaseline | None = None
    """Against full fine-tuning; for LoRA on some layers, against LoRA on all layers."""
    ratio: LrRatioEstimate | None = None
    """Over full fine-tuning; None for LoRA on some layers."""


@dataclass(frozen=True)
class RankRecommendation:
    """The recommendation from the runs of one model, dataset, batch size and length."""

    place: SharedSetting
    answer: MatchAnswer
    """Yes: some rank matches. No: no rank that was tried matches. Undecided: no rank is known to match, some may."""
    fullft: Choice
    lora: tuple[Choice, ...]
    """The LoRA arms on all layers, ascending in rank."""
    best: Choice
    """The rank with the lowest validation loss among those that give the answer."""
    smallest: Choice | None
    """The lowest rank that matches, if any."""
    sigma: float
    """The seed standard deviation of the test loss."""
    dof: int
    """The degrees of freedom of sigma."""

    @property
    def use(self) -> Choice:
        """The arm to use: the lowest rank that matches, or else the best."""
        return self.smallest or self.best


@dataclass(frozen=True)
class PlacementChoice:
    """LoRA on all and on some layers of one model, dataset, batch size and length, each at its best rank."""

    place: SharedSetting
    every: Choice
    """LoRA on all layers."""
    parts: tuple[Choice, ...]
    """LoRA on the MLP and on attention alone, with their gap to LoRA on all layers."""


@dataclass(frozen=True)
class MeasuredRecipe:
    """The recommendations from a table of runs."""

    found: tuple[RankRecommendation, ...]
    placements: tuple[PlacementChoice, ...]

    @property
    def answer(self) -> MatchAnswer | Literal["mixed"] | None:
        """The answer of all comparisons together; `mixed` if they differ, None without any."""
        answers = {recommendation.answer for recommendation in self.found}
        return answers.pop() if len(answers) == 1 else "mixed" if answers else None

    def by_batch_size(self) -> list[tuple[RankRecommendation, ...]]:
        """Return the recommendations at two or more batch sizes for one task, model and dataset.

        They ascend in batch size; of several lengths at one batch size, the longest is taken.
        """
        groups: dict[tuple[str, ...], dict[int, RankRecommendation]] = {}
        for recommendation in sorted(self.found, key=lambda each: (each.place.batch_size, each.place.steps or 0)):
            place = recommendation.place
            groups.setdefault((place.task, place.model, place.dataset), {})[place.batch_size] = recommendation
        return [tuple(sizes.values()) for sizes in groups.values() if len(sizes) > 1]


def measured_recipe(runs: pd.DataFrame) -> MeasuredRecipe:
    """Derive recommendations from runs. A comparison needs full fine-tuning and LoRA, each with MIN_LRS or more LRs.

    Only LoRA in the paper's parametrization counts. RL problems on which no run ever got a reward are left out.

    Args:
        runs: the table `runs`; a task that lacks columns of NEEDED_BY is left out.

    Raises:
        UserError: see `check_runs`.
    """
    recommendations: list[RankRecommendation] = []
    placements: list[PlacementChoice] = []
    for standard in _standard(runs):
        # As in the claims, seed noise is taken from the compared arms alone.
        for comparison in _tuned(standard[standard["placement"].isna() | standard["placement"].eq("all")]):
            if comparison.fullft and comparison.lora:
                recommendations.append(_recommendation(comparison, comparison.fullft, list(comparison.lora.values())))
        for comparison in _tuned(standard[standard["method"].eq("lora")]):
            parts = [arms for name in ("mlp", "attn") if (arms := list(comparison.placed(name).values()))]
            if comparison.lora and parts:
                placements.append(_placements(comparison, list(comparison.lora.values()), parts))
    return MeasuredRecipe(tuple(recommendations), tuple(placements))


def _standard(runs: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Yield the runs of each task in the paper's parametrization; those of RL as error rates."""
    rl = is_rl(runs)
    of_task: dict[Task, pd.DataFrame] = {"sft": runs[~rl], "rl": runs[rl]}
    for task, chosen in of_task.items():
        if len(chosen) and set(NEEDED_BY[task]) <= set(chosen.columns):
            standard = with_all_columns(chosen[is_standard(chosen)], "runs")
            yield rewarded_errors(standard) if task == "rl" else standard


def _tuned(runs: pd.DataFrame) -> Iterator[Comparison]:
    """Yield the comparisons, without the arms that have fewer than MIN_LRS LRs."""
    for comparison in comparisons(runs, pd.DataFrame()):
        rows = [arm_runs for arm_runs in comparison.rows.values() if arm_runs["lr"].nunique() >= MIN_LRS]
        if rows:
            yield Comparison(comparison.label, pd.concat(rows), comparison.curves, comparison.noise)


def _recommendation(comparison: Comparison, fullft: Arm, by_rank: Sequence[Arm]) -> RankRecommendation:
    lora = [_against(comparison, arm, fullft, tuned_ratio=True) for arm in by_rank]
    answers: tuple[MatchAnswer, ...] = ("yes", "undecided", "no")
    answer = next(given for given in answers if any(_answer(choice) == given for choice in lora))
    giving = [(arm, choice) for arm, choice in zip(by_rank, lora, strict=True) if _answer(choice) == answer]
    _, best = min(giving, key=lambda pair: _validation_loss(comparison, pair[0]))
    sigma, dof = comparison.sigma("test")
    return RankRecommendation(
        _place(comparison),
        answer=answer,
        fullft=_choice(comparison, fullft),
        lora=tuple(lora),
        best=best,
        smallest=giving[0][1] if answer == "yes" else None,
        sigma=sigma,
        dof=dof,
    )


def _placements(comparison: Comparison, by_rank: Sequence[Arm], parts: Sequence[Sequence[Arm]]) -> PlacementChoice:
    every, *others = (min(arms, key=lambda arm: _validation_loss(comparison, arm)) for arms in (by_rank, *parts))
    against = tuple(_against(comparison, arm, every, tuned_ratio=False) for arm in others)
    return PlacementChoice(_place(comparison), _choice(comparison, every), against)


def _place(comparison: Comparison) -> SharedSetting:
    arm = comparison.arms[0]
    task: Task = "rl" if comparison.is_rl else "sft"
    return SharedSetting(task, arm["model"], arm["dataset"], arm["batch_size"], arm["steps"])


def _answer(choice: Choice) -> MatchAnswer:
    assert choice.gap
    return choice.gap.answer


def _validation_loss(comparison: Comparison, arm: Arm) -> float:
    """Return the mean validation loss at the best LR; infinite where no run finished."""
    rows = with_losses(comparison.rows[arm_label(arm)])
    loss = rows.loc[rows["run_id"].isin(comparison.losses[arm_label(arm)]["run_ids"]), "validation_loss"].mean()
    return float("inf") if pd.isna(loss) else float(loss)


def _against(comparison: Comparison, arm: Arm, other: Arm, tuned_ratio: bool) -> Choice:
    """Compare an arm with another: its gap and, with `tuned_ratio`, the ratio of their optimal LRs."""
    judged = comparison.equal_losses(arm, other, better_too=True)
    if comparison.is_rl:
        judged = if_learned(comparison, judged, [other])
    ratio = None
    if tuned_ratio:
        of_lrs = lr_ratio(comparison, arm, other)
        ratio = LrRatioEstimate(of_lrs.estimate, *of_lrs.interval, tuple(of_lrs.problems))
    return _choice(comparison, arm, _gap(judged), ratio)


def _gap(judged: Finding) -> GapToBaseline:
    answer = _ANSWERS.get(judged.verdict, "undecided")
    return GapToBaseline(answer, judged.estimate, judged.ci_low, judged.ci_high, judged.reason, judged.run_ids)


def _choice(
    comparison: Comparison, arm: Arm, gap: GapToBaseline | None = None, ratio: LrRatioEstimate | None = None
) -> Choice:
    label = arm_label(arm)
    optimum, losses, rows = comparison.optima[label], comparison.losses[label], comparison.rows[label]
    params = rows["trainable_params"].dropna()
    return Choice(
        label=label,
        rank=arm["rank"],
        placement=arm["placement"],
        trainable_params=int(params.iloc[0]) if len(params) else None,
        lr_best=float(optimum["lr_best"]),
        lr_opt=float(optimum["lr_opt"]),
        lr_low=float(optimum["lr_low"]),
        lr_high=float(optimum["lr_high"]),
        resolved=bool(optimum["resolved"]),
        loss=float(losses["loss_mean"]),
        n_seeds=int(losses["n_seeds"]),
        gap=gap,
        ratio=ratio,
    )
