"""Measurements that several sources repeat, and their random-effects summary over sources.

The measurements of a study are taken at the best learning rates of its grids, since most sources have one seed:

- `lr_ratio`: the natural logarithm of LoRA's optimal LR over that of full fine-tuning (FullFT), SFT and RL. An optimum
  lies anywhere between the LRs that the noise does not tell from the best, and half a step beyond them; its error is
  that of a uniform distribution.
- `loss_gap`: LoRA's lowest loss minus that of FullFT, in nats per token.
- `gap_growth`: by how much that gap is larger at the largest batch size than at the smallest, in nats per token; it is
  the fitted estimate of claim D1, of the rank that decides it.
- `rank_1_gap`: in RL, the highest accuracy of rank 1 minus that of FullFT, as a share.

LoRA is that of the highest rank whose grid has three LRs (or, without grids, the highest). A measurement without an
error, or with an optimum at the edge of its grid, is shown and does not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from lorabench.analysis.comparison import MIN_LRS
from lorabench.analysis.optima import PAPER_RATIO
from lorabench.analysis.pooled_lr import RandomEffects, p_of_groups, random_effects
from lorabench.runs import lowest
from lorabench.sources.matrix import PROJECT, Own, datasets_of_scope
from lorabench.sources.studies import REWARD_SD, Study
from lorabench.store.tables import MIXED, UNKNOWN

MEASURES = {
    "lr_ratio": "optimal LR of LoRA over that of full fine-tuning",
    "loss_gap": "lowest loss of LoRA minus that of full fine-tuning (nats per token)",
    "gap_growth": "growth of that gap from the smallest to the largest batch size (nats per token)",
    "rank_1_gap": "RL: highest accuracy of rank 1 minus that of full fine-tuning",
}
"""The measurements with their descriptions."""

PAPER_VALUES = {"lr_ratio": math.log(PAPER_RATIO), "loss_gap": 0.0, "gap_growth": 0.0, "rank_1_gap": 0.0}
"""What the paper says of each measurement; of the growth it says only that it is above 0."""

ATTRIBUTES = ("task", "precision", "schedule", "alpha", "base_kind")
"""The attributes by which sources are grouped to explain their differences."""

Z = 1.959964
"""Half of the width of a 95% interval in standard errors."""

_TWO_SIGMA = 2.0
_MIN_SOURCES = 2
_OF_CLAIMS = {"B1": ("lr_ratio", "sft"), "B10": ("lr_ratio", "rl"), "B2": ("loss_gap", "sft"),
              "D1": ("gap_growth", "sft"), "F1": ("rank_1_gap", "rl")}  # fmt: skip
"""The measurement and the task of each claim whose estimate is a measurement of a preset of this project."""


@dataclass(frozen=True)
class Measurement:
    """One measurement of one comparison of a study."""

    measure: str
    source: str
    study: str
    scale: str
    parameters: int
    task: str
    dataset: str
    batch_size: int | None
    value: float
    error: float
    """The standard error; NaN where it is not known."""
    counts: bool
    """Whether it is part of the summary."""
    remark: str
    precision: str
    schedule: str
    alpha: str
    base_kind: str


@dataclass(frozen=True)
class _Best:
    """The best learning rate of an arm."""

    lr: float
    """The geometric middle of the LRs that may be the best."""
    log_error: float
    """The standard error of its natural logarithm; NaN at an edge of the grid, or without a grid."""
    edge: bool
    loss: float
    """The lowest loss, or error rate in RL."""
    n: int
    """The number of seeds behind it."""


def measurements(studies: Sequence[Study]) -> list[Measurement]:
    """Measure all studies, in their order."""
    return [measured for study in studies for runs in study.conditions() for measured in _of_condition(study, runs)]


def growth_measurements(studies: Sequence[Study], claims: pd.DataFrame) -> list[Measurement]:
    """Return the growth of the gap with the batch size, from the judged claims of the studies.

    Args:
        studies: the studies.
        claims: as from `studies.judge`, of all studies.
    """
    measured = []
    for study in studies:
        of_study = (claims["source"] == study.of.name) & (claims["model"] == study.model)
        rows = claims.loc[of_study & (claims["claim_id"] == "D1"), ["estimate", "ci_low", "ci_high"]].dropna()
        if rows.empty:
            continue
        value, low, high = rows.iloc[0].astype(float)
        runs = study.tables.runs
        about = _about(study) | {
            "task": "sft",
            "dataset": f"{runs['dataset'].iloc[0]}, batch {runs['batch_size'].min()} to {runs['batch_size'].max()}",
            "batch_size": None,
        }
        error = (high - low) / (2 * Z)
        measured.append(Measurement("gap_growth", value=value, error=error, counts=high > low,
                                    remark="fitted, claim D1", **about))  # fmt: skip
    return measured


def own_measurements(own: Own) -> list[Measurement]:
    """Return the fitted numbers of a preset that sources measure too, from its table `claims`.

    They are those of the comparison that decides each claim (see `_OF_CLAIMS`).
    """
    measured = []
    for claim_id, (measure, task) in _OF_CLAIMS.items():
        row = dict(next(iter(own.claims[own.claims["claim_id"] == claim_id].to_dict("records")), {}))
        if not row:
            continue
        numbers = [float(row[name]) for name in ("estimate", "ci_low", "ci_high")]
        if not all(map(math.isfinite, numbers)) or pd.isna(row["scale"]):
            continue
        value, low, high = map(math.log, numbers) if measure == "lr_ratio" else numbers
        measured.append(
            Measurement(
                measure=measure,
                source=PROJECT,
                study=f"lorabench {own.name}",
                scale=str(row["scale"]),
                parameters=int(row["parameters"]),
                task=task,
                dataset=datasets_of_scope(row["scope"]),
                batch_size=None,
                value=-value if measure == "rank_1_gap" else value,
                error=(high - low) / (2 * Z),
                counts=high > low,
                remark=f"fitted, claim {claim_id}",
                precision="fp32 weights",
                schedule="constant",
                alpha="32",
                base_kind="base",
            )
        )
    return measured


def _about(study: Study) -> dict[str, Any]:
    attributes = study.of.source.attributes
    return {
        "source": study.of.name,
        "study": study.name,
        "scale": study.described.scale,
        "parameters": study.described.parameters,
        "task": "rl" if study.is_rl else "sft",
        **{name: str(getattr(attributes, name)) for name in ATTRIBUTES if name != "task"},
    }


def _of_condition(study: Study, runs: pd.DataFrame) -> list[Measurement]:
    """Measure the runs of one dataset, batch size and number of steps."""
    rl, noise = study.is_rl, study.reward_noise if study.is_rl else study.noise
    own_sigma = _own_noise(runs, rl)
    sigma = own_sigma or (noise.sigma if noise else math.nan)
    noise_remark = [] if own_sigma or noise is None else [f"noise from {noise.source}"]
    fullft_runs = runs[runs["method"] == "fullft"]
    fullft = _best(fullft_runs, sigma)
    lora = {int(str(rank)): arm for rank, arm in runs[runs["method"] == "lora"].groupby("rank")}
    if fullft is None or not lora:
        return []
    ranks = [rank for rank in lora if rank > 1]
    swept = [rank for rank in ranks if lora[rank]["lr"].nunique() >= MIN_LRS]
    high = max(swept or ranks, default=None)
    highest = None if high is None else _best(lora[high], sigma)
    rank_1 = _best(lora[1], sigma) if 1 in lora else None
    batch = runs["batch_size"].iloc[0]
    about = _about(study) | {
        "dataset": str(runs["dataset"].iloc[0]),
        "batch_size": None if pd.isna(batch) else int(batch),
    }

    def edge_remarks(arm: _Best) -> list[str]:
        edges = [name for name, best in (("LoRA", arm), ("FullFT", fullft)) if best.edge]
        return [f"best LR of {' and '.join(edges)} at the edge of its grid"] if edges else []

    def gap(measure: str, arm: _Best, sign: int) -> Measurement:
        error = sigma * math.sqrt(1 / arm.n + 1 / fullft.n)
        edges = edge_remarks(arm)
        remarks = edges + noise_remark + (["noise between seeds not known"] if math.isnan(error) else [])
        return Measurement(
            measure=measure,
            value=sign * (arm.loss - fullft.loss),
            error=error,
            counts=math.isfinite(error) and not edges,
            remark="; ".join(remarks),
            **about,
        )

    measured: list[Measurement] = []
    if highest is not None and high in swept and fullft_runs["lr"].nunique() >= MIN_LRS:
        edges = edge_remarks(highest)
        measured.append(
            Measurement(
                measure="lr_ratio",
                value=math.log(highest.lr / fullft.lr),
                error=math.hypot(highest.log_error, fullft.log_error),
                counts=not edges,
                remark=edges[0] if edges else "by the best LRs of the grids",
                **about,
            )
        )
        if not rl:
            measured.append(gap("loss_gap", highest, 1))
    if rl and rank_1 is not None:
        # The losses are error rates, and the gap is one of accuracies.
        measured.append(gap("rank_1_gap", rank_1, -1))
    return measured


def _own_noise(runs: pd.DataFrame, rl: bool) -> float | None:
    """Return the deviation between seeds of a group's own runs, pooled over arms and LRs; None with one seed."""
    column = REWARD_SD if rl else "final_test_nll_sd"
    if column in runs and runs[column].notna().any():
        return math.sqrt(float((runs[column].astype(float) ** 2).mean()))
    cells = runs.groupby(["method", "rank", "lr"], dropna=False)["loss"]
    dof = cells.count() - 1
    if not dof.sum() > 0:
        return None
    return math.sqrt(float((cells.var() * dof).sum() / dof.sum()))


