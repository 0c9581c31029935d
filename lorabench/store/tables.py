"""All tidy tables of one folder, or of several that are merged and must not contradict each other.

Tables from elsewhere may have one evaluation set only, or the training loss alone. `Tables.read` puts another loss in
the place of one that is lacking, and the column REMARK says what stands in for what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd

from lorabench.errors import UserError
from lorabench.store.checks import check_comparable, check_curves, check_table, is_rl
from lorabench.store.io import list_of_words, read_table, table_path, typed_columns, write_frame
from lorabench.store.schemas import SCHEMAS

_SCORE = "run_id model dataset task metric filter num_fewshot n_samples sampler eval_batch_size task_version"
KEYS = {
    "runs": ["run_id"],
    "curves": ["run_id", "step", "split", "metric"],
    "compute": ["model", "method", "rank", "placement", "batch_size", "sequence_length", "device", "threads"],
    "counts": ["architecture", "placement", "part", "rank", "include_unembedding"],
    "evals": [*_SCORE.split(), "template_sha256", "test_data"],
    "test_losses": ["run_id", "example"],
}
"""The columns that identify a row of each table."""

_MACHINE = "wall_s peak_mem_bytes device threads host started git_sha git_dirty_patch versions"
MAY_DIFFER = {"runs": _MACHINE.split(), "compute": ["step_s", "peak_mem_bytes"], "evals": ["versions", "task_config"]}
"""Columns that describe the machine, as paths in a task's configuration do. Rows may differ in them, and the first
folder's values are kept."""

REMARK = "remark_on_losses"
"""The column of `runs` with what a reader of a verdict should know about a run's losses; null for nothing."""

ONE_SET = "one evaluation set: the LR was picked on the loss that is reported"
TRAINING_LOSS = "the training loss stands in for the test loss, which the table lacks"

_VALID, _TEST, _TRAIN = "final_valid_nll", "final_test_nll", "final_train_nll"

SOURCE_COLUMNS = ("precision", "schedule", "alpha_convention", "unembedding", "base_kind")
"""Columns of `runs` in which sources differ that are otherwise alike."""

UNKNOWN, MIXED = "unknown", "mixed"
"""Values of SOURCE_COLUMNS: a source does not say, or its runs differ and it does not say which run has which value."""


@dataclass(frozen=True)
class Tables:
    """The tidy tables that claims and figures are made from; a missing table is empty and has no columns."""

    runs: pd.DataFrame
    curves: pd.DataFrame
    compute: pd.DataFrame = field(default_factory=pd.DataFrame)
    counts: pd.DataFrame = field(default_factory=pd.DataFrame)
    evals: pd.DataFrame = field(default_factory=pd.DataFrame)
    test_losses: pd.DataFrame = field(default_factory=pd.DataFrame)
    claims: pd.DataFrame = field(default_factory=pd.DataFrame)
    """The table `claims`, for the figure of it only; `read` leaves it out, since merged tables are judged again."""

    @classmethod
    def read(cls, *folders: Path) -> Tables:
        """Read the tables of one folder, or of several and merge them as `lorabench merge` does.

        Another loss stands in for one that the runs lack. UserError says that a folder holds none of the tables; see
        also `read_table` and `merge_tables`.
        """
        merged = {
            name: merge_tables(name, frames) if len(frames) > 1 else next(iter(frames.values()), pd.DataFrame())
            for name, frames in _read_all(folders).items()
        }
        return cls(**merged | {"runs": _usable(merged["runs"])})

    @classmethod
    def of(cls, frames: Mapping[str, pd.DataFrame]) -> Tables:
        """Return the tables of data frames by name, as `read` would return them of files, or raise UserError."""
        for name, frame in frames.items():
            if name not in KEYS or not isinstance(frame, pd.DataFrame):
                what = f"of the type {type(frame).__name__}" if name in KEYS else "not known"
                raise UserError(f"table {name!r} is {what}; allowed: data frames of {', '.join(KEYS)}")
        typed = {name: typed_columns(frame.reset_index(drop=True), name, Path(name)) for name, frame in frames.items()}
        tables = {"runs": pd.DataFrame(), "curves": pd.DataFrame()} | typed
        return cls(**tables | {"runs": _usable(tables["runs"])})


def _usable(runs: pd.DataFrame) -> pd.DataFrame:
    """Return runs with stand-ins for losses that they lack; variants that name no experiment are of those on variants.

    A run without experiments belongs to all others, whose claims and figures would take a variant for LoRA.
    """
    runs = with_stand_ins(runs)
    variant = ~runs["method"].fillna("lora").isin(["fullft", "lora"]) if "method" in runs else pd.Series(dtype=bool)
    if not variant.any():
        return runs
    named = runs["experiments"].map(list_of_words) if "experiments" in runs else pd.Series([[]] * len(runs), runs.index)
    unnamed = variant & named.map(len).eq(0)
    own = is_rl(runs).map({True: ["variants_rl"], False: ["variants"]})
    return runs.assign(experiments=named.where(~unnamed, own))


def _read_all(folders: Sequence[Path]) -> dict[str, dict[Path, pd.DataFrame]]:
    """Return the tables that the folders hold, by name and folder."""
    for folder in folders:
        if not any(table_path(folder, name) for name in KEYS):
            *names, last = KEYS
            raise UserError(f"no table {', '.join(names)} or {last} (.parquet or .csv) in {folder}")
    return {name: {folder: read_table(folder, name) for folder in folders if table_path(folder, name)} for name in KEYS}


