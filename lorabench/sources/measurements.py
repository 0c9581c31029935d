"""What the sources and own presets say together: the matrix of claims by scale, and measurements that several repeat.

The measurements of a source are taken at the best learning rates of its grids, since most sources have one seed:

- `lr_ratio`: the natural logarithm of LoRA's optimal LR over that of full fine-tuning (FullFT), SFT and RL. An optimum
  lies anywhere between the LRs that the noise does not tell from the best, and half a step beyond them; its error is
  that of a uniform distribution.
- `loss_gap`: LoRA's lowest loss minus that of FullFT, in nats per token.
- `gap_growth`: by how much that gap is larger at the largest batch size than at the smallest, in nats per token; it is
  the fitted estimate of claim D1, of the rank that decides it.
- `accuracy_gap`: in SFT that is judged by accuracy, LoRA's highest accuracy minus that of FullFT, as a share.
- `rank_1_gap`: in RL, the highest accuracy of rank 1 minus that of FullFT, as a share.

LoRA is that of the highest rank whose grid has three LRs; where alpha differs between ranks, `lr_ratio` is that of the
highest rank with alpha 32. The measurements of a preset are the fitted estimates of its
claims. A measurement without an error, or with an optimum at the edge of its grid, is shown and does not count.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lorabench.analysis.arms import ALPHA
from lorabench.analysis.finding import SEVERITY
from lorabench.analysis.fit_rows import MIN_LRS
from lorabench.analysis.rules import DECIDED
from lorabench.claims.judge import CLAIMS
from lorabench.runs import lowest
from lorabench.sources.random_effects import p_of_groups, random_effects
from lorabench.sources.source import REWARD_SD, SourceModel, at_usual_alpha
from lorabench.store.io import read_claims
from lorabench.store.published import NOT_PUBLISHED, read_batches, read_held_out, read_provenance
from lorabench.store.tables import MIXED, UNKNOWN

PROJECT = "lorabench"
"""The source that all presets of this project are: one more preset is not one more laboratory."""

TINY, BELOW = "tiny", 1e7
"""The scale of all models with fewer parameters."""

_SIZES = {"k": 1e3, "M": 1e6, "B": 1e9}

_CLAIMS = tuple(claim.id for claim in CLAIMS if claim.core or claim.id in ("A8", "F3"))
"""The claims of the matrix: the core claims, A8, which says whether a low rank is too small, and F3, whether it gains
reward as fast as full fine-tuning."""

_MATRIX = (
    *("claim_id", "statement", "unit", "paper_value", "scale", "parameters", "origin", "source", "verdict"),
    *("explored", "held_out", "batches", "batches_alike", "p_again", "n_hold", "n_parts", "part_low", "part_high"),
    *("estimate", "ci_low", "ci_high", "scope", "n_runs", "n_seeds", "lr_chosen_on", "reason", "others"),
)
"""The columns of the matrix as a tidy table. `origin` is the source or preset that decides the cell, `held_out` its
verdict on held-out seeds if it was run on them, `explored` whether it was run on others before, and `others` says what
others of the same scale find. If the cell is of several `batches` of held-out seeds together, `batches_alike` of them
have its verdict alone. The numbers of comparisons are those of all, and the range of their estimates that of all with
the cell's unit."""

MEASURES = {
    "lr_ratio": "optimal LR of LoRA over that of full fine-tuning",
    "loss_gap": "lowest loss of LoRA minus that of full fine-tuning (nats per token)",
    "gap_growth": "growth of that gap from the smallest to the largest batch size (nats per token)",
    "accuracy_gap": "SFT: highest accuracy of LoRA minus that of full fine-tuning",
    "rank_1_gap": "RL: highest accuracy of rank 1 minus that of full fine-tuning",
}
"""The measurements with their descriptions."""

ATTRIBUTES = ("task", "precision", "schedule", "alpha", "base_kind")
"""The attributes by which sources are grouped to explain their differences."""

_MEASUREMENT = (
    *("measure", "source", "study", "scale", "parameters", "task", "dataset", "batch_size"),
    *("value", "error", "counts", "remark", "precision", "schedule", "alpha", "base_kind"),
)
"""The columns of a measurement. `error` is a standard error, NaN where it is not known; `counts` says whether the
measurement is part of the summary."""

Z = 1.959964
"""Half of the width of a 95% interval in standard errors."""


