"""Compute: what a training step costs by rank, and losses at equal training FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lorabench.analysis.arms import refuse, rows_of
from lorabench.analysis.envelopes import envelopes
from lorabench.errors import UserError

NEEDED = ["model", "method", "rank", "effective_width", "linear_flops"]
"""Columns of the table `compute` that a count of FLOPs needs."""

SETTING = ["model", "batch_size", "sequence_length", "device", "threads"]
"""Columns in which LoRA and the FullFT that it is compared with agree. One that is missing is the same in all."""

_MEASURED = ["total_flops", "step_s", "peak_mem_bytes"]
_RATIOS = ["flops_ratio", "formula", "relative_difference", "total_flops_ratio", "step_ratio", "memory_ratio"]


def flops_ratio(compute: pd.DataFrame) -> pd.DataFrame:
    """What a step of LoRA costs over what one of full fine-tuning does, in the same setting.

    Args:
        compute: the table `compute`, columns NEEDED; of the others some may be missing.

    Returns:
        One row per row of LoRA, ascending in rank: the columns SETTING, placement, rank, effective_width, and
        flops_ratio (counted, linear layers), formula (2/3 + 2R/N, paper.md 3.6), relative_difference (of the former
        from the latter), total_flops_ratio, step_ratio (time) and memory_ratio (peak). NaN where something is not
        known, or there is no FullFT in that setting.

    Raises:
        UserError: a column of NEEDED is missing, a method is not known, LoRA has no rank, an arm appears twice in one
            setting, or a number is not positive.
    """
    _check(compute)
    columns = [*SETTING, "placement", "rank", "effective_width"]
    full = compute.reindex(columns=[*columns, "method", "linear_flops", *_MEASURED])
    lora, fullft = full[full["method"] == "lora"], full[full["method"] == "fullft"]
    both = lora.merge(fullft, on=SETTING, how="left", suffixes=("", "_fullft"))
    number = {name: both[name].astype(float) for name in (*columns[-2:], "linear_flops", *_MEASURED)}
    ratio = {name: number[name] / both[f"{name}_fullft"].astype(float) for name in ("linear_flops", *_MEASURED)}
    formula = 2 / 3 + 2 * number["rank"] / number["effective_width"]
    found = both[columns].assign(
        flops_ratio=ratio["linear_flops"],
        formula=formula,
        relative_difference=ratio["linear_flops"] / formula - 1,
        total_flops_ratio=ratio["total_flops"],
        step_ratio=ratio["step_s"],
        memory_ratio=ratio["peak_mem_bytes"],
    )
    return found[[*columns, *_RATIOS]].sort_values([*SETTING, "placement", "rank"], ignore_index=True)


def each_setting(ratios: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of `flops_ratio` of each model and placement in each setting, and what to call them.

    The name is the model's, with the columns in which its settings differ.
    """
    columns = [*SETTING, "placement"]
    found = []
    for model, of_model in ratios.groupby("model"):
        varied = [name for name in columns[1:] if of_model[name].nunique(dropna=False) > 1]
        for key, rows in of_model.groupby(columns, dropna=False):
            values = dict(zip(columns, key, strict=True))
            found.append((" ".join([str(model), *(f"{name} {values[name]}" for name in varied)]), rows))
    return found


def _check(compute: pd.DataFrame) -> None:
    missing = [name for name in NEEDED if name not in compute]
    if missing:
        raise UserError(f"the compute table has no column {', '.join(missing)}")
    lora, fullft = compute["method"].eq("lora"), compute["method"].eq("fullft")
    refuse(compute, ~(lora | fullft), "model", "method", "fullft, lora")
    unranked = lora & ~compute["rank"].ge(1).fillna(False).astype(bool)
    refuse(compute, unranked, "model", "rank", "whole numbers from 1 up for lora")
    for name in ("effective_width", "linear_flops", *_MEASURED):
        if name in compute:
            numbers = compute[name].astype(float)
            refuse(compute, numbers.le(0) | np.isinf(numbers), "model", name, "numbers above 0")
    arm = [name for name in (*SETTING, "method", "rank", "placement") if name in compute]
    for row in compute[compute.duplicated(arm)].to_dict("records"):
        told = ", ".join(f"{name} {row[name]}" for name in arm[1:] if not pd.isna(row[name]))
        raise UserError(f"the compute table has two rows of {row['model']} with {told}")


def loss_by_flops(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Envelopes of the validation loss against the FLOPs that a run has spent by then.

    Training spends the same FLOPs on every token, so those up to a step are train_flops x tokens / train_tokens.

    Args:
        runs: columns as for `envelopes`, and train_flops, train_tokens.
        curves: columns as for `envelopes`.

    Returns:
        One row per arm and step from 1 up, ascending: as `envelopes`, and flops. Points whose FLOPs are not known are
        left out.

    Raises:
        UserError: see `check_runs`.
    """
    points = envelopes(runs, curves)
    per_token = (runs["train_flops"].astype(float) / runs["train_tokens"].astype(float)).set_axis(runs["run_id"])
    points["flops"] = points["tokens"].astype(float) * points["run_id"].map(per_token).astype(float)
    known: pd.DataFrame = points[points["step"].gt(0).fillna(False) & points["flops"].gt(0)]
    return known


def equal_flops_gap(
    points: pd.DataFrame, arm: Mapping[str, Any] | pd.Series, other: Mapping[str, Any] | pd.Series
) -> pd.DataFrame:
    """The loss of one arm minus another's at equal FLOPs, in the second half of the log-FLOPs range that both have.

    Losses are interpolated linearly in log FLOPs. Given are all the points at which either envelope has one, so that
    no gap between them is larger than the largest of these.

    Args:
        points: as from `loss_by_flops`.
        arm: values of the ARM columns.
        other: likewise.

    Returns:
        One row per point, ascending: flops, nll (of `arm`), nll_other, gap (nats per token). Empty if the ranges of
        the arms share nothing.
    """
    both = [rows_of(points, one).sort_values("flops") for one in (arm, other)]
    columns = ["flops", "nll", "nll_other", "gap"]
    if any(of_arm.empty for of_arm in both):
        return pd.DataFrame(columns=columns, dtype=float)
    logs = [np.log(of_arm["flops"].to_numpy(float)) for of_arm in both]
    low, high = max(log[0] for log in logs), min(log[-1] for log in logs)
    middle = (low + high) / 2
    inside = np.unique([middle, high, *(log for of_arm in logs for log in of_arm if middle < log < high)])
    if not low < high:
        return pd.DataFrame(columns=columns, dtype=float)
    nll, nll_other = (
        np.interp(inside, log, of_arm["value"].to_numpy(float)) for log, of_arm in zip(logs, both, strict=True)
    )
    flops = np.exp(inside)
    return pd.DataFrame({"flops": flops, "nll": nll, "nll_other": nll_other, "gap": nll - nll_other}, columns=columns)
