"""What learning rates lose: the curvatures that `lorabench audit` uses, and its predictions held to measured regrets.

    python -m advice.benchmarks.audit_regret

These files are written into paper_figures/published/evidence; `python workflow/scripts/facts.py .` then ships them:

- `lr_curvatures.csv`: the curvatures of each model and dataset in a source, over all batch sizes, lengths and arms: the
  sum of what runs lose over the sum of their squared distances from the optimum in ln LR, of all runs within a factor
  of 6 from the optimum. A share s of the gain stands for -ln(1 - s), and a diverged run for a share of 95%.
- `lr_evidence.json`: what the audit needs of the pooled optima and curvatures, so that it imports and fits nothing.
- `lr_regret.csv`: each run whose regret is known, and what the audit says of its learning rate without its source.
- `lr_regret_inside.csv`: the shares of measured regrets within their 95% intervals.
- `lr_regret_alarms.csv`: how often each level is said, by the measured regret in margins; it is a table of
  advice/docs/audit-codes.md too.

The regret of a run is its loss, in RL its error rate, minus the lowest of its grid. The gain is how far that lowest
loss is below the loss of the base, where that is known. The margin is 2% of the gain, or where the base's
loss is not known 1% of the loss. An interval that ends above 95% of the gain ends at the whole gain.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lora_advice.audit.lr import level
from lora_advice.audit.regret import REACH, LrEvidence, Place
from lora_advice.pooled_lr import ALPHA_EXPONENT, PRIORS, REFERENCE, UNKNOWN, UNKNOWN_WIDTH, PooledLr
from lora_advice.theory import MOVEMENT

from advice.benchmarks.lr_left_out import pooled_optimum
from lorabench.analysis.arms import ALPHA
from lorabench.analysis.comparison import MIN_LRS
from lorabench.analysis.lr_law import PIVOT
from lorabench.analysis.lr_law import PUBLISHED as LAW
from lorabench.analysis.published import published_sweeps
from lorabench.config.margins import DEFAULT_MARGINS, SHARE_OF_LOSS
from lorabench.sources.lr_optima import AUTHORS, LrOptimum, grid_optimum, known_optima
from lorabench.sources.lr_optima import rounded as digits
from lorabench.sources.measurements import PROJECT
from lorabench.sources.source import SourceModel, read_sources, source_folders
from lorabench.store.io import write_csv
from lorabench.store.published import PUBLISHED, evidence_folders
from lorabench.utils.files import atomic_path
from lorabench.utils.markdown import write_part

ARM = ["task", "source", "model", "dataset", "method", "rank", "batch_size", "steps"]
CONDITION = ["task", "source", "model", "dataset"]
UNITS = ("share", "loss")

ALL = 0.95
"""From this share of the gain on, all of it is lost."""

CLASSES = {"below 1 margin": (-math.inf, 1.0), "1 to 5 margins": (1.0, 5.0), "above 5 margins": (5.0, math.nan)}

MARGINS = {"sft": DEFAULT_MARGINS.loss, "rl": DEFAULT_MARGINS.reward}

PAGE = Path("advice/docs/audit-codes.md")

BEYOND = (
    ("batch_size", 64, math.inf, 0, 16),
    ("batch_size", 0, 32, 128, math.inf),
    ("steps", 0, 150, 600, math.inf),
    ("steps", 400, math.inf, 0, 100),
)
"""Attributes, with the lowest and highest value of the optima that a run is predicted by, and those of the runs."""

# Parts of a mixture with a smaller share are left out.
_LEAST_SHARE = 2e-5
_FIGURES = ("fig2_lr_by_rank", "fig4_placement", "fig6_rl_lr", "short_run")


def pooled_curvature(values: Sequence[float], sources: Sequence[str]) -> tuple[float, float]:
    """Pool curvatures, of which those above 0 count; all sources weigh the same.

    Returns:
        The mean of ln c, and its standard deviation for a further run.

    Raises:
        ValueError: fewer than two count.
    """
    known = [(math.log(value), source) for value, source in zip(values, sources, strict=True) if value > 0]
    if len(known) < 2:
        raise ValueError(f"pooling needs two curvatures above 0; there are {len(known)}")
    logs, names = np.array([log for log, _ in known]), [source for _, source in known]
    weights = np.array([1 / names.count(name) for name in names]) / len(set(names))
    mean, few = float(weights @ logs), float(weights @ weights)
    # The mean has an error too, and the variance around it is too low by the weights of few values.
    return mean, math.sqrt(float(weights @ (logs - mean) ** 2) / (1 - few) * (1 + few))


def measured_runs(sources: Sequence[SourceModel], presets: Sequence[Path]) -> pd.DataFrame:
    """Return all runs of grids of at least three LRs, of LoRA on all layers and of FullFT.

    Returns:
        One row for each LR of an arm, a mean over its seeds, with the columns ARM, family, width, alpha, lr, loss, lost
        (whether a seed diverged), regret, gain, share, margins, and x, the distance from the optimum in ln LR. What is
        not known is null: x of a grid whose best LR is at its edge, gain and share without the base's loss. A lost run
        has lost the whole gain and any number of margins.
    """
    known = known_optima(sources, presets)
    rows = [row for arm, about, base in _arms(sources, presets, known) for row in _rows(arm, about, base)]
    # A grid that several figures show counts once.
    table = pd.DataFrame(rows).drop_duplicates([*ARM, "lr"]).reset_index(drop=True)
    return table[[*ARM, *(name for name in table if name not in ARM)]]


def _arms(
    sources: Sequence[SourceModel], presets: Sequence[Path], known: Sequence[LrOptimum]
) -> Iterator[tuple[pd.DataFrame, dict[str, Any], float]]:
    """Yield the runs of each arm with lr, loss and status, what is known of it, and the loss of its base or NaN."""
    for source in sources:
        attributes = source.file.attributes
        about = {"source": source.folder, "family": source.about.family, "width": source.about.hidden_size}
        about |= {"task": "rl" if source.is_rl else "sft", "alpha": pd.to_numeric(attributes.alpha, errors="coerce")}
        curves = source.tables.curves
        for runs in source.conditions():
            if source.is_rl:
                base = 1 - float(runs["base_reward"].mean())
            else:
                first = curves["run_id"].isin(runs["run_id"]) & curves["metric"].eq("nll") & curves["step"].le(1)
                base = float(curves.loc[first, "value"].mean())
            for _, arm in runs[runs["method"].isin(["fullft", "lora"])].groupby(["method", "rank"], dropna=False):
                stated = arm["alpha"].dropna()
                yield arm, about | ({"alpha": stated.iloc[0]} if len(stated) else {}), base
    table = published_sweeps().rename(columns={"nll": "loss", "hidden_size": "width"})
    for _, arm in table[table["source"] == "tinker-cookbook"].groupby(["model", "rank"]):
        about = {"task": "sft", "source": AUTHORS, "batch_size": 128.0, "steps": 780.0, "alpha": ALPHA}
        yield arm.assign(status="done"), arm.iloc[0][["family", "width"]].to_dict() | about, math.nan
    project = [optimum for optimum in known if optimum.source == PROJECT]
    own = {optimum.model: {"family": optimum.family, "width": optimum.width} for optimum in project}
    for path in [folder / f"{figure}.csv" for folder in presets for figure in _FIGURES]:
        if not path.is_file():
            continue
        table = pd.read_csv(path)
        rl, bases = "accuracy" in table, {}
        if rl:
            base_rows = table[table["element"] == "base"]
            bases = dict(zip(base_rows["dataset"], 1 - base_rows["accuracy"], strict=True))
        elif (envelopes := path.with_name("fig1_envelopes.csv")).is_file():
            base_rows = pd.read_csv(envelopes).query("element == 'before_training'")
            bases = dict(zip(base_rows["dataset"], base_rows["nll"], strict=True))
        points = table[table["element"].isin(["accuracy" if rl else "loss", "diverged"])]
        points = points[points["placement"].fillna("all").eq("all") & points["model"].isin(list(own))]
        status = np.where(points["element"].eq("diverged"), "diverged", "done")
        points = points.assign(loss=1 - points["accuracy"] if rl else points["nll"], status=status)
        keys = ["model", "dataset", "batch_size", "steps", "method", "rank"]
        for (model, *_), arm in points.groupby(keys, dropna=False):
            about = {"task": "rl" if rl else "sft", "source": PROJECT, "alpha": ALPHA} | own[str(model)]
            yield arm, about, bases.get(arm["dataset"].iloc[0], math.nan)


def _rows(arm: pd.DataFrame, about: dict[str, Any], base: float) -> list[dict[str, Any]]:
    cells = arm.assign(lost=~arm["status"].eq("done"), lr=arm["lr"].astype(float), loss=arm["loss"].astype(float))
    grid = cells.groupby("lr").agg(loss=("loss", "mean"), lost=("lost", "any"))
    sound = grid.loc[~grid["lost"], "loss"].dropna()
    if len(grid) < MIN_LRS or sound.empty:
        return []
    rl, best = about["task"] == "rl", float(sound.min())
    names = ("model", "dataset", "method", "rank", "batch_size", "steps")
    about = {name: arm[name].iloc[0] for name in names if name in arm} | about
    gain = base - best
    if rl and not gain > 0:
        return []
    margin = MARGINS[about["task"]] * gain if math.isfinite(gain) else SHARE_OF_LOSS * best
    optimum = grid_optimum(arm, about | {"lr": math.nan})
    rows = []
    for lr, loss, lost in grid.itertuples():
        lost = bool(lost) or not math.isfinite(loss)
        regret = loss - best
        row = {"lr": lr, "loss": loss, "lost": lost, "regret": regret, "gain": gain}
        row["share"] = 1.0 if lost and math.isfinite(gain) else regret / gain
        row["margins"] = math.inf if lost else regret / margin
        row["x"] = math.log(lr / optimum.lr) if optimum.counts else math.nan
        rows.append(about | row)
    return rows


def curvatures(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the curvatures of each model and dataset of a source; null where no run lies on that side."""
    near = runs[(runs["x"].abs() <= REACH) & (runs["lost"] | runs["regret"].gt(0))]
    near = near.assign(squared=near["x"] ** 2, lost_share=-np.log1p(-near["share"].clip(0, ALL)))
    rows = []
    for key, group in near.groupby(CONDITION, sort=False):
        row = dict(zip(CONDITION, key, strict=True)) | {"gain": group["gain"].median()}
        for side, part in (("below", group[group["x"] < 0]), ("above", group[group["x"] > 0])):
            row[f"share_{side}"] = _ratio(part["lost_share"], part["squared"])
            row[f"loss_{side}"] = _ratio(part["regret"].mask(part["lost"] & group["task"].eq("sft")), part["squared"])
        rows.append(row)
    return pd.DataFrame(rows)