def read_own(folder: Path, name: str) -> pd.DataFrame:
    """Read the table `claims` of a preset, finished or published; of several published batches, that of all together.

    It gets the columns origin (the preset's name), explored (False where all seeds are held out), held_out (the verdict
    on held-out seeds, null without them; the verdict itself where all seeds are), scale (as `8B`) and parameters: those
    at the start of the claim's scope, such as `0.83M parameters, 50 steps`, the larger one of a range; null for a claim
    that was judged on no models.
    """
    together = read_batches(folder)
    claims = read_claims(folder, without=NOT_PUBLISHED) if together is None else together
    stated = claims["scope"].astype(str).str.extract(r"^(?:[\d.]+[kMB] to )?([\d.]+)([kMB]) parameters")
    number, unit = stated[0].astype(float), stated[1]
    parameters = number * unit.map(_SIZES).astype(float)
    scale = (number.map(lambda n: f"{n:.2g}" if n < 10 else f"{n:.0f}") + unit).mask(parameters < BELOW, TINY)
    again, held_out = read_held_out(folder), claims["verdict"]
    if explored := together is None and "frozen" not in read_provenance(folder):
        held_out = claims["claim_id"].map({} if again is None else dict(again[["claim_id", "held_out"]].to_numpy()))
    return claims.assign(scale=scale, parameters=parameters, origin=name, explored=explored, held_out=held_out)


def holds_again(cell: Mapping[Any, Any]) -> bool:
    """Return whether a decided verdict of a cell of the matrix was reached on held-out seeds, alone or again."""
    return cell["verdict"] in DECIDED and cell["held_out"] == cell["verdict"]


def matrix(judged: pd.DataFrame, own: Sequence[pd.DataFrame] = ()) -> pd.DataFrame:
    """Return the matrix as a tidy table, one row for each of its claims and scale, by claim and ascending size.

    Where several sources are of one scale, the worst verdict decides the cell, as within a verdict over several
    comparisons (see `lorabench.analysis.finding.SEVERITY`); one that longer runs would decide counts for less than any
    decided one. Without any runs behind it a verdict is `not tested`. Given are the claims of all sources, as from
    `source.judge`, and own presets, each as from `read_own`.
    """
    every = pd.concat([judged.assign(origin=judged["source"]), *own], ignore_index=True)
    # Models of nearly one size share a column, whose place is that of the smallest.
    every = every[every["claim_id"].isin(_CLAIMS) & every["scale"].notna()].assign(
        verdict=lambda table: table["verdict"].mask(table["n_runs"].fillna(0).eq(0), "not tested"),
        parameters=lambda table: table.groupby("scale")["parameters"].transform("min"),
    )
    # Runs that are too short for a claim decide no cell that longer ones do, nor do their estimates count.
    too_short = every["would_decide"].eq("longer runs")
    every.loc[too_short, ["part_low", "part_high"]] = np.nan
    # Of equal verdicts, one with a number is shown.
    ranks = -every["verdict"].map(SEVERITY.index).mask(too_short, SEVERITY.index("confirmed") - 0.5)
    order = every.assign(claim=every["claim_id"].map(_CLAIMS.index), rank=ranks, unknown=every["estimate"].isna())
    every = order.sort_values(["claim", "parameters", "scale", "rank", "unknown"], kind="stable")
    cell = every.groupby(["claim_id", "scale"])
    every[["n_hold", "n_parts"]] = cell[["n_hold", "n_parts"]].transform("sum")
    # Losses and error rates have no common range.
    alike = every.groupby(["claim_id", "scale", "unit"], dropna=False)
    every["part_low"], every["part_high"] = alike["part_low"].transform("min"), alike["part_high"].transform("max")
    deciding = ~every.duplicated(["claim_id", "scale"])
    others = every[~deciding & every["verdict"].ne("not tested")]
    verdicts = (others["origin"] + ": " + others["verdict"]).groupby([others["claim_id"], others["scale"]])
    cells = every[deciding].join(verdicts.agg("; ".join).rename("others"), on=["claim_id", "scale"])
    return cells.fillna({"others": ""}).reindex(columns=_MATRIX).reset_index(drop=True)


class _Best(NamedTuple):
    """The best learning rate of an arm, the geometric middle of those that may be the best, with the standard error of
    ln LR, NaN at an edge of the grid or without a grid, and the lowest loss, in RL the error rate, of n seeds."""

    lr: float
    log_error: float
    edge: bool
    loss: float
    n: int


