"""The functions for other programs, `judge` and `fit_lr`, whose names, arguments and records are stable.

Each imports what it needs when it is called. Examples are in docs/tables.md ("From Python").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorabench.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from lorabench.analysis.loss_fit import Noise

__all__ = ["LrFit", "fit_lr", "judge"]


def judge(
    tables: str | Path | Mapping[str, pd.DataFrame],
    claims: Sequence[str] | None = None,
    margins: Mapping[str, float] | None = None,
    noise: Noise | None = None,
) -> pd.DataFrame:
    """Judge the paper's claims on tables of runs.

    Args:
        tables: data frames by the name of their table: `runs`, and as far as they are there `curves`, `test_losses`,
            `compute` and `counts`; or a folder with such tables in parquet or CSV; or the folder of a source, which has
            a file `source.yaml`. Their columns are those of docs/tables.md. A claim that lacks one is not tested.
        claims: the ids of the claims to judge, such as `B1`; all by default.
        margins: the smallest effects that matter (docs/verdicts.md), any of `loss`, `final_loss`, `reward` and
            `lr_factor`; by default those of the shipped presets: 0.02, 0.1, 0.1 and 1.6.
        noise: the noise of final losses over seeds from elsewhere, for supervised runs with one seed.

    Returns:
        A row for each claim with the columns `lorabench.store.schemas.CLAIMS`. For a source there is a row for each
        claim and model, and the columns `source`, `model`, `scale`, `parameters` and `doubts` come first.

    Raises:
        UserError: a table, claim or margin does not exist or has a value that is not allowed.
    """
    from lorabench.claims.judge import CLAIMS, judge_claims
    from lorabench.config.loading import parse_margins
    from lorabench.config.margins import DEFAULT_MARGINS
    from lorabench.store.tables import Tables

    by_id = {claim.id: claim for claim in CLAIMS}
    if unknown := [name for name in claims or () if name not in by_id]:
        raise UserError(f"claim {unknown[0]!r}: allowed: {', '.join(by_id)}")
    chosen = CLAIMS if claims is None else [claim for claim in CLAIMS if claim.id in claims]
    stated = None if margins is None else parse_margins(DEFAULT_MARGINS.model_dump() | dict(margins))
    if isinstance(tables, Mapping):
        return judge_claims(Tables.of(tables), chosen, stated, noise)
    if (Path(tables) / "source.yaml").is_file():
        import pandas as pd

        from lorabench.sources.source import judge as judge_source
        from lorabench.sources.source import read_sources

        if noise is not None:
            raise UserError(f"noise: {Path(tables) / 'source.yaml'} states the noise of a source, so none can be given")
        judged = [judge_source(source, chosen, stated) for source in read_sources([Path(tables)])]
        return pd.concat(judged, ignore_index=True)
    return judge_claims(Tables.read(Path(tables)), chosen, stated, noise)


@dataclass(frozen=True)
class LrFit:
    """The optimal learning rate (LR) of one sweep by a fit, and the loss there, each with the ends of its 95% interval.

    NaN stands where the runs do not tell. The interval of the loss is for the mean over new seeds on these examples.
    """

    lr: float
    lr_low: float
    lr_high: float
    loss: float
    loss_low: float
    loss_high: float
    inside: bool
    """Whether the optimal LR lies between LRs of the sweep with a probability of 95% or more."""
    problems: tuple[str, ...]
    """What speaks against a conclusion from it, such as too few seeds; empty if nothing does."""
    next_lr: float | None
    """The LR to run next where a further one is needed."""


def fit_lr(runs: pd.DataFrame, noise: Noise | None = None) -> LrFit:
    """Fit the optimal learning rate (LR) of one sweep, by the estimator that judges the claims.

    The loss is a slightly asymmetric parabola in the logarithm of the LR. All runs of the table are of one method in
    one setting, and differ in LR and seed alone. The interval of the optimal LR has the noise within seeds, and that of
    the loss also what each seed does to all LRs; `judge` fits several methods together, in which this cancels.

    Args:
        runs: a row for each run, with the columns `lr`, `loss` (the final loss in nats per token; null or infinite of a
            run that diverged) and `seed` (a whole number; without the column all runs have one seed).
        noise: the noise of losses over seeds from elsewhere, without which one seed has no intervals.

    Raises:
        UserError: a column is missing, a value is not allowed, or two runs have the same LR and seed.
    """
    import numpy as np
    import pandas as pd

    from lorabench.analysis.arms import arm_label
    from lorabench.analysis.comparison import Judging, comparisons
    from lorabench.analysis.estimate import unknown
    from lorabench.store.checks import refuse_rows

    if missing := [name for name in ("lr", "loss") if name not in runs]:
        raise UserError(f"the runs have no column {', '.join(missing)}; they have {', '.join(map(str, runs.columns))}")
    if runs.empty:
        raise UserError("the table of runs is empty")
    runs = runs.assign(**({} if "seed" in runs else {"seed": 0})).reset_index(drop=True)
    numbers = runs[["lr", "seed", "loss"]].apply(pd.to_numeric, errors="coerce").astype(float)
    named = runs.assign(row=runs.index)
    for column, wrong, allowed in (
        ("lr", ~numbers["lr"].between(0, math.inf, "neither"), "numbers above 0"),
        ("seed", ~numbers["seed"].mod(1).eq(0), "whole numbers"),
        ("loss", numbers["loss"].isna() & runs["loss"].notna(), "numbers, and null or infinity of a run that diverged"),
        ("lr", numbers.duplicated(["lr", "seed"]), "each once with a seed, since all runs are of one method"),
    ):
        refuse_rows(named, wrong, "row", column, allowed)
    losses = numbers["loss"].where(np.isfinite(numbers["loss"]))
    # The estimator sees no difference between methods; that of an arm without a rank is full fine-tuning.
    arm = {"model": "model", "dataset": "dataset", "method": "fullft", "rank": None, "placement": None}
    columns = arm | {"batch_size": 1, "steps": 1, "final_valid_nll": losses, "final_test_nll": losses}
    columns |= {"seed": numbers["seed"].astype(int), "run_id": numbers.index.map("row {}".format)}
    columns |= {"status": losses.isna().map({True: "diverged", False: "done"})}
    [sweep] = comparisons(numbers.assign(**columns), pd.DataFrame(), Judging(noise=noise))
    [fitted], label = sweep.arms, arm_label(arm)
    optimum, minimum = (values.get(label, unknown()) for values in (sweep.fit.optima, sweep.fit.minima))
    problems = sweep.problems([fitted], resolved=True)
    further = (lr for problem in problems if problem.remedy for _, lr in problem.remedy.lrs)
    (low, high), (loss_low, loss_high) = optimum.interval(), minimum.interval()
    return LrFit(
        lr=math.exp(optimum.value),
        lr_low=math.exp(low),
        lr_high=math.exp(high),
        loss=minimum.value,
        loss_low=loss_low,
        loss_high=loss_high,
        inside=sweep.fit.resolved.get(label, False),
        problems=tuple(problem.text.removeprefix(f"{label}: ") for problem in problems),
        next_lr=next(further, None),
    )
