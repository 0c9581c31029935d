"""Judging of claims on batches of runs of one design: each on seeds, and as far as they are generated on test examples,
of its own. After each registered batch all of them so far are judged together (docs/verdicts.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import pandas as pd

from lorabench.analysis.arms import each_arm
from lorabench.analysis.rules import DECIDED, LEVEL
from lorabench.analysis.sequential import Look, Number, spent
from lorabench.claims.claim import Claim
from lorabench.claims.judge import CLAIMS, findings, judge_claims
from lorabench.config.margins import Margins, Predictions
from lorabench.errors import UserError
from lorabench.store.schemas import CLAIMS_BY_BATCH
from lorabench.store.tables import Tables
from lorabench.utils.formats import missing

SEEDS = 100
"""The number of seeds that a batch may have: the seeds of batch 2 are those from 200 up, and those of batch 0 were
explored."""

Status = Literal["registered", "explored", "unregistered", "waiting"]


class Batch(NamedTuple):
    """A batch of runs."""

    number: int
    status: Status
    """Whether it counts, which a `registered` one does alone."""
    about: str
    """What is registered of it, or why it does not count."""


def judge_batches(
    tables: Tables,
    batches: Sequence[Batch],
    claims: Sequence[Claim] = CLAIMS,
    margins: Margins | None = None,
    predictions: Predictions | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Judge claims (see `judge_claims`) after each registered batch, in ascending order, on all so far; the first
    decision stays, with the numbers of the last look if that has the same verdict. Return the table `claims`, and
    `claims_by_batch` with a row for each claim and look."""
    arms = {run_id: tuple(map(str, arm.values())) for arm, own in each_arm(tables.runs) for run_id in own["run_id"]}
    counted = [batch.number for batch in batches if batch.status == "registered"]
    alone: list[Mapping[Number, tuple[float, int]]] = []
    looks = []
    for place, number in enumerate(counted, 1):
        own = Look(arms)
        for _ in findings(_of(tables, [number]), claims, margins, predictions=predictions, look=own):
            pass
        alone.append(own.seen)
        together = _of(tables, counted[:place])
        judged = judge_claims(together, claims, margins, predictions=predictions, look=Look(arms, list(alone)))
        looks.append(judged.assign(batches=place, spent=spent(LEVEL, place)))
    if not looks:
        lacking = "; ".join(f"batch {batch.number}: {batch.about}" for batch in batches)
        raise UserError(f"no batch of runs is registered, so none counts ({lacking}); `lorabench freeze` registers one")
    by_batch, latest = pd.concat(looks, ignore_index=True), looks[-1].set_index("claim_id", drop=False)
    first = by_batch[by_batch["verdict"].isin(DECIDED)].drop_duplicates("claim_id").set_index("claim_id", drop=False)
    # The intervals of all looks hold together, so those of the last may be shown where it says what was decided.
    turned = first[first["verdict"].ne(latest["verdict"].reindex(first.index))]
    answers = pd.concat([turned, latest]).drop_duplicates("claim_id").loc[latest.index]
    decided = first[["batches", "spent"]].to_dict("index")
    on_runs = {claim.id for claim in claims if claim.experiments}
    reasons = [
        f"{in_words(row | decided.get(name, {}), batches, str(latest.at[name, 'verdict']))}: {row['reason']}"
        if name in on_runs and row["verdict"] in (*DECIDED, "inconclusive")
        else row["reason"]
        for name, row in answers.to_dict("index").items()
    ]
    return answers.assign(reason=reasons).reset_index(drop=True)[list(judged.columns)], by_batch[CLAIMS_BY_BATCH.names]


def _of(tables: Tables, numbers: Sequence[int]) -> Tables:
    """Return the tables of some batches; those that are not of runs are of all."""
    runs = tables.runs[(tables.runs["seed"] // SEEDS).isin(numbers)]
    chosen = {"runs": runs}
    for name in ("curves", "test_losses"):
        table = getattr(tables, name)
        chosen[name] = table[table["run_id"].isin(runs["run_id"])] if "run_id" in table else table
    return replace(tables, **chosen)


def in_words(row: Mapping[Any, Any], batches: Sequence[Batch], last: str) -> str:
    """Return in words after how many batches a claim was decided, or what it would take, and which do not count; `row`
    has its verdict, and the `batches` and level `spent` of the deciding look; `last` is the verdict of all batches."""
    number = f"{row['batches']} batch{'es' if row['batches'] > 1 else ''}"
    words = [f"decided after {number}, level spent {row['spent']:.1%} of {LEVEL:.0%}"]
    if row["verdict"] not in DECIDED:
        words = [f"open after {number}, {row['spent']:.1%} of {LEVEL:.0%} spent"]
        needs = "" if missing(row["would_decide"]) else row["would_decide"].removesuffix(" at this error")
        words += [f"at this error {needs}" if "batches" in needs else f"it needs {needs}"] if needs else []
    elif row["verdict"] != last:
        words.append(f"with later batches {last}")
    if left := ", ".join(f"batch {batch.number} ({batch.about})" for batch in batches if batch.status != "registered"):
        words.append(f"without {left}")
    return "; ".join(words)
