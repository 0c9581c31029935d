"""Comparisons of arms: LoRA and full fine-tuning (FullFT) on one model, dataset, batch size and length of run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd

from lorabench.analysis.arms import ARM, OPTIONAL, arm_label, check_runs, each_arm, kept, with_arm_columns, with_losses
from lorabench.analysis.curves import curves_of, metric_points
from lorabench.analysis.estimate import Estimate, ExampleLosses
from lorabench.analysis.finding import MIN_SEEDS, Finding, UnjudgedError, decide, nats
from lorabench.analysis.fit_rows import MAX_STEP, MIN_LRS
from lorabench.analysis.loss_fit import LossFit, Noise, fit_losses
from lorabench.analysis.rules import Above, Bound, Margin, Problem, Remedy, Rule, Verdict, Within
from lorabench.config.margins import DEFAULT_MARGINS, SHARE_OF_LOSS, Margins, Predictions
from lorabench.store.checks import is_rl
from lorabench.utils.formats import with_interval

COMPARED = ["model", "dataset", "batch_size", "steps"]
"""The columns in which the runs of one comparison agree."""

Arm = dict[str, Any]
"""An arm by the columns ARM: one method in one setting, whose LR is swept."""

Task = Literal["sft", "rl"]
"""Supervised fine-tuning, or reinforcement learning (RL)."""

CEILING = 0.03
"""The error rate up to which an arm is about perfect; arms that all are can't differ by much, whatever is true."""


_ARM_AND_STATUS = ["run_id", *(name for name in ARM if name not in OPTIONAL), "lr", "seed", "status"]

NEEDED_BY: dict[Task, list[str]] = {
    "sft": [*_ARM_AND_STATUS, "final_valid_nll", "final_test_nll"],
    "rl": [*_ARM_AND_STATUS, "final_valid_reward", "final_reward"],
}
"""The columns of `runs` that every comparison needs, by task."""


@dataclass(frozen=True)
class Judging:
    """What is known besides the runs, for all comparisons alike."""

    margins: Margins = DEFAULT_MARGINS
    examples: ExampleLosses = field(default_factory=ExampleLosses, repr=False)
    """The losses by test example; without them their error is not known and counts as 0."""
    noise: Noise | None = None
    """Seed noise from elsewhere, for comparisons with one seed."""
    predictions: Predictions = field(default_factory=dict)
    """What studies predict."""


