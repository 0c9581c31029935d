"""What the sources and own presets say together: the matrix of claims by scale, and measurements that several repeat.

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
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lorabench.analysis.comparison import MIN_LRS
from lorabench.analysis.optima import PAPER_RATIO
from lorabench.analysis.pooled_lr import RandomEffects, random_effects
from lorabench.claims.judge import CORE
from lorabench.errors import UserError
from lorabench.runs import lowest
from lorabench.sources.studies import REWARD_SD, Study
from lorabench.store.io import read_claims, table_path
from lorabench.store.tables import MIXED, UNKNOWN

PROJECT = "lorabench"
"""The source that all presets of this project are: one more preset is not one more laboratory."""

TINY, BELOW = "tiny", 1e7
"""The scale of all models with fewer parameters."""

_COLUMNS = (
    *("claim_id", "statement", "unit", "paper_value", "scale", "parameters", "origin", "source", "verdict"),
    *("borderline", "estimate", "ci_low", "ci_high", "scope", "n_runs", "reason", "others"),
)
"""The columns of the matrix as a tidy table. `origin` is the source or preset that decides the cell, and `others` says
what others of the same scale find."""

_WORST_FIRST = ("contradicted", "inconclusive", "confirmed", "setting not met", "not tested")
_SIZES = {"k": 1e3, "M": 1e6, "B": 1e9}

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
class Own:
    """The verdicts of a preset."""

    name: str
    claims: pd.DataFrame
    """The table `claims` with the columns scale (as `8B`; None for a claim that was judged on no models) and
    parameters (NaN there). It lacks run_ids."""


def read_own(folder: Path, name: str) -> Own:
    """Read the table `claims` of a preset, finished or published; the scale of each claim is that of its scope.

    Raises:
        UserError: there is no such table, or it is from another version.
    """
    if table_path(folder, "claims") is None:
        raise UserError(f"no table claims.parquet or claims.csv in {folder}")
    claims = read_claims(folder, without=("run_ids",))
    scales = [_scale(scope) for scope in claims["scope"]]
    return Own(name, claims.join(pd.DataFrame(scales, columns=["scale", "parameters"], index=claims.index)))


def _scale(scope: object) -> tuple[str | None, float]:
    """Return the scale and the number of parameters at the start of a scope such as `0.83M parameters, 50 steps`.

    Of a range, as in `0.27M to 0.83M parameters`, the larger one counts.
    """
    match = re.match(r"(?:[\d.]+[kMB] to )?([\d.]+)([kMB]) parameters", str(scope))
    if match is None:
        return None, math.nan
    number, unit = float(match[1]), match[2]
    parameters = number * _SIZES[unit]
    if parameters < BELOW:
        return TINY, parameters
    return (f"{number:.2g}{unit}" if number < 10 else f"{number:.0f}{unit}"), parameters


def datasets_of_scope(scope: object) -> str:
    """Return the datasets at the end of a scope such as `0.83M parameters, 50 steps, instruct, worked`."""
    parts = str(scope).split(", ")
    return ", ".join(part for part in parts if not re.search(r"parameters$|steps$", part)).removeprefix("RL on ")


def matrix(judged: pd.DataFrame, own: Sequence[Own] = ()) -> pd.DataFrame:
    """Return the matrix as a tidy table, one row for each core claim and scale, by claim and ascending size.

    Where several sources are of one scale, the worst verdict decides the cell, as within a verdict over several
    comparisons: contradicted, inconclusive, confirmed, setting not met, not tested. Without any runs behind it a
    verdict is `not tested`.

    Args:
        judged: the claims of all studies, as from `studies.judge`.
        own: presets of one's own; the scale of each claim's runs says in which column it stands.
    """
    parts = [judged.assign(origin=judged["source"])]
    parts += [preset.claims[preset.claims["scale"].notna()].assign(origin=preset.name) for preset in own]
    every = pd.concat(parts, ignore_index=True)
    every = every[every["claim_id"].isin(CORE)]
    every.loc[every["n_runs"].fillna(0).eq(0), "verdict"] = "not tested"
    # Models of nearly one size share a column, whose place is that of the smallest.
    every = every.assign(parameters=every["scale"].map(every.groupby("scale")["parameters"].min()))
    rows = []
    for claim_id in CORE:
        verdicts = every[every["claim_id"] == claim_id].sort_values("parameters", kind="stable")
        for _, cell in verdicts.groupby(["parameters", "scale"], sort=True):
            # Of equal verdicts, one with a number is shown.
            order = 2 * cell["verdict"].map(_WORST_FIRST.index) + cell["estimate"].isna()
            deciding, *others = cell.loc[order.sort_values(kind="stable").index].to_dict("records")
            said = [f"{row['origin']}: {row['verdict']}" for row in others if row["verdict"] != "not tested"]
            rows.append({**deciding, "others": "; ".join(said)})
    return pd.DataFrame(rows, columns=list(_COLUMNS))


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

    def measured(measure: str, arm: _Best, value: float, error: float, remarks: list[str]) -> Measurement:
        edges = " and ".join(name for name, best in (("LoRA", arm), ("FullFT", fullft)) if best.edge)
        remark = "; ".join([f"best LR of {edges} at the edge of its grid"] * bool(edges) + remarks)
        counts = not edges and math.isfinite(error)
        return Measurement(measure, value=value, error=error, counts=counts, remark=remark, **about)

    def gap(measure: str, arm: _Best, sign: int) -> Measurement:
        error = sigma * math.sqrt(1 / arm.n + 1 / fullft.n)
        remarks = noise_remark + (["noise between seeds not known"] if math.isnan(error) else [])
        return measured(measure, arm, sign * (arm.loss - fullft.loss), error, remarks)

    rows: list[Measurement] = []
    if highest is not None and high in swept and fullft_runs["lr"].nunique() >= MIN_LRS:
        error = math.hypot(highest.log_error, fullft.log_error)
        at_edge = highest.edge or fullft.edge
        remarks = [] if at_edge else ["by the best LRs of the grids"]
        rows.append(measured("lr_ratio", highest, math.log(highest.lr / fullft.lr), error, remarks))
        if not rl:
            rows.append(gap("loss_gap", highest, 1))
    if rl and rank_1 is not None:
        # The losses are error rates, and the gap is one of accuracies.
        rows.append(gap("rank_1_gap", rank_1, -1))
    return rows


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
    `p_of_groups` is then the probability of group means so far apart by chance (a Wald test), and otherwise null.
    Sources whose attribute is unknown or mixed are no group that could explain anything.

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
            chance = math.nan
            if len(enough) >= _MIN_SOURCES:
                chance = random_effects([part.mean for part in enough], [part.error for part in enough]).p_alike
            if len(groups) > 1:
                summaries += [row(measure, attribute, value, part, chance) for value, part in groups.items()]
    return pd.DataFrame(summaries)
