"""A table of runs, `runs.csv` in a folder, to which runs that end at the same time add their rows.

Its columns are those of the tidy table `runs` of lorabench, whose command `claims` judges it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from lora_advice.errors import UserError
from lora_advice.files import locked, write_text

ID = "run_id"


def check_table(folder: Path) -> None:
    """Raise UserError if rows can't be added to the table of a folder, which is made if it does not exist."""
    with locked(folder / ".runs.lock"):
        _read(folder)


def add_row(folder: Path, row: Mapping[str, object]) -> bool:
    """Add a row to the table of a folder, and return whether it takes the place of one with the same `run_id`.

    Other processes wait meanwhile. The table is replaced as a whole, so that one that is killed leaves it as it was.
    """
    with locked(folder / ".runs.lock"):
        columns, rows = _read(folder)
        kept = [old for old in rows if old[ID] != row[ID]]
        text = io.StringIO()
        table = csv.DictWriter(text, [*dict.fromkeys([*columns, *row])], restval="", lineterminator="\n")
        table.writeheader()
        table.writerows([*kept, row])
        write_text(text.getvalue(), folder / "runs.csv")
    return len(kept) < len(rows)


def _read(folder: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns and rows of the table, which are none if there is no file."""
    path = folder / "runs.csv"
    if path.with_suffix(".parquet").exists():
        raise UserError(f"{folder} has a table runs.parquet, which counts in place of runs.csv: name another folder")
    if not path.exists():
        return [], []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            table = csv.DictReader(file, strict=True)
            rows, columns = list(table), list(table.fieldnames or ())
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} can't be read as a table: {error}") from error
    if ID not in columns or any(None in row or None in row.values() for row in rows):
        raise UserError(f"{path} is no table of runs: it needs a column {ID}, and in each row a cell for each column")
    return columns, rows