@dataclass(frozen=True)
class Comparison:
    """Arms that can be compared, with their runs: FullFT and LoRA on one model, dataset, batch size and length."""

    label: str
    runs: pd.DataFrame
    """The runs of all arms; runs of RL have error rates as losses (see `rewards.with_error_rates`)."""
    curves: pd.DataFrame
    judging: Judging = field(default_factory=Judging, repr=False)

    def forget(self) -> None:
        """Drop all that was made of the runs, which takes much memory; what is asked for again is made again."""
        for name in set(vars(self)) - {own.name for own in fields(self)}:
            del vars(self)[name]

    @cached_property
    def rows(self) -> dict[str, pd.DataFrame]:
        """The runs of each arm, by arm label."""
        return {arm_label(arm): rows for arm, rows in each_arm(self.runs)}

    @cached_property
    def arms(self) -> list[Arm]:
        """The arms, FullFT first, then LoRA by rank."""
        return [arm for arm, _ in each_arm(self.runs)]

    @cached_property
    def fullft(self) -> Arm | None:
        """The FullFT arm, if any."""
        return next((arm for arm in self.arms if arm["method"] == "fullft"), None)

    @cached_property
    def lora(self) -> dict[int, Arm]:
        """The LoRA arms on all layers by rank, ascending."""
        return self.placed("all")

    def placed(self, placement: str) -> dict[int, Arm]:
        """Return the LoRA arms of a placement by rank, ascending; a missing placement counts as `all`."""
        lora = [arm for arm in self.arms if arm["method"] == "lora"]
        return {arm["rank"]: arm for arm in lora if (arm["placement"] or "all") == placement}

    @cached_property
    def highest(self) -> Arm | None:
        """The LoRA arm on all layers with the highest rank above 1, which stands for the paper's high ranks."""
        return next((arm for rank, arm in reversed(self.lora.items()) if rank > 1), None)

    @cached_property
    def is_rl(self) -> bool:
        """Whether all runs are of RL."""
        return bool(is_rl(self.runs).all())

    def of(self, arms: Iterable[Arm]) -> pd.DataFrame:
        """Return the runs of several arms."""
        return pd.concat([self.rows[arm_label(arm)] for arm in arms])

    def run_ids(self, arms: Iterable[Arm]) -> list[str]:
        """Return the ids of the runs of several arms."""
        return [run_id for arm in arms for run_id in self.rows[arm_label(arm)]["run_id"]]

    @kept
    def points(self, split: str, metric: str) -> pd.DataFrame:
        """Return the points of one metric of the curves: columns run_id, step and value, which is never null."""
        return metric_points(self.curves, split, metric)

    @cached_property
    def fit(self) -> LossFit:
        """The fit of the final losses of all arms."""
        group = [str(self.runs[name].iloc[0]) for name in COMPARED]
        name = "/".join(group) + ("/rl" if self.is_rl else "")
        # The test split is that of the dataset, whatever the model, batch size and length.
        return fit_losses(self.runs, self.judging.examples, self.judging.noise, name, test_split=group[1])

    @cached_property
    def of_accuracies(self) -> bool:
        """Whether the losses are error rates, as in RL and where a source has no test losses."""
        accuracies = self.runs.reindex(columns=["final_reward"])["final_reward"].astype(float)
        return self.is_rl or bool((with_losses(self.runs)["test_loss"].astype(float) == 1 - accuracies).any())

    @cached_property
    def margin(self) -> Margin:
        """The smallest difference of test losses, or of error rates, that matters: that of one seed is not below the
        standard deviation of a seed."""
        margin, sigma = self._stated_margin, self.fit.sigma
        one_seed = self.judging.noise is not None and all(len(seeds) == 1 for seeds in self.fit.seeds.values())
        if not one_seed or not sigma > margin.value:
            return margin
        rule = f"the standard deviation of a seed ({sigma:.4f}), since there is one seed, in place of {margin.rule}"
        return replace(margin, value=sigma, rule=rule)

    @property
    def _stated_margin(self) -> Margin:
        lowest = {arm_label(arm): self.fit.lowest.get(arm_label(arm), (0.0, math.inf))[1] for arm in self.arms}
        arm = self.fullft or min(self.arms, key=lambda arm: lowest[arm_label(arm)])
        label, margins = arm_label(arm), self.judging.margins
        loss, no_gain = lowest[label], f"{label} is no better than the base, so there is no gain to compare with"
        if self.of_accuracies:
            base = float(self.runs.reindex(columns=["base_reward"])["base_reward"].astype(float).mean())
            rule = f"{100 * margins.reward:.3g} points of accuracy"
            return Margin(margins.reward, rule, no_gain if base >= 1 - loss else None)
        points = self.points("validation", "nll")
        at_start = points[(points["step"] == 0) & points["run_id"].isin(self.runs["run_id"])]
        tuned = with_losses(self.at_optimum(arm))["validation_loss"]
        gain = float(at_start["value"].astype(float).mean()) - float(tuned.astype(float).mean())
        if math.isnan(gain):
            rule = f"{SHARE_OF_LOSS:.0%} of the loss ({loss:.3f} nats), since the base's loss is not known"
            return Margin(SHARE_OF_LOSS * loss, rule)
        rule = f"{100 * margins.loss:.3g}% of the gain from the base to {label} ({gain:.3f} nats)"
        if not gain > 0:
            return Margin(math.nan, rule, no_gain)
        if margins.loss * gain <= margins.final_loss * loss:
            return Margin(margins.loss * gain, rule)
        of_loss = f"{100 * margins.final_loss:.3g}% of the final loss of {label} ({loss:.3f} nats)"
        return Margin(margins.final_loss * loss, f"{of_loss}, which is less than {rule}")

    @kept
    def at_optimum(self, arm: Arm) -> pd.DataFrame:
        """Return the finished runs of an arm at the LR of its grid that is nearest to its fitted optimum, or else to
        the best one; of LRs within a factor of MAX_STEP, those with the most seeds come first, as further seeds have
        one LR only."""
        label = arm_label(arm)
        grid, done = self.fit.grids.get(label), self.rows[label][self.rows[label]["status"] == "done"]
        if grid is None or done.empty:
            return done
        target, _ = self.fit.lowest.get(label, (float(np.log(grid.lrs[grid.centre])), math.nan))
        seeds = done.groupby("lr")["seed"].nunique()
        distance = pd.Series(np.abs(np.log(seeds.index.to_numpy(float)) - target), seeds.index)
        near = distance[distance <= math.log(MAX_STEP)]
        most = near[seeds[near.index] == seeds[near.index].max()]
        return done.loc[done["lr"] == most.idxmin()]

    def problems(self, arms: Sequence[Arm], resolved: bool = False) -> list[Problem]:
        """Return the reasons against a verdict on fitted minima of arms, or, if `resolved`, on their optimal LRs; their
        bounds are those of the number of the first arm minus that of the second."""
        labels, problems = [arm_label(arm) for arm in arms], []
        for label in labels:
            if (problem := self._grid_problem(label, resolved)) is not None:
                problems.append(problem if label == labels[0] else problem.of_subtracted())
        noise = self._noise_problems(labels)
        if problems and noise:
            return [replace(problem, bound=None) for problem in problems]
        return problems or noise

    def _noise_problems(self, labels: Sequence[str]) -> list[Problem]:
        """Return why arms can't be told apart, or the errors are not known, if so."""
        if self.of_accuracies and all(self.fit.lowest.get(label, (0.0, 1.0))[1] <= CEILING for label in labels):
            return [Problem(f"all arms are within {CEILING:.0%} of perfect: a ceiling", Remedy("harder problems"))]
        if any(label in self.fit.minima and self.fit.minima[label].n_groups == 1 for label in labels):
            text = "the error from test examples is not known, since all of them are of one group"
            return [Problem(text, Remedy("test examples of 2 groups or more, such as packages or documents"))]
        paired = len(frozenset.intersection(*(self.fit.seeds.get(label, frozenset()) for label in labels)))
        if paired < MIN_SEEDS and self.judging.noise is None:
            remedy = Remedy(f"{MIN_SEEDS} seeds (now {paired})", seeds=MIN_SEEDS)
            return [Problem(f"{paired} paired seeds, {MIN_SEEDS} needed", remedy)]
        if math.isnan(self.fit.sigma):
            return [Problem("the seed noise is not known: means of several seeds need final_test_nll_sd")]
        if not self.fit.sigma > 0:
            return [Problem("all seeds alike: no seed noise to judge by")]
        return []

    def _grid_problem(self, label: str, resolved: bool) -> Problem | None:
        """Return what the LRs of an arm lack for a minimum, or for an optimum. A minimum at the end of the LRs bounds
        the lowest loss from above, and its LR the optimal one from within."""
        grid = self.fit.grids.get(label)
        if grid is None:
            return Problem(f"{label}: no run finished")
        if len(grid.lrs) < MIN_LRS and grid.coarse is None:
            text = f"{label}: {len(grid.lrs)} LRs finished, {MIN_LRS} needed"
            return Problem(text, Remedy(f"{MIN_LRS} LRs of {label}"))

        def bounded(text: str, further: float) -> Problem:
            beyond: Bound = "below" if further > grid.lrs[grid.centre] else "above"
            known = label in self.fit.minima and self.fit.minima[label].known
            return Problem(text, _further_lr(label, further), None if not known else beyond if resolved else "above")

        if grid.edge is not None:
            return bounded(f"{label}: best LR at the edge of its grid", grid.edge)
        if grid.coarse is not None and resolved:
            text = f"{label}: no finished LR within a factor of {MAX_STEP} of the best"
            return Problem(text, _further_lr(label, grid.coarse))
        if label not in self.fit.minima:
            return Problem(f"{label}: its runs do not determine a minimum")
        optimum = self.fit.optima[label].value
        for end in np.log(grid.lrs[grid.centre]) + grid.reach:
            # Further seeds would not show how the loss goes on.
            if math.isclose(optimum, end, abs_tol=1e-6):
                return bounded(f"{label}: fitted optimum a step beyond its LRs", math.exp(end))
        minimum, (measured, error) = self.fit.minima[label].value, self.fit.measured[label]
        # Between LRs that are a factor of 2.4 apart, a parabola as steep as was measured falls by up to 0.9 margins of
        # SFT. A loss that is flat and then rises steeply seems to fall by more, as does an accuracy that breaks down.
        if measured - minimum > max(self.margin.value, 2 * error):
            text = f"fitted minimum {minimum:.4f}, but no LR has less than {measured:.4f}"
            if self.is_rl:
                text = f"fitted peak {1 - minimum:.3f}, but no LR has more than {1 - measured:.3f}"
            return Problem(f"{label}: {text}", _further_lr(label, math.exp(optimum)))
        return None

    def gap(self, arm: Arm, other: Arm) -> Estimate:
        """Return the fitted minimum of the test loss (in RL the error rate) of an arm minus that of another."""
        return self.fit.gap(arm_label(arm), arm_label(other))

    def decide(
        self,
        rule: Rule,
        estimate: Estimate,
        text: str,
        arms: Sequence[Arm],
        margin_rule: str,
        problems: Sequence[Problem] = (),
        resolved: bool = False,
        difference: bool = False,
    ) -> Finding:
        """Apply a rule to a number that follows from fitted minima of arms, or, if `resolved`, from their optimal LRs;
        `problems` are added to theirs. If it is the `difference` of two, a bound of it may decide."""
        problems = [*self.problems(arms, resolved), *problems]
        bounds = {problem.bound for problem in problems if difference}
        bound = bounds.pop() if len(bounds) == 1 else None
        return decide(rule, estimate, text, self.run_ids(arms), problems, margin_rule, bound)

    def gap_text(self, arm: Arm, other: Arm) -> str:
        """Return the gap as text, with the parts of its error."""
        gap = self.gap(arm, other)
        in_rl = with_interval(gap.value, *gap.interval(), 4, "+", " in error rate")
        number = in_rl if self.is_rl else nats(gap)
        text = f"{arm_label(arm)} - {arm_label(other)} = {number} at the fitted minima, {gap.n_seeds} seeds"
        if gap.example_part is None and gap.known:
            text += "; the error from test examples is not known"
        return text + self.fit.noise_text

    def judge_gap(self, rule: Callable[[float], Rule], arm: Arm, other: Arm) -> Finding:
        """Judge the gap of an arm to another by the rule that a function makes from the margin (`Within.margin`)."""
        margin, gap = self.margin, self.gap(arm, other)
        text, arms = self.gap_text(arm, other), [arm, other]
        return self.decide(rule(margin.value), gap, text, arms, margin.rule, margin.problems, difference=True)

    def equal_losses(self, arm: Arm, other: Arm, better_too: bool = False) -> Finding:
        """Judge whether the losses of two arms are the same within the margin, or the first's is lower if allowed."""
        return self.judge_gap(lambda margin: Within.margin(margin, better_too), arm, other)

    def worse(self, arm: Arm, other: Arm) -> Finding:
        """Judge whether the loss of an arm is above that of another by the margin or more."""
        return self.judge_gap(Above, arm, other)