def _ratio(lost: pd.Series, squared: pd.Series) -> float:
    known = lost.notna()
    return float(lost[known].sum() / squared[known].sum()) if known.any() else math.nan


def evidence(optima: Sequence[LrOptimum], table: pd.DataFrame) -> dict[str, Any]:
    """Return what the audit needs of optima and of curvatures, as `LrEvidence` takes it.

    The margins, the constant of the rank and the terms of the law come with it, since the modules that define them take
    long to import.
    """
    unknown = {name: (prior.mean**2 + prior.sd**2) * UNKNOWN**2 for name, prior in PRIORS.items()}
    tasks = {"sft": False, "rl": True}
    counted = [optimum for optimum in optima if optimum.counts]
    return {
        "law": asdict(LAW) | {"pivot": PIVOT, "unknown_width": UNKNOWN_WIDTH},
        "reference": REFERENCE,
        "unknown": unknown,
        "alpha": ALPHA,
        "alpha_exponent": ALPHA_EXPONENT,
        "rank_constant": MOVEMENT["k"],
        "margins": MARGINS,
        "optima": {
            task: {
                method: _pool([optimum for optimum in counted if (optimum.method, optimum.rl) == (method, rl)])
                for method in ("fullft", "lora")
            }
            for task, rl in tasks.items()
        },
        "curvatures": {
            task: {
                name: pooled_curvature(own[name].fillna(0).tolist(), own["source"].tolist())
                for name in ("share_below", "share_above", "loss_below", "loss_above")
            }
            for task in tasks
            if len(own := table[table["task"] == task])
        },
    }


