"""The catalogue of claims, and their judging: from the tidy tables to the table `claims`."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from lorabench.analysis.alpha_rules import remarks_on_alpha
from lorabench.analysis.arms import in_experiments, with_arm_columns
from lorabench.analysis.comparison import NEEDED_BY, Judging, Task
from lorabench.analysis.curves import curves_of
from lorabench.analysis.estimate import ExampleLosses
from lorabench.analysis.finding import Finding, with_parts
from lorabench.analysis.loss_fit import Noise
from lorabench.analysis.published import estimates_by_claim
from lorabench.analysis.sequential import LOOK, Look
from lorabench.claims import (
    batch_size,
    capacity,
    compute,
    learning_curves,
    learning_rate,
    parametrization,
    placement,
    reinforcement,
)
from lorabench.claims.claim import Claim, Evidence, judge_each, judge_part
from lorabench.claims.rules_hash import rules_sha256
from lorabench.claims.texts import claims_of
from lorabench.config.margins import DEFAULT_MARGINS, Margins, Predictions, default_predictions
from lorabench.store.checks import check_curves, check_table, is_rl
from lorabench.store.schemas import CLAIMS as COLUMNS
from lorabench.store.tables import MAY_DIFFER, Tables, remarks_on
from lorabench.utils.formats import count, parameters
from lorabench.utils.studies import studies

_FAMILIES = "ANBCDEMFG"
"""The families of the paper's claims in the order of the table `claims`."""


def _position(claim: Claim) -> tuple[int, str, int]:
    """Return where a claim stands: those of the paper by family, all on RL in family F, and then those of studies."""
    family, own = claim.id[0], claim.kind == "own prediction"
    place = len(_FAMILIES) if own else _FAMILIES.index("F" if claim.task == "rl" else family)
    return place, family, int(claim.id[1:])


_MODULES = (batch_size, capacity, compute, learning_curves, learning_rate, parametrization, placement, reinforcement)
_STUDIES = tuple(study.module("claims") for study in studies())

CLAIMS = tuple(sorted((claim for module in (*_MODULES, *_STUDIES) for claim in claims_of(module)), key=_position))
"""All claims, in the order of the table `claims`."""

CORE = tuple(claim.id for claim in CLAIMS if claim.core)
"""The ids of the core claims, in the order of CLAIMS."""

LARGE_MODEL = 1e9
"""The least number of parameters of the models that the paper is about."""