def _further_lr(label: str, lr: float) -> Remedy:
    return Remedy(f"LR {lr:.2g} of {label}", lrs=((label, lr),))


def comparisons(runs: pd.DataFrame, curves: pd.DataFrame, judging: Judging | None = None) -> list[Comparison]:
    """Return the comparisons that a table `runs` holds, one per model, dataset, batch size and length, with their
    curves; an arm with two runs of one LR and seed is refused (see `check_runs`)."""
    check_runs(runs)
    runs = with_arm_columns(runs)
    # Runs at several batch sizes pass once over the same data, so their steps follow from the batch size.
    varied = runs.groupby(["model", "dataset"])[["batch_size", "steps"]].nunique().gt(1).any()
    parts = []
    for (model, dataset, batch_size, steps), rows in runs.groupby(COMPARED, dropna=False):
        setting = f" batch {batch_size}" if varied["batch_size"] else f" {steps} steps" if varied["steps"] else ""
        points = curves_of(curves, rows)
        parts.append(Comparison(f"{model}/{dataset}{setting}", rows, points, judging or Judging()))
    return parts


def require(*arms: tuple[str, Arm | None]) -> list[Arm]:
    """Return the arms that a claim compares, given each after its name, None where the tables lack it; an UnjudgedError
    says if one is missing, with the verdict `not tested` if all are."""
    missing = [name for name, arm in arms if arm is None]
    if missing:
        verdict: Verdict = "not tested" if len(missing) == len(arms) else "inconclusive"
        raise UnjudgedError(verdict, f"no runs of {' and '.join(missing)}")
    return [arm for _, arm in arms if arm is not None]


def highest_and_full(comparison: Comparison) -> tuple[Arm, Arm]:
    """Return LoRA at the highest rank above 1, and FullFT; raise UnjudgedError if an arm is missing."""
    lora, fullft = require(("LoRA above rank 1", comparison.highest), ("FullFT", comparison.fullft))
    return lora, fullft