def measurement_table(
    sources: Sequence[SourceModel], claims: pd.DataFrame, own: Sequence[pd.DataFrame] = ()
) -> pd.DataFrame:
    """Measure presets (each as from `read_own`), of which only the comparison that decides a claim counts, and sources,
    given their claims (as from `source.judge`), in their order."""
    rows = [row for preset in own for row in _measured_preset(preset)]
    for source in sources:
        for runs in source.conditions():
            if source.has_losses:
                rows += _measured(source, runs, ["lr_ratio", "loss_gap"], rates=False)
            if source.by_accuracy and source.has_losses:
                rows += _measured(source, runs.assign(loss=1 - runs["final_reward"]), ["accuracy_gap"], rates=True)
            if not source.has_losses:
                measures = ["lr_ratio"] if source.is_rl else ["lr_ratio", "accuracy_gap"]
                rows += _measured(source, runs, measures, rates=True)
    for source in sources:
        judged = claims[(claims["source"] == source.folder) & (claims["model"] == source.model)]
        growth = _fitted(judged, "D1", "gap_growth")
        if growth is not None:
            runs = source.tables.runs
            batches = f"batch {runs['batch_size'].min()} to {runs['batch_size'].max()}"
            rows.append(growth | _about(source) | {"task": "sft", "dataset": f"{runs['dataset'].iloc[0]}, {batches}"})
    return pd.DataFrame(rows, columns=_MEASUREMENT).astype({"batch_size": "Int64"})


def _about(source: SourceModel) -> dict[str, Any]:
    about: dict[str, Any] = {"source": source.folder, "study": source.name, "scale": source.about.scale}
    about |= {"parameters": source.about.parameters, "task": "rl" if source.is_rl else "sft"}
    return about | {name: getattr(source.file.attributes, name) for name in ATTRIBUTES if name != "task"}


def _fitted(claims: pd.DataFrame, claim_id: str, measure: str) -> dict[str, Any] | None:
    """Return the measurement that is the estimate of a claim; None where it has no finite estimate or interval."""
    numbers = claims.loc[claims["claim_id"] == claim_id, ["estimate", "ci_low", "ci_high"]].astype(float)
    if numbers.empty or not np.isfinite(numbers.iloc[0]).all():
        return None
    value, low, high = map(math.log, numbers.iloc[0]) if measure == "lr_ratio" else numbers.iloc[0]
    error, remark = (high - low) / (2 * Z), f"fitted, claim {claim_id}"
    return {"measure": measure, "value": value, "error": error, "counts": high > low, "remark": remark}


