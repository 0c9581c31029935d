"""Claims B1, B3, B4 and B9 on the optimal learning rate, and P1 to P5: theories of its ratio.

The theories are predictions of this project and not claims of the paper.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from lorabench.analysis.arms import arm_label, in_experiments, with_arm_columns
from lorabench.analysis.comparison import NEEDED_BY, Comparison, Judging, comparisons, require
from lorabench.analysis.curves import curves_of
from lorabench.analysis.estimate import ExampleLosses, combined
from lorabench.analysis.finding import Finding, UnjudgedError, decide, together, worst
from lorabench.analysis.lr_ratio import (
    LogRatio,
    MeasuredRatio,
    at_end,
    at_step,
    coupled,
    fitted,
    measured_ratios,
    predicted,
    prediction_table,
)
from lorabench.analysis.optima import PAPER_RATIO, as_ratio, in_words, judge_ratio, ratio_text
from lorabench.analysis.rules import Above, Within
from lorabench.claims.claim import SWEEP, Evidence, claim, highest_and_full, named_problems
from lorabench.claims.scope import FULL_STEPS, LONG, every_dataset
from lorabench.config.margins import DEFAULT_MARGINS, DEFAULT_PREDICTIONS, Margins, Predictions
from lorabench.store.checks import is_rl
from lorabench.store.io import write_csv
from lorabench.store.tables import Tables

LR_RATIO = f"LoRA's optimal LR is about {PAPER_RATIO:g} times that of full fine-tuning"
"""The fact that several claims state."""

# Bounds whose meaning the criteria say.
LOW_RANK = 4
HIGH_RANK = 16
SHORT_STEPS = (50, 100)
SHORT_RATIO = 15.0

SAME_FACTOR = 2.0
"""The factor between two optimal LRs up to which the paper calls them nearly the same."""

LEAST_SHIFT = 1.25
"""The least factor by which rank 1's optimal LR is lower: in published sweeps of Qwen3-30B-A3B it is 1.2 to 2.4."""

GROWTH = math.sqrt(SHORT_RATIO / PAPER_RATIO)
"""The least growth of the ratio, from long runs to short ones, that matters: half of the paper's on a log axis."""

_SEEDS = "further seeds at the LRs around the optimum"

_FACTOR = "the preset's lr_factor (1.6 unless it says otherwise)"

_claim = partial(claim, figure="2", unit="ratio", experiments=("rank",), over=every_dataset, core=True)


def ratio_rule(ratio: float, factor: float) -> tuple[Within, str]:
    """Return the rule that the logarithm of a ratio is that of another within a factor, and a text on the margin."""
    return (
        Within(math.log(ratio / factor), math.log(ratio * factor)),
        f"within a factor of {factor:g} of {ratio:g}, by the preset's lr_factor",
    )


@_claim(
    id="B1",
    statement=f"The optimal LR of LoRA is {PAPER_RATIO:g} times that of full fine-tuning",
    criterion=(
        "In every comparison the fitted optimal LR of the highest rank, over that of FullFT, is "
        f"{PAPER_RATIO:g} within a factor that is the margin, {_FACTOR}"
    ),
    needs=f"{SWEEP}; {_SEEDS}",
    paper_value="10 (fit over 14 models: 9.8)",
    fact=LR_RATIO,
)
def _lr_ratio_ten(comparison: Comparison) -> Finding:
    lora, fullft = highest_and_full(comparison)
    return judge_ratio(comparison, lora, fullft, *ratio_rule(PAPER_RATIO, comparison.judging.margins.lr_factor))


@_claim(
    id="B3",
    statement=f"The optimal LR of LoRA is nearly the same at all ranks from {LOW_RANK} up",
    criterion=(
        f"In every comparison the fitted optimal LR of the highest rank is that of the lowest rank from {LOW_RANK} "
        f"up, within a factor of {SAME_FACTOR:g}"
    ),
    needs=f"LoRA on all layers at two or more ranks from {LOW_RANK} up, each with an LR grid; {_SEEDS}",
    paper_value="less than 2 from rank 4 to 512",
)
def _lr_independent_of_rank(comparison: Comparison) -> Finding:
    arms = {rank: arm for rank, arm in comparison.lora.items() if rank >= LOW_RANK}
    if len(arms) < 2:
        raise UnjudgedError("inconclusive" if arms else "not tested", f"fewer than two LoRA ranks from {LOW_RANK} up")
    rule = Within(-math.log(SAME_FACTOR), math.log(SAME_FACTOR))
    margin_rule = f"within a factor of {SAME_FACTOR:g}, the paper's own number"
    return judge_ratio(comparison, arms[max(arms)], arms[min(arms)], rule, margin_rule)


