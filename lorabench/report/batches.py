"""Claims judged on the batches of a preset: their tables, and a page on how estimates narrowed from batch to batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lorabench.analysis.rules import DECIDED
from lorabench.claims.batches import judge_batches
from lorabench.claims.claim import Claim
from lorabench.claims.judge import CLAIMS
from lorabench.report.freeze import batches_of
from lorabench.report.page import environment, inline
from lorabench.store.io import write_frame
from lorabench.store.layout import Layout
from lorabench.store.tables import Tables
from lorabench.utils.files import atomic_path


def judge_registered(
    preset: str, tables: Tables, out: Path, claims: Sequence[Claim] = CLAIMS
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Judge claims on the registered batches of a preset among the runs of tables (see `judge_batches`), and write the
    tables `claims` and `claims_by_batch` and the page index.html to a folder; return both tables."""
    stated, batches = Layout.of(preset).preset, batches_of(preset, tables.runs)
    judged, by_batch = judge_batches(tables, batches, claims, stated.margins, stated.predictions or {})
    write_frame(judged, "claims", out)
    write_frame(by_batch, "claims_by_batch", out)
    page = (
        environment()
        .get_template("batches.html.j2")
        .render(
            preset=Layout.of(preset).name,
            batches=batches,
            claims=[
                _claim(row, by_batch[by_batch["claim_id"] == row["claim_id"]])
                # What is decided comes first, and what these runs are not about last.
                for row in sorted(
                    judged[judged["verdict"].ne("not tested")].to_dict("records"),
                    key=lambda row: (row["verdict"] == "setting not met", row["verdict"] not in DECIDED),
                )
                if row["claim_id"] in {claim.id for claim in claims if claim.experiments}
            ],
            style=inline("page.css"),
        )
    )
    with atomic_path(out / "index.html") as partial:
        partial.write_text(page, encoding="utf-8")
    return judged, by_batch


def _claim(claim: dict[Any, Any], looks: pd.DataFrame) -> dict[Any, Any]:
    """Return a claim with its looks, each with the places of its numbers from 0 to 100 on one axis for all."""
    numbers = looks[["estimate", "ci_low", "ci_high", "margin_low", "margin_high"]].to_numpy(float)
    known = numbers[abs(numbers) < math.inf]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)

    def place(number: float) -> float | None:
        return None if math.isnan(number) else 100 * min(1.0, max(0.0, (number - low) / max(high - low, 1e-300)))

    shown = [
        claim | row | {"places": list(map(place, ends))}
        for row, ends in zip(looks.to_dict("records"), numbers.tolist(), strict=True)
    ]
    return claim | {"words": claim["reason"].partition(": ")[0], "looks": shown}
