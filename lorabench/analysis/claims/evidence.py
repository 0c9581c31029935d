"""What a claim is judged on: the tidy tables of its experiments, and the comparisons they hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import pandas as pd

from lorabench.analysis.arms import ARM, OPTIONAL, arm_label, each_arm, is_rl, is_standard, rows_of
from lorabench.analysis.claims.finding import (
    MIN_SEEDS,
    Finding,
    UnjudgedError,
    Verdict,
    equality_problems,
    error_equality_problems,
    error_rate,
    finding,
    nats,
    noise_problems,
    sigma_text,
    together,
    within,
)
from lorabench.analysis.gaps import best_losses, gap
from lorabench.analysis.noise import GROUP, seed_noise
from lorabench.analysis.optimum import lr_draws, lr_optima
from lorabench.tables import words

Arm = dict[str, Any]

Task = Literal["sft", "rl"]

_ARM_AND_STATUS = ["run_id", *(name for name in ARM if name not in OPTIONAL), "lr", "seed", "status"]

NEEDED = [*_ARM_AND_STATUS, "final_valid_nll", "final_test_nll"]
"""Columns of `runs` that every claim on supervised runs needs."""

NEEDED_BY: dict[Task, list[str]] = {"sft": NEEDED, "rl": [*_ARM_AND_STATUS, "final_valid_reward", "final_reward"]}
"""Columns of `runs` that every claim on runs needs, by their task."""

SWEEP = "FullFT and LoRA on all layers, each with an LR grid whose best LR is not at its edge"
"""What most claims need, in words."""


@dataclass(frozen=True)
class Evidence:
    """The tidy tables as a claim sees them; a table that is not there is empty."""

    runs: pd.DataFrame
    """Those of its task and its experiments."""
    curves: pd.DataFrame
    """Of those runs."""
    compute: pd.DataFrame
    counts: pd.DataFrame
    every_run: pd.DataFrame = field(default_factory=pd.DataFrame)
    """All of the table, for a claim that sets one task beside the other."""

    @cached_property
    def standard(self) -> pd.DataFrame:
        """FullFT, and LoRA in the paper's parametrisation, whatever its placement."""
        return self.runs[is_standard(self.runs)]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """What can be compared: the standard runs of one model, dataset, batch size and length."""
        return comparisons(self.standard, self.curves)


