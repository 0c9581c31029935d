"""Claims C5 to C8: which of LoRA's hyperparameters are redundant."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from lorabench.analysis.early import train_curves
from lorabench.analysis.finding import (
    MIN_SEEDS,
    Finding,
    UnjudgedError,
    Verdict,
    finding,
    together,
    within,
    worst,
)
from lorabench.analysis.invariances import (
    CONFIGURATION,
    PAIR_SETTING,
    differences,
    invariance_pairs,
    move_times,
    ratio_of_means,
    tenfold_pairs,
)
from lorabench.analysis.slopes import log_log
from lorabench.claims.claim import Claim
from lorabench.claims.scopes import on_lora
from lorabench.utils.formats import fixed_interval

_PAIRS = "LoRA runs of one rank, length and seed, Adam's epsilon near 0"

TRAJECTORY_STEPS = 50
"""The number of steps over which equivalent runs are compared."""

IDENTICAL = 1e-5
"""The difference of two training losses, in nats per token, below which they are numerically the same."""

ZERO_EPS = 1e-12
"""The epsilon of Adam up to which it counts as 0, which the invariances assume."""

SLOPE_STEPS = 5
"""The number of steps over which the initial slope is taken."""

SLOPE_BAND = (0.98, 1.02)
"""The ratios of two initial slopes that count as equal."""

STILL = 0.1
"""The movement of A, as a share of its initial norm, up to which A counts as still."""

TIME_BAND = (0.8, 1.2)
"""The exponents of the time until A has moved, against init_A / LR_A, that count as 1."""

MIN_TIMES = 3
"""The number of values of init_A / LR_A that this exponent needs."""

MIN_TIMES_RANGE = 4
"""The factor between the largest and the smallest of these values that the exponent needs."""


def _named(pair: pd.Series[Any], speed: str) -> str:
    alpha, init_a, lr, ratio = (pair[f"{name}_{speed}"] for name in CONFIGURATION)
    return f"alpha {alpha:g} init x{init_a:g} LR_A {lr:g} LR_B/LR_A {ratio:g}"


def equivalent_trajectories(lora: pd.DataFrame, curves: pd.DataFrame, plus: bool = False) -> Finding:
    """C5, C8: judge the largest difference of training NLL of equivalent runs, beside that of other runs.

    Args:
        lora: the LoRA runs of one model and dataset.
        curves: the table `curves`.
        plus: whether to take only pairs in which one run has unequal LRs of A and B and the other has equal ones.
    """
    pairs = invariance_pairs(lora, plus)
    if pairs.empty:
        raise UnjudgedError("not tested", "no runs that should be equivalent")
    last = differences(pairs, curves, TRAJECTORY_STEPS).groupby("pair").last()
    equal, control = last[last["equivalent"]], last[~last["equivalent"]]
    if equal.empty:
        raise UnjudgedError("not tested", "no training losses of runs that should be equivalent")
    furthest = equal.sort_values("difference").iloc[-1]
    largest, eps = float(furthest["difference"]), float(furthest["eps"])
    at_eps = "" if math.isnan(eps) else f", eps {eps:g}"
    text = (
        f"{len(equal)} equivalent pairs of runs differ by at most {largest:.2g} nats (r{furthest['rank']}, "
        f"{_named(furthest, 'fast')} and {_named(furthest, 'slow')}{at_eps}) over {equal['step'].min()} steps"
    )
    problems = []
    if len(equal) < int(pairs["equivalent"].sum()):
        problems.append("some equivalent pairs have no training losses")
    verdict: Verdict = "confirmed" if largest < IDENTICAL else "contradicted"
    if equal["step"].min() < TRAJECTORY_STEPS and verdict == "confirmed":
        problems.append(f"fewer than {TRAJECTORY_STEPS} steps in common")
    if verdict == "contradicted" and not eps <= ZERO_EPS:
        problems.append("epsilon is not near the zero that the argument is about")
    if control.empty:
        problems += ["no pair that should differ"] if verdict == "confirmed" else []
    else:
        nearest = float(control["difference"].min())
        text += f"; {len(control)} other pairs by at least {nearest:.2g}"
        if verdict == "confirmed" and not nearest > max(largest, IDENTICAL):
            problems.append("runs that should differ do not, so the measure can't tell them apart")
    run_ids = last[["run_id_fast", "run_id_slow"]].to_numpy().ravel()
    return finding(run_ids, text, verdict, problems, largest, strain=largest)


C5 = Claim(
    id="C5",
    kind="theory",
    statement="Two of the four hyperparameters alpha, init_A, LR_A, LR_B are redundant",
    figure="text",
    criterion=(
        "Runs with the same alpha * init_A * LR_B and the same init_A / LR_A, all else equal, have training losses "
        f"that differ by less than {IDENTICAL:g} nats over the first {TRAJECTORY_STEPS} steps, and all pairs in which "
        "one of the two products differs, the control, differ by more. Judged at the smallest epsilon in the tables; "
        f"above {ZERO_EPS:g}, a difference does not contradict"
    ),
    needs=f"{_PAIRS}, that are equivalent, and some that are not",
    paper_value="exact; derived",
    unit="nats per token",
    experiments=("parametrization",),
    judge=on_lora(equivalent_trajectories),
    core=True,
)


def plus_trajectories(lora: pd.DataFrame, curves: pd.DataFrame) -> Finding:
    """C8: judge as C5 the pairs in which one run has unequal LRs of A and B and the other has equal ones."""
    return equivalent_trajectories(lora, curves, plus=True)


C8 = Claim(
    id="C8",
    kind="theory",
    statement="LoRA+ (a larger LR of B) and a larger alpha are equivalent to a change of init_A / LR_A",
    figure="text",
    criterion=(
        "The criterion of C5 holds for the pairs in which one run has unequal LRs of A and B and the other, with "
        "another alpha, init_A or LR, has equal ones"
    ),
    needs=f"{_PAIRS}, that are equivalent with LR_B/LR_A other than 1 and equal to 1",
    paper_value="exact; derived",
    unit="nats per token",
    experiments=("parametrization",),
    judge=on_lora(plus_trajectories),
)


def _falls(lora: pd.DataFrame, curves: pd.DataFrame) -> pd.Series[float]:
    """Return the validation NLL before training minus that at the last point up to step SLOPE_STEPS, by run.

    Training losses of single steps would not do: they differ more between batches than over so few updates.
    """
    losses = train_curves(lora[["run_id"]], curves, split="validation")
    early = losses[losses["step"] <= SLOPE_STEPS].groupby("run_id")
    points = early.agg(first=("step", "min"), last=("step", "max"), before=("value", "first"), after=("value", "last"))
    points = points[(points["first"] == 0) & (points["last"] > 0)]
    return (points["before"] - points["after"]).astype(float)


def _moved_by(lora: pd.DataFrame, curves: pd.DataFrame, step: int) -> pd.Series[float]:
    """Return the movement of A by run, at the first recorded step from `step` on."""
    moved = train_curves(lora[["run_id"]], curves, "a_moved")
    return moved[moved["step"] >= step].groupby("run_id")["value"].first().astype(float)


def _slope_of(of_pair: pd.DataFrame, moved: pd.Series[float]) -> Finding:
    """Judge one pair of configurations, over seeds."""
    first = of_pair.iloc[0]
    ratio, low, high = ratio_of_means(of_pair["fast"].to_numpy(float), of_pair["slow"].to_numpy(float))
    a_moved = of_pair["run_id_fast"].map(moved).max()
    text = (
        f"r{first['rank']} {_named(first, 'fast')}: {ratio:.3f} {fixed_interval(low, high, 3)} of the fall of "
        f"{_named(first, 'slow')} over {len(of_pair)} seeds"
    )
    problems = []
    if len(of_pair) < MIN_SEEDS:
        problems.append(f"{len(of_pair)} paired seeds, {MIN_SEEDS} needed")
    if math.isnan(ratio):
        problems.append("the loss does not fall")
    verdict = within(low, high, SLOPE_BAND)
    if not math.isnan(a_moved):
        text += f", A moved by {a_moved:.2g}"
    run_ids = [*of_pair["run_id_fast"], *of_pair["run_id_slow"]]
    return finding(run_ids, text, verdict, problems, ratio, (low, high), abs(ratio - 1))


def same_initial_slope(lora: pd.DataFrame, curves: pd.DataFrame) -> Finding:
    """C6: judge the first fall of the validation loss where LR_A alone is ten times as large."""
    pairs = tenfold_pairs(lora)
    if pairs.empty:
        raise UnjudgedError("not tested", "no runs that differ tenfold in init_a/LR_A alone")
    falls = _falls(lora, curves)
    both = pairs.assign(fast=pairs["run_id_fast"].map(falls), slow=pairs["run_id_slow"].map(falls))
    both = both.dropna(subset=["fast", "slow"])
    if both.empty:
        raise UnjudgedError("not tested", f"no validation losses at step 0 and up to step {SLOPE_STEPS}")
    names = [f"{name}_{speed}" for name in CONFIGURATION for speed in ("fast", "slow")]
    all_pairs = [of_pair for _, of_pair in both.groupby([*PAIR_SETTING, *names], dropna=False)]
    # The claim is about the time before A moves. A pair whose movement was not recorded is judged.
    moved = _moved_by(lora, curves, SLOPE_STEPS)
    still = [of_pair for of_pair in all_pairs if not of_pair["run_id_fast"].map(moved).max() > STILL]
    left_out = (
        f"{len(all_pairs) - len(still)} pairs left out, whose A moved by more than {STILL:.0%} in {SLOPE_STEPS} steps"
    )
    if not still:
        raise UnjudgedError("inconclusive", left_out)
    findings = [_slope_of(of_pair, moved) for of_pair in still]
    # There may be dozens of pairs, so the reason counts their verdicts.
    counts = pd.Series([judged.verdict for judged in findings]).value_counts()
    verdicts = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    return replace(together(findings), reason=f"{worst(findings).reason}; pairs in all: {verdicts}; {left_out}")


C6 = Claim(
    id="C6",
    kind="theory",
    statement="The initial slope of the curve is set by alpha * init_A * LR_B; LR_A does not matter at first",
    figure="text",
    criterion=(
        f"The measure is the fall of the validation loss over the first {SLOPE_STEPS} steps of runs whose LR_A is at "
        "least ten times as large, so that init_A / LR_A is a tenth or less, over that of runs with the same alpha * "
        f"init_A * LR_B. The 95% interval of this ratio of means, paired by seed, lies within {SLOPE_BAND[0]:g} to "
        f"{SLOPE_BAND[1]:g}. Pairs whose A has moved by more than {STILL:.0%} of its norm by then are left out, since "
        "the claim is about the time before A moves"
    ),
    needs=f"{_PAIRS}, with LR_A tenfold and the same LR_B; {MIN_SEEDS} seeds",
    paper_value="irrelevant while B is 0; derived",
    unit="ratio",
    experiments=("parametrization",),
    judge=on_lora(same_initial_slope),
)


def time_scale_of_a(lora: pd.DataFrame, curves: pd.DataFrame) -> Finding:
    """C7: judge the steps until A has moved by its own norm, as a power of init_A / LR_A."""
    times = move_times(lora, curves)
    if times.empty:
        raise UnjudgedError("not tested", "no a_moved in the curves")
    # The seeds of one configuration make one point of the line.
    cells = times.groupby([*PAIR_SETTING, *CONFIGURATION], dropna=False).agg(
        time=("time_scale", "first"), step=("step", lambda steps: math.exp(np.log(steps).mean(skipna=False)))
    )
    reached = cells.dropna()
    if reached.empty:
        raise UnjudgedError("inconclusive", f"A did not move by its own norm in any of {len(cells)} configurations")
    line = log_log(reached["time"], reached["step"])
    n_times = reached["time"].map(lambda value: f"{value:.6g}").nunique()
    text = (
        f"steps until A has moved by its own norm go as (init_a/LR_A) to the power {line.slope:.2f} "
        f"{fixed_interval(line.low, line.high, 2)}, {line.n} configurations with {n_times} time scales"
    )
    left_out = len(cells) - len(reached)
    if left_out:
        text += f"; {left_out} left out, in which A did not get there in every seed, or did before the first record"
    problems = []
    if n_times < MIN_TIMES or reached["time"].max() < MIN_TIMES_RANGE * reached["time"].min():
        problems.append(f"{MIN_TIMES} time scales over a factor of {MIN_TIMES_RANGE} needed")
    verdict = within(line.low, line.high, TIME_BAND)
    run_ids = times.loc[times["step"].notna(), "run_id"]
    return finding(run_ids, text, verdict, problems, line.slope, (line.low, line.high), abs(line.slope - 1))


C7 = Claim(
    id="C7",
    kind="theory",
    statement="init_A / LR_A sets the number of steps until A has moved from its initial value",
    figure="text",
    criterion=(
        "The log-log slope against init_A / LR_A of the steps until ||A - A0|| / ||A0|| reaches 1 has a 95% interval "
        f"within {TIME_BAND[0]:g} to {TIME_BAND[1]:g}. The movement is a mean over layers, the steps are interpolated "
        "on log axes between recorded steps, and their logs are averaged over seeds. Runs in which A does not move so "
        "far are left out"
    ),
    needs=(
        f"LoRA with {MIN_TIMES} values of init_A / LR_A over a factor of {MIN_TIMES_RANGE}, long enough for A to move"
    ),
    paper_value="proportional; derived",
    unit="exponent",
    experiments=("parametrization",),
    judge=on_lora(time_scale_of_a),
)

CLAIMS = (C5, C6, C7, C8)