@_claim(
    id="B4",
    statement="Rank 1 has a lower optimal LR than high ranks",
    criterion=(
        f"In every comparison the fitted optimal LR of each rank from {HIGH_RANK} up, or else of the highest rank, is "
        f"above that of rank 1 by a factor of {LEAST_SHIFT:g}"
    ),
    needs=f"LoRA on all layers at rank 1 and a higher one, each with an LR grid; {_SEEDS}",
    paper_value="lower; no number",
)
def _rank_1_lower_lr(comparison: Comparison) -> Finding:
    rank_1, highest = require(("LoRA r1", comparison.lora.get(1)), ("LoRA above rank 1", comparison.highest))
    others = [arm for rank, arm in comparison.lora.items() if rank >= HIGH_RANK] or [highest]
    rule, margin_rule = (
        Above(math.log(LEAST_SHIFT)),
        f"a factor of {LEAST_SHIFT:g}, about the least of published sweeps",
    )
    judged = [judge_ratio(comparison, arm, rank_1, rule, margin_rule) for arm in others]
    return replace(worst(judged), run_ids=tuple(sorted(comparison.run_ids([rank_1, *others]))))


@claim(
    id="B9",
    kind="opinion",
    statement=(
        f"Short runs need a higher ratio of LRs, about {SHORT_RATIO:g} in runs of fewer than about {max(SHORT_STEPS)} "
        "steps"
    ),
    criterion=(
        f"Two numbers are judged, with the loss after {SHORT_STEPS[0]} and after {SHORT_STEPS[1]} steps of longer "
        f"runs. The ratio of optimal LRs there is {SHORT_RATIO:g} within a factor that is the margin, {_FACTOR}; and "
        f"it is above the ratio at the end of the same runs by a factor of {GROWTH:.2f}, half of the paper's growth "
        "on a log axis. All losses are on the validation split, as the test split is measured at the end only. A short "
        "run is the beginning of a long one, so the errors of the two ratios are taken as correlated, as the residuals "
        "of the runs are"
    ),
    needs=(
        f"{SWEEP}; runs of {FULL_STEPS:,} steps or more with validation losses at steps {SHORT_STEPS[0]} and "
        f"{SHORT_STEPS[1]}; {_SEEDS}"
    ),
    paper_value="about 15 below about 100 steps; 10 for long runs",
    unit="ratio",
    experiments=("short_run",),
    over=every_dataset,
    conditions=(LONG,),
    fact=LR_RATIO,
)
def _short_runs_want_more(comparison: Comparison) -> Finding:
    lora, fullft = highest_and_full(comparison)
    steps = fullft["steps"]
    lengths = [step for step in SHORT_STEPS if steps is not None and step < steps]
    if not lengths:
        raise UnjudgedError("not tested", f"runs of {steps or 'unknown'} steps, none longer than {SHORT_STEPS[0]}")
    runs = comparison.of([lora, fullft])
    # The losses by test example are those at the end, and of another split.
    judging = Judging(comparison.judging.margins, noise=comparison.judging.noise)
    [full] = comparisons(at_end(runs), comparison.curves, judging)
    rule, margin_rule = ratio_rule(SHORT_RATIO, judging.margins.lr_factor)
    growing = f"half of the paper's growth, a factor of {GROWTH:.2f}"
    findings: list[Finding] = []
    for step in lengths:
        short = next(iter(comparisons(at_step(runs, comparison.curves, step), comparison.curves, judging)), None)
        if short is None or short.highest is None or short.fullft is None:
            findings.append(Finding("not tested", f"no validation losses of both methods at step {step}"))
            continue
        arms = short.highest, short.fullft
        at_length = judge_ratio(short, *arms, rule, margin_rule)
        findings.append(replace(at_length, reason=f"at step {step} {at_length.reason}"))
        from_short, from_full = (part.fit.log_ratio(*map(arm_label, arms)) for part in (short, full))
        growth = combined(np.subtract, from_short, coupled(short, full, from_short, from_full, short.label))
        problems = named_problems(short.problems(arms, resolved=True), f"at step {step}")
        problems += named_problems(full.problems(highest_and_full(full), resolved=True), "at the end")
        text = f"ratio at step {step} over that at the end {in_words(growth)}"
        ids = short.run_ids(arms)
        findings.append(as_ratio(decide(Above(math.log(GROWTH)), growth, text, ids, problems, growing)))
    decisive = together(findings)
    length = f"at {steps} steps, by validation losses: {ratio_text(full, *highest_and_full(full))}"
    return replace(decisive, reason=f"{decisive.reason}; {length}")