@dataclass(frozen=True)
class Comparison:
    """Arms that can be compared: FullFT and LoRA of one model, dataset, batch size and length."""

    label: str
    runs: pd.DataFrame
    """Those of RL as from `rewards.errors`: their losses are error rates."""
    curves: pd.DataFrame
    noise: pd.DataFrame = field(repr=False)

    @cached_property
    def arms(self) -> list[Arm]:
        return [arm for arm, _ in each_arm(self.runs)]

    @cached_property
    def rows(self) -> dict[str, pd.DataFrame]:
        """Runs, by arm label."""
        return {arm_label(arm): rows for arm, rows in each_arm(self.runs)}

    @property
    def fullft(self) -> Arm | None:
        return next((arm for arm in self.arms if arm["method"] == "fullft"), None)

    @cached_property
    def lora(self) -> dict[int, Arm]:
        """LoRA arms on all layers by rank, ascending."""
        return self.placed("all")

    def placed(self, placement: str) -> dict[int, Arm]:
        """LoRA arms of a placement by rank, ascending; a placement that is not given counts as `all`."""
        return {
            arm["rank"]: arm
            for arm in self.arms
            if arm["method"] == "lora" and (arm["placement"] or "all") == placement
        }

    @property
    def highest(self) -> Arm | None:
        """The highest LoRA rank present, which stands for the paper's high ranks; rank 1 never does."""
        return next((arm for rank, arm in reversed(self.lora.items()) if rank > 1), None)

    def sigma(self, split: str) -> tuple[float, int]:
        """Seed noise of the final loss and its degrees of freedom."""
        column = "sigma_valid" if split == "validation" else "sigma"
        return float(self.noise[column].iloc[0]), int(self.noise["dof"].iloc[0])

    @cached_property
    def losses(self) -> dict[str, pd.Series]:
        """Rows of `best_losses`, by arm label."""
        return {arm_label(row): row for _, row in best_losses(self.runs).iterrows()}

    @cached_property
    def optima(self) -> dict[str, pd.Series]:
        """Rows of `lr_optima`, by arm label."""
        return {arm_label(row): row for _, row in lr_optima(self.runs, self.noise).iterrows()}

    @cached_property
    def draws(self) -> dict[str, np.ndarray]:
        """Bootstrap draws of optimal LRs, by arm label."""
        return {label: lr_draws(rows, self.noise) for label, rows in self.rows.items()}

    def of(self, arms: Iterable[Arm]) -> pd.DataFrame:
        """The runs of some arms."""
        return pd.concat([self.rows[arm_label(arm)] for arm in arms])

    def edge_problems(self, arms: Iterable[Arm]) -> list[str]:
        """Arms whose best LR does not count, since it is at the edge of its grid or no run finished."""
        losses = [self.losses[arm_label(arm)] for arm in arms]
        return [
            f"{arm_label(found)}: " + ("best LR at the edge of its grid" if found["at_edge"] else "no run finished")
            for found in losses
            if found["at_edge"] or math.isnan(found["lr_best"])
        ]

    def final_gap(self, arm: Arm, other: Arm) -> tuple[float, tuple[float, float], str, list[str]]:
        """Test NLL (in RL error rate) of an arm minus another's: estimate, interval, text, and problems with it."""
        found = gap(self.runs, arm, other)
        problems = self.edge_problems([arm, other])
        if found.n_seeds < MIN_SEEDS:
            problems.append(f"{found.n_seeds} paired seeds, {MIN_SEEDS} needed")
        if found.n_diverged:
            problems.append(f"{found.n_diverged} repeats at the best LR diverged")
        interval = (found.ci_low, found.ci_high)
        words = (error_rate if self.is_rl else nats)(found.estimate, *interval)
        text = f"{arm_label(arm)} - {arm_label(other)} = {words} over {found.n_seeds} seeds"
        return found.estimate, interval, text, problems

    @property
    def is_rl(self) -> bool:
        return bool(is_rl(self.runs).all())

    def equal_losses(self, arm: Arm, other: Arm, better_too: bool = False) -> Finding:
        """Whether the test NLL (in RL the error rate) of two arms is the same within 2 sigma.

        Args:
            better_too: that the arm is better than the other by more than 2 sigma speaks for the claim as well.
        """
        estimate, interval, text, problems = self.final_gap(arm, other)
        sigma, dof = self.sigma("test")
        loss = float(self.losses[arm_label(other)]["loss_mean"])
        verdict = within(*interval, (-math.inf if better_too else -2 * sigma, 2 * sigma))
        noisy = error_equality_problems(verdict, 2 * sigma) if self.is_rl else equality_problems(verdict, sigma, loss)
        off = estimate if better_too else abs(estimate)
        return finding(
            self.of([arm, other])["run_id"],
            f"{text}, {sigma_text(sigma)}",
            verdict,
            noise_problems(sigma, dof) + noisy + problems,
            estimate,
            interval,
            off / sigma if sigma > 0 else math.nan,
        )


def comparisons(runs: pd.DataFrame, curves: pd.DataFrame) -> list[Comparison]:
    """The comparisons that a runs table holds, one per model, dataset, batch size and length."""
    noise = seed_noise(runs)
    found = []
    several = {name: runs.groupby(["model", "dataset"])[name].nunique().max() > 1 for name in GROUP[2:]}
    for (model, dataset, batch_size, steps), of_group in runs.groupby(GROUP, dropna=False):
        label = f"{model}/{dataset}" + (f" batch {batch_size}" if several["batch_size"] else "")
        # One pass over the same data is one length, however many steps it takes.
        label += f" {steps} steps" if several["steps"] and not several["batch_size"] else ""
        group = dict(zip(GROUP, (model, dataset, batch_size, steps), strict=True))
        found.append(Comparison(label, of_group, curves, rows_of(noise, group)))
    return found


