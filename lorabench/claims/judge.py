"""Judging claims: from the tidy tables to the table `claims`."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import replace

import pandas as pd

from lorabench.analysis.arms import in_experiments, with_arm_columns
from lorabench.analysis.comparison import NEEDED_BY, Judging, Task, curves_of
from lorabench.analysis.example_losses import ExampleLosses
from lorabench.analysis.finding import Finding, UnjudgedError
from lorabench.analysis.loss_fit import Noise
from lorabench.analysis.published import estimates_by_claim
from lorabench.claims.catalog import CLAIMS
from lorabench.claims.claim import Claim
from lorabench.claims.evidence import Evidence
from lorabench.claims.scope_text import scope_text
from lorabench.config.margins import DEFAULT_MARGINS, Margins
from lorabench.config.predictions import DEFAULT_PREDICTIONS, Predictions
from lorabench.store.checks import check_curves, check_table, is_rl
from lorabench.store.schemas import CLAIMS as COLUMNS
from lorabench.store.stand_ins import REMARK, SOURCE_COLUMNS, remarks_on
from lorabench.store.tables import Tables


def judge_claims(
    tables: Tables,
    claims: Sequence[Claim] = CLAIMS,
    margins: Margins | None = None,
    noise: Noise | None = None,
    reward_noise: Noise | None = None,
    predictions: Predictions | None = None,
) -> pd.DataFrame:
    """Judge claims on the tidy tables.

    Args:
        tables: the tidy tables, with the losses that stand in for others. A claim whose table or columns are missing is
            not tested, and its reason names them.
        claims: the claims to judge.
        margins: the smallest effects that matter; without them DEFAULT_MARGINS hold, and the rows say so.
        noise: seed noise of supervised runs from elsewhere, for comparisons with one seed.
        reward_noise: the same of final accuracies in RL, as shares.
        predictions: what theories predict; without them DEFAULT_PREDICTIONS hold.

    Returns:
        The table `claims` (columns of `lorabench.store.schemas.CLAIMS`), one row per claim. Where a claim is judged on
        several models and datasets, the estimate is from the one that decides, and the reason gives all.

    Raises:
        UserError: `check_table` or `check_curves` refuses a table, or an arm has two runs with the same LR and seed.
    """
    runs = tables.runs
    check_table(runs)
    every_curve = _with_categories(tables.curves)
    check_curves(every_curve)
    missing = {task: [name for name in needed if name not in runs] for task, needed in NEEDED_BY.items()}
    if "run_id" in runs:
        runs = with_arm_columns(runs)
    remarks = _Remarks(runs)
    replications = estimates_by_claim()
    examples = ExampleLosses.of(tables.test_losses)
    evidence: dict[tuple[Task, tuple[str, ...]], Evidence] = {}
    by_runs: dict[tuple[Task, tuple[Hashable, ...]], Evidence] = {}
    rows = []
    for claim in claims:
        key = (claim.task, claim.experiments)
        if key not in evidence:
            chosen = runs[in_experiments(runs, claim.experiments) & (is_rl(runs) == (claim.task == "rl"))]
            same = (claim.task, tuple(chosen.index))
            if same not in by_runs:
                curves = curves_of(every_curve, chosen) if "run_id" in runs else every_curve
                judging = Judging(
                    margins or DEFAULT_MARGINS,
                    examples,
                    noise if claim.task == "sft" else reward_noise,
                    predictions or DEFAULT_PREDICTIONS,
                )
                by_runs[same] = Evidence(chosen, curves, tables.compute, tables.counts, runs, judging)
            # Experiments with the same runs share their comparisons, whose fits take most of the time.
            evidence[key] = by_runs[same]
        absent = [*missing[claim.task], *(name for name in claim.columns if name not in runs)]
        judged, missing_text = _judge(claim, evidence[key], absent)
        if margins is None:
            judged = replace(judged, margin_rule=_by_default(judged.margin_rule))
        if judged.run_ids:
            judged = replace(judged, reason="; ".join([judged.reason, *remarks.on(judged.run_ids)]))
        rows.append(
            {
                "claim_id": claim.id,
                "kind": claim.kind,
                "fact": claim.fact or claim.statement,
                "statement": claim.statement,
                "figure": claim.figure,
                "criterion": claim.criterion,
                "verdict": judged.verdict,
                "borderline": judged.borderline,
                "margin_low": judged.margin_low,
                "margin_high": judged.margin_high,
                "margin_rule": judged.margin_rule or None,
                "estimate": judged.estimate,
                "ci_low": judged.ci_low,
                "ci_high": judged.ci_high,
                "unit": claim.unit,
                "detectable": judged.detectable,
                "scope": scope_text(runs, judged.run_ids),
                "missing": missing_text,
                **_remedy(judged),
                "n_runs": len(judged.run_ids),
                "reason": judged.reason,
                "paper_value": claim.paper_value,
                "published": replications.get(claim.id),
                "run_ids": list(judged.run_ids),
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS.names)


class _Remarks:
    """What reasons say about runs, looked up once for all claims whose runs are of the same kinds."""

    def __init__(self, runs: pd.DataFrame) -> None:
        remarked = [name for name in (REMARK, *SOURCE_COLUMNS) if name in runs and runs[name].notna().any()]
        self._kinds, self._kind_of = pd.DataFrame(), {}
        if remarked:
            about = runs[["model", "dataset", *remarked]]
            self._kinds = about.drop_duplicates().reset_index(drop=True)
            kind = about.groupby(list(about), dropna=False, sort=False).ngroup()
            self._kind_of = dict(zip(runs["run_id"], kind, strict=True))
        self._known: dict[frozenset[int], list[str]] = {}

    def on(self, run_ids: Sequence[str]) -> list[str]:
        """Return the remarks on some runs (see `remarks_on`)."""
        kinds = frozenset(self._kind_of[run_id] for run_id in run_ids if run_id in self._kind_of)
        if kinds not in self._known:
            self._known[kinds] = remarks_on(self._kinds.loc[sorted(kinds)]) if kinds else []
        return self._known[kinds]


def _with_categories(curves: pd.DataFrame) -> pd.DataFrame:
    """Return the curves with split and metric as categories, since every claim picks points by these columns."""
    named = [name for name in ("split", "metric") if name in curves]
    return curves.astype(dict.fromkeys(named, "category"))


def _by_default(margin_rule: str) -> str:
    """Return the rule of a margin that no preset states; a rule that reads no section `margins` stays as it is."""
    if not re.search(r"of the gain|of the loss \(|lr_factor", margin_rule):
        return margin_rule
    without_preset = margin_rule.replace("the preset's", "the")
    return f"default margins: {without_preset}"


def _remedy(judged: Finding) -> dict[str, object]:
    """Return the columns on what would decide an inconclusive claim."""
    remedy = judged.remedy if judged.verdict == "inconclusive" else None
    return {
        "would_decide": remedy.text if remedy else None,
        "decide_seeds": remedy.seeds if remedy else None,
        "decide_around": remedy.around if remedy else None,
        "decide_test_examples": remedy.test_examples if remedy else None,
        "decide_lrs": [f"{label.replace(' ', '_')}={lr:.3g}" for label, lr in remedy.lrs] if remedy else [],
    }


def _judge(claim: Claim, evidence: Evidence, absent: list[str]) -> tuple[Finding, str | None]:
    """Judge one claim; a claim without experiments is judged on other tables than `runs`.

    Returns:
        The finding, and the conditions of the claim that the runs do not meet, in words.
    """
    if claim.experiments and evidence.runs.columns.empty:
        return Finding("not tested", "the runs table is empty"), None
    if claim.experiments and evidence.runs.empty:
        without = f"no runs of the experiment {' or '.join(claim.experiments)}"
        return Finding("not tested", f"{without}; it needs {claim.needs}"), None
    if claim.experiments and absent:
        return Finding("not tested", f"the runs table has no column {', '.join(absent)}"), None
    try:
        judged = claim.judge(evidence)
    except UnjudgedError as unjudged:
        judged = unjudged.finding
    if judged.verdict == "not tested":
        return judged, None
    unmet = [
        f"{condition.text} (here {found}{in_presets(condition.presets)})"
        for condition in claim.conditions
        if (found := condition.instead(evidence)) is not None
    ]
    if not unmet:
        return judged, None
    missing = "; ".join(unmet)
    return replace(
        judged,
        verdict="setting not met",
        reason=f"it needs {missing}; measured here: {judged.reason}",
        favoured=None,
        hindered=None,
    ), missing


def in_presets(presets: Sequence[str]) -> str:
    """Return which shipped presets have a condition, as the end of a remark."""
    if not presets:
        return "; no shipped preset meets it"
    *others, last = presets
    return f"; the preset {' or '.join([', '.join(others), last] if others else [last])} meets it"