def _pool(optima: Sequence[LrOptimum]) -> dict[str, Any]:
    """Return the mixture that `PooledLr.predict` uses, as a function of the place.

    With t of 1 and the logarithms b and s of the batch size and the number of steps over their reference, a part of the
    mixture has the mean `law + means t`, and a variance of which `variances` are the coefficients of 1, b, s, b b, b s
    and s s, to which what is unknown adds. Parts that hardly count are left out.
    """
    pooled = PooledLr([pooled_optimum(optimum).pooled for optimum in optima])
    scaled = pooled.design * pooled.prior
    parts = []
    for share, (between, within), inverse in zip(pooled.shares, pooled.grid, pooled.inverses, strict=True):
        covariance = np.diag(pooled.prior) - scaled.T @ inverse @ scaled
        covariance[0, 0] += between**2 + within**2
        # The two halves of a symmetric matrix are one coefficient.
        variances = (2 * covariance - np.diag(covariance.diagonal()))[np.triu_indices(3)]
        parts.append((float(share), pooled.means + scaled.T @ inverse @ pooled.rest, variances))
    parts = [part for part in sorted(parts, key=lambda part: -part[0]) if part[0] > _LEAST_SHARE]
    total = sum(share for share, _, _ in parts)
    measured = {
        name: sorted({value for optimum in optima if math.isfinite(value := getattr(optimum, name))})
        for name in ("width", "batch_size", "steps")
    }
    return {
        "sources": len(pooled.sources),
        "measured": measured,
        "shares": [digits(share / total) for share, _, _ in parts],
        "means": [list(map(digits, means)) for _, means, _ in parts],
        "variances": [list(map(digits, variances)) for _, _, variances in parts],
    }


