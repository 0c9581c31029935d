"""All tidy tables of one folder, or of several that are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from lorabench.errors import UserError
from lorabench.store.io import empty_table, read_table, table_path
from lorabench.store.merge import merge_tables
from lorabench.store.stand_ins import with_stand_ins


@dataclass(frozen=True)
class Tables:
    """The tidy tables that claims and figures are made from; a missing table is empty and has no columns."""

    runs: pd.DataFrame
    curves: pd.DataFrame
    compute: pd.DataFrame = field(default_factory=empty_table)
    counts: pd.DataFrame = field(default_factory=empty_table)
    evals: pd.DataFrame = field(default_factory=empty_table)
    test_losses: pd.DataFrame = field(default_factory=empty_table)
    claims: pd.DataFrame = field(default_factory=empty_table)
    """The table `claims`, for the figure of it only; `read` leaves it out, since merged tables are judged again."""

    @classmethod
    def read(cls, *folders: Path) -> Tables:
        """Read the tables of one folder, or of several and merge them as `lorabench merge` does.

        Another loss stands in for one that the runs lack (see `with_stand_ins`).

        Raises:
            UserError: a folder holds none of the tables; see also `read_table` and `merge_tables`.
        """
        names = ("runs", "curves", "compute", "counts", "evals", "test_losses")
        for folder in folders:
            if not any(table_path(folder, name) for name in names):
                raise UserError(f"no table {', '.join(names[:-1])} or {names[-1]} (.parquet or .csv) in {folder}")
        runs, *others = (_read_merged(folders, name) for name in names)
        return cls(with_stand_ins(runs), *others)


def _read_merged(folders: Sequence[Path], name: str) -> pd.DataFrame:
    frames = {folder: read_table(folder, name) for folder in folders if table_path(folder, name)}
    if len(frames) < 2:
        return next(iter(frames.values()), empty_table())
    return merge_tables(name, frames)
