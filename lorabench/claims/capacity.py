"""Claims A3 to A5: where an adapter runs out of capacity, and what it learns from there on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_label, rows_of
from lorabench.analysis.comparison import Arm, Comparison, require
from lorabench.analysis.departure import departures
from lorabench.analysis.envelopes import envelopes
from lorabench.analysis.finding import (
    SIGMAS,
    Finding,
    UnjudgedError,
    Verdict,
    finding,
    noise_problems,
    sigma_text,
    together,
    within,
)
from lorabench.analysis.slopes import against_log
from lorabench.analysis.thresholds import threshold_slope, thresholds
from lorabench.claims.claim import Claim
from lorabench.claims.evidence import SWEEP, Evidence, over
from lorabench.claims.scopes import every_longest, learning, longest_run, longest_runs, without_facts
from lorabench.utils.formats import fixed_interval

MIN_POINTS = 3
"""The number of points at the end of an envelope that must lie above the shared curve for a departure."""

MIN_RANKS = 3
"""The number of ranks that a verdict on departures by rank needs."""

MIN_RHO = 0.9
"""The rank correlation from which departures grow with rank."""

FLOOR = 0.05
"""A slope shallower than this share of FullFT's is a floor."""

THRESHOLD_BAND = (0.5, 1.5)
"""The log-log slopes of tokens at departure against parameters that count as proportional."""


def _departures(comparison: Comparison) -> tuple[list[Arm], pd.DataFrame, pd.DataFrame]:
    """Return the LoRA arms and FullFT, their envelopes, and where each departs from the lowest envelope."""
    fullft, _ = require(("FullFT", comparison.fullft), ("LoRA", next(iter(comparison.lora.values()), None)))
    arms = [*comparison.lora.values(), fullft]
    points = envelopes(comparison.of(arms), comparison.curves)
    if points.empty:
        raise UnjudgedError("not tested", "no validation curves")
    return arms, points, departures(points, comparison.noise, SIGMAS, MIN_POINTS)


def departure_grows_with_rank(comparison: Comparison) -> Finding:
    """A3: judge the rank correlation of rank and departure step; a rank that never leaves counts as leaving last."""
    from scipy import stats

    arms, _, left = _departures(comparison)
    ranks = list(comparison.lora)
    lora = left[left["method"] == "lora"].set_index("rank").reindex(ranks)
    steps = lora["step"].to_numpy(float, na_value=math.inf)
    gone = np.isfinite(steps)
    rho = float(stats.spearmanr(ranks, steps).statistic) if len(ranks) > 1 and len(set(steps)) > 1 else math.nan
    departure_steps = ", ".join(
        f"r{rank} {f'at step {step:.0f}' if math.isfinite(step) else 'never'}"
        for rank, step in zip(ranks, steps, strict=True)
    )
    correlation = "no rank correlation" if math.isnan(rho) else f"Spearman rho {rho:.2f}"
    sigma, dof = comparison.sigma("validation")
    text = f"leaves the shared curve: {departure_steps}; {correlation}, {sigma_text(sigma)}"
    problems = noise_problems(sigma, dof) + comparison.edge_problems(arms)
    if len(left) < len(arms) or left["departed"].isna().any():
        problems.append("too few points on some curve")
    if ranks[0] != 1 or len(ranks) < MIN_RANKS:
        problems.append(f"rank 1 and at least {MIN_RANKS} ranks needed")
    elif not gone.any():
        problems.append("no rank leaves, so this data is within the capacity of all ranks")
    verdict: Verdict = "inconclusive"
    if rho < 0 or (gone.any() and not gone[0]):
        verdict = "contradicted"
    elif gone[-1]:
        text += "; the highest rank leaves too"
    elif gone.sum() < 2:
        text += "; fewer than two ranks leave"
    elif rho >= MIN_RHO or (steps[1:] >= steps[:-1]).all():
        verdict = "confirmed"
    return finding(comparison.of(arms)["run_id"], text, verdict, problems, rho, strain=-rho)


