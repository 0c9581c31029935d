"""The verdicts that other margins would give, for readers to whom smaller or larger effects matter.

The margins of a preset are written down before its runs, and these verdicts replace none of those. Each claim is judged
by its own function, on comparisons whose margins are others and whose fits, which take most of the time, are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property, partial
from typing import Any

import pandas as pd

from lorabench.analysis.comparison import Comparison, Judging
from lorabench.analysis.loss_fit import LossFit
from lorabench.claims.claim import Claim, Evidence
from lorabench.claims.judge import CLAIMS, judge_claims
from lorabench.config.margins import Margins, Predictions
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
        predictions: what theories predict; see `judge_claims`.
        factors: how many times as large as the preset's the other margins are.

    Returns:
        The table `verdicts_by_margin`: of each claim that the runs test, a row for each factor.
    """
    tested = set(judged.loc[~judged["verdict"].isin(UNTESTED), "claim_id"])
    allowed = {factor: other for factor in factors if (other := scaled(margins, factor))}
    claims = [claim for claim in CLAIMS if claim.id in tested]
    again = [_by_margins(claim, factor, other) for factor, other in allowed.items() for claim in claims]
    others = judge_claims(tables, again, margins, predictions=predictions)
    parts = others["claim_id"].str.split("@", expand=True).reindex(columns=[0, 1])
    others = others.assign(claim_id=parts[0], factor=parts[1].astype(float))
    rows = pd.concat([judged[judged["claim_id"].isin(tested)].assign(factor=1.0), others])
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


def _by_margins(claim: Claim, factor: float, margins: Margins) -> Claim:
    """Return a claim that is judged by other margins, on the same parts of the evidence as the claim itself."""
    return replace(claim, id=f"{claim.id}@{factor:g}", judge=lambda part: claim.judge(_with_margins(part, margins)))


@dataclass(frozen=True)
class _OtherMargins(Comparison):
    """A comparison whose margins differ from those of another one of the same runs."""

    original: Comparison = field(kw_only=True, repr=False)

    @cached_property
    def fit(self) -> LossFit:
        """The fit of the original, since no fit depends on a margin."""
        return self.original.fit


def _with_margins(part: Any, margins: Margins) -> Any:
    """Return a copy of a part of the evidence in which all comparisons have other margins."""
    if isinstance(part, Judging):
        return replace(part, margins=margins)
    if isinstance(part, Comparison):
        judging = replace(part.judging, margins=margins)
        return _OtherMargins(part.label, part.runs, part.curves, judging, original=part)
    if isinstance(part, partial):
        return partial(part.func, *_with_margins(part.args, margins), **_with_margins(part.keywords, margins))
    if is_dataclass(part) and not isinstance(part, type):
        own = {each.name: _with_margins(getattr(part, each.name), margins) for each in fields(part)}
        other = replace(part, **own)
        if isinstance(part, Evidence) and "comparisons" in vars(part):
            vars(other)["comparisons"] = _with_margins(part.comparisons, margins)
        return other
    if isinstance(part, dict):
        return {name: _with_margins(value, margins) for name, value in part.items()}
    return type(part)(_with_margins(each, margins) for each in part) if isinstance(part, list | tuple) else part
