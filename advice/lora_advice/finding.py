"""What the commands `audit` and `check` say: findings with a level, a place, a source and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "note"]
"""An `error` sets the exit status to 1: something has no effect, or costs more than chance explains."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found, as `--json` prints it."""

    code: str  # which check it is, such as `lr`; advice/docs/audit-codes.md has a heading for each
    level: Level
    message: str  # one sentence that names the thing, its value and what would be right
    source: str  # where the knowledge comes from, such as `the file alone` or `optima of 14 sources`
    sure: str  # how sure it is, such as `certain` or `95% interval 1.1e-4 to 9e-4`
    path: str = ""
    run: str = ""  # which run of the file it is about, where the file has several
    line: int | None = None  # from 1; null where it is about the whole file