A3 = Claim(
    id="A3",
    kind="empirical",
    statement="Low and medium ranks leave the shared learning curve at a step that grows with rank",
    figure="1",
    criterion=(
        f"A rank leaves at the step from which its envelope stays more than {SIGMAS} sigma above the lowest "
        f"envelope to the end, for at least {MIN_POINTS} points. On the longest dataset, rank 1 and at least one more "
        "rank leave, the highest rank does not, and these steps do not fall with rank or their Spearman rho is at "
        f"least {MIN_RHO:g}. Contradicted if rho is below 0, or if a rank leaves while rank 1 stays"
    ),
    needs=f"{SWEEP}; rank 1 and two more ranks; validation curves; seeds that give sigma",
    paper_value="no number",
    unit="Spearman rho",
    experiments=("rank", "capacity"),
    judge=over(learning(longest_run), departure_grows_with_rank),
    core=True,
)


def _keeps_falling(comparison: Comparison, arm: pd.Series[Any], points: pd.DataFrame, shared: pd.DataFrame) -> Finding:
    """Judge whether one rank's loss falls after departure, and less steeply than FullFT's at the same steps."""
    own = rows_of(points, arm)
    both = own[own["step"] >= arm["step"]].merge(shared[["step", "value"]], on="step", suffixes=("", "_shared"))
    sigma, dof = comparison.sigma("validation")
    loss = against_log(both["step"], both["value"], sigma)
    fullft = against_log(both["step"], both["value_shared"], sigma)
    # The curves are of single runs, so their difference has twice the variance of one.
    lag = against_log(both["step"], both["value"] - both["value_shared"], math.sqrt(2) * sigma)
    text = (
        f"{arm_label(arm)} after step {arm['step']}: {loss.slope:.4f} {fixed_interval(loss.low, loss.high, 4)} nats "
        f"per tenfold steps, FullFT {fullft.slope:.4f}, difference {lag.slope:.4f} "
        f"{fixed_interval(lag.low, lag.high, 4)} ({loss.n} points)"
    )
    both_arms = [comparison.lora[int(arm["rank"])], comparison.fullft or {}]
    problems = noise_problems(sigma, dof) + comparison.edge_problems(both_arms)
    if not fullft.high < 0:
        problems.append("FullFT's own loss does not surely fall there")
    verdict: Verdict = "inconclusive"
    if loss.low > FLOOR * fullft.slope:
        verdict, text = "contradicted", f"{text}; a floor"
    elif lag.high < 0:
        verdict, text = "contradicted", f"{text}; steeper than FullFT"
    elif loss.high < 0 and lag.low > 0:
        verdict = "confirmed"
    return finding(
        comparison.of(both_arms)["run_id"], text, verdict, problems, loss.slope, (loss.low, loss.high), loss.slope
    )


def no_floor(comparison: Comparison) -> Finding:
    """A4: judge the slope against log(step) of each rank that has left the shared curve, beside FullFT's."""
    arms, points, left = _departures(comparison)
    if left["departed"].isna().any():
        sigma, dof = comparison.sigma("validation")
        problems = noise_problems(sigma, dof) or ["too few points on some curve"]
        return finding(comparison.of(arms)["run_id"], "departures not known", "inconclusive", problems)
    gone = thresholds(comparison.of(arms), points, left).query("status == 'left'")
    if gone.empty:
        raise UnjudgedError("not tested", "no rank joins the shared curve and leaves it")
    shared = rows_of(points, arms[-1])
    return together([_keeps_falling(comparison, arm, points, shared) for _, arm in gone.iterrows()])