def _measured_preset(claims: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the fitted numbers of a preset that sources measure too."""
    rows = []
    for claim_id, measure, task in (
        ("B1", "lr_ratio", "sft"),
        ("B10", "lr_ratio", "rl"),
        ("B2", "loss_gap", "sft"),
        ("D1", "gap_growth", "sft"),
        ("F1", "rank_1_gap", "rl"),
    ):
        claim = claims[claims["claim_id"] == claim_id]
        row = _fitted(claim, claim_id, measure)
        if row is None or pd.isna(claim["scale"].iloc[0]):
            continue
        first = claim.iloc[0]
        # The claim is about the accuracy that rank 1 lacks.
        row["value"] *= -1 if measure == "rank_1_gap" else 1
        # A scope is `0.83M parameters, 50 steps, instruct, worked`; the last parts are the datasets.
        parts = [part for part in first["scope"].split(", ") if not re.search(r"parameters$|steps$", part)]
        row |= {"source": PROJECT, "study": f"lorabench {first['origin']}", "scale": first["scale"], "task": task}
        row |= {"parameters": int(first["parameters"]), "dataset": ", ".join(parts).removeprefix("RL on ")}
        rows.append(row | {"precision": "fp32 weights", "schedule": "constant", "alpha": "32", "base_kind": "base"})
    return rows


def _measured(source: SourceModel, runs: pd.DataFrame, measures: Sequence[str], rates: bool) -> list[dict[str, Any]]:
    """Take measurements of a condition, the runs of one dataset, batch size and length; its losses may be rates."""
    # The deviation between seeds is that of the runs' own, pooled over arms and LRs, or that which a source states,
    # which is one of what it is judged by.
    column, sigma = REWARD_SD if rates else "final_test_nll_sd", math.nan
    cells = runs.groupby(["method", "rank", "lr"], dropna=False)["loss"]
    dof = cells.count() - 1
    if column in runs and runs[column].notna().any():
        sigma = math.sqrt(float((runs[column].astype(float) ** 2).mean()))
    elif dof.sum() > 0:
        sigma = math.sqrt(float((cells.var() * dof).sum() / dof.sum()))
    noise_remark = "" if sigma > 0 else "noise between seeds not known"
    if not sigma > 0:
        sigma = math.nan
        if source.noise and (rates or not source.by_accuracy):
            sigma, noise_remark = source.noise.sigma, f"noise from {source.noise.source}"
    fullft_runs = runs[runs["method"] == "fullft"]
    fullft = _best(fullft_runs, sigma)
    if fullft is None:
        return []
    arms = {int(str(rank)): arm for rank, arm in runs[runs["method"] == "lora"].groupby("rank")}
    swept = {rank: arm for rank, arm in arms.items() if rank > 1 and arm["lr"].nunique() >= MIN_LRS}
    chosen: list[tuple[str, pd.DataFrame]] = []
    if swept and fullft_runs["lr"].nunique() >= MIN_LRS:
        usual = max(at_usual_alpha(pd.concat(swept.values()))["rank"])
        chosen += [(measure, arms[usual if measure == "lr_ratio" else max(swept)]) for measure in measures]
    if source.is_rl and 1 in arms:
        chosen.append(("rank_1_gap", arms[1]))
    rows = []
    for measure, arm in chosen:
        lora = _best(arm, sigma)
        if lora is None:
            continue
        edges = " and ".join(name for name, best in (("LoRA", lora), ("FullFT", fullft)) if best.edge)
        remarks = [f"best LR of {edges} at the edge of its grid"] if edges else []
        if measure == "lr_ratio":
            value, error = math.log(lora.lr / fullft.lr), math.hypot(lora.log_error, fullft.log_error)
            remarks += [] if edges else ["by the best LRs of the grids"]
            remarks += [f"of rank {usual} at alpha {ALPHA:g}"] if usual < max(swept) else []
        else:
            # The gap of error rates is one of accuracies.
            value = fullft.loss - lora.loss if rates else lora.loss - fullft.loss
            error = sigma * math.sqrt(1 / lora.n + 1 / fullft.n)
            remarks += [noise_remark] if noise_remark else []
        row = {"measure": measure, "dataset": runs["dataset"].iloc[0], "batch_size": runs["batch_size"].iloc[0]}
        row |= {"value": value, "error": error, "counts": not edges and math.isfinite(error)}
        rows.append(_about(source) | row | {"remark": "; ".join(remarks)})
    return rows


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
    alike = np.nan_to_num(2 * sigma * np.sqrt(1 / n + 1 / n[best]))
    # The LRs next to the best, up to the first on each side that the noise tells from it.
    far = np.flatnonzero(losses - losses[best] > alike)
    low, high = max(far[far < best], default=-1) + 1, min(far[far > best], default=len(lrs)) - 1
    lost = np.log(arm.loc[~arm["status"].eq("done"), "lr"].astype(float).dropna())
    above = lost[lost > lrs[high]].min() if len(lost) else math.nan
    upper = lrs[high + 1] if high + 1 < len(lrs) else above
    if low == 0 or math.isnan(upper):
        return _Best(float(np.exp(lrs[best])), math.nan, len(lrs) > 1, float(losses[best]), int(n[best]))
    first, last = (lrs[low - 1] + lrs[low]) / 2, (lrs[high] + upper) / 2
    middle, log_error = float(np.exp((first + last) / 2)), float(last - first) / math.sqrt(12)
    return _Best(middle, log_error, False, float(losses[best]), int(n[best]))


def summary_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return the summaries over sources: one row for each measure of a `measurement_table`, and for each of its groups
    by an attribute.

    The measurements of one source share data and model, so their mean counts once, with the mean of their errors; SFT
    and RL of a source count apart. An attribute explains as far as two groups of it have two sources each;
    `p_of_groups` is then the probability of group means so far apart by chance, and otherwise null. Sources whose
    attribute is unknown or mixed are no group that could explain anything.
    """
    rows: list[dict[str, Any]] = []
    for measure in MEASURES:
        counted = table[(table["measure"] == measure) & table["counts"]]
        if counted.empty:
            continue
        for attribute in ("", *ATTRIBUTES):
            groups = {}
            for group, part in counted.groupby(attribute) if attribute else [("", counted)]:
                means = part.groupby(["source", "task"])[["value", "error"]].mean()
                groups[str(group)] = random_effects(means["value"].tolist(), means["error"].tolist())
            known = [effects for group, effects in groups.items() if group not in (UNKNOWN, MIXED)]
            enough = [effects for effects in known if effects.k >= 2]
            chance = p_of_groups(enough) if len(enough) >= 2 else math.nan
            if not attribute or len(groups) > 1:
                for group, effects in groups.items():
                    row = {"measure": measure, "attribute": attribute, "group": group, **asdict(effects)}
                    rows.append(row | {"p_of_groups": chance})
    return pd.DataFrame(rows)
