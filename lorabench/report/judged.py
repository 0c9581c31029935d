"""The tables of verdicts, made from the tidy tables of a folder: `claims` with `optima`, and `verdicts_by_margin`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lorabench.analysis.loss_fit import Noise
from lorabench.claims.judge import judge_claims
from lorabench.claims.rules_hash import rules_sha256
from lorabench.config.margins import Margins, Predictions
from lorabench.report.other_margins import verdicts_by_margin
from lorabench.sources.lr_optima import measured_optima
from lorabench.store.io import read_claims, write_csv, write_frame
from lorabench.store.made_from import of_tables
from lorabench.store.tables import Tables

JUDGED = ("runs", "curves", "test_losses", "counts", "compute")
"""The tables by which claims are judged."""


def write_claims(
    folders: list[Path], out: Path, margins: Margins | None, predictions: Predictions | None, noise: Noise | None = None
) -> pd.DataFrame:
    """Judge the claims on the tables of folders (see `judge_claims`), and write the tables `claims` and `optima`."""
    read, made_from = Tables.read(*folders), of_tables(folders, JUDGED, rules_sha256(margins, predictions))
    judged = judge_claims(read, margins=margins, noise=noise, predictions=predictions)
    write_frame(judged, "claims", out, made_from=made_from)
    if len(optima := measured_optima(read)):
        write_csv(optima, out / "optima.csv")
    return judged


def write_verdicts_by_margin(tables: Path, margins: Margins, predictions: Predictions) -> None:
    """Judge the claims of a folder by other margins than those stated, and write the table `verdicts_by_margin`."""
    made_from = of_tables([tables], [*JUDGED, "claims"], rules_sha256(margins, predictions))
    judged = verdicts_by_margin(Tables.read(tables), read_claims(tables), margins, predictions)
    write_frame(judged, "verdicts_by_margin", tables, made_from=made_from)
