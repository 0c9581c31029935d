"""Capacity thresholds: the training tokens after which an adapter leaves the lowest curve, by its parameters."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from lorabench.analysis.arms import arm_table, each_arm, rows_of, with_arm_columns
from lorabench.analysis.slopes import Line, log_log

ThresholdStatus = Literal["left", "stays", "never joined", "unknown"]


def thresholds(runs: pd.DataFrame, envelopes: pd.DataFrame, departures: pd.DataFrame) -> pd.DataFrame:
    """Find where each LoRA arm runs out of capacity.

    An arm whose curve lies above the lowest curve from its first point on never joined it. LoRA starts slowly, since B
    is zero, and the curve of such an arm does not show when a lack of capacity sets in, so it has no threshold.

    Args:
        runs: columns ARM, trainable_params.
        envelopes: as from `envelopes`.
        departures: as from `departures`, of the same arms.

    Returns:
        One row per LoRA arm with a curve: status (`left`, `stays`, `never joined`, or `unknown` where `departures` is
        null), step and tokens (at departure, or else at the end of the curve), tokens_before (at the last point before
        departure), trainable_params.
    """
    runs, envelopes, rows = with_arm_columns(runs), with_arm_columns(envelopes), []
    for arm, departure in each_arm(departures):
        if arm["method"] == "fullft":
            continue
        points = rows_of(envelopes[envelopes["step"] > 0], arm).sort_values("step")
        steps, tokens = points["step"].to_numpy(int), points["tokens"].to_numpy(float, na_value=math.nan)
        departed, step = departure["departed"].iloc[0], departure["step"].iloc[0]
        status: ThresholdStatus
        index = len(steps) - 1
        if pd.isna(departed):
            status = "unknown"
        elif not departed:
            status = "stays"
        else:
            index = int(np.flatnonzero(steps == step)[0])
            status = "left" if index else "never joined"
        rows.append(
            arm
            | {
                "status": status,
                "step": steps[index],
                "tokens": tokens[index],
                "tokens_before": tokens[index - 1] if status == "left" else math.nan,
                "trainable_params": rows_of(runs, arm)["trainable_params"].iloc[0],
            }
        )
    table = arm_table(rows, ["status", "step", "tokens", "tokens_before", "trainable_params"])
    return table.astype({"step": "Int64", "tokens": float, "tokens_before": float, "trainable_params": "Int64"})


def threshold_slope(left: pd.DataFrame, groups: ArrayLike | None = None) -> Line:
    """Fit the log-log slope of tokens at departure against trainable parameters.

    Departure lies somewhere between two points of a curve. The interval of the slope assumes at least the scatter of a
    position that is uniform between them.

    Args:
        left: rows of `thresholds` with status `left`.
        groups: one label per row; each group has its own intercept.
    """
    gaps = np.log10(left["tokens"].to_numpy(float)) - np.log10(left["tokens_before"].to_numpy(float))
    resolution = math.sqrt(float(np.mean(gaps**2)) / 12) if len(gaps) else math.nan
    return log_log(left["trainable_params"].to_numpy(float), left["tokens"].to_numpy(float), resolution, groups)
