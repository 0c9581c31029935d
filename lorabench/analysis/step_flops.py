"""The cost of a LoRA training step relative to that of full fine-tuning, and losses at equal training FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lorabench.analysis.arms import rows_of
from lorabench.analysis.envelopes import envelopes
from lorabench.errors import UserError
from lorabench.tables.checks import refuse_rows

FLOPS_COLUMNS = ["model", "method", "rank", "effective_width", "linear_flops"]
"""Columns of the table `compute` that the ratio of FLOPs needs."""

COMPUTE_SETTING = ["model", "batch_size", "sequence_length", "device", "threads"]
"""Columns in which a LoRA row and its FullFT row must agree; a missing column counts as equal in all rows."""

_MEASURED = ["total_flops", "step_s", "peak_mem_bytes"]
_RATIOS = ["flops_ratio", "formula", "relative_difference", "total_flops_ratio", "step_ratio", "memory_ratio"]


def flops_ratio(compute: pd.DataFrame) -> pd.DataFrame:
    """Compute the cost of a LoRA step divided by that of a FullFT step in the same setting.

    Args:
        compute: the table `compute`, with the columns FLOPS_COLUMNS; its other columns are optional.

    Returns:
        One row per LoRA row, ascending in rank: the columns COMPUTE_SETTING, placement, rank, effective_width,
        and flops_ratio (counted FLOPs of the linear layers), formula (2/3 + 2R/N, with rank R and width N, from the
        paper's section on compute efficiency), relative_difference (of flops_ratio from formula), total_flops_ratio,
        step_ratio (seconds per step) and memory_ratio (peak bytes). A ratio is NaN where a number is missing or the
        setting has no FullFT row.

    Raises:
        UserError: A column of FLOPS_COLUMNS is missing, a method is unknown, LoRA has no rank, an arm appears twice in
            one setting, or a number is not positive.
    """
    _check(compute)
    columns = [*COMPUTE_SETTING, "placement", "rank", "effective_width"]
    full = compute.reindex(columns=[*columns, "method", "linear_flops", *_MEASURED])
    lora, fullft = full[full["method"] == "lora"], full[full["method"] == "fullft"]
    both = lora.merge(fullft, on=COMPUTE_SETTING, how="left", suffixes=("", "_fullft"))
    numbers = {name: both[name].astype(float) for name in (*columns[-2:], "linear_flops", *_MEASURED)}
    ratio = {name: numbers[name] / both[f"{name}_fullft"].astype(float) for name in ("linear_flops", *_MEASURED)}
    formula = 2 / 3 + 2 * numbers["rank"] / numbers["effective_width"]
    ratios = both[columns].assign(
        flops_ratio=ratio["linear_flops"],
        formula=formula,
        relative_difference=ratio["linear_flops"] / formula - 1,
        total_flops_ratio=ratio["total_flops"],
        step_ratio=ratio["step_s"],
        memory_ratio=ratio["peak_mem_bytes"],
    )
    return ratios[[*columns, *_RATIOS]].sort_values([*COMPUTE_SETTING, "placement", "rank"], ignore_index=True)


def each_setting(ratios: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Split the rows of `flops_ratio` by model, placement and setting, and name each part.

    The name is the model's name with the columns, and their values, in which the model's settings differ.
    """
    columns = [*COMPUTE_SETTING, "placement"]
    named = []
    for model, of_model in ratios.groupby("model"):
        varied = [name for name in columns[1:] if of_model[name].nunique(dropna=False) > 1]
        for key, rows in of_model.groupby(columns, dropna=False):
            values = dict(zip(columns, key, strict=True))
            named.append((" ".join([str(model), *(f"{name} {values[name]}" for name in varied)]), rows))
    return named


def _check(compute: pd.DataFrame) -> None:
    missing = [name for name in FLOPS_COLUMNS if name not in compute]
    if missing:
        raise UserError(f"the compute table has no column {', '.join(missing)}")
    lora, fullft = compute["method"].eq("lora"), compute["method"].eq("fullft")
    refuse_rows(compute, ~(lora | fullft), "model", "method", "fullft, lora")
    unranked = lora & ~compute["rank"].ge(1).fillna(False).astype(bool)
    refuse_rows(compute, unranked, "model", "rank", "whole numbers from 1 up for lora")
    for name in ("effective_width", "linear_flops", *_MEASURED):
        if name in compute:
            numbers = compute[name].astype(float)
            refuse_rows(compute, numbers.le(0) | np.isinf(numbers), "model", name, "numbers above 0")
    arm = [name for name in (*COMPUTE_SETTING, "method", "rank", "placement") if name in compute]
    for row in compute[compute.duplicated(arm)].to_dict("records"):
        values = ", ".join(f"{name} {row[name]}" for name in arm[1:] if not pd.isna(row[name]))
        raise UserError(f"the compute table has two rows of {row['model']} with {values}")


def loss_by_flops(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Compute each arm's envelope of the validation NLL against the training FLOPs spent.

    Training spends the same FLOPs on every token, so the FLOPs up to a step are
    train_flops * tokens / train_tokens.

    Args:
        runs: columns as for `envelopes`, and train_flops, train_tokens.
        curves: columns as for `envelopes`.

    Returns:
        One row per arm and step from 1 up, ascending: the columns of `envelopes`, and flops (of the run with the
        lowest loss there, up to that step). Points without a known number of FLOPs are left out.

    Raises:
        UserError: See `check_runs`.
    """
    points = envelopes(runs, curves)
    per_token = (runs["train_flops"].astype(float) / runs["train_tokens"].astype(float)).set_axis(runs["run_id"])
    points["flops"] = points["tokens"].astype(float) * points["run_id"].map(per_token).astype(float)
    known: pd.DataFrame = points[points["step"].gt(0).fillna(False) & points["flops"].gt(0)]
    return known


def equal_flops_gap(
    points: pd.DataFrame, arm: Mapping[str, Any] | pd.Series, other: Mapping[str, Any] | pd.Series
) -> pd.DataFrame:
    """Compute the loss of one arm minus another's at equal FLOPs, in the upper half of the shared log-FLOPs range.

    Losses are interpolated linearly in log FLOPs. The result has every point of either envelope in that range, so
    that the interpolated gap between two of its rows is never larger than at the rows.

    Args:
        points: as from `loss_by_flops`.
        arm: values of the ARM columns.
        other: values of the ARM columns.

    Returns:
        One row per point, ascending: flops, nll (of `arm`), nll_other, gap (nats per token). The table is empty if the
        ranges of the two arms do not overlap.
    """
    both = [rows_of(points, compared).sort_values("flops") for compared in (arm, other)]
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