Scoped = tuple[Comparison, str]
"""A comparison that a claim is about, and why that one."""

Scope = Callable[[list[Comparison]], list[Scoped]]


class Labelled(Protocol):
    """What a claim is judged on by itself: a comparison, or several that belong together."""

    @property
    def label(self) -> str: ...


Judged = TypeVar("Judged", bound=Labelled)


def over(
    scope: Callable[[list[Comparison]], list[tuple[Judged, str]]], judge: Callable[[Judged], Finding]
) -> Callable[[Evidence], Finding]:
    """Judge each in scope by itself; the worst finding decides, and the reason names all."""

    return lambda evidence: judge_each(
        (f"{judged.label}{note}", partial(judge, judged)) for judged, note in scope(evidence.comparisons)
    )


def judge_each(named: Iterable[tuple[str, Callable[[], Finding]]]) -> Finding:
    """The finding that decides over several, each with its name in the reason."""
    found = []
    for name, judge in named:
        try:
            one = judge()
        except UnjudgedError as unjudged:
            one = unjudged.finding
        found.append(replace(one, reason=f"{name}: {one.reason}"))
    if not found:
        raise UnjudgedError("not tested", "no such runs")
    return together(found)


def every_dataset(comparisons: list[Comparison]) -> list[Scoped]:
    """All that the tables hold."""
    return [(comparison, "") for comparison in comparisons]


def smallest_dataset(comparisons: list[Comparison]) -> list[Scoped]:
    """Per model, the dataset with the fewest train tokens."""
    return _by_size(comparisons, "train_tokens", lambda runs: float(runs["train_tokens"].max()), -1, "fewest tokens")


def longest_dataset(comparisons: list[Comparison]) -> list[Scoped]:
    """Per model, the dataset with the most examples seen (steps times batch size)."""
    return _by_size(
        comparisons, "steps", lambda runs: float((runs["steps"] * runs["batch_size"]).max()), 1, "most examples"
    )


def _by_size(
    comparisons: list[Comparison], column: str, size: Callable[[pd.DataFrame], float], sign: int, why: str
) -> list[Scoped]:
    by_model: dict[str, dict[str, list[Comparison]]] = {}
    for comparison in comparisons:
        first = comparison.runs.iloc[0]
        by_model.setdefault(first["model"], {}).setdefault(first["dataset"], []).append(comparison)
    chosen: list[Scoped] = []
    for model, datasets in by_model.items():
        if len(datasets) == 1:
            [picked] = datasets.values()
            note = f" (the only dataset of {model})"
        elif any(column not in c.runs or c.runs[column].isna().all() for group in datasets.values() for c in group):
            raise UnjudgedError("not tested", f"the runs table has no {column}, by which {model}'s dataset is chosen")
        else:
            sizes = {dataset: sign * max(size(c.runs) for c in group) for dataset, group in datasets.items()}
            picked = datasets[max(sizes, key=lambda dataset: sizes[dataset])]
            note = f" ({why} of {len(datasets)} datasets)"
        chosen += [(comparison, note) for comparison in picked]
    return chosen


def require(*arms: tuple[str, Arm | None]) -> list[Arm]:
    """The arms that a claim compares, given with what they are called; stops where they are not there."""
    missing = [name for name, arm in arms if arm is None]
    if missing:
        verdict: Verdict = "not tested" if len(missing) == len(arms) else "inconclusive"
        raise UnjudgedError(verdict, f"no runs of {' and '.join(missing)}")
    return [arm for _, arm in arms if arm is not None]


def curves_of(curves: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """The curves of some runs; of a table without columns, all there is."""
    return curves[curves["run_id"].isin(runs["run_id"])] if "run_id" in curves else curves


def in_experiments(runs: pd.DataFrame, names: Sequence[str]) -> pd.Series[bool]:
    """Which runs belong to one of the experiments; a run that says nothing belongs to all."""
    if "experiments" not in runs:
        return pd.Series(True, index=runs.index)
    listed = runs["experiments"].map(words)
    return listed.map(lambda found: not found or any(name in found for name in names)).astype(bool)
