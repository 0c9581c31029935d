"""The practical recipe of some runs: does LoRA match full fine-tuning, and at which learning rate, rank and placement?

Every arm is taken at its own best learning rate, picked on the validation split. LoRA matches if, on the test split,
what it loses against full fine-tuning is within two seed standard deviations with its whole 95% interval, by the rule
of the claims on equal losses (`Comparison.equal_losses`); that LoRA is better counts as matching. Of RL all losses
are error rates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from lorabench.analysis.arms import arm_label, is_rl, is_standard
from lorabench.analysis.claims.rl_shared import if_learned, rewarded_errors
from lorabench.analysis.comparison import NEEDED_BY, Arm, Comparison, Task, comparisons
from lorabench.analysis.finding import Finding, Verdict
from lorabench.analysis.lr_ratio import lr_ratio
from lorabench.analysis.studies import MIN_LRS
from lorabench.tables import with_all_columns

Answer = Literal["yes", "no", "undecided"]

_ANSWERS: Mapping[Verdict, Answer] = {"confirmed": "yes", "contradicted": "no"}


@dataclass(frozen=True)
class Place:
    """What is the same for all arms of a comparison."""

    task: Task
    model: str
    dataset: str
    batch_size: int
    steps: int | None


@dataclass(frozen=True)
class Gap:
    """What an arm loses against another, both at their best LR, paired by seed. NaN where not known."""

    answer: Answer
    """Whether it is as good as the other, or better."""
    estimate: float
    """Nats per token; in RL, error rate. Above 0 the arm is worse."""
    low: float
    high: float
    reason: str
    run_ids: tuple[str, ...]


@dataclass(frozen=True)
class Ratio:
    """Optimal LR of LoRA over that of full fine-tuning, with its 95% bootstrap interval. NaN where not known."""

    estimate: float
    low: float
    high: float
    problems: tuple[str, ...]
    """Why it does not count; empty if both optima are resolved."""


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
    """Interpolated between the LRs of the grid, with its 95% bootstrap interval."""
    lr_low: float
    lr_high: float
    resolved: bool
    loss: float
    """Mean test loss at the best LR over its seeds."""
    n_seeds: int
    gap: Gap | None = None
    """Against full fine-tuning; of a placement, against LoRA on all layers."""
    ratio: Ratio | None = None
    """Over full fine-tuning; of a placement, none."""


@dataclass(frozen=True)
class Recommendation:
    """What the runs of one model, dataset, batch size and length say."""

    place: Place
    answer: Answer
    """Yes: some rank matches. No: none of those tried does. Undecided: none is known to, some may."""
    fullft: Choice
    lora: tuple[Choice, ...]
    """LoRA on all layers, ascending in rank."""
    best: Choice
    """Of the ranks that give the answer, the one with the lowest validation loss."""
    smallest: Choice | None
    """The lowest rank that matches."""
    sigma: float
    """Seed standard deviation of the test loss, and its degrees of freedom."""
    dof: int

    @property
    def use(self) -> Choice:
        """What to use: the cheapest rank that matches, or else the best."""
        return self.smallest or self.best


@dataclass(frozen=True)
class PlacementChoice:
    """LoRA on the layers tried for one model, dataset, batch size and length; each at its best rank."""

    place: Place
    every: Choice
    """On all layers."""
    parts: tuple[Choice, ...]
    """On some, with their gap to all layers."""


@dataclass(frozen=True)
class Recipe:
    """What to use, as measured."""

    found: tuple[Recommendation, ...]
    placements: tuple[PlacementChoice, ...]

    @property
    def answer(self) -> Answer | Literal["mixed"] | None:
        """The answer of all comparisons together; `mixed` if they differ, None without any."""
        answers = {one.answer for one in self.found}
        return answers.pop() if len(answers) == 1 else "mixed" if answers else None

    def by_batch_size(self) -> list[tuple[Recommendation, ...]]:
        """Those that share task, model and dataset at two or more batch sizes, ascending, of one size the longest."""
        groups: dict[tuple[str, ...], dict[int, Recommendation]] = {}
        for one in sorted(self.found, key=lambda one: (one.place.batch_size, one.place.steps or 0)):
            place = one.place
            groups.setdefault((place.task, place.model, place.dataset), {})[place.batch_size] = one
        return [tuple(sizes.values()) for sizes in groups.values() if len(sizes) > 1]


def recipe(runs: pd.DataFrame) -> Recipe:
    """What the runs recommend. A comparison needs full fine-tuning and LoRA, each with at least MIN_LRS rates.

    Only LoRA in the paper's parametrisation counts. Of RL, problems that no run was ever rewarded on are left out.

    Args:
        runs: the table `runs`; a task without the columns of NEEDED_BY is left out.

    Raises:
        UserError: see `check_runs`.
    """
    found: list[Recommendation] = []
    placements: list[PlacementChoice] = []
    for standard in _standard(runs):
        # Noise is that of the arms compared, as in the claims.
        for comparison in _tuned(standard[standard["placement"].isna() | standard["placement"].eq("all")]):
            if comparison.fullft and comparison.lora:
                found.append(_recommendation(comparison, comparison.fullft, list(comparison.lora.values())))
        for comparison in _tuned(standard[standard["method"].eq("lora")]):
            parts = [arms for name in ("mlp", "attn") if (arms := list(comparison.placed(name).values()))]
            if comparison.lora and parts:
                placements.append(_placements(comparison, list(comparison.lora.values()), parts))
    return Recipe(tuple(found), tuple(placements))


def _standard(runs: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The runs of each task in the paper's parametrisation; of RL as error rates."""
    rl = is_rl(runs)
    of_task: dict[Task, pd.DataFrame] = {"sft": runs[~rl], "rl": runs[rl]}
    for task, chosen in of_task.items():
        if len(chosen) and set(NEEDED_BY[task]) <= set(chosen.columns):
            standard = with_all_columns(chosen[is_standard(chosen)], "runs")
            yield rewarded_errors(standard) if task == "rl" else standard


