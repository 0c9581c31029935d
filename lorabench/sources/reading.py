"""Reading a source: from its files to the tidy tables `runs` and `curves`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lorabench.errors import UserError
from lorabench.sources.rows import read_rows
from lorabench.sources.schema import UNITS, Column, CurvesOf, RunsOf, Source, quantity_of, read_source_file
from lorabench.store.checks import check_curves, check_table
from lorabench.store.io import typed_columns, write_known_columns
from lorabench.store.schemas import CURVES
from lorabench.store.tables import MIXED, UNKNOWN, with_stand_ins
from lorabench.store.tables import Tables

_CELL = ["model", "dataset", "task", "method", "rank", "placement", "alpha", "batch_size", "steps", "lr"]
"""The columns in which repeats of a run agree, as far as a source has them."""


@dataclass(frozen=True)
class Imported:
    """A source with its tidy tables."""

    name: str
    folder: Path
    source: Source
    tables: Tables
    """Its runs and curves as published: nothing stands in for a loss that they lack."""


def import_source(folder: Path) -> Imported:
    """Read a source.

    Raises:
        UserError: the file `source.yaml` is wrong, a file has changed, or a table has something that the file does not
            explain: an unlisted value, a share above 1, or two runs with equal settings and seed.
    """
    source = read_source_file(folder)
    runs = _runs(folder, source)
    curves = _curves(folder, source.curves, runs)
    if source.curves is not None and source.curves.shorter is not None:
        runs, curves = _with_shorter(runs, curves, source.curves)
    base = _base_losses(runs)
    curves = pd.concat([part for part in (curves, base) if len(part)] or [curves], ignore_index=True)
    runs = runs.drop(columns="base_nll", errors="ignore")
    try:
        check_table(with_stand_ins(runs))
        check_curves(curves)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    return Imported(folder.name, folder, source, Tables(runs, curves))


def write_tables(imported: Imported, out: Path) -> None:
    """Write the tidy tables of a source into a folder, with the documented columns that the source has."""
    write_known_columns(imported.tables.runs, "runs", out)
    write_known_columns(imported.tables.curves, "curves", out)


def _runs(folder: Path, source: Source) -> pd.DataFrame:
    of, path = source.runs, folder / source.runs.file
    rows = read_rows(folder, of)
    read = [column.source for column in of.columns.values()] + [rule.column for rule in of.leave_out] + of.one_run
    _check_columns(rows, read, path)
    rows = _kept(rows, of, path)
    columns = {name: _column(rows, name, column, path) for name, column in of.columns.items()}
    frame = pd.DataFrame(columns, index=rows.index).assign(**of.constants)
    frame = typed_columns(frame, "runs", path)
    for name in ("base_nll", "final_reward_sd"):
        if name in frame:
            frame[name] = frame[name].astype(float)
    frame = _with_attributes(frame, source, path)
    frame = _without_duplicates(frame, of, path)
    if "run_id" not in frame:
        frame.insert(0, "run_id", [f"{folder.name}-{place}" for place in range(len(frame))])
    return frame.reset_index(drop=True)


def _kept(rows: pd.DataFrame, of: RunsOf, path: Path) -> pd.DataFrame:
    """Return the rows that are read: without those left out, and one of several equal listings of a run."""
    for rule in of.leave_out:
        rows = rows[~rows[rule.column].isin(rule.values)]
    if not of.one_run:
        return rows.reset_index(drop=True)
    used = list(dict.fromkeys(column.source for column in of.columns.values()))
    for key, listed in rows.groupby(of.one_run, dropna=False):
        differing = [name for name in used if listed[name].nunique(dropna=False) > 1]
        if differing:
            named = ", ".join(map(str, key if isinstance(key, tuple) else (key,)))
            raise UserError(f"{path}: run {named} is listed with several values of {', '.join(differing)}")
    return rows.drop_duplicates(of.one_run).reset_index(drop=True)


def _check_columns(rows: pd.DataFrame, names: Iterable[str], path: Path) -> None:
    """Refuse names of columns that a source's file lacks, all at once."""
    if absent := [repr(name) for name in dict.fromkeys(names) if name not in rows]:
        raise UserError(f"{path}: has no column {', '.join(absent)}; it has {', '.join(map(str, rows.columns))}")


def _column(rows: pd.DataFrame, name: str, column: Column, path: Path) -> pd.Series[Any]:
    """Return a tidy column: the source's text with its values replaced, or its numbers in the tidy unit."""
    text = rows[column.source]
    if column.values is not None:
        unlisted = sorted(set(text.dropna()) - set(column.values))
        if unlisted:
            raise UserError(
                f"{path}: column {column.source!r} has {', '.join(map(repr, unlisted))}, which "
                f"runs.columns.{name}.values does not list"
            )
        return text.map(column.values)
    quantity = quantity_of(name)
    if quantity is None or column.unit is None:
        return text
    numbers = pd.to_numeric(text, errors="coerce")
    if len(wrong := text[numbers.isna() & text.notna() & (text.str.lower() != "nan")]):
        raise UserError(f"{path}: column {column.source!r} has {wrong.iloc[0]!r}, which is not a number")
    _check_share(numbers, column, path)
    return numbers * UNITS[quantity][column.unit]


def _check_share(numbers: pd.Series[float], column: Column, path: Path) -> None:
    """Refuse percentages that are declared as shares, and shares that are declared as percentages."""
    largest = numbers.max()
    if column.unit == "share" and largest > 1:
        raise UserError(
            f"{path}: column {column.source!r} has {largest:g}, but a share is at most 1; write `unit: percent`"
        )
    if column.unit == "percent" and 0 < largest <= 1:
        raise UserError(f"{path}: column {column.source!r} has no percentage above 1; a share has `unit: share`")