def judge_claims(
    tables: Tables,
    claims: Sequence[Claim] = CLAIMS,
    margins: Margins | None = None,
    noise: Noise | None = None,
    reward_noise: Noise | None = None,
    predictions: Predictions | None = None,
    look: Look | None = None,
) -> pd.DataFrame:
    """Return the table `claims`, one row per claim; without its table or columns one is not tested.

    Args:
        tables: the tidy tables; a UserError says if `check_table` or `check_curves` refuses one.
        claims: the claims to judge.
        margins: the smallest effects that matter; without them DEFAULT_MARGINS hold, and the rows say so.
        noise: seed noise of supervised runs from elsewhere, for comparisons with one seed.
        reward_noise: the same of final accuracies in RL, as shares.
        predictions: what studies predict; without them the default ones hold.
        look: the look at batches of runs, if the tables are of batches (see `batches.judge_batches`).
    """
    check_table(tables.runs)
    check_curves(tables.curves)
    runs, replications = tables.runs, estimates_by_claim()
    rules = rules_sha256(margins, predictions)
    rows = []
    for claim, judged, missing in findings(tables, claims, margins, noise, reward_noise, predictions, look):
        if margins is None and re.search(r"of the gain|of the loss \(|points of acc|lr_factor", judged.margin_rule):
            rule = judged.margin_rule.replace("the preset's", "the")
            judged = replace(judged, margin_rule=f"default margins: {rule}")
        behind = runs[runs["run_id"].isin(judged.run_ids)] if judged.run_ids else runs.iloc[:0]
        if judged.n_parts is None:
            judged = with_parts(judged, [judged])
        verdict, sizes = judged.verdict, behind.get("base_params", pd.Series(dtype=float))
        if verdict == "contradicted" and claim.kind in ("empirical", "opinion", "prediction") and len(sizes):
            # What the paper says of its own models, of 1B parameters or more, fails on smaller ones alone.
            verdict = "not seen here" if sizes.lt(LARGE_MODEL).fillna(False).all() else verdict
        remedy = judged.remedy if judged.verdict == "inconclusive" else None
        rows.append(
            vars(claim)
            | vars(judged)
            | {
                "claim_id": claim.id,
                "verdict": verdict,
                "p_again": judged.p_again,
                "fact": claim.fact or claim.statement,
                "margin_rule": judged.margin_rule or None,
                "scope": scope_text(behind),
                "missing": missing,
                "would_decide": remedy and remedy.text,
                "decide_seeds": remedy and remedy.seeds,
                "decide_around": remedy and remedy.around,
                "decide_test_examples": remedy and remedy.test_examples,
                "decide_lrs": [f"{arm.replace(' ', '_')}={lr:.3g}" for arm, lr in remedy.lrs] if remedy else [],
                "n_runs": len(judged.run_ids),
                "n_seeds": _seeds(behind),
                "lr_chosen_on": _lr_chosen_on(behind),
                "reason": "; ".join([judged.reason, *(remarks_on(behind) if len(behind) else [])]),
                "published": replications.get(claim.id),
                "rules": rules,
                "run_ids": list(judged.run_ids),
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS.names)


def findings(
    tables: Tables,
    claims: Sequence[Claim] = CLAIMS,
    margins: Margins | None = None,
    noise: Noise | None = None,
    reward_noise: Noise | None = None,
    predictions: Predictions | None = None,
    look: Look | None = None,
) -> Iterator[tuple[Claim, Finding, str | None]]:
    """Yield each claim with its finding on checked tables, and its conditions that the runs do not meet; see
    `judge_claims`."""
    # Every claim picks points by these columns.
    by_category = [name for name in ("split", "metric") if name in tables.curves]
    every_curve = tables.curves.astype(dict.fromkeys(by_category, "category"))
    runs = with_arm_columns(tables.runs) if "run_id" in tables.runs else tables.runs
    # No claim is about the machine, and selecting runs takes as much longer as they have more columns.
    runs = runs.drop(columns=MAY_DIFFER["runs"], errors="ignore")
    rl, examples = is_rl(runs), ExampleLosses.of(tables.test_losses)
    stated = default_predictions() if predictions is None else predictions
    judging = {
        task: Judging(margins or DEFAULT_MARGINS, examples, task_noise, stated)
        for task, task_noise in (("sft", noise), ("rl", reward_noise))
    }
    by_runs: dict[tuple[Task, tuple[Hashable, ...]], Evidence] = {}
    for claim in claims:
        chosen = runs[in_experiments(runs, claim.experiments) & (rl == (claim.task == "rl"))]
        # Experiments with the same runs share their comparisons, whose fits take most of the time.
        key = (claim.task, tuple(chosen.index))
        if key not in by_runs:
            curves = curves_of(every_curve, chosen) if "run_id" in runs else every_curve
            by_runs[key] = Evidence(chosen, curves, tables.compute, tables.counts, runs, judging[claim.task])
        evidence, outer = by_runs[key], LOOK.set(look)
        if look is not None:
            look.claim = claim.id
        try:
            judged = _judged(claim, evidence)
        finally:
            LOOK.reset(outer)
        reasons = [judged.reason, *remarks_on_alpha(evidence.runs, judged.run_ids)]
        yield (claim, *_with_conditions(claim, evidence, replace(judged, reason="; ".join(reasons))))


def _judged(claim: Claim, evidence: Evidence) -> Finding:
    """Return the finding on a claim, without its conditions; one without experiments is judged on other tables."""
    columns, over = evidence.every_run.columns, claim.over
    if claim.experiments:
        if columns.empty:
            return Finding("not tested", "the runs table is empty")
        if evidence.runs.empty:
            without = f"no runs of the experiment {' or '.join(claim.experiments)}"
            return Finding("not tested", f"{without}; it needs {claim.needs}")
        absent = [name for name in dict.fromkeys((*NEEDED_BY[claim.task], *claim.columns)) if name not in columns]
        if absent:
            return Finding("not tested", f"the runs table has no column {', '.join(absent)}")
    if over is None:
        return judge_part(claim.judge, evidence)
    return judge_part(lambda whole: judge_each(over(whole), claim.judge), evidence)


def _with_conditions(claim: Claim, evidence: Evidence, judged: Finding) -> tuple[Finding, str | None]:
    """Return the finding on a claim, and the conditions of the claim that the runs do not meet."""
    if judged.verdict == "not tested":
        return judged, None
    unmet = []
    for condition in claim.conditions:
        if (instead := condition.instead(evidence)) is not None:
            *others, last = condition.presets
            presets = " or ".join([", ".join(others), last] if others else [last])
            unmet.append(f"{condition.text} (here {instead}; the preset {presets} meets it)")
    if not unmet:
        return judged, None
    missing = "; ".join(unmet)
    reason = f"it needs {missing}; measured here: {judged.reason}"
    return with_parts(replace(judged, verdict="setting not met", reason=reason), []), missing


def _seeds(behind: pd.DataFrame) -> int | None:
    """Return the number of seeds of the runs behind a verdict; None without runs. A row may be the mean of several."""
    several = behind.reindex(columns=["n_seeds"])["n_seeds"].max()
    return max(behind["seed"].nunique(), 1 if pd.isna(several) else int(several)) if len(behind) else None


def _lr_chosen_on(behind: pd.DataFrame) -> str | None:
    """Return the split by whose losses or accuracies the runs behind a verdict have their best LR; None without runs.
    In RL it is the validation split, unless its accuracies are the reported ones."""
    if behind.empty:
        return None
    names = ("final_valid_reward", "final_reward")
    if not is_rl(behind).all() or any(name not in behind for name in names):
        return "test"
    picked, reported = (behind[name].astype(float) for name in names)
    return "test" if picked.isna().all() or (picked - reported).abs().max() == 0 else "validation"


def scope_text(runs: pd.DataFrame) -> str | None:
    """Return the scope of runs, such as `0.83M parameters, 50 steps, worked`, or with the models' names."""

    def known(name: str) -> set[Any]:
        return set(runs[name].dropna()) if name in runs else set()

    words = []
    if sizes := known("base_params"):
        words.append(f"{_range(sizes, parameters)} parameters")
    elif models := known("model"):
        words.append(", ".join(sorted(map(str, models))))
    if steps := known("steps"):
        words.append(f"{_range(steps, count)} steps")
    if datasets := known("dataset"):
        words.append(("RL on " if is_rl(runs).all() else "") + ", ".join(sorted(map(str, datasets))))
    return ", ".join(words) or None


def _range(values: set[Any], text: Callable[[float], str]) -> str:
    low, high = (text(float(value)) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