_EXPERIMENTS, _COLUMNS = ("lr_ratio",), ("hidden_size", "steps")

_THEORIES = (
    (
        "P1",
        "movement",
        "none: a theory of this project",
        "The LR ratio R follows R (1 + R LR_F / u*) = c d / alpha, given FullFT's optimal LR",
        "with u* = u0 (128/d) sqrt(50/T), width d and T steps",
    ),
    (
        "P2",
        "scale",
        "none: a theory of this project",
        "The LR ratio depends on the width over alpha alone: R (1 + kappa R) = c d / alpha",
        "for which length and batch size do not matter",
    ),
    (
        "P3",
        "fixed_lora",
        "none: from published sweeps of others",
        "LoRA's optimal LR does not depend on the width, and the LR ratio grows as FullFT's falls",
        "which speaks of alpha 32, 50 steps and batch size 8",
    ),
    (
        "P4",
        "constant",
        "10 (fit over 14 models: 9.8)",
        "The LR ratio is 10 at every width, length and batch size",
        "the paper's number in conditions that the paper does not have, at alpha 32",
    ),
    (
        "P5",
        "naive",
        "hidden size / (2 alpha), which the paper finds contradicted",
        "The LR ratio is half of the width over alpha",
        "from the paper's naive derivation",
    ),
)
"""The id, name, source, statement and content of each theory."""

_LEFT_OUT = " The conditions where its parameters were fitted (width 128, 50 steps, batch size 8) are left out."


def _predicted_ratios(theory: str, evidence: Evidence) -> list[tuple[str, tuple[MeasuredRatio, LogRatio]]]:
    """Return the measured ratios of which a theory speaks and to which it was not fitted, with its predictions."""
    predictions = evidence.judging.predictions.lr_ratio
    if getattr(predictions, theory) is None:
        raise UnjudgedError("not tested", f"the preset states no prediction of the theory {theory}")
    return [
        (ratio.label, (ratio, theories[theory]))
        for ratio in evidence.lr_ratios
        if ratio.kind == "own"
        and theory in (theories := predicted(predictions, ratio.setting))
        and not fitted(theory, ratio.setting)
    ]


for claim_id, theory, source, statement, content in _THEORIES:
    claim(
        id=claim_id,
        kind="own prediction",
        statement=statement,
        figure="own",
        criterion=(
            f"The theory `{theory}` of the preset's section `predictions`, {content}. In every condition of which it "
            "speaks (model, length, batch size and alpha), the fitted optimal LR of LoRA over that of FullFT is the "
            "predicted ratio within a factor that is the margin, the preset's lr_factor (1.6 unless it says otherwise)"
            ". The estimate is the measured over the predicted ratio."
            f"{'' if theory in ('constant', 'naive') else _LEFT_OUT} The beginnings of longer runs are the same steps "
            "as runs of that length, so they are not judged again"
        ),
        needs=f"{SWEEP}, at several widths, lengths, batch sizes and values of alpha; seeds around the optima",
        paper_value=source,
        unit="measured / predicted",
        experiments=_EXPERIMENTS,
        over=partial(_predicted_ratios, theory),
        columns=_COLUMNS,
    )(lambda ratio_and_prediction: ratio_and_prediction[0].judge(ratio_and_prediction[1]))


def write_predictions(tables: Tables, margins: Margins | None, predictions: Predictions | None, out: Path) -> None:
    """Write `predictions.csv` into a folder: one row per condition and theory (see `prediction_table`).

    Without runs of the experiment `lr_ratio`, or with a table `runs` that lacks a column for it, nothing is written.

    Args:
        tables: the tidy tables.
        margins: as for `judge_claims`.
        predictions: as for `judge_claims`.
        out: the folder.
    """
    needed = {*NEEDED_BY["sft"], *_COLUMNS}
    if not needed <= set(tables.runs.columns):
        return
    runs = tables.runs[in_experiments(tables.runs, _EXPERIMENTS) & ~is_rl(tables.runs)]
    if runs.empty or "experiments" not in runs:
        return
    known = predictions or DEFAULT_PREDICTIONS
    judging = Judging(margins or DEFAULT_MARGINS, ExampleLosses.of(tables.test_losses), predictions=known)
    ratios = measured_ratios(with_arm_columns(runs), curves_of(tables.curves, runs), judging)
    write_csv(prediction_table(ratios, known.lr_ratio), out / "predictions.csv")
