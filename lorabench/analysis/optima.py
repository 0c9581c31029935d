"""At the fitted optima of arms: ratios of LRs, seed noise, curves, and the step at which one curve leaves another.

Half a step of a grid costs about as much as the margin of a loss. Where enough seeds have the three LRs around the
optimum, their curves are therefore interpolated there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.special import ndtri

from lorabench.analysis.alpha_rules import judged_arms
from lorabench.analysis.arms import arm_label, kept
from lorabench.analysis.comparison import NEEDED_BY, Arm, Comparison, Judging, comparisons
from lorabench.analysis.curves import LrError, PairedCurves, curves_by_seed, log_windows, paired
from lorabench.analysis.estimate import N_DRAWS, Estimate, normal
from lorabench.analysis.finding import MIN_SEEDS, Finding, exponential, in_unit
from lorabench.analysis.loss_fit import Noise
from lorabench.analysis.memorisation import is_memorisation
from lorabench.analysis.rules import LEVEL, Problem, Remedy, Rule
from lorabench.errors import UserError
from lorabench.store.checks import is_rl
from lorabench.utils.formats import with_interval

PAPER_RATIO = 10.0
"""The ratio of optimal LRs, LoRA over FullFT, that the paper gives."""

WINDOWS = 8
"""The number of windows of steps, equally long on a logarithmic axis, in which a departure is sought."""

MAX_LOST = 0.1
"""The share of an effect that the distances of two arms from their optimal LRs may add to it."""


def mean_lr(schedule: object) -> float:
    """Return the mean LR of a run over its highest, by the name of its schedule: a half where it falls to zero on a
    line or a cosine."""
    return 0.5 if str(schedule).startswith(("linear", "cosine")) else 1.0


@kept
def _around(comparison: Comparison, arm: Arm) -> pd.DataFrame | None:
    """Return the runs at the three LRs around the fitted optimum of an arm, of the seeds that have all three, if any.
    The columns 0 to 2 are the weights with which losses give the coefficients of a parabola through them: the value at
    the optimum, and the coefficients of the distance from it in ln LR and of its square."""
    label = arm_label(arm)
    grid, fitted, runs = comparison.fit.grids.get(label), comparison.fit.optima.get(label), comparison.rows[label]
    if grid is None or fitted is None or len(grid.window) < 3:
        return None
    lrs = grid.lrs[grid.window]
    distance = np.log(lrs) - fitted.value
    around = np.sort(np.argsort(np.abs(distance), kind="stable")[:3])
    powers = pd.DataFrame(np.linalg.inv(np.vander(distance[around], increasing=True)).T, lrs[around])
    runs = runs[(runs["status"] == "done") & runs["lr"].isin(powers.index)]
    complete = runs[runs.groupby("seed")["lr"].transform("nunique") == 3]
    return None if complete.empty else complete.join(powers, on="lr")


@kept
def runs_at_optimum(comparison: Comparison, arm: Arm) -> pd.DataFrame:
    """Return the finished runs of an arm that stand for it at its fitted optimum, with a column weight: those of a
    parabola in ln LR (see `_around`) if MIN_SEEDS seeds have the three LRs around it, which sum to 1 for each seed, and
    otherwise 1, of the runs of `Comparison.at_optimum`."""
    around = _around(comparison, arm)
    if around is not None and around["seed"].nunique() >= MIN_SEEDS:
        return around.drop(columns=[1, 2]).rename(columns={0: "weight"})
    return comparison.at_optimum(arm).assign(weight=1.0)


@kept
def curves_at_optimum(comparison: Comparison, arm: Arm) -> pd.DataFrame:
    """Return the training NLL of an arm at its fitted optimum: a row for each step and a column for each seed."""
    return curves_by_seed(runs_at_optimum(comparison, arm), comparison.points("train", "nll"))


@kept
def lr_error(comparison: Comparison, arm: Arm) -> LrError | None:
    """Return what the error of an arm's optimal LR does to its training NLL there, by a parabola through the three LRs
    around it, as a mean over the seeds that have them; None if no seed has."""
    around = _around(comparison, arm)
    if around is None:
        return None
    points, optimum = comparison.points("train", "nll"), comparison.fit.optima[arm_label(arm)]
    by_power = (curves_by_seed(around.assign(weight=around[power]), points).mean(axis=1) for power in (1, 2))
    return LrError(optimum.draws - optimum.value, pd.concat(by_power, axis=1))


@kept
def pair_at_optimum(comparison: Comparison, arm: Arm, other: Arm) -> PairedCurves:
    """Pair the training NLL of two arms, each at its fitted optimum (see `runs_at_optimum`), whose error they carry."""
    runs, others = runs_at_optimum(comparison, arm), runs_at_optimum(comparison, other)
    name = f"{comparison.label} {arm_label(arm)} - {arm_label(other)}"
    apart = paired(runs, others, curves_at_optimum(comparison, arm), curves_at_optimum(comparison, other), name)
    return replace(apart, lr_errors=lr_errors(comparison, arm, other))


def lr_errors(comparison: Comparison, arm: Arm, other: Arm) -> tuple[LrError, ...]:
    """Return what the errors of two arms' optimal LRs do to the training NLL of the first minus that of the other."""
    own, others = lr_error(comparison, arm), lr_error(comparison, other)
    negative = None if others is None else replace(others, by_power=-others.by_power)
    return tuple(error for error in (own, negative) if error is not None)