def _best(arm: pd.DataFrame, sigma: float) -> _Best | None:
    """Return the best LR of an arm, given the deviation of a loss between seeds; None without a finished run."""
    done = arm[arm["status"].eq("done") & arm["loss"].notna()].astype({"loss": float})
    if done.empty:
        return None
    number = done["n_seeds"].fillna(1).astype(float) if "n_seeds" in done else pd.Series(1.0, index=done.index)
    if done["lr"].isna().any():
        return _Best(math.nan, math.nan, False, float(done["loss"].mean()), int(number.sum()))
    cells = done.assign(n=number).groupby(done["lr"].astype(float)).agg(loss=("loss", "mean"), n=("n", "sum"))
    lrs = np.log(cells.index.to_numpy(float))
    losses, n = cells["loss"].to_numpy(float), cells["n"].to_numpy(float)
    best = cells.index.tolist().index(lowest(dict(zip(cells.index, losses.tolist(), strict=True))))
    alike = 0.0 if math.isnan(sigma) else _TWO_SIGMA * sigma * np.sqrt(1 / n + 1 / n[best])
    close = losses - losses[best] <= alike
    low = high = best
    while low > 0 and close[low - 1]:
        low -= 1
    while high + 1 < len(lrs) and close[high + 1]:
        high += 1
    lost = np.log(arm.loc[~arm["status"].eq("done"), "lr"].astype(float).dropna())
    above = lost[lost > lrs[high]].min() if len(lost) else math.nan
    if low == 0 or (high == len(lrs) - 1 and math.isnan(above)):
        return _Best(float(np.exp(lrs[best])), math.nan, len(lrs) > 1, float(losses[best]), int(n[best]))
    upper = lrs[high + 1] if high + 1 < len(lrs) else above
    ends = ((lrs[low - 1] + lrs[low]) / 2, (lrs[high] + upper) / 2)
    log_error = float(ends[1] - ends[0]) / math.sqrt(12)
    return _Best(float(np.exp(sum(ends) / 2)), log_error, False, float(losses[best]), int(n[best]))


