"""Comparisons of arms: LoRA and full fine-tuning (FullFT) on one model, dataset, batch size and length of run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd

from lorabench.analysis.arms import ARM, OPTIONAL, arm_label, each_arm, rows_of
from lorabench.analysis.finding import (
    MIN_SEEDS,
    SIGMAS,
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
    within,
)
from lorabench.analysis.gaps import best_losses, gap
from lorabench.analysis.noise import NOISE_GROUP, seed_noise
from lorabench.analysis.optimum import lr_draws, lr_optima
from lorabench.tables.checks import is_rl
from lorabench.tables.io import list_of_words

Arm = dict[str, Any]
"""An arm by the columns ARM: one method in one setting, whose LR is swept."""

Task = Literal["sft", "rl"]
"""Supervised fine-tuning, or reinforcement learning (RL)."""

_ARM_AND_STATUS = ["run_id", *(name for name in ARM if name not in OPTIONAL), "lr", "seed", "status"]

NEEDED = [*_ARM_AND_STATUS, "final_valid_nll", "final_test_nll"]
"""The columns of `runs` that every comparison of supervised runs needs."""

NEEDED_BY: dict[Task, list[str]] = {"sft": NEEDED, "rl": [*_ARM_AND_STATUS, "final_valid_reward", "final_reward"]}
"""The columns of `runs` that every comparison needs, by task."""


@dataclass(frozen=True)
class Comparison:
    """Arms that can be compared, with their runs: FullFT and LoRA on one model, dataset, batch size and length."""

    label: str
    runs: pd.DataFrame
    """The runs of all arms; those of RL as returned by `rewards.errors`, with error rates as their losses."""
    curves: pd.DataFrame
    noise: pd.DataFrame = field(repr=False)

    @cached_property
    def arms(self) -> list[Arm]:
        """All arms."""
        return [arm for arm, _ in each_arm(self.runs)]

    @cached_property
    def rows(self) -> dict[str, pd.DataFrame]:
        """The runs of each arm, by arm label."""
        return {arm_label(arm): rows for arm, rows in each_arm(self.runs)}

    @property
    def fullft(self) -> Arm | None:
        """The FullFT arm, if any."""
        return next((arm for arm in self.arms if arm["method"] == "fullft"), None)

    @cached_property
    def lora(self) -> dict[int, Arm]:
        """The LoRA arms on all layers by rank, ascending."""
        return self.placed("all")

    def placed(self, placement: str) -> dict[int, Arm]:
        """Return the LoRA arms of a placement by rank, ascending; a missing placement counts as `all`."""
        return {
            arm["rank"]: arm
            for arm in self.arms
            if arm["method"] == "lora" and (arm["placement"] or "all") == placement
        }

    @property
    def highest(self) -> Arm | None:
        """The LoRA arm on all layers with the highest rank above 1, which stands for the paper's high ranks."""
        return next((arm for rank, arm in reversed(self.lora.items()) if rank > 1), None)

    def sigma(self, split: str) -> tuple[float, int]:
        """Return the seed standard deviation of the final loss on a split, and its degrees of freedom."""
        column = "sigma_valid" if split == "validation" else "sigma"
        return float(self.noise[column].iloc[0]), int(self.noise["dof"].iloc[0])

    @cached_property
    def losses(self) -> dict[str, pd.Series]:
        """The rows of `best_losses`, by arm label."""
        return {arm_label(row): row for _, row in best_losses(self.runs).iterrows()}

    @cached_property
    def optima(self) -> dict[str, pd.Series]:
        """The rows of `lr_optima`, by arm label."""
        return {arm_label(row): row for _, row in lr_optima(self.runs, self.noise).iterrows()}

    @cached_property
    def draws(self) -> dict[str, np.ndarray]:
        """The bootstrap draws of optimal LRs, by arm label."""
        return {label: lr_draws(rows, self.noise) for label, rows in self.rows.items()}

    def of(self, arms: Iterable[Arm]) -> pd.DataFrame:
        """Return the runs of several arms."""
        return pd.concat([self.rows[arm_label(arm)] for arm in arms])

    def edge_problems(self, arms: Iterable[Arm]) -> list[str]:
        """Return the arms whose best LR does not count, with the reason: the edge of its grid, or no finished run."""
        losses = [self.losses[arm_label(arm)] for arm in arms]
        return [
            f"{arm_label(loss)}: " + ("best LR at the edge of its grid" if loss["at_edge"] else "no run finished")
            for loss in losses
            if loss["at_edge"] or math.isnan(loss["lr_best"])
        ]

    def final_gap(self, arm: Arm, other: Arm) -> tuple[float, tuple[float, float], str, list[str]]:
        """Compute the test NLL (in RL the error rate) of an arm minus that of another, both at their best LR.

        Returns:
            The difference, its 95% interval, both in words, and what speaks against a verdict on them.
        """
        difference = gap(self.runs, arm, other)
        problems = self.edge_problems([arm, other])
        if difference.n_seeds < MIN_SEEDS:
            problems.append(f"{difference.n_seeds} paired seeds, {MIN_SEEDS} needed")
        if difference.n_diverged:
            problems.append(f"{difference.n_diverged} repeats at the best LR diverged")
        interval = (difference.ci_low, difference.ci_high)
        in_words = (error_rate if self.is_rl else nats)(difference.estimate, *interval)
        text = f"{arm_label(arm)} - {arm_label(other)} = {in_words} over {difference.n_seeds} seeds"
        return difference.estimate, interval, text, problems

    @property
    def is_rl(self) -> bool:
        """Whether all runs are of RL."""
        return bool(is_rl(self.runs).all())

    def equal_losses(self, arm: Arm, other: Arm, better_too: bool = False) -> Finding:
        """Judge whether the test NLL (in RL the error rate) of two arms is the same within SIGMAS sigma.

        Args:
            arm: the arm whose loss is compared.
            other: the arm that it is compared with.
            better_too: whether a lower loss than the other's confirms as well.
        """
        estimate, interval, text, problems = self.final_gap(arm, other)
        sigma, dof = self.sigma("test")
        loss = float(self.losses[arm_label(other)]["loss_mean"])
        margin = SIGMAS * sigma
        verdict = within(*interval, (-math.inf if better_too else -margin, margin))
        noisy = error_equality_problems(verdict, margin) if self.is_rl else equality_problems(verdict, sigma, loss)
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
    """Return the comparisons that a table `runs` holds, one per model, dataset, batch size and length."""
    noise = seed_noise(runs)
    parts = []
    several = {name: runs.groupby(["model", "dataset"])[name].nunique().max() > 1 for name in NOISE_GROUP[2:]}
    for (model, dataset, batch_size, steps), of_group in runs.groupby(NOISE_GROUP, dropna=False):
        label = f"{model}/{dataset}" + (f" batch {batch_size}" if several["batch_size"] else "")
        # Runs at several batch sizes pass once over the same data, so their steps follow from the batch size.
        label += f" {steps} steps" if several["steps"] and not several["batch_size"] else ""
        group = dict(zip(NOISE_GROUP, (model, dataset, batch_size, steps), strict=True))
        parts.append(Comparison(label, of_group, curves, rows_of(noise, group)))
    return parts


def curves_of(curves: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Return the curves of some runs; a table without the column run_id is returned as it is."""
    return curves[curves["run_id"].isin(runs["run_id"])] if "run_id" in curves else curves


def in_experiments(runs: pd.DataFrame, names: Sequence[str]) -> pd.Series[bool]:
    """Return which runs belong to one of the experiments; a run that names no experiment belongs to all."""
    if "experiments" not in runs:
        return pd.Series(True, index=runs.index)
    listed = runs["experiments"].map(list_of_words)
    return listed.map(lambda of_run: not of_run or any(name in of_run for name in names)).astype(bool)


def require(*arms: tuple[str, Arm | None]) -> list[Arm]:
    """Return the arms that a claim compares.

    Args:
        arms: each arm after its name in words; None where the tables lack it.

    Raises:
        UnjudgedError: an arm is missing; the verdict is `not tested` if all are, and inconclusive otherwise.
    """
    missing = [name for name, arm in arms if arm is None]
    if missing:
        verdict: Verdict = "not tested" if len(missing) == len(arms) else "inconclusive"
        raise UnjudgedError(verdict, f"no runs of {' and '.join(missing)}")
    return [arm for _, arm in arms if arm is not None]
