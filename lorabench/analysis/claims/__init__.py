"""The paper's claims, each with a criterion and a function that judges it from the tidy tables.

A module per family, in the order of the project's notes on the paper (claims table); a new claim is one entry in its
`CLAIMS` and one small function. Criteria and the paper's numbers are those of the notes; what the paper leaves open is
decided here and said in `criterion`.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lorabench.analysis.arms import check_curves, check_table, is_rl, with_arm_columns
from lorabench.analysis.claims import (
    batch_size,
    capacity,
    compute,
    early_curves,
    invariance,
    learning_curves,
    learning_rate,
    lr_across_models,
    lr_law,
    parameter_counts,
    parametrization,
    placement,
    reinforcement,
    rl_information,
    rl_progress,
    stored_bits,
)
from lorabench.analysis.claims.claim import Claim
from lorabench.analysis.claims.evidence import Evidence
from lorabench.analysis.comparison import NEEDED_BY, Task, curves_of, in_experiments
from lorabench.analysis.finding import Finding, UnjudgedError
from lorabench.published import beside_claims
from lorabench.tables import CLAIMS as COLUMNS
from lorabench.tables import Tables

_MODULES = (
    learning_curves,
    capacity,
    stored_bits,
    learning_rate,
    lr_across_models,
    lr_law,
    early_curves,
    parametrization,
    invariance,
    batch_size,
    placement,
    parameter_counts,
    reinforcement,
    rl_progress,
    rl_information,
    compute,
)

_FAMILIES = "ANBCDEMFG"
"""First letters of the ids in the order of the table."""


def _position(claim: Claim) -> tuple[int, str, int]:
    """Return the sort key of a claim: its family, then its number; all claims on RL belong to family F."""
    family = "F" if claim.task == "rl" else claim.id[0]
    return _FAMILIES.index(family), claim.id[0], int(claim.id[1:])


CLAIMS: tuple[Claim, ...] = tuple(sorted((claim for module in _MODULES for claim in module.CLAIMS), key=_position))

CORE = tuple(claim.id for claim in CLAIMS if claim.core)
"""Ids of the core claims, in the order of CLAIMS."""


def judge_claims(tables: Tables, claims: Sequence[Claim] = CLAIMS) -> pd.DataFrame:
    """Judge the claims.

    Args:
        tables: the tidy tables. A claim whose table or columns are missing is not tested, and says which.
        claims: those to judge.

    Returns:
        The table `claims` (columns of `lorabench.tables.CLAIMS`), one row per claim. Where a claim is judged on
        several models and datasets, the estimate is that of the one that decides, and the reason names each.

    Raises:
        UserError: the tables can't be trusted, see `check_table` and `check_curves`; an arm has two runs of the same
            LR and seed.
    """
    runs = tables.runs
    check_table(runs)
    check_curves(tables.curves)
    missing = {task: [name for name in needed if name not in runs] for task, needed in NEEDED_BY.items()}
    if "run_id" in runs:
        runs = with_arm_columns(runs)
    replications = beside_claims()
    evidence: dict[tuple[Task, tuple[str, ...]], Evidence] = {}
    rows = []
    for claim in claims:
        key = (claim.task, claim.experiments)
        if key not in evidence:
            chosen = runs[in_experiments(runs, claim.experiments) & (is_rl(runs) == (claim.task == "rl"))]
            curves = curves_of(tables.curves, chosen) if "run_id" in runs else tables.curves
            evidence[key] = Evidence(chosen, curves, tables.compute, tables.counts, runs)
        absent = [*missing[claim.task], *(name for name in claim.columns if name not in runs)]
        found = _judge(claim, evidence[key], absent)
        rows.append(
            {
                "claim_id": claim.id,
                "kind": claim.kind,
                "statement": claim.statement,
                "figure": claim.figure,
                "criterion": claim.criterion,
                "estimate": found.estimate,
                "ci_low": found.ci_low,
                "ci_high": found.ci_high,
                "unit": claim.unit,
                "n_runs": len(found.run_ids),
                "verdict": found.verdict,
                "reason": found.reason,
                "paper_value": claim.paper_value,
                "published": replications.get(claim.id),
                "run_ids": list(found.run_ids),
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS.names)


def _judge(claim: Claim, evidence: Evidence, missing: list[str]) -> Finding:
    """The finding on one claim; a claim without experiments does not look at runs."""
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
