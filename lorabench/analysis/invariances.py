"""Parametrization of LoRA: runs that its invariances make equivalent, and measures of how far runs differ.

LoRA has four hyperparameters: alpha, the initial scale of A (`init_a`, in units of 1/sqrt(d_in)) and the LRs of A
(`lr`) and B (`lr * lr_ratio`). Two are redundant, according to the paper's section on parametrization: with Adam at
epsilon 0, training depends on them only through the update scale alpha * init_a * LR_B, the size of the first updates
of W, and the time scale init_a / LR_A, the number of steps until A has moved away from its initial value.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from lorabench.analysis.arms import ARM, STANDARD, is_standard, with_arm_columns
from lorabench.analysis.comparison import comparisons
from lorabench.analysis.curves import metric_points, train_curves
from lorabench.analysis.estimate import ratio_of_means
from lorabench.analysis.fit_rows import MIN_LRS

PAIR_SETTING = ["model", "dataset", "rank", "placement", "batch_size", "steps", "eps"]
"""Columns that are equal, with the seed, in runs that differ only in their parametrization and LR."""

CONFIGURATION = ["alpha", "init_a", "lr", "lr_ratio"]
"""Columns of the four hyperparameters that determine a run's update scale and time scale."""

SAME = 1e-9
"""Relative difference up to which two scales count as equal; it allows for rounding in their products."""

RULES = {0.0: "alpha / r", 0.5: "alpha / sqrt(r)", 1.0: "constant factor"}
"""Rules by which the factor of BA depends on rank, by the power of rank in alpha; the first is the paper's."""

BATCHES = ["model", "dataset", "placement", "batch_size", "eps"]
"""Columns that are equal in runs whose first updates are compared, which differ in rank and the rule of alpha."""


