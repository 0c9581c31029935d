"""The table of a calibration as Markdown, for the page on it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd

START = "<!-- calibration: start -->"
END = "<!-- calibration: end -->"
"""The lines between which the page has the table."""


def block(table: pd.DataFrame, day: str) -> str:
    """Return the table of a calibration with its markers.

    Args:
        table: as from `run.calibrate`.
        day: the day on which it was made.
    """
    worlds = int(table["n_worlds"].min())
    wrong = int((table["wrong_low"] > 0.05).sum())
    surely = f"{wrong} surely have" if wrong != 1 else "1 surely has"
    head = [
        START,
        "",
        f"Made on {day}, with {worlds} worlds for each claim and size of the effect. Of the {len(table)} shares of "
        f"wrong verdicts, {surely} more than 5% (the 95% interval is above it).",
        "",
        "| claim | says | what has the effect | wrong at 0 | wrong at 1 margin | wrong at 2 margins | power at 0 | "
        "power at 2 margins |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = []
    for claim_id, of_claim in table.groupby("claim_id", sort=False):
        by_effect = {int(row["effect"]): row for row in of_claim.to_dict("records")}
        cells = [_wrong(by_effect[effect]) for effect in (0, 1, 2)]
        cells += [f"{float(by_effect[effect]['power']):.0%}" for effect in (0, 2)]
        rows.append(f"| {claim_id} | {by_effect[0]['kind']} | {by_effect[0]['what']} | {' | '.join(cells)} |")
    return "\n".join([*head, *rows, "", END])


def _wrong(row: Mapping[Hashable, Any]) -> str:
    share = f"{row['wrong']:.1%}"
    return f"**{share}**" if row["wrong_low"] > 0.05 else share