def _with_attributes(runs: pd.DataFrame, source: Source, path: Path) -> pd.DataFrame:
    """Add what the file says of the source and of its models to each run that does not say it itself."""
    undescribed = sorted(set(runs["model"].dropna()) - set(source.models))
    if undescribed:
        raise UserError(f"{path}: model {', '.join(map(repr, undescribed))} is not described under `models`")
    attributes = source.attributes
    alpha = attributes.alpha if attributes.alpha in (UNKNOWN, MIXED) else f"alpha {attributes.alpha}"
    added: dict[str, Any] = {
        "precision": attributes.precision,
        "schedule": attributes.schedule,
        "alpha_convention": alpha,
        "unembedding": attributes.unembedding,
        "base_kind": attributes.base_kind,
        "max_new_tokens": attributes.max_new_tokens,
        "response_tokens": attributes.response_tokens,
        "constant_reward": attributes.guessed,
        "rule_reward": attributes.guessed,
        "base_params": runs["model"].map({name: model.parameters for name, model in source.models.items()}),
        "family": runs["model"].map({name: model.family for name, model in source.models.items()}),
        "hidden_size": runs["model"].map({name: model.hidden_size for name, model in source.models.items()}),
    }
    kept = {name: value for name, value in added.items() if name not in runs and value is not None}
    return typed_columns(runs.assign(**kept), "runs", path)


def _without_duplicates(runs: pd.DataFrame, of: RunsOf, path: Path) -> pd.DataFrame:
    """Refuse runs with equal settings and seed, or take their mean where the file says that they are repeats."""
    cell = [name for name in _CELL if name in runs]
    seeded = runs if "seed" in runs else runs.assign(seed=pd.Series(0, index=runs.index, dtype="Int64"))
    same = seeded.duplicated([*cell, "seed"], keep=False)
    if not same.any():
        return seeded
    if of.repeats == "mean":
        groups = seeded.groupby([*cell, "seed"], dropna=False)
        for name in [str(name) for name in seeded if name not in (*cell, "seed", "run_id")]:
            seeded[name] = groups[name].transform("mean" if _is_float(seeded[name]) else "first")
        return seeded[~seeded.duplicated([*cell, "seed"])]
    first = seeded[same].iloc[0]
    settings = ", ".join(f"{name} {first[name]}" for name in [*cell, "seed"] if not pd.isna(first[name]))
    raise UserError(
        f"{path}: has several runs with {settings}; name a column that tells them apart, or write `repeats: mean`"
    )


def _is_float(column: pd.Series[Any]) -> bool:
    return bool(pd.api.types.is_float_dtype(column))


def _curves(folder: Path, of: CurvesOf | None, runs: pd.DataFrame) -> pd.DataFrame:
    if of is None:
        return pd.DataFrame(columns=CURVES.names)
    path = folder / of.file
    rows = read_rows(folder, of)
    read = [column.source for column in of.columns.values()] + [metric.column for metric in of.metrics]
    _check_columns(rows, read, path)
    frame = pd.DataFrame({name: rows[column.source] for name, column in of.columns.items()})
    if of.metrics:
        parts = [
            frame.assign(split=metric.split, metric=metric.metric, value=rows[metric.column]) for metric in of.metrics
        ]
        frame = pd.concat(parts, ignore_index=True)
    frame = typed_columns(frame, "curves", path)
    return frame[frame["run_id"].isin(runs["run_id"]) & frame["value"].notna()].reset_index(drop=True)


def _with_shorter(runs: pd.DataFrame, curves: pd.DataFrame, of: CurvesOf) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Add the runs of some models as runs of fewer steps; those that did not get further are left as these only."""
    shorter = of.shorter
    if shorter is None:
        return runs, curves
    chosen = runs[runs["model"].isin(shorter.models)]
    points = curves[(curves["step"] <= shorter.steps) & curves["run_id"].isin(chosen["run_id"])]
    losses = points[(points["split"] == "train") & (points["metric"] == "nll")]
    reached = losses.groupby("run_id")["step"].max()
    kept = chosen[chosen["run_id"].map(reached).ge(shorter.least).fillna(False)]
    last = losses[losses["step"] > shorter.steps - shorter.window].groupby("run_id")["value"].mean()
    short = kept.assign(
        run_id=kept["run_id"] + f"@{shorter.steps}",
        steps=shorter.steps,
        final_train_nll=kept["run_id"].map(last),
        status="done",
    ).astype({"steps": "Int64"})
    short_points = points[points["run_id"].isin(kept["run_id"])]
    short_points = short_points.assign(run_id=short_points["run_id"] + f"@{shorter.steps}")
    whole = runs[runs["steps"].gt(shorter.steps) | ~runs["model"].isin(shorter.models)]
    whole_points = curves[curves["run_id"].isin(whole["run_id"])]
    return pd.concat([whole, short], ignore_index=True), pd.concat([whole_points, short_points], ignore_index=True)


def _base_losses(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the losses of the base model as the points of the curves at step 0."""
    if "base_nll" not in runs:
        return pd.DataFrame(columns=CURVES.names)
    known = runs[runs["base_nll"].notna()]
    points = known[["run_id"]].assign(step=0, split="validation", metric="nll", value=known["base_nll"])
    return points.reindex(columns=CURVES.names).astype({"step": "Int64"})
