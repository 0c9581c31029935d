"""What a repository has published of presets: their folders, provenance, and verdicts on held-out seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from lorabench.store.io import read_claims
from lorabench.utils.studies import studies

PUBLISHED = Path("paper_figures/published")
"""The folder of published results, from the root of the repository."""

HELD_OUT = "held_out"
"""The folder, in that of a published preset, of its results on held-out seeds."""

CONTROLS = tuple(name for study in studies() for name in study.texts.get("controls", ()))
"""The presets that test a theory alone, on schedules, bases and arms that are not the paper's or with others' runs."""

NOT_PUBLISHED = ("run_ids",)
"""The columns of the table `claims` that are not published."""


def published_folders(root: Path) -> list[Path]:
    """Return the folders of the presets whose verdicts a repository has published."""
    return sorted(path.parent for path in (root / PUBLISHED).glob("*/provenance.json"))


def evidence_folders(root: Path) -> list[Path]:
    """Return the published folders of the presets that are evidence on the claims and on learning rates."""
    return [folder for folder in published_folders(root) if folder.name not in CONTROLS]


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return the content of a published preset's provenance.json, empty without it."""
    path = folder / "provenance.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def read_held_out(folder: Path) -> pd.DataFrame | None:
    """Return the table `came_out_again` of a published preset; None if it was not run on held-out seeds.

    Where several batches were run, it has the rows of each, named in the column `batch`.
    """
    path = folder / HELD_OUT / "came_out_again.csv"
    return pd.read_csv(path) if path.is_file() else None


def read_batches(folder: Path) -> pd.DataFrame | None:
    """Return the claims of a published preset by all of its batches together; None without several batches.

    The table `claims` gets the columns `batches`, their number, and `batches_alike`, of how many alone the verdict is
    the same; null for claims of which nothing was expected, such as derivations.
    """
    again = read_held_out(folder)
    if again is None or "batch" not in again:
        return None
    claims = read_claims(folder / HELD_OUT, without=NOT_PUBLISHED)
    alike = again["held_out"].eq(again["claim_id"].map(claims.set_index("claim_id")["verdict"]))
    by_claim = claims["claim_id"].map(alike.groupby(again["claim_id"]).sum())
    return claims.assign(batches=again["batch"].nunique(), batches_alike=by_claim)
