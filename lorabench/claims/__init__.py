"""The paper's claims, each with a criterion and a function that judges it from the tidy tables.

Each module declares the claims of one subject, each directly below the function that judges it; a new claim is one such
pair and its name in the module's `CLAIMS`. The first letter of an id is the claim's family: A learning curves and
capacity, N stored bits, B learning rate, C early curves and parametrization, D batch size, E placement, M mixtures of
experts, F reinforcement learning, G compute. Statements and numbers are the paper's; where the paper leaves open what
would confirm a statement, its criterion here decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lorabench.analysis.arms import with_arm_columns
from lorabench.analysis.comparison import NEEDED_BY, Task, curves_of, in_experiments
from lorabench.analysis.finding import Finding, UnjudgedError
from lorabench.analysis.published import estimates_by_claim
from lorabench.claims import (
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
from lorabench.claims.claim import Claim
from lorabench.claims.evidence import Evidence
from lorabench.tables.checks import check_curves, check_table, is_rl
from lorabench.tables.schemas import CLAIMS as COLUMNS
from lorabench.tables.tables import Tables

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
"""The families in the order of the table `claims`."""


def _position(claim: Claim) -> tuple[int, str, int]:
    """Return the sort key of a claim: its family, then its number; all claims on RL belong to family F."""
    family = "F" if claim.task == "rl" else claim.id[0]
    return _FAMILIES.index(family), claim.id[0], int(claim.id[1:])


CLAIMS: tuple[Claim, ...] = tuple(sorted((claim for module in _MODULES for claim in module.CLAIMS), key=_position))
"""All claims, in the order of the table `claims`."""

CORE = tuple(claim.id for claim in CLAIMS if claim.core)
"""The ids of the core claims, in the order of CLAIMS."""


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
