"""Recipes: whether LoRA matches FullFT in the given runs, and which learning rate, rank and placement to use.

Every arm is taken at its own best learning rate, picked on the validation split. LoRA matches FullFT if the whole 95%
interval of its test loss minus that of FullFT is below two seed standard deviations, the rule of the claims on equal
losses (`Comparison.equal_losses`); LoRA also matches if it is better. In RL a loss is an error rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from lorabench.analysis.arms import arm_label, is_rl, is_standard
from lorabench.analysis.claims.evidence import NEEDED_BY, Arm, Comparison, Task, comparisons
from lorabench.analysis.claims.finding import Finding, Verdict
from lorabench.analysis.claims.learning_rate import lr_ratio
from lorabench.analysis.claims.reinforcement import if_learned, rewarded_errors
from lorabench.analysis.losses import with_losses
from lorabench.analysis.studies import MIN_LRS
from lorabench.tables import with_all_columns

Answer = Literal["yes", "no", "undecided"]

_ANSWERS: Mapping[Verdict, Answer] = {"confirmed": "yes", "contradicted": "no"}


@dataclass(frozen=True)
class Place:
    """The columns that all arms of a comparison share."""

    task: Task
    model: str
    dataset: str
    batch_size: int
    steps: int | None


@dataclass(frozen=True)
class Gap:
    """The test loss of an arm minus that of another, each at its best LR, paired by seed; an unknown number is NaN."""

    answer: Answer
    """Whether the arm is as good as the other or better."""
    estimate: float
    """Nats per token, or in RL error rate; above 0 the arm is worse."""
    low: float
    """Lower end of the 95% interval."""
    high: float
    """Upper end of the 95% interval."""
    reason: str
    """Why the answer is as it is, in words."""
    run_ids: tuple[str, ...]
    """Ids of the compared runs."""


@dataclass(frozen=True)
class Ratio:
    """The optimal LR of LoRA over that of FullFT, with its 95% bootstrap interval; an unknown number is NaN."""

    estimate: float
    low: float
    high: float
    problems: tuple[str, ...]
    """Why the ratio is not reliable; empty if both optima are resolved."""


@dataclass(frozen=True)
class Choice:
    """An arm at its best LR; an unknown number is NaN."""

    label: str
    rank: int | None
    placement: str | None
    trainable_params: int | None
    lr_best: float
    """The LR of the grid with the lowest validation loss."""
    lr_opt: float
    """The optimal LR, interpolated between the LRs of the grid."""
    lr_low: float
    """Lower end of the 95% bootstrap interval of `lr_opt`."""
    lr_high: float
    """Upper end of that interval."""
    resolved: bool
    """Whether the grid determines the optimal LR (see `lr_optima`)."""
    loss: float
    """Mean over seeds of the test loss at the best LR."""
    n_seeds: int
    gap: Gap | None = None
    """The gap to FullFT, or for a placement the gap to LoRA on all layers."""
    ratio: Ratio | None = None
    """The ratio of its optimal LR to that of FullFT; None for a placement."""


@dataclass(frozen=True)
class Recommendation:
    """The result for one model, dataset, batch size and number of steps."""

    place: Place
    answer: Answer
    """Yes if some rank matches FullFT, no if none of the ranks tried does, undecided if some may match."""
    fullft: Choice
    lora: tuple[Choice, ...]
    """LoRA on all layers, ascending in rank."""
    best: Choice
    """The rank with the lowest validation loss among the ranks that give the answer."""
    smallest: Choice | None
    """The lowest rank that matches FullFT, if any does."""
    sigma: float
    """Seed standard deviation of the test loss."""
    dof: int
    """Degrees of freedom of `sigma`."""

    @property
    def use(self) -> Choice:
        """The choice to use: the lowest rank that matches FullFT, or else the best."""
        return self.smallest or self.best


@dataclass(frozen=True)
class PlacementChoice:
    """The placements of LoRA tried for one model, dataset, batch size and number of steps, each at its best rank."""

    place: Place
    every: Choice
    """LoRA on all layers."""
    parts: tuple[Choice, ...]
    """LoRA on some of the layers, with the gap to LoRA on all layers."""


@dataclass(frozen=True)
class Recipe:
    """The recommendations and placements of all comparisons in the runs."""

    found: tuple[Recommendation, ...]
    placements: tuple[PlacementChoice, ...]

    @property
    def answer(self) -> Answer | Literal["mixed"] | None:
        """The answer of all comparisons together; `mixed` if they differ, None without any."""
        answers = {recommendation.answer for recommendation in self.found}
        return answers.pop() if len(answers) == 1 else "mixed" if answers else None

    def by_batch_size(self) -> list[tuple[Recommendation, ...]]:
        """Group the recommendations of each task, model and dataset that has at least two batch sizes.

        A group is ascending in batch size, and has for each batch size the recommendation with the most steps.
        """
        groups: dict[tuple[str, ...], dict[int, Recommendation]] = {}
        ascending = sorted(self.found, key=lambda found: (found.place.batch_size, found.place.steps or 0))
        for recommendation in ascending:
            place = recommendation.place
            groups.setdefault((place.task, place.model, place.dataset), {})[place.batch_size] = recommendation
        return [tuple(sizes.values()) for sizes in groups.values() if len(sizes) > 1]


def recipe(runs: pd.DataFrame) -> Recipe:
    """Derive the recommendations from runs. A comparison needs FullFT and LoRA, each with at least MIN_LRS LRs.

    Only LoRA in the paper's parametrization is used. An RL problem set on which no run ever got a reward is left out.

    Args:
        runs: the table `runs`; runs of a task whose columns (NEEDED_BY) it lacks are left out.

    Raises:
        UserError: See `check_runs`.
    """
    recommendations: list[Recommendation] = []
    placements: list[PlacementChoice] = []
    for standard in _standard(runs):
        # The noise is that of the compared arms only, as in the claims, so placements are compared separately.
        for comparison in _tuned(standard[standard["placement"].isna() | standard["placement"].eq("all")]):
            if comparison.fullft and comparison.lora:
                recommendations.append(_recommendation(comparison, comparison.fullft, list(comparison.lora.values())))
        for comparison in _tuned(standard[standard["method"].eq("lora")]):
            parts = [arms for name in ("mlp", "attn") if (arms := list(comparison.placed(name).values()))]
            if comparison.lora and parts:
                placements.append(_placements(comparison, list(comparison.lora.values()), parts))
    return Recipe(tuple(recommendations), tuple(placements))


def _standard(runs: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Yield the runs of each task in the paper's parametrization, with the losses of RL runs."""
    rl = is_rl(runs)
    of_task: dict[Task, pd.DataFrame] = {"sft": runs[~rl], "rl": runs[rl]}
    for task, chosen in of_task.items():
        if len(chosen) and set(NEEDED_BY[task]) <= set(chosen.columns):
            standard = with_all_columns(chosen[is_standard(chosen)], "runs")
            yield rewarded_errors(standard) if task == "rl" else standard


