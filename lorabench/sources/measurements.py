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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from lorabench.analysis.comparison import MIN_LRS
from lorabench.analysis.lr_ratio import PAPER_RATIO
from lorabench.analysis.random_effects import RandomEffects, p_of_groups, random_effects
from lorabench.sources.studies import Study
from lorabench.store.checks import is_rl
from lorabench.store.tables import MIXED, UNKNOWN

MEASURES = {
    "lr_ratio": "optimal LR of LoRA over that of full fine-tuning",
    "loss_gap": "lowest loss of LoRA minus that of full fine-tuning (nats per token)",
    "gap_growth": "growth of that gap from the smallest to the largest batch size (nats per token)",
    "rank_1_gap": "RL: highest accuracy of rank 1 minus that of full fine-tuning",
}
"""The measurements, in words."""

PAPER_VALUES = {"lr_ratio": math.log(PAPER_RATIO), "loss_gap": 0.0, "gap_growth": 0.0, "rank_1_gap": 0.0}
"""What the paper says of each measurement; of the growth it says only that it is above 0."""

ATTRIBUTES = ("task", "precision", "schedule", "alpha", "base_kind")
"""The attributes by which sources are grouped to explain their differences."""

Z = 1.959964
"""Half of the width of a 95% interval in standard errors."""

_TWO_SIGMA = 2.0
_MIN_SOURCES = 2


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
    return [measurement for study in studies for measurement in _of_study(study)]


def growth_measurements(studies: Sequence[Study], claims: pd.DataFrame) -> list[Measurement]:
    """Return the growth of the gap with the batch size, from the judged claims of the studies.

    Args:
        studies: the studies.
        claims: as from `studies.judge`, of all studies.
    """
    measured = []
    for study in studies:
        of_study = (claims["source"] == study.of.name) & (claims["model"] == study.model)
        row = claims[of_study & (claims["claim_id"] == "D1")]
        if row.empty or row[["estimate", "ci_low", "ci_high"]].isna().to_numpy().any():
            continue
        value, low, high = (float(row[name].iloc[0]) for name in ("estimate", "ci_low", "ci_high"))
        runs = study.tables.runs
        measured.append(
            Measurement(
                measure="gap_growth",
                source=study.of.name,
                study=study.name,
                scale=study.scale,
                parameters=study.parameters,
                task="sft",
                dataset=f"{runs['dataset'].iloc[0]}, batch {runs['batch_size'].min()} to {runs['batch_size'].max()}",
                batch_size=None,
                value=value,
                error=(high - low) / (2 * Z),
                counts=high > low,
                remark="fitted, claim D1",
                **_attributes(study),
            )
        )
    return measured


def _attributes(study: Study) -> dict[str, str]:
    return {name: str(getattr(study.of.source.attributes, name)) for name in ATTRIBUTES if name != "task"}


def _of_study(study: Study) -> list[Measurement]:
    runs = study.tables.runs
    runs = runs.reindex(
        columns=[*runs, *(name for name in ("lr", "steps", "batch_size", "data_kind") if name not in runs)]
    )
    rl = bool(is_rl(runs).all())
    runs = runs.assign(loss=1 - runs["final_reward"] if rl else runs["final_test_nll"])
    runs = runs[(runs["placement"].fillna("all") == "all") & ~runs["data_kind"].eq("facts")]
    measured: list[Measurement] = []
    for _, of_group in runs.groupby(["dataset", "batch_size", "steps"], dropna=False):
        measured += _of_group(study, of_group, rl)
    return measured


def _of_group(study: Study, runs: pd.DataFrame, rl: bool) -> list[Measurement]:
    noise = study.reward_noise if rl else study.noise
    batch = runs["batch_size"].iloc[0]
    sigma = _own_noise(runs, rl) or (noise.sigma if noise else math.nan)
    fullft = _best(runs[runs["method"] == "fullft"], sigma)
    lora = {int(str(rank)): arm for rank, arm in runs[runs["method"] == "lora"].groupby("rank")}
    high = [rank for rank, arm in lora.items() if rank > 1 and arm["lr"].nunique() >= MIN_LRS] or [
        rank for rank in lora if rank > 1
    ]
    if fullft is None or not lora:
        return []
    highest = _best(lora[max(high)], sigma) if high else None
    rank_1 = _best(lora[1], sigma) if 1 in lora else None
    source_noise = "" if _own_noise(runs, rl) or noise is None else f"noise from {noise.source}"
    about: dict[str, Any] = {
        "source": study.of.name,
        "study": study.name,
        "scale": study.scale,
        "parameters": study.parameters,
        "task": "rl" if rl else "sft",
        "dataset": str(runs["dataset"].iloc[0]),
        "batch_size": None if pd.isna(batch) else int(batch),
        **_attributes(study),
    }
    measured = []
    if highest is not None and _swept(runs, lora[max(high)]):
        edges = [name for name, arm in (("LoRA", highest), ("FullFT", fullft)) if arm.edge]
        error = math.hypot(highest.log_error, fullft.log_error)
        remark = (
            f"best LR of {' and '.join(edges)} at the edge of its grid" if edges else "by the best LRs of the grids"
        )
        measured.append(
            Measurement(
                measure="lr_ratio",
                value=math.log(highest.lr / fullft.lr),
                error=error,
                counts=not edges,
                remark=remark,
                **about,
            )
        )
    if not rl and highest is not None and _swept(runs, lora[max(high)]):
        measured.append(_gap("loss_gap", highest, fullft, sigma, source_noise, about))
    if rl and rank_1 is not None:
        measured.append(_gap("rank_1_gap", rank_1, fullft, sigma, source_noise, about))
    return measured