def held_to(runs: pd.DataFrame, optima: Sequence[LrOptimum]) -> pd.DataFrame:
    """Predict the regret of each run from all other sources.

    Returns:
        The runs of which the audit says something, since they are near what the others measured, with the level of the
        finding, the factor from the recommended LR, and for each unit the expected regret with its interval and whether
        the measured one lies inside, null where it is not known.
    """
    rows = []
    for source, part in runs.groupby("source", sort=False):
        others = [optimum for optimum in optima if optimum.source != source]
        known = LrEvidence(evidence(others, curvatures(runs[runs["source"] != source])))
        placed = [(row, _place(row)) for row in part.to_dict("records")]
        rows += [_prediction(row, place, known) for row, place in placed if not known.unmeasured(place)]
    return pd.DataFrame(rows)


def held_beyond(runs: pd.DataFrame, optima: Sequence[LrOptimum]) -> pd.DataFrame:
    """Predict the regret of SFT runs beyond all batch sizes or lengths of the optima that they are predicted by.

    Returns:
        The rows of `held_to` for each split of BEYOND, of models of width 500 or more, from all other sources.
    """
    rows = []
    for field, low, high, least, most in BEYOND:
        part = runs[(runs["task"] == "sft") & (runs["width"] >= 500) & runs[field].between(least, most)]
        for source, own in part.groupby("source", sort=False):
            others = [
                known
                for known in optima
                if known.source != source
                and (known.rl or (not getattr(known, field) < low and not getattr(known, field) > high))
            ]
            known = LrEvidence(evidence(others, curvatures(runs[runs["source"] != source])))
            rows += [_prediction(row, _place(row), known) | {"beyond": field} for row in own.to_dict("records")]
    return pd.DataFrame(rows)


def _place(run: dict[str, Any]) -> Place:
    numbers = [math.nan if pd.isna(run[name]) else float(run[name]) for name in ("batch_size", "steps")]
    return Place(run["family"] or "", float(run["width"]), run["method"], run["task"] == "rl", *numbers)