def measurement_table(measured: Sequence[Measurement]) -> pd.DataFrame:
    """Return the measurements as a table, one row each."""
    names = list(Measurement.__dataclass_fields__)
    return pd.DataFrame([asdict(part) for part in measured], columns=names).astype({"batch_size": "Int64"})


def summary_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return the summaries over sources: one row for each measure, and for each of its groups by an attribute.

    The measurements of one source share data and model, so their mean counts once, with the mean of their errors; SFT
    and RL of a source count apart. An attribute explains as far as two groups of it have two sources each;
    `p_of_groups` is then the probability of group means so far apart by chance, and otherwise null. Sources whose
    attribute is unknown or mixed are no group that could explain anything.

    Args:
        table: as from `measurement_table`.
    """

    def row(measure: str, attribute: str, group: str, summary: RandomEffects, chance: float) -> dict[str, Any]:
        return {"measure": measure, "attribute": attribute, "group": group, **asdict(summary), "p_of_groups": chance}

    def by_source(rows: pd.DataFrame) -> RandomEffects:
        means = rows.groupby(["source", "task"])[["value", "error"]].mean()
        return random_effects(means["value"].tolist(), means["error"].tolist())

    summaries = []
    for measure in MEASURES:
        counted = table[(table["measure"] == measure) & table["counts"]]
        if counted.empty:
            continue
        summaries.append(row(measure, "", "", by_source(counted), math.nan))
        for attribute in ATTRIBUTES:
            groups = {str(value): by_source(part) for value, part in counted.groupby(attribute)}
            known = [part for value, part in groups.items() if value not in (UNKNOWN, MIXED)]
            enough = [part for part in known if part.k >= _MIN_SOURCES]
            chance = p_of_groups(enough) if len(enough) >= _MIN_SOURCES else math.nan
            if len(groups) > 1:
                summaries += [row(measure, attribute, value, part, chance) for value, part in groups.items()]
    return pd.DataFrame(summaries)
