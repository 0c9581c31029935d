"""Data that the page embeds for a closer look: learning curves that its script draws, and tidy tables to download."""

from __future__ import annotations

import base64
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lorabench.figures.style import arm_styles

POINTS = 60
"""The largest number of points of one curve; they are log-spaced in steps."""

ALL_POINTS = 250_000
"""The largest number of points of all curves together; where there are many curves, each has fewer points."""

MAX_PLAIN, MAX_EMBEDDED = 150_000, 2_200_000
"""The largest sizes in bytes of a table that is embedded uncompressed, and of one that is embedded compressed."""

_DASHES = {"-": "", "--": "6 3", ":": "2 3"}


def curves_to_draw(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Any]:
    """Return the thinned learning curves of all runs as plain data, for the page's script.

    Args:
        runs: columns run_id, label, method, rank and placement.
        curves: the table `curves`.

    Returns:
        `measures`: a list of (split, metric). `grids`: a list of lists of steps. `curves`: by run_id, a list of (index
        of the measure, index of the grid, values to four digits). `styles`: by label, the colour, dashes and width of a
        line. `points`: the largest number of points of one curve.
    """
    styles = arm_styles(runs.rename(columns={"label": "arm"}))
    drawn = {label: [style.colour, _DASHES[style.linestyle], style.linewidth] for label, style in styles.items()}
    if curves.empty:
        return {"measures": [], "grids": [], "curves": {}, "styles": drawn, "points": POINTS}
    curves = curves[curves["run_id"].isin(runs["run_id"]) & np.isfinite(curves["value"].astype(float))]
    groups = curves.sort_values("step", kind="stable").groupby(["split", "metric", "run_id"], sort=True)
    limit = max(8, min(POINTS, ALL_POINTS // max(1, groups.ngroups)))
    measures: dict[tuple[str, str], int] = {}
    grids: dict[tuple[int, ...], int] = {}
    by_run: dict[str, list[Any]] = {}
    for (split, metric, run_id), points in groups:
        steps = points["step"].to_numpy(int)
        kept = thinned(steps, limit)
        measure = measures.setdefault((str(split), str(metric)), len(measures))
        grid = grids.setdefault(tuple(steps[kept].tolist()), len(grids))
        values = [float(f"{value:.4g}") for value in points["value"].to_numpy(float)[kept]]
        by_run.setdefault(str(run_id), []).append([measure, grid, values])
    return {"measures": list(measures), "grids": list(grids), "curves": by_run, "styles": drawn, "points": limit}


def thinned(steps: np.ndarray, limit: int) -> np.ndarray:
    """Return the indices of at most `limit` of the ascending steps: the first, the last, and log-spaced ones."""
    if len(steps) <= limit:
        return np.arange(len(steps))
    wanted = np.geomspace(max(1, steps[0]), steps[-1], limit - 1)
    return np.unique([0, *np.searchsorted(steps, np.floor(wanted + 0.5)).clip(0, len(steps) - 1)])


def table_downloads(folder: Path, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the given tables of a folder that have a CSV file as data: URIs, compressed with gzip if they are large.

    Returns:
        For each table: `file` (its name), `bytes` (the size of the CSV file) and `uri` (None where the table is too
        large even when compressed).
    """
    embedded = []
    for name in names:
        path = folder / f"{name}.csv"
        if not path.is_file():
            continue
        text = path.read_bytes()
        if len(text) <= MAX_PLAIN:
            file, uri = path.name, data_uri(text, "text/csv")
        elif len(packed := gzip.compress(text, 6, mtime=0)) <= MAX_EMBEDDED:
            file, uri = f"{path.name}.gz", data_uri(packed, "application/gzip")
        else:
            file, uri = path.name, None
        embedded.append({"file": file, "bytes": len(text), "uri": uri})
    return embedded


def data_uri(content: bytes, mime: str) -> str:
    """Return content of the given MIME type as a data: URI."""
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"