def _prediction(run: dict[str, Any], place: Place, known: LrEvidence) -> dict[str, Any]:
    rl, method = place.rl, place.method
    alpha, rank = (None if pd.isna(run[name]) else int(run[name]) for name in ("alpha", "rank"))
    shift = known.shift(alpha, rank) if method == "lora" else (0.0, 0.0)
    verdict = known.verdict(math.log(run["lr"]), place, *shift)
    row = run | {"level": level(verdict, place), "factor": math.exp(verdict.log_factor)}
    row |= {"outside_80": verdict.outside_80, "outside_95": verdict.outside_95, "p_margin": verdict.p_margin}
    measured = {"share": run["share"], "loss": math.nan if run["lost"] and not rl else run["regret"]}
    for unit, (mean, low, high) in (("share", verdict.share), ("loss", verdict.loss)):
        high = math.inf if verdict.may_diverge or (unit == "share" and high > ALL) else high
        value = measured[unit]
        # In a grid whose best LR is at its edge, a run has lost what is measured and perhaps more.
        least = -math.inf if math.isnan(run["x"]) else low
        inside = float(least <= value <= high) if math.isfinite(value) else math.nan
        row |= {f"{unit}_expected": mean, f"{unit}_low": low, f"{unit}_high": high, f"{unit}_inside": inside}
    return row


def inside(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the shares of measured regrets within their intervals, by task, method and source, and of all."""
    parts = []
    for keys in ([], ["task"], ["task", "method", "source"]):
        groups = rows.groupby(keys, sort=False) if keys else [((), rows)]
        for key, group in groups:
            row = dict(zip(keys, key, strict=True))
            for unit in UNITS:
                measured = group[f"{unit}_inside"].dropna()
                row |= {f"{unit}_runs": len(measured), f"{unit}_inside": measured.mean()}
            parts.append(row)
    columns = ["task", "method", "source", *(f"{unit}_{name}" for unit in UNITS for name in ("runs", "inside"))]
    return pd.DataFrame(parts, columns=columns)


def alarms(rows: pd.DataFrame) -> pd.DataFrame:
    """Return how many runs of each class of measured regret get each level, by task, method and source."""
    parts = []
    for key, group in rows.groupby(["task", "method", "source", "level"], sort=False):
        own = group["margins"]
        counts = {name: int(((own >= low) & ~(own >= high)).sum()) for name, (low, high) in CLASSES.items()}
        parts.append(dict(zip(["task", "method", "source", "level"], key, strict=True)) | counts)
    return pd.DataFrame(parts)


def page_rows(table: pd.DataFrame) -> Iterator[str]:
    """Yield the lines of the page's table, by the table of alarms."""
    levels = ["error", "warning", "note"]
    yield f"| | runs | {' | '.join(levels)} |\n|---|---|---|---|---|"
    for task, name in (("sft", "SFT"), ("rl", "RL")):
        counts = table[table["task"] == task].groupby("level")[list(CLASSES)].sum().reindex(levels, fill_value=0)
        for column in CLASSES:
            own = ", or diverged" if column == list(CLASSES)[-1] else ""
            yield f"| {name}, {column}{own} | {counts[column].sum()} | {' | '.join(map(str, counts[column]))} |"


def main() -> None:
    """Write the curvatures, and what the audit would have said of each run."""
    sources, presets = read_sources(source_folders()), evidence_folders(Path())
    runs, optima = measured_runs(sources, presets), known_optima(sources, presets)
    rows = held_to(runs, optima)
    out = Path() / PUBLISHED / "evidence"
    with atomic_path(out / "lr_evidence.json") as path:
        path.write_text(json.dumps(evidence(optima, curvatures(runs))) + "\n")
    tables = {"curvatures": curvatures(runs), "regret": rows, "regret_inside": inside(rows)}
    for name, table in (tables | {"regret_alarms": alarms(rows)}).items():
        write_csv(rounded(table), out / f"lr_{name}.csv")
    write_part(PAGE, "alarms", "`python -m advice.benchmarks.audit_regret`", "\n".join(page_rows(alarms(rows))))


def rounded(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with its numbers to four digits."""
    numbers = table.select_dtypes("float")
    return table.assign(**numbers.map(digits))


if __name__ == "__main__":
    main()
