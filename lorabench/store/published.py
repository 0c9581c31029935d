"""What a repository has published of presets: their folders, provenance, and verdicts on held-out seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

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
    made: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return made


def read_held_out(folder: Path) -> pd.DataFrame | None:
    """Return the table `came_out_again` of a published preset; None if it was not run on held-out seeds."""
    path = folder / HELD_OUT / "came_out_again.csv"
    return pd.read_csv(path) if path.is_file() else None
