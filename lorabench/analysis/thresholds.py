"""Capacity thresholds: after how many tokens an adapter leaves the shared curve, against how many parameters it has."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from lorabench.analysis.arms import arm_table, each_arm, rows_of, with_arm_columns
from lorabench.analysis.slopes import Line, log_log

Status = Literal["left", "stays", "never joined", "unknown"]


def thresholds(runs: pd.DataFrame, envelopes: pd.DataFrame, departures: pd.DataFrame) -> pd.DataFrame:
    """Where LoRA arms run out of capacity.

    An arm that is above the shared curve from its first point on never joined it. LoRA starts slowly, since B is
    zero: when that passes into a lack of capacity its curve does not tell, so such an arm has no threshold.

    Args:
        runs: columns ARM, trainable_params.
        envelopes: as from `envelopes`.
        departures: as from `departures`, of the same arms.

    Returns:
        One row per LoRA arm with a curve: status (`left`, `stays`, `never joined`, or `unknown` where departure can't
        be told), step and tokens (of departure; of the curve's end for the others), tokens_before (of the last point
        that is not above), trainable_params.
    """
    runs, envelopes, rows = with_arm_columns(runs), with_arm_columns(envelopes), []
    for arm, found in each_arm(departures):
        if arm["method"] == "fullft":
            continue
        points = rows_of(envelopes[envelopes["step"] > 0], arm).sort_values("step")
        steps, tokens = points["step"].to_numpy(int), points["tokens"].to_numpy(float, na_value=math.nan)
        departed, step = found["departed"].iloc[0], found["step"].iloc[0]
        status: Status
        place = len(steps) - 1
        if pd.isna(departed):
            status = "unknown"
        elif not departed:
            status = "stays"
        else:
            place = int(np.flatnonzero(steps == step)[0])
            status = "left" if place else "never joined"
        rows.append(
            arm
            | {
                "status": status,
                "step": steps[place],
                "tokens": tokens[place],
                "tokens_before": tokens[place - 1] if status == "left" else math.nan,
                "trainable_params": rows_of(runs, arm)["trainable_params"].iloc[0],
            }
        )
    table = arm_table(rows, ["status", "step", "tokens", "tokens_before", "trainable_params"])
    return table.astype({"step": "Int64", "tokens": float, "tokens_before": float, "trainable_params": "Int64"})


def threshold_slope(left: pd.DataFrame, groups: ArrayLike | None = None) -> Line:
    """Log-log slope of tokens at departure against adapter parameters.

    Departure lies somewhere between two points of a curve. The scatter of a uniform position there is the least that
    the interval of the slope assumes.

    Args:
        left: rows of `thresholds` with status `left`.
        groups: one label per row, each with an intercept of its own.
    """
    gaps = np.log10(left["tokens"].to_numpy(float)) - np.log10(left["tokens_before"].to_numpy(float))
    resolution = math.sqrt(float(np.mean(gaps**2)) / 12) if len(gaps) else math.nan
    return log_log(left["trainable_params"].to_numpy(float), left["tokens"].to_numpy(float), resolution, groups)
