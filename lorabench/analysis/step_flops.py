"""The cost of a LoRA training step relative to that of full fine-tuning, and losses at equal training FLOPs."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from lorabench.analysis.curves import PairedCurves, curves_by_seed, metric_points
from lorabench.errors import UserError

FLOPS_COLUMNS = ["model", "method", "rank", "effective_width", "linear_flops"]
"""Columns of the table `compute` that the ratio of FLOPs needs."""

COMPUTE_SETTING = ["model", "batch_size", "sequence_length", "device", "threads"]
"""Columns in which a LoRA row and its FullFT row must agree; a missing column counts as equal in all rows."""

_MEASURED = {
    "linear_flops": "flops_ratio",
    "total_flops": "total_flops_ratio",
    "step_s": "step_ratio",
    "peak_mem_bytes": "memory_ratio",
}


def flops_ratio(compute: pd.DataFrame) -> pd.DataFrame:
    """Compute the cost of a LoRA step divided by that of a FullFT step in the same setting.

    A row per LoRA row, ascending in rank, has COMPUTE_SETTING, placement, rank, effective_width, and flops_ratio
    (counted FLOPs of the linear layers), formula (2/3 + 2R/N, with rank R and width N, from the paper's section on
    compute efficiency), relative_difference (of flops_ratio from formula), total_flops_ratio, step_ratio (seconds per
    step) and memory_ratio (peak bytes). A ratio is NaN where a number or the FullFT row is missing.
    """
    if missing := [name for name in FLOPS_COLUMNS if name not in compute]:
        raise UserError(f"the compute table has no column {', '.join(missing)}")
    arm = [name for name in (*COMPUTE_SETTING, "method", "rank", "placement") if name in compute]
    for row in compute[compute.duplicated(arm)].to_dict("records"):
        values = ", ".join(f"{name} {row[name]}" for name in arm[1:] if not pd.isna(row[name]))
        raise UserError(f"the compute table has two rows of {row['model']} with {values}")

    columns = [*COMPUTE_SETTING, "placement", "rank", "effective_width"]
    numbered = compute.reindex(columns=[*columns, *_MEASURED]).astype(dict.fromkeys(_MEASURED, float))
    lora, fullft = (numbered[compute["method"] == method] for method in ("lora", "fullft"))
    both = lora.merge(fullft, on=COMPUTE_SETTING, how="left", suffixes=("", "_fullft"))
    formula = 2 / 3 + 2 * both["rank"].astype(float) / both["effective_width"].astype(float)
    ratios = {name: both[measured] / both[f"{measured}_fullft"] for measured, name in _MEASURED.items()}
    difference = ratios["flops_ratio"] / formula - 1
    table = both[columns].assign(**ratios, formula=formula, relative_difference=difference)
    return table.sort_values([*COMPUTE_SETTING, "placement", "rank"], ignore_index=True)


def each_setting(ratios: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Split the rows of `flops_ratio` by model, placement and setting, each with the model's name and the columns, and
    their values, in which the model's settings differ."""
    named = []
    for model, rows_of_model in ratios.groupby("model"):
        varied = [name for name in (*COMPUTE_SETTING[1:], "placement") if rows_of_model[name].nunique(dropna=False) > 1]
        for _, rows in rows_of_model.groupby([*COMPUTE_SETTING, "placement"], dropna=False):
            named.append((" ".join([str(model), *(f"{name} {rows[name].iloc[0]}" for name in varied)]), rows))
    return named


def _flops_per_token(runs: pd.DataFrame) -> pd.Series[float]:
    return runs["train_flops"].astype(float) / runs["train_tokens"].astype(float)


def equal_flops_curves(runs: pd.DataFrame, others: pd.DataFrame, curves: pd.DataFrame, name: str) -> PairedCurves:
    """Return the training NLL of `others` minus that of `runs` at equal training FLOPs, by step of `runs` and seed, in
    nats per token, in the later half of their log-FLOPs range.

    Equal FLOPs are at different steps, on other batches. So the difference at a step is that on its batch, plus what
    `others` gains from the FLOPs by which it is ahead there, by its validation NLL, interpolated linearly in log FLOPs.
    Steps of `runs` beyond the FLOPs of `others` are left out.
    """
    if "tokens" not in curves:
        return PairedCurves(pd.DataFrame(index=pd.Index([], dtype=int)), (), name)
    train = metric_points(curves, "train", "nll")
    own, other = (curves_by_seed(arm_runs, train) for arm_runs in (runs, others))
    validation = curves_by_seed(others, metric_points(curves, "validation", "nll"))
    # The tokens trained on up to each step, with a column for each seed.
    points = runs[["run_id", "seed"]].merge(curves.loc[curves["split"] == "train", ["run_id", "step", "tokens"]])
    points = points.dropna().astype({"step": int, "tokens": float})
    tokens = points.groupby(["step", "seed"])["tokens"].max().unstack("seed").sort_index()
    own_flops, other_flops = (float(_flops_per_token(arm_runs).mean()) for arm_runs in (runs, others))
    by_seed = {}
    for seed in (seed for seed in own if all(seed in table for table in (other, validation, tokens))):
        difference, seen, losses = (other[seed] - own[seed]).dropna(), tokens[seed].dropna(), validation[seed].dropna()
        by_seed[seed] = pd.Series(dtype=float)
        # A training loss is measured before its step's update, a validation loss after it.
        before = np.interp(difference.index - 1, [0, *seen.index], [0.0, *seen])
        after = seen.reindex(losses.index).dropna()
        after = after[after > 0]
        within = (before > 0) & (own_flops * before <= other_flops * after.max())
        if within.any():
            later = within & (before >= math.sqrt(before[within].min() * before[within].max()))
            known, at_known = np.log(other_flops * after), losses.reindex(after.index)
            at_own, at_other = (np.interp(np.log(f * before[later]), known, at_known) for f in (own_flops, other_flops))
            by_seed[seed] = difference[later] + (at_own - at_other)
    both = pd.concat([runs, others])
    run_ids = both.loc[both["seed"].isin(list(by_seed)), "run_id"].astype(str)
    return PairedCurves(pd.DataFrame(by_seed).dropna().sort_index(), tuple(run_ids), name)