def coupled(short: Comparison, full: Comparison, from_short: Estimate, from_full: Estimate, name: str) -> Estimate:
    """Couple the error of a number from the losses at the end to that of one from the losses at a step of these runs.

    The errors are correlated as the residuals of the runs are. The lower end of the 68% interval of their correlation
    is taken, since a large one makes the difference of the numbers look precise, times the share of runs that both fits
    have; no less than 0. The number from the end is returned with draws whose ranks have this correlation.
    """
    if not (from_short.known and from_full.known):
        return from_full
    parts = []
    for part in (short, full):
        off = []
        for label, run_ids in part.fit.run_ids.items():
            rows, (optimum, minimum) = part.rows[label].set_index("run_id").loc[list(run_ids)], part.fit.lowest[label]
            distance = np.log(rows["lr"].astype(float)) - optimum
            parabola = minimum + part.fit.curvature[label] * distance**2
            off.append(rows[["seed"]].assign(residual=rows["final_test_nll"].astype(float) - parabola))
        by_run = pd.concat(off)
        parts.append(by_run["residual"] - by_run.groupby("seed")["residual"].transform("mean"))
    residuals = pd.concat(parts, axis=1).to_numpy()
    common = residuals[np.isfinite(residuals).all(1)]
    products = common.T @ common
    squares = float(products[0, 0] * products[1, 1])
    dof, correlation = min(short.fit.dof, full.fit.dof), 0.0
    if dof >= 2 and squares > 0:
        # No correlation above 0.999 is believed.
        lower = math.tanh(math.atanh(min(products[0, 1] / math.sqrt(squares), 0.999)) - 1 / math.sqrt(dof - 1))
        correlation = max(0.0, lower) * len(common) / len(residuals)
    scores = ndtri((from_short.seed_part.argsort(kind="stable").argsort() + 0.5) / N_DRAWS)
    scores = correlation * scores + math.sqrt(1 - correlation**2) * normal(f"coupled {name}")
    return replace(from_full, seed_part=np.sort(from_full.seed_part)[scores.argsort(kind="stable").argsort()])


def in_window(comparison: Comparison, low: int, high: int) -> Comparison:
    """Return the comparison by the mean training NLL of each run from one step to another, whose fitted minima are the
    envelopes there (docs/estimates.md). A run that diverged later counts, and one that had diverged by then bounds the
    lowest loss; other runs without all of these steps are left out."""
    points = comparison.points("train", "nll")
    inside = points[points["step"].between(low, high)].astype({"value": float}).groupby("run_id")["value"]
    means = inside.mean()[inside.size() == inside.size().max()]
    loss = comparison.runs["run_id"].map(means).astype(float)
    known = np.isfinite(loss)
    loss, status = loss.where(known), comparison.runs["status"].mask(known, "done")
    runs = comparison.runs.assign(status=status, final_valid_nll=loss, final_test_nll=loss)
    # The losses by test example, and seed noise from elsewhere, are those of final losses.
    judging = Judging(comparison.judging.margins)
    return Comparison(comparison.label, runs[known | (runs["status"] == "diverged")], comparison.curves, judging)


