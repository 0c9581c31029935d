"""Claims P1 to P5: theories of the LR ratio. They are predictions of this project, not claims of the paper."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from lorabench.analysis.arms import in_experiments, with_arm_columns
from lorabench.analysis.comparison import NEEDED, Judging, curves_of
from lorabench.analysis.example_losses import ExampleLosses
from lorabench.analysis.finding import Finding, UnjudgedError
from lorabench.analysis.lr_ratio_conditions import measured_ratios, prediction_table
from lorabench.analysis.lr_ratio_theories import fitted, predicted
from lorabench.claims.claim import Claim
from lorabench.claims.evidence import SWEEP, Evidence, judge_each
from lorabench.config.margins import DEFAULT_MARGINS, Margins
from lorabench.config.predictions import DEFAULT_PREDICTIONS, Predictions
from lorabench.store.checks import is_rl
from lorabench.store.io import write_csv
from lorabench.store.tables import Tables


def judge_theory(name: str) -> Callable[[Evidence], Finding]:
    """Return a function that judges what a theory predicts of each condition; the worst finding decides."""

    def judge(evidence: Evidence) -> Finding:
        predictions = evidence.judging.predictions.lr_ratio
        if getattr(predictions, name) is None:
            raise UnjudgedError("not tested", f"the preset states no prediction of the theory {name}")
        return judge_each(
            (ratio.label, partial(ratio.judge, theories[name]))
            for ratio in evidence.lr_ratios
            if ratio.kind == "own"
            and name in (theories := predicted(predictions, ratio.setting))
            and not fitted(name, ratio.setting)
        )

    return judge


def _claim(claim_id: str, theory: str, statement: str, value: str, where: str, fits: bool) -> Claim:
    left_out = (
        " The conditions where its parameters were fitted (width 128, 50 steps, batch size 8) are left out."
        if fits
        else ""
    )
    return Claim(
        id=claim_id,
        kind="own prediction",
        statement=statement,
        figure="own",
        criterion=(
            f"The theory `{theory}` of the preset's section `predictions`, {where}. In every condition of which it "
            "speaks (model, length, batch size and alpha), the fitted optimal LR of LoRA over that of FullFT is the "
            "predicted ratio within a factor that is the margin, the preset's lr_factor (1.6 unless it says otherwise)"
            f". The estimate is the measured over the predicted ratio.{left_out} The beginnings of longer runs are the "
            "same steps as runs of that length, so they are not judged again"
        ),
        needs=f"{SWEEP}, at several widths, lengths, batch sizes and values of alpha; seeds around the optima",
        paper_value=value,
        unit="measured / predicted",
        experiments=("lr_ratio",),
        judge=judge_theory(theory),
        columns=("hidden_size", "steps"),
    )


P1 = _claim(
    "P1",
    "movement",
    "The LR ratio R follows R (1 + R LR_F / u*) = c d / alpha, given FullFT's optimal LR",
    "none: a theory of this project",
    "with u* = u0 (128/d) sqrt(50/T), width d and T steps",
    True,
)
P2 = _claim(
    "P2",
    "scale",
    "The LR ratio depends on the width over alpha alone: R (1 + kappa R) = c d / alpha",
    "none: a theory of this project",
    "for which length and batch size do not matter",
    True,
)
P3 = _claim(
    "P3",
    "fixed_lora",
    "LoRA's optimal LR does not depend on the width, and the LR ratio grows as FullFT's falls",
    "none: from published sweeps of others",
    "which speaks of alpha 32, 50 steps and batch size 8",
    True,
)
P4 = _claim(
    "P4",
    "constant",
    "The LR ratio is 10 at every width, length and batch size",
    "10 (fit over 14 models: 9.8)",
    "the paper's number in conditions that the paper does not have, at alpha 32",
    False,
)
P5 = _claim(
    "P5",
    "naive",
    "The LR ratio is half of the width over alpha",
    "hidden size / (2 alpha), which the paper finds contradicted",
    "from the paper's naive derivation",
    False,
)

CLAIMS = (P1, P2, P3, P4, P5)


def write_predictions(tables: Tables, margins: Margins | None, predictions: Predictions | None, out: Path) -> None:
    """Write `predictions.csv` into a folder: one row per condition and theory (see `prediction_table`).

    Without runs of the experiment `lr_ratio`, or with a table `runs` that lacks a column for it, nothing is written.

    Args:
        tables: the tidy tables.
        margins: as for `judge_claims`.
        predictions: as for `judge_claims`.
        out: the folder.
    """
    needed = {*NEEDED, *P1.columns}
    if not needed <= set(tables.runs.columns):
        return
    runs = tables.runs[in_experiments(tables.runs, P1.experiments) & ~is_rl(tables.runs)]
    if runs.empty or "experiments" not in runs:
        return
    known = predictions or DEFAULT_PREDICTIONS
    judging = Judging(margins or DEFAULT_MARGINS, ExampleLosses.of(tables.test_losses), predictions=known)
    ratios = measured_ratios(with_arm_columns(runs), curves_of(tables.curves, runs), judging)
    write_csv(prediction_table(ratios, known.lr_ratio), out / "predictions.csv")