A4 = Claim(
    id="A4",
    kind="empirical",
    statement="Past its capacity LoRA has no floor: it goes on learning, less efficiently",
    figure="text",
    criterion=(
        "For each rank that joins the shared curve and leaves it (as in A3), from departure on: the 95% interval of "
        "the slope of its envelope against log(step) is below 0, and the interval of its slope minus FullFT's at the "
        f"same steps is above 0. Contradicted if the slope's whole interval is shallower than {FLOOR:.0%} of FullFT's "
        "slope, or if the interval of the difference is below 0"
    ),
    needs=f"{SWEEP}; a rank that leaves the shared curve; validation curves; seeds that give sigma",
    paper_value="no number",
    unit="nats per tenfold steps",
    experiments=("rank", "capacity"),
    judge=over(learning(every_longest), no_floor),
    columns=("trainable_params",),
)


def threshold_tied_to_parameters(evidence: Evidence) -> Finding:
    """A5: judge the log-log slope of tokens at departure against parameters, over all models and datasets together."""
    parts, run_ids, tokens, left_out = [], [], [], []
    for comparison in longest_runs(without_facts(evidence.comparisons)):
        try:
            arms, points, left = _departures(comparison)
        except UnjudgedError as unjudged:
            left_out.append(f"{comparison.label}: {unjudged.finding.reason}")
            continue
        sigma, dof = comparison.sigma("validation")
        problems = noise_problems(sigma, dof) + comparison.edge_problems(arms[-1:])
        if problems:
            left_out.append(f"{comparison.label}: {', '.join(problems)}")
            continue
        ranks = thresholds(comparison.of(arms), points, left)
        edges = np.array([bool(comparison.edge_problems([comparison.lora[rank]])) for rank in ranks["rank"]], bool)
        ranks = ranks.assign(status=ranks["status"].mask(edges, "at its grid's edge"))
        gone = ranks[ranks["status"] == "left"]
        parts.append(gone)
        run_ids += [run_id for rank in gone["rank"] for run_id in comparison.of([comparison.lora[rank]])["run_id"]]
        tokens += [f"{comparison.label} r{row.rank} {row.tokens:.3g} tokens" for row in gone.itertuples()]
        left_out += [
            f"{comparison.label} r{row.rank} {row.status}" for row in ranks.itertuples() if row.status != "left"
        ]
    if not parts and not left_out:
        raise UnjudgedError("not tested", "no such runs")
    gone = pd.concat(parts) if parts else pd.DataFrame()
    line = threshold_slope(gone, gone["dataset"]) if len(gone) else None
    others = f"; left out: {', '.join(left_out)}" if left_out else ""
    if line is None or math.isnan(line.low):
        raise UnjudgedError("inconclusive", f"{', '.join(tokens) or 'no departures'}: too few for a slope{others}")
    interval = fixed_interval(line.low, line.high, 2)
    text = f"slope {line.slope:.2f} {interval} over {line.n} departures ({', '.join(tokens)})"
    verdict = within(line.low, line.high, THRESHOLD_BAND)
    return finding(run_ids, text + others, verdict, [], line.slope, (line.low, line.high), abs(line.slope - 1))


A5 = Claim(
    id="A5",
    kind="empirical",
    statement="An adapter runs out of capacity after an amount of data proportional to its parameters",
    figure="text",
    criterion=(
        "The 95% interval of the log-log slope of train tokens at departure (as in A3) against adapter parameters "
        f"lies within {THRESHOLD_BAND[0]:g} to {THRESHOLD_BAND[1]:g}. The line is fitted to all models and datasets "
        "together with an intercept per dataset, to each dataset's longest runs; the interval assumes at least the "
        "scatter that comes from the spacing of the points. Ranks that never leave, that never joined the shared "
        "curve, or whose best LR is at the edge of its grid give no point"
    ),
    needs=(
        f"{SWEEP}; four ranks, on one or more datasets, that leave the shared curve; validation curves; seeds that "
        "give sigma"
    ),
    paper_value="proportional; no number",
    unit="log-log slope",
    experiments=("rank", "capacity"),
    judge=threshold_tied_to_parameters,
    columns=("trainable_params",),
)

CLAIMS = (A3, A4, A5)