def seeds_at_best(comparison: Comparison, arms: Sequence[Arm]) -> list[Problem]:
    """Return a problem for each arm whose LR nearest to its fitted optimum has fewer than MIN_SEEDS seeds."""
    problems = []
    for label in map(arm_label, arms):
        runs, fitted = comparison.rows[label], comparison.fit.optima.get(label)
        if fitted is not None:
            seeds = runs[runs["status"] == "done"].groupby("lr")["seed"].nunique()
            lr = min(seeds.index, key=lambda lr: abs(math.log(lr) - fitted.value))
            if seeds[lr] < MIN_SEEDS:
                remedy = Remedy(f"{MIN_SEEDS} seeds at LR {lr:.2g} of {label}", MIN_SEEDS)
                problems.append(Problem(f"{label}: {seeds[lr]} seeds at LR {lr:.2g}, the best there", remedy))
    return problems


def off_optimum(comparison: Comparison, arm: Arm, other: Arm, effect: float) -> list[Problem]:
    """Return the reasons against comparing the curves of two arms at the LRs that they are from; `effect` is the least
    difference that matters to the comparison, in nats per token."""
    added = 0.0
    for compared, sign in ((arm, 1), (other, -1)):
        label, runs = arm_label(compared), runs_at_optimum(comparison, compared)
        # A curve that is interpolated at the optimum adds nothing.
        if label in comparison.fit.lowest and len(runs) and (runs["weight"] == 1.0).all():
            off = math.log(float(runs["lr"].iloc[0])) - comparison.fit.lowest[label][0]
            added += sign * comparison.fit.curvature[label] * off**2
    if not abs(added) > MAX_LOST * effect:
        return []
    labels = f"{arm_label(arm)} and {arm_label(other)}"
    text = f"{labels}: the LRs of their curves, which are not the fitted optima, add {added:.4f} nats to the gap"
    remedy = Remedy(f"{MIN_SEEDS} seeds at the three LRs around the optima of {labels}", MIN_SEEDS, around=True)
    return [Problem(text, remedy)]


@dataclass(frozen=True)
class Departure:
    """Whether and where a curve leaves another for good; the steps are None if it has not left."""

    growth: Estimate | None
    """The slope of the gap per tenfold steps from there on, or from where it stays above to the end, if it does."""
    first: int | None = None
    """The first step of the window from which it has left."""
    before: int | None = None
    """The first step of the window before, if any."""
    past: int | None = None
    """The first step of the window after: the steps of the one that was chosen are no evidence of what comes after."""

    @property
    def left(self) -> bool:
        """Whether it has left."""
        return self.first is not None


def paired_departure(curves: PairedCurves, margin: float) -> Departure:
    """Find where one arm's loss leaves another's for lack of capacity, given their difference and the margin.

    The gap must lie above the margin in each window to the end, with an interval above 0 for all at once. LoRA starts
    slowly, since B is zero; so the departure is the window with the smallest gap of these, but not the last, from which
    on the gap must grow.
    """
    windows = log_windows(curves.by_seed.index, WINDOWS)
    level = 1 - LEVEL / max(1, len(windows))
    means = curves.means(windows)
    above = [gap.known and gap.value >= margin and gap.interval(level)[0] > 0 for gap in means]
    if not above or not above[-1]:
        return Departure(None)
    start, last = len(above) - above[::-1].index(False) if False in above else 0, len(windows) - 1
    if start < last:
        place = min(range(start, last), key=lambda index: means[index].value)
        growth = curves.slope(windows[place][0])
        # The lowest of several windows gives a slope that noise alone makes larger, so the level is divided by them.
        if growth.known and growth.interval(1 - LEVEL / (last - start))[0] > 0:
            before = windows[place - 1][0] if place else None
            return Departure(growth, windows[place][0], before, windows[place + 1][0])
    return Departure(curves.slope(windows[start][0]))