def with_scales(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the LoRA runs with `update_scale` and `time_scale`; a null of STANDARD becomes its value."""
    runs = with_arm_columns(runs)
    lora = runs[runs["method"] == "lora"].astype(dict.fromkeys(STANDARD, float)).fillna(STANDARD)
    lr, init_a = lora["lr"].astype(float), lora["init_a"]
    return lora.assign(update_scale=lora["alpha"] * init_a * lr * lora["lr_ratio"], time_scale=init_a / lr)


def run_pairs(runs: pd.DataFrame) -> pd.DataFrame:
    """Pair the LoRA runs that differ only in their parametrization or LR. A row has PAIR_SETTING, seed; run_id and
    CONFIGURATION of the run with the smaller time scale (suffix `_fast`) and of the other (`_slow`); same_update_scale;
    time_ratio (of the slow run over the fast one, at least 1); equivalent (both scales are the same)."""
    setting = [*PAIR_SETTING, "seed"]
    scaled = with_scales(runs).sort_values(["time_scale", *CONFIGURATION], kind="stable", ignore_index=True)
    scaled = scaled.assign(setting=scaled.groupby(setting, dropna=False).ngroup(), place=range(len(scaled)))
    compared = ["run_id", *CONFIGURATION, "update_scale", "time_scale", "place"]
    pairs = scaled.merge(scaled[["setting", *compared]], on="setting", suffixes=("_fast", "_slow"))
    pairs = pairs[pairs["place_fast"] < pairs["place_slow"]]
    pairs = pairs.sort_values(["setting", "place_fast", "place_slow"], ignore_index=True)
    update = pairs[["update_scale_fast", "update_scale_slow"]].to_numpy(float)
    pairs["same_update_scale"] = np.isclose(update[:, 0], update[:, 1], rtol=SAME, atol=0.0)
    pairs["time_ratio"] = pairs["time_scale_slow"].astype(float) / pairs["time_scale_fast"].astype(float)
    pairs["equivalent"] = pairs["same_update_scale"] & (pairs["time_ratio"] < 1 + SAME)
    names = [f"{name}_{speed}" for speed in ("fast", "slow") for name in ("run_id", *CONFIGURATION)]
    return pairs[[*setting, *names, "same_update_scale", "time_ratio", "equivalent"]]


def invariance_pairs(runs: pd.DataFrame, plus: bool = False) -> pd.DataFrame:
    """Return the pairs of `run_pairs` that test the invariance: equivalent pairs, and others of the same settings and
    seeds as a control, at the smallest epsilon that has equivalent pairs, since the paper's argument holds at 0. With
    `plus`, one run of equivalent pairs has unequal LRs of A and B (LoRA+)."""
    pairs = run_pairs(runs)
    wanted, eps = pairs["equivalent"], pairs["eps"].astype(float)
    if plus:
        wanted &= pairs["lr_ratio_fast"].eq(1.0) ^ pairs["lr_ratio_slow"].eq(1.0)
    smallest = eps[wanted].min()
    at_eps = eps.isna() if math.isnan(smallest) else eps == smallest
    tested = (wanted & at_eps).groupby([pairs[name] for name in (*PAIR_SETTING, "seed")], dropna=False).transform("any")
    return pairs[tested & (wanted | ~pairs["equivalent"])]


def tenfold_pairs(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the pairs of `run_pairs` with the same update scale and time scales that differ at least tenfold."""
    pairs = run_pairs(runs)
    return pairs[pairs["same_update_scale"] & (pairs["time_ratio"] >= 10 * (1 - SAME))]


def fixed_a_controls(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the pairs of `tenfold_pairs` whose fast run is standard and whose slow run has the same initial A, which
    hardly moves in comparison, so that later differences between their updates are due to the movement of A."""
    pairs = tenfold_pairs(runs)
    standard = {f"{name}_fast": value for name, value in STANDARD.items()} | {"init_a_slow": STANDARD["init_a"]}
    return pairs[pairs[list(standard)].eq(pd.Series(standard)).all(axis=1)]


def update_growth(pairs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Return the pairs of `fixed_a_controls` with step, the last one that both record, and growth: the change of W by
    that step (`update_norm`) over that by the first, in the run where A moves over that in the run where it is still.
    """
    norms = metric_points(curves, "train", "update_norm").pivot(index="run_id", columns="step", values="value")
    rows = []
    for pair in pairs.to_dict("records"):
        both = norms.reindex([pair["run_id_fast"], pair["run_id_slow"]]).astype(float).dropna(axis=1)
        if 1 in both and both.shape[1] > 1:
            fast, slow = both[both.columns.max()] / both[1]
            rows.append({**pair, "step": int(both.columns.max()), "growth": fast / slow})
    return pd.DataFrame(rows, columns=[*pairs, "step", "growth"])


def differences(pairs: pd.DataFrame, curves: pd.DataFrame, first_steps: int) -> pd.DataFrame:
    """Return the columns of pairs (see `run_pairs`) for each step up to one that both runs have, pair (its number),
    step, difference (the largest of the training NLL up to that step, nats per token)."""
    pairs = pairs.reset_index(drop=True).rename_axis("pair").reset_index()
    losses = metric_points(curves, "train", "nll")
    wide = losses[losses["step"] <= first_steps].pivot(index="run_id", columns="step", values="value").astype(float)
    fast, slow = (wide.reindex(pairs[f"run_id_{speed}"]).to_numpy() for speed in ("fast", "slow"))
    apart = pd.DataFrame(np.abs(fast - slow), pairs.index.rename("pair"), wide.columns)
    so_far = apart.cummax(axis=1).where(apart.notna()).melt(value_name="difference", ignore_index=False).dropna()
    return pairs.merge(so_far.reset_index(), on="pair")


def first_descents(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Compute the loss decrease by the first update over LR_B, Adam's update of an entry of B, by rule and rank, at A's
    standard initial scale.

    A row per BATCHES, rule (of RULES), rank and seed has alpha, descent (nats per unit of LR), run_ids. A rule other
    than the paper's needs two ranks, not all with the standard alpha; the factor with the most ranks counts.
    """
    scaled = with_scales(runs)
    scaled = scaled[scaled["init_a"] == STANDARD["init_a"]]
    first = train_curves(scaled, curves, "descent")
    first = first[first["step"] == 1]
    first = first.assign(descent=first["value"] / (first["lr"].astype(float) * first["lr_ratio"]))
    cells = first.groupby([*BATCHES, "rank", "alpha", "seed"], dropna=False, as_index=False).agg(
        descent=("descent", "mean"), run_ids=("run_id", list)
    )
    columns, parts = [*BATCHES, "rule", "rank", "alpha", "seed", "descent", "run_ids"], []
    for _, rows in cells.groupby(BATCHES, dropna=False):
        standard = rows["alpha"] == STANDARD["alpha"]
        parts.append(rows[standard].assign(rule=RULES[0.0]))
        for power, rule in list(RULES.items())[1:]:
            # Rounding makes factors equal that differ only by the inexact square roots of ranks.
            factor = (rows["alpha"] / rows["rank"].astype(float) ** power).map(lambda value: float(f"{value:.9g}"))
            followed = [same for _, same in rows.groupby(factor) if not standard[same.index].all()]
            most = max(followed, key=lambda same: int(same["rank"].nunique()), default=rows.iloc[:0])
            if most["rank"].nunique() > 1:
                parts.append(most.assign(rule=rule))
    parts = [part[columns] for part in parts if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def descent_ratios(descents: pd.DataFrame) -> pd.DataFrame:
    """Compute each rank's mean of `first_descents` over that of the highest rank of its rule, over the seeds of both. A
    row per BATCHES, rule and rank has estimate (an `Estimate`), ratio (its value), its 95% interval (`low`, `high`),
    n_seeds, run_ids. The highest rank has ratio 1 and no interval."""
    ratios = []
    for key, rule_rows in descents.groupby([*BATCHES, "rule"], dropna=False, sort=False):
        by_rank = {group["rank"].iloc[0]: group.set_index("seed") for _, group in rule_rows.groupby("rank")}
        top = by_rank[max(by_rank)]
        for rank, group in by_rank.items():
            both = group.merge(top, on="seed", suffixes=("", "_top"))
            own, highest = both["descent"].to_numpy(float), both["descent_top"].to_numpy(float)
            ratio = ratio_of_means(own, highest, "/".join(map(str, (*key, rank))))
            low, high = (math.nan, math.nan) if group is top else ratio.interval()
            run_ids = {run_id for ids in (*both["run_ids"], *both["run_ids_top"]) for run_id in ids}
            ratios.append((*key, rank, ratio, ratio.value, low, high, len(both), sorted(run_ids)))
    columns = [*BATCHES, "rule", "rank", "estimate", "ratio", "low", "high", "n_seeds", "run_ids"]
    return pd.DataFrame(ratios, columns=columns)


def move_times(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Compute the number of steps until A has moved by its initial norm, interpolated on logarithmic axes. LoRA runs
    with the metric `a_moved` get step (NaN where it is not known), limit, and bound: 1 if the number is at least the
    limit, since A did not move that far, -1 if it is at most that, by the first record, and 0 if it is the limit."""
    scaled, times = with_scales(runs), []
    for run_id, points in train_curves(scaled, curves, "a_moved").groupby("run_id"):
        steps, values = points["step"].to_numpy(float), points["value"].to_numpy(float)
        limit, bound = (steps[values >= 1][0], -1) if (values >= 1).any() else (steps[-1], 1)
        steps, values = np.log(steps[values > 0]), np.log(values[values > 0])
        if len(crossings := np.flatnonzero((values[:-1] < 0) & (values[1:] >= 0))):
            around = slice(crossings[0], crossings[0] + 2)
            limit, bound = math.exp(np.interp(0.0, values[around], steps[around])), 0
        times.append((run_id, float(limit), bound))
    timed = scaled.merge(pd.DataFrame(times, columns=["run_id", "limit", "bound"]), on="run_id")
    return timed.assign(step=timed["limit"].where(timed["bound"] == 0))


def step_sizes(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Return the longest standard LoRA runs at their fitted optima, with step and size: the change of W by this step
    (Frobenius norm over all layers, per unit of the LR of A)."""
    scaled = with_scales(runs)
    standard = scaled[is_standard(scaled)]
    longest = standard[standard["steps"].isna() | (standard["steps"] == standard["steps"].max())]
    parts = comparisons(longest, curves)
    best = pd.concat([longest.iloc[:0], *(part.at_optimum(arm) for part in parts for arm in part.arms)])
    norms = train_curves(longest[longest["run_id"].isin(best["run_id"])], curves, "update_norm")
    return norms.assign(size=norms["value"].astype(float) / norms["lr"].astype(float))


def with_lr_grid(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs with A's standard initial scale whose arm has MIN_LRS LRs or more."""
    runs = with_arm_columns(runs)
    lrs = runs.groupby(ARM, dropna=False)["lr"].transform("nunique")
    return runs[(lrs >= MIN_LRS) & (runs["init_a"].isna() | runs["init_a"].eq(STANDARD["init_a"]))]
