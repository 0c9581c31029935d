"""Losses that stand in for others in tables from elsewhere, and remarks about runs that a verdict's reason repeats.

Own runs have a validation split, by which the learning rate is picked, and a test split, which is reported. Tables from
elsewhere may have one evaluation set only, or the training loss alone. They are judged all the same, and the column
REMARK says what stood in for what. `Tables.read` puts the stand-ins in place, so that claims, figures and
recommendations all see them.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from lorabench.store.checks import is_rl

REMARK = "remark_on_losses"
"""The column of `runs` with what a reader of a verdict should know about a run's losses; null for nothing."""

ONE_SET = "one evaluation set: the LR was picked on the loss that is reported"
TRAINING_LOSS = "the training loss stands in for the test loss, which the table lacks"

_VALID, _TEST, _TRAIN = "final_valid_nll", "final_test_nll", "final_train_nll"

SOURCE_COLUMNS = ("precision", "schedule", "alpha_convention", "unembedding", "base_kind")
"""Columns of `runs` in which sources differ that are otherwise alike."""

UNKNOWN, MIXED = "unknown", "mixed"
"""Values of SOURCE_COLUMNS: a source does not say, or its runs differ and it does not say which run has which value."""


def with_stand_ins(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs with a loss in place of each one that a model and dataset lack throughout, and with REMARK.

    The training loss stands in for the test loss, and the test loss for the validation loss. Where only some finished
    runs lack a loss, nothing stands in for it, since the table is then not whole.

    Args:
        runs: the table `runs`; runs of RL are left as they are.
    """
    if runs.empty or not {"model", "dataset", "status"} <= set(runs.columns) or not {_TEST, _TRAIN} & set(runs.columns):
        return runs
    filled = runs.reindex(columns=[*runs.columns, *(name for name in (_VALID, _TEST, REMARK) if name not in runs)])
    filled[REMARK] = filled[REMARK].astype(object)
    done = filled["status"].eq("done").fillna(False).astype(bool) & ~is_rl(filled)
    read = ["model", "dataset", *(name for name in (_VALID, _TEST, _TRAIN) if name in filled)]
    for _, group in filled.loc[done, read].groupby(["model", "dataset"]):
        remarks = []
        if _TRAIN in filled and _lacks(group, _TEST) and group[_TRAIN].notna().all():
            filled.loc[group.index, _TEST] = group[_TRAIN]
            remarks.append(TRAINING_LOSS)
        test = filled.loc[group.index, _TEST]
        if _lacks(group, _VALID):
            filled.loc[group.index, _VALID] = test
        if len(group) > 1 and filled.loc[group.index, _VALID].equals(test) and test.notna().all():
            remarks.append(ONE_SET)
        if remarks:
            filled.loc[group.index, REMARK] = "; ".join(remarks)
    absent = [name for name in (_VALID, _TEST) if name not in runs and filled[name].isna().all()]
    return filled.drop(columns=absent)


def _lacks(group: pd.DataFrame, column: str) -> bool:
    return bool(group[column].isna().all())


def remarks_on(runs: pd.DataFrame) -> list[str]:
    """Return what the reason of a verdict says about its runs: their remarks, and in what their sources differ.

    Args:
        runs: the runs behind the verdict; optionally REMARK and SOURCE_COLUMNS.
    """
    remarks = sorted(set(runs[REMARK].dropna())) if REMARK in runs else []
    for column in SOURCE_COLUMNS:
        if column not in runs:
            continue
        # Several models may differ; what must be alike are the runs of one.
        for _, of_model in runs.groupby(["model", "dataset"]):
            remarks += _differences(of_model[column])
    return list(dict.fromkeys(remarks))


def _differences(column: pd.Series[Any]) -> list[str]:
    """Return in what runs of one model differ, or may differ since a source does not say."""
    values = {str(value) for value in column.dropna()}
    known = sorted(values - {UNKNOWN, MIXED})
    remarks = [f"its runs differ in {column.name}: {', '.join(known)}"] if len(known) > 1 else []
    if MIXED in values:
        remarks.append(f"its runs differ in {column.name}, and the source does not say which has which")
    if UNKNOWN in values:
        of = "some of its runs" if len(values) > 1 else "its runs"
        remarks.append(f"the {column.name} of {of} is unknown, so they may differ in it")
    return remarks