def log_threshold(curves: PairedCurves, departure: Departure, margin: float) -> Estimate | str:
    """Estimate log10 of the step at which a rank runs out of capacity, or return as text why there is none: where its
    gap to the highest rank (`curves`) reaches the margin, on a line against log10(step) from the window after that of
    the departure on. A line that surely does so before the window before the departure does not describe the gap."""
    if departure.first is None:
        return "does not leave"
    if departure.before is None or departure.past is None:
        return "never joined"
    crossing = curves.crossing(departure.past, margin)
    if not crossing.known:
        return "does not go on leaving after its departure"
    if crossing.interval()[1] < math.log10(departure.before):
        return "does not leave along a line in log(step)"
    return crossing


def tokens_at(comparison: Comparison, arm: Arm, step: float) -> float:
    """Return the training tokens of an arm's runs at its optimum up to a step, interpolated; NaN if not recorded."""
    curves = comparison.curves
    if "tokens" not in curves:
        return math.nan
    ids = runs_at_optimum(comparison, arm)["run_id"]
    points = curves[curves["run_id"].isin(ids) & (curves["split"] == "train")]
    tokens = points.groupby("step")["tokens"].max().astype(float)
    return float(np.interp(step, [0, *tokens.index], [0.0, *tokens]))


def pooled_noise(runs: pd.DataFrame, source: str) -> Noise:
    """Return the seed noise of supervised runs: each `LossFit`'s variance, weighted by its degrees of freedom. Random
    facts are left out, since the loss on memorized text varies far more. `source` says where the runs are from; a
    UserError, if the table lacks a column or no comparison has two seeds."""
    if missing := [name for name in NEEDED_BY["sft"] if name not in runs]:
        raise UserError(f"{source}: the runs table has no column {', '.join(missing)}, so its seed noise is not known")
    chosen = runs[~is_rl(runs) & judged_arms(runs) & ~is_memorisation(runs)]
    repeated = [part for part in comparisons(chosen, pd.DataFrame()) if part.runs["seed"].nunique() > 1]
    fits = [part.fit for part in repeated if part.fit.dof >= 1 and part.fit.sigma > 0]
    dof = sum(fit.dof for fit in fits)
    if dof < 1:
        raise UserError(f"{source}: no comparison has repeated seeds, so its seed noise is not known")
    sigma = math.sqrt(sum(fit.sigma**2 * fit.dof for fit in fits) / dof)
    number = f"{len(fits)} comparison" + ("s" if len(fits) > 1 else "")
    return Noise.borrowed(sigma, dof, f"{source} (SD {sigma:.4f} nats, {dof} degrees of freedom, {number})")


def ratio_interval(log_ratio: Estimate) -> tuple[float, float]:
    """Return the 95% interval of a ratio, from the estimate of its logarithm."""
    low, high = log_ratio.interval()
    return exponential(low), exponential(high)


def in_words(log_ratio: Estimate) -> str:
    """Return a ratio with its 95% interval as text, from the estimate of its logarithm."""
    return with_interval(exponential(log_ratio.value), *ratio_interval(log_ratio), 2)


def ratio_text(comparison: Comparison, arm: Arm, other: Arm) -> str:
    """Return the ratio of two optimal LRs with its interval and both LRs as text."""
    labels, fit = (arm_label(arm), arm_label(other)), comparison.fit
    both = " / ".join(f"{math.exp(fit.optima[label].value):.2g}" if label in fit.optima else "?" for label in labels)
    return f"optimal LR {' / '.join(labels)} = {in_words(fit.log_ratio(*labels))} ({both}){fit.noise_text}"


def as_ratio(judged: Finding) -> Finding:
    """Return a finding on the logarithm of a ratio with its numbers as ratios."""
    return replace(in_unit(judged, exponential), detectable=exponential(judged.detectable))


def judge_ratio(comparison: Comparison, arm: Arm, other: Arm, rule: Rule, margin_rule: str = "") -> Finding:
    """Judge the ratio of the optimal LRs of two arms by a rule on its natural logarithm; the finding has ratios."""
    log_ratio = comparison.fit.log_ratio(arm_label(arm), arm_label(other))
    text, arms = ratio_text(comparison, arm, other), [arm, other]
    return as_ratio(comparison.decide(rule, log_ratio, text, arms, margin_rule, resolved=True, difference=True))
