"""Claims C5 to C8: which of LoRA's hyperparameters are redundant."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from lorabench.analysis.curves import train_curves
from lorabench.analysis.estimate import exact, ratio_of_means
from lorabench.analysis.finding import MIN_SEEDS, Finding, UnjudgedError, decide, together, worst
from lorabench.analysis.invariances import (
    CONFIGURATION,
    PAIR_SETTING,
    differences,
    invariance_pairs,
    move_times,
    tenfold_pairs,
)
from lorabench.analysis.rules import Problem, Remedy, Within
from lorabench.analysis.slopes import censored_slope
from lorabench.claims.claim import Evidence, claim, few_seeds, number
from lorabench.claims.scope import lora_runs

REDUNDANT = "Two of LoRA's four hyperparameters alpha, init_A, LR_A, LR_B are redundant"
"""The fact that several claims state."""

_PAIRS = "LoRA runs of one rank, length and seed, Adam's epsilon near 0"

# Bounds whose meaning the criteria say.
TRAJECTORY_STEPS = 50
IDENTICAL = 1e-5
SLOPE_STEPS = 5
STILL = 0.1
TIME_BAND = (0.8, 1.2)
MIN_TIMES = 3
MIN_TIMES_RANGE = 4

ZERO_EPS = 1e-12
"""The epsilon of Adam up to which it counts as 0, which the invariances assume."""

SLOPE_BAND = (0.98, 1.02)
"""The ratios of two initial slopes that count as equal: the losses of equal first updates differ by rounding and by
what little A has moved."""

TIME_ERROR = 0.05
"""The least standard deviation of the natural logarithm of a time until A has moved, since it is interpolated between
recorded steps."""


def _pairs(evidence: Evidence, plus: bool = False) -> list[tuple[str, tuple[pd.DataFrame, pd.DataFrame]]]:
    """Return the `invariance_pairs` of each model and dataset, and the table `curves`, after their name."""
    return [(name, (invariance_pairs(lora.runs, plus), lora.curves)) for name, lora in lora_runs(evidence)]


_claim = partial(claim, kind="derivation", experiments=("parametrization",), over=lora_runs)


def _named(pair: pd.Series[Any], speed: str) -> str:
    alpha, init_a, lr, ratio = (pair[f"{name}_{speed}"] for name in CONFIGURATION)
    return f"alpha {alpha:g} init x{init_a:g} LR_A {lr:g} LR_B/LR_A {ratio:g}"


@_claim(
    id="C5",
    statement="Two of the four hyperparameters alpha, init_A, LR_A, LR_B are redundant",
    criterion=(
        "Runs with the same alpha * init_A * LR_B and the same init_A / LR_A, all else equal, have training losses "
        f"that are the same within {IDENTICAL:g} nats, the precision of a loss, over the first {TRAJECTORY_STEPS} "
        "steps. All pairs in which one of the two differs are the control and must differ by more. Judged at the "
        f"smallest epsilon in the tables; above {ZERO_EPS:g}, a difference leaves the claim open"
    ),
    needs=f"{_PAIRS}, that are equivalent, and some that are not",
    paper_value="exact; derived",
    over=_pairs,
    fact=REDUNDANT,
    core=True,
)
@_claim(
    id="C8",
    statement="LoRA+ (a larger LR of B) and a larger alpha are equivalent to a change of init_A / LR_A",
    criterion=(
        "The criterion of C5 holds for the pairs in which one run has unequal LRs of A and B and the other, with "
        "another alpha, init_A or LR, has equal ones"
    ),
    needs=f"{_PAIRS}, that are equivalent with LR_B/LR_A other than 1 and equal to 1",
    paper_value="exact; derived",
    over=partial(_pairs, plus=True),
    fact=REDUNDANT,
)
def _equivalent_trajectories(tested: tuple[pd.DataFrame, pd.DataFrame]) -> Finding:
    pairs, curves = tested
    if pairs.empty:
        raise UnjudgedError("not tested", "no runs that should be equivalent")
    last = differences(pairs, curves, TRAJECTORY_STEPS).groupby("pair").last()
    equal, control = last[last["equivalent"]], last[~last["equivalent"]]
    if equal.empty:
        raise UnjudgedError("not tested", "no training losses of runs that should be equivalent")
    furthest, least = equal.sort_values("difference").iloc[-1], float(control["difference"].min())
    largest, eps, steps = float(furthest["difference"]), float(furthest["eps"]), equal["step"].min()
    at_eps = "" if math.isnan(eps) else f", eps {eps:g}"
    text = (
        f"{len(equal)} equivalent pairs of runs differ by at most {largest:.2g} nats (r{furthest['rank']}, "
        f"{_named(furthest, 'fast')} and {_named(furthest, 'slow')}{at_eps}) over {steps} steps"
    )
    text += f"; {len(control)} other pairs by at least {least:.2g}" if len(control) else ""
    problems = []
    if len(equal) < int(pairs["equivalent"].sum()):
        problems.append(Problem("some equivalent pairs have no training losses"))
    if largest > IDENTICAL and not eps <= ZERO_EPS:
        remedy = Remedy(f"runs with an epsilon of {ZERO_EPS:g} or less")
        problems.append(Problem("epsilon is not near the zero that the argument is about", remedy))
    if largest <= IDENTICAL and steps < TRAJECTORY_STEPS:
        remedy = Remedy(f"runs of {TRAJECTORY_STEPS} steps")
        problems.append(Problem(f"fewer than {TRAJECTORY_STEPS} steps in common", remedy))
    if largest <= IDENTICAL and control.empty:
        remedy = Remedy("a run that should differ, such as at another LR")
        problems.append(Problem("no pair that should differ", remedy))
    elif largest <= IDENTICAL and not least > IDENTICAL:
        problems.append(Problem("runs that should differ do not, so the measure can't tell them apart"))
    run_ids = last[["run_id_fast", "run_id_slow"]].to_numpy().ravel()
    margin_rule = "the numerical precision of a training loss"
    return decide(Within.margin(IDENTICAL), exact(largest), text, run_ids, problems, margin_rule)


@_claim(
    id="C6",
    statement="The initial slope of the curve is set by alpha * init_A * LR_B; LR_A does not matter at first",
    criterion=(
        f"The measure is the fall of the validation loss over the first {SLOPE_STEPS} steps of runs whose LR_A is at "
        "least ten times as large, so that init_A / LR_A is a tenth or less, over that of runs with the same alpha * "
        f"init_A * LR_B. In every pair this ratio of means, paired by seed, is between {SLOPE_BAND[0]:g} and "
        f"{SLOPE_BAND[1]:g}. Pairs whose A has moved by more than {STILL:.0%} of its norm by then are left out, since "
        "the claim is about the time before A moves"
    ),
    needs=f"{_PAIRS}, with LR_A tenfold and the same LR_B; {MIN_SEEDS} seeds",
    paper_value="irrelevant while B is 0; derived",
    unit="ratio",
)
def _same_initial_slope(lora: Evidence) -> Finding:
    pairs = tenfold_pairs(lora.runs)
    if pairs.empty:
        raise UnjudgedError("not tested", "no runs that differ tenfold in init_a/LR_A alone")
    # Validation losses, as training losses of single steps differ more between batches than over so few updates.
    losses = train_curves(lora.runs[["run_id"]], lora.curves, split="validation")
    early = losses[losses["step"] <= SLOPE_STEPS].groupby("run_id")
    points = early.agg(first=("step", "min"), last=("step", "max"), before=("value", "first"), after=("value", "last"))
    points = points[(points["first"] == 0) & (points["last"] > 0)]
    falls = (points["before"] - points["after"]).astype(float)
    # The claim is about the time before A moves. A pair whose movement was not recorded is judged.
    recorded = train_curves(lora.runs[["run_id"]], lora.curves, "a_moved")
    moved = recorded[recorded["step"] >= SLOPE_STEPS].groupby("run_id")["value"].first().astype(float)
    fast, slow = pairs["run_id_fast"], pairs["run_id_slow"]
    both = pairs.assign(fast=fast.map(falls), slow=slow.map(falls), moved=fast.map(moved))
    both = both.dropna(subset=["fast", "slow"])
    if both.empty:
        raise UnjudgedError("not tested", f"no validation losses at step 0 and up to step {SLOPE_STEPS}")
    names = [f"{name}_{speed}" for name in CONFIGURATION for speed in ("fast", "slow")]
    all_pairs = [pair for _, pair in both.groupby([*PAIR_SETTING, *names], dropna=False)]
    still = [pair for pair in all_pairs if not pair["moved"].max() > STILL]
    left_out = (
        f"{len(all_pairs) - len(still)} pairs left out, whose A moved by more than {STILL:.0%} in {SLOPE_STEPS} steps"
    )
    if not still:
        raise UnjudgedError("inconclusive", left_out, Remedy("the same pairs at a smaller LR_A"))
    findings = []
    for pair in still:
        name = f"r{pair['rank'].iloc[0]} {_named(pair.iloc[0], 'fast')}"
        other = _named(pair.iloc[0], "slow")
        ratio = ratio_of_means(pair["fast"].to_numpy(float), pair["slow"].to_numpy(float), f"{name} / {other}")
        text = f"{name}: {number(ratio, 3)} of the fall of {other} over {len(pair)} seeds"
        a_moved = pair["moved"].max()
        if not math.isnan(a_moved):
            text += f", A moved by {a_moved:.2g}"
        problems = few_seeds(len(pair)) + ([Problem("the loss does not fall")] if math.isnan(ratio.value) else [])
        run_ids = [*pair["run_id_fast"], *pair["run_id_slow"]]
        findings.append(decide(Within(*SLOPE_BAND), ratio, text, run_ids, problems, "a ratio of 1 within 2%"))
    # There may be dozens of pairs, so the reason counts their verdicts.
    counts = pd.Series([judged.verdict for judged in findings]).value_counts()
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return replace(together(findings), reason=f"{worst(findings).reason}; pairs in all: {verdicts}; {left_out}")


def _time_cells(times: pd.DataFrame) -> pd.DataFrame:
    """Return one time until A has moved for each setting, update scale and time scale.

    Runs that are equivalent are one cell, as are seeds. The log times of a cell are averaged; if A did not move that
    far in a run, or had done so by its first record, the mean is a bound as that run's limit is.

    Returns:
        The columns group (the number of the setting and update scale), time_scale, limit and bound (as of `move_times`)
        and run_ids.
    """
    scales = {name: times[name].map(lambda value: f"{value:.9g}") for name in ("update_scale", "time_scale")}
    keyed = times.assign(**{f"{name}_key": scale for name, scale in scales.items()})
    keyed["group"] = keyed.groupby([*PAIR_SETTING, "update_scale_key"], dropna=False, sort=False).ngroup()
    cells = keyed.groupby(["group", "time_scale_key"], as_index=False, sort=False).agg(
        time_scale=("time_scale", "first"),
        limit=("limit", lambda limits: math.exp(np.log(limits).mean())),
        lowest=("bound", "min"),
        highest=("bound", "max"),
        run_ids=("run_id", list),
    )
    # A mean of an upper and a lower bound bounds nothing.
    cells = cells[~((cells["lowest"] < 0) & (cells["highest"] > 0))]
    return cells.assign(bound=cells["lowest"] + cells["highest"].where(cells["highest"] != cells["lowest"], 0))


_LONGER = Remedy(
    f"{MIN_TIMES} values of init_A / LR_A over a factor of {MIN_TIMES_RANGE} at one alpha * init_A * LR_B, in runs "
    "long enough for A to move by its own norm"
)


@_claim(
    id="C7",
    statement="init_A / LR_A sets the number of steps until A has moved from its initial value",
    criterion=(
        "The measure is the exponent with which the steps until ||A - A0|| / ||A0|| reaches 1 grow with init_A / LR_A, "
        "between runs with the same alpha * init_A * LR_B, so that the size of the first updates is the same. It is "
        f"between {TIME_BAND[0]:g} and {TIME_BAND[1]:g}. Movement is a mean over layers, and steps are interpolated on "
        "log axes between recorded steps. Runs that end before A has moved so far count with their length as a lower "
        "bound (Tobit regression with an intercept for each update scale); the log times of seeds and of equivalent "
        "runs are averaged"
    ),
    needs=(
        f"LoRA with {MIN_TIMES} values of init_A / LR_A over a factor of {MIN_TIMES_RANGE} at one alpha * init_A * "
        "LR_B, long enough for A to move"
    ),
    paper_value="proportional; derived",
    unit="exponent",
)
def _time_scale_of_a(lora: Evidence) -> Finding:
    times = move_times(lora.runs, lora.curves)
    if times.empty:
        raise UnjudgedError("not tested", "no a_moved in the curves")
    cells = _time_cells(times)
    groups_known = cells.loc[cells["bound"] == 0, "group"]
    compared = cells[cells["group"].isin(groups_known) & (cells.groupby("group")["group"].transform("size") > 1)]
    if compared.empty:
        text = "no two values of init_a/LR_A at one alpha * init_a * LR_B, in one of which A moved by its own norm"
        raise UnjudgedError("inconclusive", text, _LONGER)
    slope = censored_slope(
        np.log(compared["time_scale"].to_numpy(float)),
        np.log(compared["limit"].to_numpy(float)),
        compared["bound"].to_numpy(int),
        compared["group"].to_numpy(int),
        TIME_ERROR,
        f"time scale of A on {lora.runs['model'].iloc[0]}/{lora.runs['dataset'].iloc[0]}",
    )
    known = compared[compared["bound"] == 0]
    text = (
        "at fixed alpha * init_a * LR_B, steps until A has moved by its own norm go as (init_a/LR_A) to the power "
        f"{number(slope) if math.isfinite(slope.value) else 'unknown'}, {len(known)} times and "
        f"{len(compared) - len(known)} bounds at {compared['group'].nunique()} update scales"
    )
    problems = []
    scales = known.groupby("group")["time_scale"].agg(["size", "min", "max"])
    if not ((scales["size"] >= MIN_TIMES) & (scales["max"] >= MIN_TIMES_RANGE * scales["min"])).any():
        needed = f"{MIN_TIMES} known times over a factor of {MIN_TIMES_RANGE} in init_a/LR_A needed at one update scale"
        problems.append(Problem(needed, _LONGER))
    ids = compared["run_ids"].explode()
    return decide(Within(*TIME_BAND), slope, text, ids, problems, "an exponent of 1 within a fifth")
