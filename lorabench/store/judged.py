"""Reading the table `claims` that `lorabench claims` has written."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lorabench.errors import UserError
from lorabench.store.io import read_table
from lorabench.store.schemas import CLAIMS


def read_claims(folder: Path, without: tuple[str, ...] = ()) -> pd.DataFrame:
    """Read the table `claims` of a folder.

    Args:
        folder: the folder of the table.
        without: columns that the table need not have.

    Raises:
        UserError: the table lacks a column, as one from an older version does; see also `read_table`.
    """
    claims = read_table(folder, "claims")
    absent = [name for name in CLAIMS.names if name not in claims and name not in without]
    if absent:
        raise UserError(
            f"the table claims in {folder} is from another version of lorabench, since it has no column "
            f"{', '.join(absent)}: judge the claims again with `lorabench claims`"
        )
    return claims