def merge(folders: list[Path], out: Path) -> None:
    """Merge the tables in KEYS of several folders into the folder `out`, as parquet and CSV.

    The merged tables have the documented columns that at least one folder has, null in the rows of the other folders.
    `out` may be one of the folders. UserError says that a folder holds no table, that a table can't be read or is not
    valid, or that tables contradict each other; nothing is written then.
    """
    merged = {name: merge_tables(name, frames) for name, frames in _read_all(folders).items() if frames}
    check_table(with_stand_ins(merged.get("runs", pd.DataFrame())))
    check_curves(merged.get("curves", pd.DataFrame()))
    check_comparable(merged.get("evals", pd.DataFrame()), "scores")
    for name, frame in merged.items():
        write_frame(frame, name, out, all_columns=False)


def merge_tables(name: str, frames: dict[Path, pd.DataFrame]) -> pd.DataFrame:
    """Merge tables of one kind by folder: rows with the same KEYS become one row, with the experiments of all of them.

    Rows are in the order in which they first appear. UserError says that some tables lack a column of KEYS that others
    have, or that rows with the same KEYS differ in a column that is not in MAY_DIFFER.
    """
    columns = [field.name for field in SCHEMAS[name] if any(field.name in frame for frame in frames.values())]
    keys = [key for key in KEYS[name] if key in columns or name in ("runs", "curves", "test_losses")]
    for folder, frame in frames.items():
        # Older tables do not identify their test data.
        if missing := [key for key in keys if key not in frame and key != "test_data"]:
            raise UserError(f"the table {name} in {folder} has no column {', '.join(missing)}")
    whole = pd.concat(list(frames.values()), ignore_index=True)
    folders = np.repeat([str(folder) for folder in frames], [len(frame) for frame in frames.values()])
    number = whole.groupby(keys, dropna=False, sort=False).ngroup()
    merged = {}
    for column in columns:
        # A table that lacks the column does not contradict the others.
        known = np.isin(folders, [str(folder) for folder, frame in frames.items() if column in frame])
        values, row = whole.loc[known, column], number[known]
        first = values[~row.duplicated()].set_axis(row[~row.duplicated()])
        if column == "experiments":
            first = values.groupby(row.to_numpy()).agg(lambda lists: list(dict.fromkeys(chain(*lists))))
        elif column not in MAY_DIFFER.get(name, ()):
            expected = row.map(first)
            other = values[~((values == expected).fillna(False) | (values.isna() & expected.isna())).astype(bool)]
            if len(other):
                place = other.index[0]
                named = whole.loc[place, keys].dropna()
                key = " ".join(f"{key_column} {value}" for key_column, value in named.items())
                alike = values[row == row[place]]
                pairs = zip(alike.tolist(), folders[alike.index], strict=True)
                values_in = " and ".join(f"{value!r} in {folder}" for value, folder in pairs)
                raise UserError(f"{name}: {key} has {column} = {values_in}")
        merged[column] = first
    table = pd.DataFrame(merged, columns=columns)
    if "experiments" in table:
        table["experiments"] = table["experiments"].map(list_of_words)
    return table


def with_stand_ins(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs with a loss in place of each one that a model and dataset lack throughout, and with REMARK.

    The training loss stands in for the test loss, and the test loss for the validation loss. Where only some finished
    runs lack a loss, nothing stands in for it, since the table is then not whole. Runs of RL are left as they are.
    """
    if runs.empty or not {"model", "dataset", "status"} <= set(runs.columns) or not {_TEST, _TRAIN} & set(runs.columns):
        return runs
    filled = runs.reindex(columns=[*runs.columns, *(name for name in (_VALID, _TEST, REMARK) if name not in runs)])
    filled[REMARK] = filled[REMARK].astype(object)
    done = filled["status"].eq("done").fillna(False).astype(bool) & ~is_rl(filled)
    read = ["model", "dataset", *(name for name in (_VALID, _TEST, _TRAIN) if name in filled)]
    for _, group in filled.loc[done, read].groupby(["model", "dataset"]):
        remarks = []
        if _TRAIN in filled and group[_TEST].isna().all() and group[_TRAIN].notna().all():
            filled.loc[group.index, _TEST] = group[_TRAIN]
            remarks.append(TRAINING_LOSS)
        test = filled.loc[group.index, _TEST]
        if group[_VALID].isna().all():
            filled.loc[group.index, _VALID] = test
        if len(group) > 1 and filled.loc[group.index, _VALID].equals(test) and test.notna().all():
            remarks.append(ONE_SET)
        if remarks:
            filled.loc[group.index, REMARK] = "; ".join(remarks)
    absent = [name for name in (_VALID, _TEST) if name not in runs and filled[name].isna().all()]
    return filled.drop(columns=absent)


def remarks_on(runs: pd.DataFrame) -> list[str]:
    """Return what the reason of a verdict says about its runs: each REMARK, and in which SOURCE_COLUMNS they differ."""
    remarks = sorted(set(runs[REMARK].dropna())) if REMARK in runs else []
    for column in SOURCE_COLUMNS:
        # Several models may differ; what must be alike are the runs of one.
        for _, group in runs.groupby(["model", "dataset"])[column] if column in runs else ():
            values = {str(value) for value in group.dropna()}
            known = sorted(values - {UNKNOWN, MIXED})
            if len(known) > 1:
                remarks.append(f"its runs differ in {column}: {', '.join(known)}")
            if MIXED in values:
                remarks.append(f"its runs differ in {column}, and the source does not say which has which")
            if UNKNOWN in values:
                which = "some of its runs" if len(values) > 1 else "its runs"
                remarks.append(f"the {column} of {which} is unknown, so they may differ in it")
    return list(dict.fromkeys(remarks))