def _tuned(runs: pd.DataFrame) -> Iterator[Comparison]:
    """The comparisons of arms that have enough LRs to pick from."""
    for comparison in comparisons(runs, pd.DataFrame()):
        rows = [of_arm for of_arm in comparison.rows.values() if of_arm["lr"].nunique() >= MIN_LRS]
        if rows:
            yield Comparison(comparison.label, pd.concat(rows), comparison.curves, comparison.noise)


def _recommendation(comparison: Comparison, fullft: Arm, by_rank: Sequence[Arm]) -> Recommendation:
    lora = [_against(comparison, arm, fullft, tuned_ratio=True) for arm in by_rank]
    answers: tuple[Answer, ...] = ("yes", "undecided", "no")
    answer = next(one for one in answers if any(_answer(choice) == one for choice in lora))
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
    """Mean validation loss at the best LR; infinite where no run finished."""
    rows = comparison.rows[arm_label(arm)]
    loss = rows.loc[rows["run_id"].isin(comparison.losses[arm_label(arm)]["run_ids"]), "final_valid_nll"].mean()
    return float("inf") if pd.isna(loss) else float(loss)


def _against(comparison: Comparison, arm: Arm, other: Arm, tuned_ratio: bool) -> Choice:
    """An arm beside another: its gap, and where wanted the ratio of their LRs."""
    found = comparison.equal_losses(arm, other, better_too=True)
    if comparison.is_rl:
        found = if_learned(comparison, found, [other])
    ratio = None
    if tuned_ratio:
        of_lrs = lr_ratio(comparison, arm, other)
        ratio = Ratio(of_lrs.estimate, *of_lrs.interval, tuple(of_lrs.problems))
    return _choice(comparison, arm, _gap(found), ratio)


def _gap(found: Finding) -> Gap:
    answer = _ANSWERS.get(found.verdict, "undecided")
    return Gap(answer, found.estimate, found.ci_low, found.ci_high, found.reason, found.run_ids)


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
        loss=float(losses["nll_mean"]),
        n_seeds=int(losses["n_seeds"]),
        gap=gap,
        ratio=ratio,
    )
