"""Judging claims: from the tidy tables to the table `claims`."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lorabench.analysis.arms import with_arm_columns
from lorabench.analysis.comparison import NEEDED_BY, Task, curves_of, in_experiments
from lorabench.analysis.finding import Finding, UnjudgedError
from lorabench.analysis.published import estimates_by_claim
from lorabench.claims.catalog import CLAIMS
from lorabench.claims.claim import Claim
from lorabench.claims.evidence import Evidence
from lorabench.tables.checks import check_curves, check_table, is_rl
from lorabench.tables.schemas import CLAIMS as COLUMNS
from lorabench.tables.tables import Tables


def judge_claims(tables: Tables, claims: Sequence[Claim] = CLAIMS) -> pd.DataFrame:
    """Judge claims on the tidy tables.

    Args:
        tables: the tidy tables. A claim whose table or columns are missing is not tested, and its reason names them.
        claims: the claims to judge.

    Returns:
        The table `claims` (columns of `lorabench.tables.schemas.CLAIMS`), one row per claim. Where a claim is judged on
        several models and datasets, the estimate is from the one that decides, and the reason gives all.

    Raises:
        UserError: `check_table` or `check_curves` refuses a table, or an arm has two runs with the same LR and seed.
    """
    runs = tables.runs
    check_table(runs)
    check_curves(tables.curves)
    missing = {task: [name for name in needed if name not in runs] for task, needed in NEEDED_BY.items()}
    if "run_id" in runs:
        runs = with_arm_columns(runs)
    replications = estimates_by_claim()
    evidence: dict[tuple[Task, tuple[str, ...]], Evidence] = {}
    rows = []
    for claim in claims:
        key = (claim.task, claim.experiments)
        if key not in evidence:
            chosen = runs[in_experiments(runs, claim.experiments) & (is_rl(runs) == (claim.task == "rl"))]
            curves = curves_of(tables.curves, chosen) if "run_id" in runs else tables.curves
            evidence[key] = Evidence(chosen, curves, tables.compute, tables.counts, runs)
        absent = [*missing[claim.task], *(name for name in claim.columns if name not in runs)]
        judged = _judge(claim, evidence[key], absent)
        rows.append(
            {
                "claim_id": claim.id,
                "kind": claim.kind,
                "statement": claim.statement,
                "figure": claim.figure,
                "criterion": claim.criterion,
                "estimate": judged.estimate,
                "ci_low": judged.ci_low,
                "ci_high": judged.ci_high,
                "unit": claim.unit,
                "n_runs": len(judged.run_ids),
                "verdict": judged.verdict,
                "reason": judged.reason,
                "paper_value": claim.paper_value,
                "published": replications.get(claim.id),
                "run_ids": list(judged.run_ids),
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS.names)


def _judge(claim: Claim, evidence: Evidence, missing: list[str]) -> Finding:
    """Judge one claim; a claim without experiments is judged on other tables than `runs`."""
    if claim.experiments and evidence.runs.columns.empty:
        return Finding("not tested", "the runs table is empty")
    if claim.experiments and evidence.runs.empty:
        absent = f"no runs of the experiment {' or '.join(claim.experiments)}"
        return Finding("not tested", f"{absent}; it needs {claim.needs}")
    if claim.experiments and missing:
        return Finding("not tested", f"the runs table has no column {', '.join(missing)}")
    try:
        return claim.judge(evidence)
    except UnjudgedError as unjudged:
        return unjudged.finding