def _swept(runs: pd.DataFrame, lora: pd.DataFrame) -> bool:
    """Return whether both methods have a grid of LRs."""
    return lora["lr"].nunique() >= MIN_LRS and runs.loc[runs["method"] == "fullft", "lr"].nunique() >= MIN_LRS


def _gap(measure: str, lora: _Best, fullft: _Best, sigma: float, noise: str, about: Mapping[str, Any]) -> Measurement:
    """Return the gap of two arms; in RL it is one of accuracies, so that above 0 is better for LoRA."""
    gap = lora.loss - fullft.loss
    error = sigma * math.sqrt(1 / lora.n + 1 / fullft.n)
    edges = [name for name, arm in (("LoRA", lora), ("FullFT", fullft)) if arm.edge]
    remarks = [f"best LR of {' and '.join(edges)} at the edge of its grid"] if edges else []
    remarks += [noise] if noise else []
    remarks += ["noise between seeds not known"] if math.isnan(error) else []
    counts = math.isfinite(error) and not edges
    value = -gap if measure == "rank_1_gap" else gap
    return Measurement(measure=measure, value=value, error=error, counts=counts, remark="; ".join(remarks), **about)


def _own_noise(runs: pd.DataFrame, rl: bool) -> float | None:
    """Return the deviation between seeds of a group's own runs, pooled over arms and LRs; None with one seed."""
    column = "final_reward_sd" if rl else "final_test_nll_sd"
    if column in runs and runs[column].notna().any():
        return math.sqrt(float((runs[column].astype(float) ** 2).mean()))
    cells = runs.groupby(["method", "rank", "lr"], dropna=False)["loss"]
    dof = cells.count() - 1
    if not dof.sum() > 0:
        return None
    return math.sqrt(float((cells.var() * dof).sum() / dof.sum()))


def _best(arm: pd.DataFrame, sigma: float) -> _Best | None:
    done = arm[arm["status"].eq("done") & arm["loss"].notna()].astype({"loss": float})
    if done.empty:
        return None
    number = done["n_seeds"].fillna(1).astype(float) if "n_seeds" in done else pd.Series(1.0, index=done.index)
    if done["lr"].isna().any():
        return _Best(math.nan, math.nan, False, float(done["loss"].mean()), int(number.sum()))
    cells = done.assign(n=number).groupby(done["lr"].astype(float)).agg(loss=("loss", "mean"), n=("n", "sum"))
    lrs, losses = np.log(cells.index.to_numpy(float)), cells["loss"].to_numpy(float)
    best = int(losses.argmin())
    alike = (
        0.0
        if math.isnan(sigma)
        else _TWO_SIGMA * sigma * np.sqrt(1 / cells["n"].to_numpy() + 1 / cells["n"].iloc[best])
    )
    close = losses - losses[best] <= alike
    low = high = best
    while low > 0 and close[low - 1]:
        low -= 1
    while high + 1 < len(lrs) and close[high + 1]:
        high += 1
    lost = np.log(arm.loc[~arm["status"].eq("done"), "lr"].astype(float).dropna())
    above = lost[lost > lrs[high]].min() if len(lost) else math.nan
    loss, n = float(losses[best]), int(cells["n"].iloc[best])
    one_lr = len(lrs) == 1
    if low == 0 or (high == len(lrs) - 1 and math.isnan(above)):
        return _Best(float(np.exp(lrs[best])), math.nan, not one_lr, loss, n)
    upper = lrs[high + 1] if high + 1 < len(lrs) else above
    ends = ((lrs[low - 1] + lrs[low]) / 2, (lrs[high] + upper) / 2)
    return _Best(float(np.exp(sum(ends) / 2)), float(ends[1] - ends[0]) / math.sqrt(12), False, loss, n)


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
    rows = []
    for measure in MEASURES:
        counted = table[(table["measure"] == measure) & table["counts"]]
        if counted.empty:
            continue
        rows.append(_summary_row(measure, "", "", _by_source(counted)))
        for attribute in ATTRIBUTES:
            groups = {str(value): _by_source(part) for value, part in counted.groupby(attribute)}
            known = {value: part for value, part in groups.items() if value not in (UNKNOWN, MIXED)}
            enough = {value: part for value, part in known.items() if part.k >= _MIN_SOURCES}
            chance = p_of_groups(list(enough.values())) if len(enough) >= _MIN_SOURCES else math.nan
            if len(groups) > 1:
                rows += [_summary_row(measure, attribute, value, part, chance) for value, part in groups.items()]
    return pd.DataFrame(rows)


def _by_source(table: pd.DataFrame) -> RandomEffects:
    """Summarize measurements over their sources, where SFT and RL of a source count apart."""
    means = table.groupby(["source", "task"])[["value", "error"]].mean()
    return random_effects(means["value"].tolist(), means["error"].tolist())


def _summary_row(
    measure: str, attribute: str, group: str, summary: RandomEffects, chance: float = math.nan
) -> dict[str, Any]:
    return {"measure": measure, "attribute": attribute, "group": group, **asdict(summary), "p_of_groups": chance}
