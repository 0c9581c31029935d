"""The verdicts that other margins would give, for readers to whom smaller or larger effects matter.

The margins of a preset are written down before its runs, and these verdicts replace none of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from lorabench.claims.judge import CLAIMS, judge_claims
from lorabench.config.margins import Margins
from lorabench.config.predictions import Predictions
from lorabench.store.schemas import VERDICTS_BY_MARGIN
from lorabench.store.tables import Tables

FACTORS = (0.25, 0.5, 2.0, 4.0)
"""How many times as large as those of the preset the other margins are."""

UNTESTED = ("not tested", "setting not met")
"""The verdicts that follow from what the runs are like, and from no margin."""


def scaled(margins: Margins, factor: float) -> Margins | None:
    """Return margins that are a number of times as large; None if a share of a loss or an accuracy would be 1 or more.

    A factor of learning rates is as many times as large on a logarithmic scale.
    """
    shares = {name: getattr(margins, name) * factor for name in ("loss", "final_loss", "reward")}
    if max(shares.values()) >= 1:
        return None
    return Margins(**shares, lr_factor=margins.lr_factor**factor)


def verdicts_by_margin(
    tables: Tables,
    judged: pd.DataFrame,
    margins: Margins,
    predictions: Predictions | None = None,
    factors: Sequence[float] = FACTORS,
) -> pd.DataFrame:
    """Judge the claims again by other margins.

    Args:
        tables: the tidy tables by which the claims were judged.
        judged: the table `claims`, whose verdicts are those at the factor 1.
        margins: the margins of the preset.
        predictions: what studies predict; see `judge_claims`.
        factors: how many times as large as the preset's the other margins are.

    Returns:
        The table `verdicts_by_margin`: of each claim that the runs test, a row for each factor.
    """
    tested = set(judged.loc[~judged["verdict"].isin(UNTESTED), "claim_id"])
    claims = [claim for claim in CLAIMS if claim.id in tested]
    parts = [judged[judged["claim_id"].isin(tested)].assign(factor=1.0)]
    for factor in factors:
        if (other := scaled(margins, factor)) is not None:
            again = judge_claims(tables, claims, other, predictions=predictions)
            parts.append(again.assign(factor=factor))
    rows = pd.concat(parts)
    place = rows["claim_id"].map({claim_id: place for place, claim_id in enumerate(judged["claim_id"])})
    ordered = rows.assign(place=place).sort_values(["place", "factor"], ignore_index=True)
    return ordered.reindex(columns=VERDICTS_BY_MARGIN.names)


def turned(by_margin: pd.DataFrame, judged: pd.DataFrame) -> dict[str, Any] | None:
    """Return which verdicts other margins turn, for the page.

    Args:
        by_margin: the table `verdicts_by_margin`, empty if there is none.
        judged: the table `claims`.

    Returns:
        `factors`, ascending; `rows`, the claims whose verdict is not the same at all of them: each with `claim_id`,
        `statement`, its `verdict` and `at`, its rows of the table in the order of the factors; and `stay`, the ids of
        the other claims. None if there are no verdicts by other margins, or they belong to an earlier table `claims`.
    """
    if by_margin.empty:
        return None
    about = judged.set_index("claim_id")[["statement", "unit", "verdict"]]
    own = by_margin[by_margin["factor"] == 1].set_index("claim_id")["verdict"]
    if not own.equals(about["verdict"].reindex(own.index)):
        return None
    rows: list[dict[str, Any]] = []
    stay = []
    for claim_id, at in by_margin.groupby("claim_id", sort=False):
        if at["verdict"].nunique() == 1:
            stay.append(str(claim_id))
            continue
        claim = about.loc[claim_id]
        by_factor = at.sort_values("factor").assign(unit=claim["unit"]).to_dict("records")
        rows.append({"claim_id": claim_id, "at": by_factor} | {name: claim[name] for name in ("statement", "verdict")})
    return {"factors": sorted(by_margin["factor"].unique()), "rows": rows, "stay": stay}
