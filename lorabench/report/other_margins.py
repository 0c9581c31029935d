"""The verdicts that other margins would give, for readers to whom smaller or larger effects matter.

The margins of a preset are written down before its runs, and these verdicts replace none of those.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from lorabench.claims.judge import CLAIMS, judge_claims
from lorabench.config.margins import Margins, Predictions
from lorabench.store.schemas import VERDICTS_BY_MARGIN
from lorabench.store.tables import Tables

FACTORS = (0.25, 0.5, 2.0, 4.0)
"""How many times as large as those of the preset the other margins are."""

UNTESTED = ("not tested", "setting not met")
"""The verdicts that follow from what the runs are like, and from no margin."""


def verdicts_by_margin(
    tables: Tables, judged: pd.DataFrame, margins: Margins, predictions: Predictions | None = None
) -> pd.DataFrame:
    """Return the table `verdicts_by_margin`: claims that the runs test, judged by FACTORS times the preset's margins.

    Each has a row for each factor; those of 1 are from the table `judged`.
    """
    tested = judged[~judged["verdict"].isin(UNTESTED)]
    claims = [claim for claim in CLAIMS if claim.id in set(tested["claim_id"])]
    parts = [tested.assign(factor=1.0)]
    for factor in FACTORS:
        shares = {name: getattr(margins, name) * factor for name in ("loss", "final_loss", "reward")}
        # A share of a loss or an accuracy is below 1. A factor of learning rates grows on a logarithmic scale.
        if max(shares.values()) < 1:
            other = Margins(**shares, lr_factor=margins.lr_factor**factor)
            parts.append(judge_claims(tables, claims, other, predictions=predictions).assign(factor=factor))
    rows = pd.concat(parts).sort_values("factor").set_index("claim_id").loc[tested["claim_id"]]
    return rows.reset_index().reindex(columns=VERDICTS_BY_MARGIN.names)


def turned(by_margin: pd.DataFrame, judged: pd.DataFrame) -> dict[str, Any] | None:
    """Return which verdicts the table `verdicts_by_margin` turns, for the page; `judged` is the table `claims`.

    There are `factors`, ascending; `rows`, the claims whose verdict is not the same at all of them: each with
    `claim_id`, `statement`, its `verdict` and `at`, its rows of the table by factor; and `stay`, the ids of the other
    claims. None if there are no verdicts by other margins, or they belong to an earlier table `claims`.
    """
    if by_margin.empty:
        return None
    about = judged.set_index("claim_id")[["statement", "unit", "verdict"]]
    own = by_margin[by_margin["factor"] == 1].set_index("claim_id")["verdict"]
    if not own.equals(about["verdict"].reindex(own.index)):
        return None
    rows: list[dict[Any, Any]] = []
    stay: list[Any] = []
    for claim_id, at in by_margin.groupby("claim_id", sort=False):
        claim = about.loc[claim_id]
        if at["verdict"].nunique() == 1:
            stay.append(claim_id)
        else:
            by_factor = at.sort_values("factor").assign(unit=claim["unit"]).to_dict("records")
            rows.append({"claim_id": claim_id, "at": by_factor, **claim[["statement", "verdict"]]})
    return {"factors": sorted(by_margin["factor"].unique()), "rows": rows, "stay": stay}
