"""Claims C5 to C8: which of LoRA's hyperparameters are redundant."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from lorabench.analysis.claims.claim import Claim
from lorabench.analysis.claims.scopes import (
    on_lora,
)
from lorabench.analysis.early import train_curves
from lorabench.analysis.finding import (
    MIN_SEEDS,
    Finding,
    UnjudgedError,
    Verdict,
    finding,
    interval_text,
    together,
    within,
    worst,
)
from lorabench.analysis.parametrization import (
    CONFIGURATION,
    SETTING,
    differences,
    invariance_pairs,
    move_times,
    ratio_of_means,
    tenfold_pairs,
)
from lorabench.analysis.slopes import log_log

_PAIRS = "LoRA runs of one rank, length and seed, Adam's epsilon near 0"


TRAJECTORY_STEPS = 50
"""Over which equivalent runs are compared (C5, C8)."""


IDENTICAL = 1e-5
"""Nats per token below which two training losses are the same to numerical precision."""


ZERO_EPS = 1e-12
"""Adam's epsilon up to which it counts as the zero of the invariance argument."""


SLOPE_STEPS = 5
"""Over which the initial slope is taken (C6)."""


STILL = 0.1
"""Movement of A, in its initial norm, below which A is still where it started."""


def _named(pair: pd.Series[Any], speed: str) -> str:
    alpha, init_a, lr, ratio = (pair[f"{name}_{speed}"] for name in CONFIGURATION)
    return f"alpha {alpha:g} init x{init_a:g} LR_A {lr:g} LR_B/LR_A {ratio:g}"