def _tuned(runs: pd.DataFrame) -> Iterator[Comparison]:
    """Yield the comparisons, with only the arms that have at least MIN_LRS LRs."""
    for comparison in comparisons(runs, pd.DataFrame()):
        rows = [of_arm for of_arm in comparison.rows.values() if of_arm["lr"].nunique() >= MIN_LRS]
        if rows:
            yield Comparison(comparison.label, pd.concat(rows), comparison.curves, comparison.noise)


def _recommendation(comparison: Comparison, fullft: Arm, by_rank: Sequence[Arm]) -> Recommendation:
    lora = [_against(comparison, arm, fullft, tuned_ratio=True) for arm in by_rank]
    answers: tuple[Answer, ...] = ("yes", "undecided", "no")
    answer = next(answer for answer in answers if any(_answer(choice) == answer for choice in lora))
    giving = [(arm, choice) for arm, choice in zip(by_rank, lora, strict=True) if _answer(choice) == answer]
    _, best = min(giving, key=lambda pair: _validation_loss(comparison, pair[0]))
    sigma, dof = comparison.sigma("test")
    return Recommendation(
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


def _place(comparison: Comparison) -> Place:
    arm = comparison.arms[0]
    task: Task = "rl" if comparison.is_rl else "sft"
    return Place(task, arm["model"], arm["dataset"], arm["batch_size"], arm["steps"])


def _answer(choice: Choice) -> Answer:
    assert choice.gap
    return choice.gap.answer


def _validation_loss(comparison: Comparison, arm: Arm) -> float:
    """Return the mean validation loss at the best LR; infinity if no run finished."""
    rows = with_losses(comparison.rows[arm_label(arm)])
    loss = rows.loc[rows["run_id"].isin(comparison.losses[arm_label(arm)]["run_ids"]), "validation_loss"].mean()
    return float("inf") if pd.isna(loss) else float(loss)


def _against(comparison: Comparison, arm: Arm, other: Arm, tuned_ratio: bool) -> Choice:
    """Return the choice of an arm with its gap to another, and if wanted the ratio of their optimal LRs."""
    finding = comparison.equal_losses(arm, other, better_too=True)
    if comparison.is_rl:
        finding = if_learned(comparison, finding, [other])
    ratio = None
    if tuned_ratio:
        of_lrs = lr_ratio(comparison, arm, other)
        ratio = Ratio(of_lrs.estimate, *of_lrs.interval, tuple(of_lrs.problems))
    return _choice(comparison, arm, _gap(finding), ratio)


def _gap(finding: Finding) -> Gap:
    answer = _ANSWERS.get(finding.verdict, "undecided")
    return Gap(answer, finding.estimate, finding.ci_low, finding.ci_high, finding.reason, finding.run_ids)


def _choice(comparison: Comparison, arm: Arm, gap: Gap | None = None, ratio: Ratio | None = None) -> Choice:
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