def equivalent_trajectories(lora: pd.DataFrame, curves: pd.DataFrame, plus: bool = False) -> Finding:
    """C5, C8: largest difference of the training NLL of runs that should be one run, against runs that should not.

    Args:
        plus: only pairs of which one has unequal LRs of A and B and the other does not.
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
            problems.append("runs that should differ do not, so the measure can't tell")
    run_ids = last[["run_id_fast", "run_id_slow"]].to_numpy().ravel()
    return finding(run_ids, text, verdict, problems, largest, strain=largest)


C5 = Claim(
    id="C5",
    kind="theory",
    statement="Two of the four hyperparameters alpha, init_A, LR_A, LR_B are redundant",
    figure="text",
    criterion=(
        "Runs with the same alpha * init_A * LR_B and init_A / LR_A, all else equal, have training losses that "
        f"differ by less than {IDENTICAL:g} nats over the first {TRAJECTORY_STEPS} steps; all pairs of which one "
        "of the two differs, the control, differ by more. At the smallest epsilon in the tables; above "
        f"{ZERO_EPS:g}, a difference does not contradict"
    ),
    needs=f"{_PAIRS}, that are equivalent, and some that are not",
    paper_value="exact; derived",
    unit="nats per token",
    experiments=("parametrization",),
    judge=on_lora(equivalent_trajectories),
    core=True,
)


def plus_trajectories(lora: pd.DataFrame, curves: pd.DataFrame) -> Finding:
    """C8: as C5, for pairs of which one has unequal LRs of A and B and the other does not."""
    return equivalent_trajectories(lora, curves, plus=True)


C8 = Claim(
    id="C8",
    kind="theory",
    statement="LoRA+ (a larger LR of B) and a larger alpha are moves along init_A / LR_A",
    figure="text",
    criterion=(
        "As C5, for pairs of which one has unequal LRs of A and B and the other, with another alpha, init_A or LR, "
        "has equal ones"
    ),
    needs=f"{_PAIRS}, that are equivalent with LR_B/LR_A other than 1 and equal to 1",
    paper_value="exact; derived",
    unit="nats per token",
    experiments=("parametrization",),
    judge=on_lora(plus_trajectories),
)


def _falls(lora: pd.DataFrame, curves: pd.DataFrame) -> pd.Series[float]:
    """Validation NLL before training minus that at the last point up to step SLOPE_STEPS, by run.

    Training losses of single steps would not do: their batches differ more than so few updates do.
    """
    losses = train_curves(lora[["run_id"]], curves, split="validation")
    early = losses[losses["step"] <= SLOPE_STEPS].groupby("run_id")
    points = early.agg(first=("step", "min"), last=("step", "max"), before=("value", "first"), after=("value", "last"))
    points = points[(points["first"] == 0) & (points["last"] > 0)]
    return (points["before"] - points["after"]).astype(float)


def _moved_by(lora: pd.DataFrame, curves: pd.DataFrame, step: int) -> pd.Series[float]:
    """Movement of A by a step, at the first recorded step that is not before it, by run."""
    moved = train_curves(lora[["run_id"]], curves, "a_moved")
    return moved[moved["step"] >= step].groupby("run_id")["value"].first().astype(float)


def _slope_of(of_pair: pd.DataFrame, moved: pd.Series[float]) -> Finding:
    """The finding on one pair of configurations, over seeds."""
    first = of_pair.iloc[0]
    ratio, low, high = ratio_of_means(of_pair["fast"].to_numpy(float), of_pair["slow"].to_numpy(float))
    a_moved = of_pair["run_id_fast"].map(moved).max()
    text = (
        f"r{first['rank']} {_named(first, 'fast')}: {ratio:.3f} {interval_text(low, high, 3)} of the fall of "
        f"{_named(first, 'slow')} over {len(of_pair)} seeds"
    )
    problems = []
    if len(of_pair) < MIN_SEEDS:
        problems.append(f"{len(of_pair)} paired seeds, {MIN_SEEDS} needed")
    if math.isnan(ratio):
        problems.append("the loss does not fall")
    verdict = within(low, high, (0.98, 1.02))
    if not math.isnan(a_moved):
        text += f", A moved by {a_moved:.2g}"
    run_ids = [*of_pair["run_id_fast"], *of_pair["run_id_slow"]]
    return finding(run_ids, text, verdict, problems, ratio, (low, high), abs(ratio - 1))


def same_initial_slope(lora: pd.DataFrame, curves: pd.DataFrame) -> Finding:
    """C6: fall of the training loss where LR_A alone is ten times as large."""
    pairs = tenfold_pairs(lora)
    if pairs.empty:
        raise UnjudgedError("not tested", "no runs that differ tenfold in init_a/LR_A alone")
    falls = _falls(lora, curves)
    both = pairs.assign(fast=pairs["run_id_fast"].map(falls), slow=pairs["run_id_slow"].map(falls))
    both = both.dropna(subset=["fast", "slow"])
    if both.empty:
        raise UnjudgedError("not tested", f"no validation losses at step 0 and up to step {SLOPE_STEPS}")
    names = [f"{name}_{speed}" for name in CONFIGURATION for speed in ("fast", "slow")]
    every = [of_pair for _, of_pair in both.groupby([*SETTING, *names], dropna=False)]
    # The claim is about the time before A moves. Where that was not recorded, a pair counts.
    moved = _moved_by(lora, curves, SLOPE_STEPS)
    still = [of_pair for of_pair in every if not of_pair["run_id_fast"].map(moved).max() > STILL]
    left_out = (
        f"{len(every) - len(still)} pairs left out, whose A moved by more than {STILL:.0%} in {SLOPE_STEPS} steps"
    )
    if not still:
        raise UnjudgedError("inconclusive", left_out)
    found = [_slope_of(of_pair, moved) for of_pair in still]
    # Not all reasons: there may be dozens.
    counts = pd.Series([one.verdict for one in found]).value_counts()
    told = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    return replace(together(found), reason=f"{worst(found).reason}; pairs in all: {told}; {left_out}")


C6 = Claim(
    id="C6",
    kind="theory",
    statement="The initial slope of the curve is set by alpha * init_A * LR_B; LR_A does not matter at first",
    figure="text",
    criterion=(
        f"Fall of the validation loss over the first {SLOPE_STEPS} steps of runs whose LR_A is at least ten times "
        "as large (init_A / LR_A a tenth) at the same alpha * init_A * LR_B: the 95% interval of the ratio of "
        "means, paired by seed, is within 0.98 to 1.02. Pairs whose A has moved by more than "
        f"{STILL:g} of its norm by then are left out: the claim is about the time before A moves"
    ),
    needs=f"{_PAIRS}, with LR_A tenfold and the same LR_B; {MIN_SEEDS} seeds",
    paper_value="irrelevant while B is 0; derived",
    unit="ratio",
    experiments=("parametrization",),
    judge=on_lora(same_initial_slope),
)


def time_scale_of_a(lora: pd.DataFrame, curves: pd.DataFrame) -> Finding:
    """C7: exponent of the steps until A has moved by its own norm, as a power of init_a/LR_A."""
    times = move_times(lora, curves)
    if times.empty:
        raise UnjudgedError("not tested", "no a_moved in the curves")
    # Seeds of one configuration are no further points of the line.
    cells = times.groupby([*SETTING, *CONFIGURATION], dropna=False).agg(
        time=("time_scale", "first"), step=("step", lambda steps: math.exp(np.log(steps).mean(skipna=False)))
    )
    reached = cells.dropna()
    if reached.empty:
        raise UnjudgedError("inconclusive", f"A did not move by its own norm in any of {len(cells)} configurations")
    line = log_log(reached["time"], reached["step"])
    n_times = reached["time"].map(lambda value: f"{value:.6g}").nunique()
    text = (
        f"steps until A has moved by its own norm go as (init_a/LR_A) to the power {line.slope:.2f} "
        f"{interval_text(line.low, line.high, 2)}, {line.n} configurations with {n_times} time scales"
    )
    left_out = len(cells) - len(reached)
    if left_out:
        text += f"; {left_out} left out, in which A did not get there in every seed, or did before the first record"
    problems = []
    if n_times < 3 or reached["time"].max() < 4 * reached["time"].min():
        problems.append("needs three time scales over a factor of 4")
    verdict = within(line.low, line.high, (0.8, 1.2))
    run_ids = times.loc[times["step"].notna(), "run_id"]
    return finding(run_ids, text, verdict, problems, line.slope, (line.low, line.high), abs(line.slope - 1))


C7 = Claim(
    id="C7",
    kind="theory",
    statement="init_A / LR_A sets the number of steps until A has moved from its initial value",
    figure="text",
    criterion=(
        "Log-log slope of the steps until ||A - A0|| / ||A0|| reaches 1 (mean over layers, interpolated on log "
        "axes between recorded steps, mean of logs over seeds) against init_A / LR_A: 95% interval within 0.8 to "
        "1.2. Runs that do not get there are left out"
    ),
    needs="LoRA with three values of init_A / LR_A over a factor of 4, long enough for A to move",
    paper_value="proportional; derived",
    unit="exponent",
    experiments=("parametrization",),
    judge=on_lora(time_scale_of_a),
)


CLAIMS = (
    C5,
    C6,
    C7,
    C8,
)
