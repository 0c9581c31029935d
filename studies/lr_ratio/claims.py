"""Claims P1 to P7: theories of the LR ratio, which are predictions of this project and not claims of the paper."""

from __future__ import annotations

from functools import partial

from lorabench.analysis.arms import kept
from lorabench.claims.claim import SWEEP, Evidence, claim, unjudged_if
from studies.lr_ratio.conditions import MeasuredRatio, measured_ratios, stated_predictions
from studies.lr_ratio.theories import LogRatio, predicted

_THEORIES = {
    "movement": (
        "none: a theory of this project",
        "The LR ratio R follows R sqrt(1 + (R LR_F / u*)^2) = c d / alpha, given FullFT's optimal LR",
        "with u* = u0 (128/d) sqrt(50/T), width d, T steps, and c lower by 1 + k/r at rank r",
    ),
    "scale": (
        "none: a theory of this project",
        "The LR ratio depends on the width over alpha alone: R (1 + kappa R) = c d / alpha",
        "for which length and batch size do not matter",
    ),
    "fixed_lora": (
        "none: from published sweeps of others",
        "LoRA's optimal LR does not depend on the width, and the LR ratio grows as FullFT's falls",
        "which speaks of alpha 32, 50 steps and batch size 8",
    ),
    "constant": (
        "10 (fit over 14 models: 9.8)",
        "The LR ratio is 10 at every width, length and batch size",
        "the paper's number in conditions that the paper does not have, at alpha 32",
    ),
    "naive": (
        "hidden size / (2 alpha), which the paper finds contradicted",
        "The LR ratio is half of the width over alpha",
        "from the paper's naive derivation",
    ),
    "mu_a": (
        "none: the maximal-update theory of LoRA, arXiv 2602.06204",
        "The LR ratio is c times the square root of the width over alpha",
        "which speaks of an A that is trained, of any initial scale",
    ),
    "still": (
        "none: a theory of this project",
        "The LR ratio is c times the width over alpha, as if A never moved",
        "with c = sqrt(3), which is derived",
    ),
}
"""The source, statement and content of the theory of each claim from P1 on, by its name."""


@kept
def _measured(evidence: Evidence) -> list[MeasuredRatio]:
    return measured_ratios(evidence.runs, evidence.curves, evidence.judging)


def _predicted_ratios(theory: str, evidence: Evidence) -> list[tuple[str, tuple[MeasuredRatio, LogRatio]]]:
    """Return the measured ratios that a theory speaks of and was not fitted to, each with its prediction."""
    predictions = stated_predictions(evidence.judging)
    unjudged_if(getattr(predictions, theory) is None, f"the preset states no prediction of the theory {theory}")
    return [
        (ratio.label, (ratio, theories[theory]))
        for ratio in _measured(evidence)
        if ratio.kind == "own" and theory in (theories := predicted(predictions, ratio.setting))
    ]


for number, (theory, (source, statement, content)) in enumerate(_THEORIES.items(), 1):
    claim(
        id=f"P{number}",
        kind="own prediction",
        statement=statement,
        figure="own",
        criterion=(
            f"The theory `{theory}` of the preset's section `predictions`, {content}. In every condition it speaks "
            "of (model, length, batch size and alpha), the fitted optimal LR of LoRA over that of FullFT is the "
            "predicted ratio within a factor that is the margin, the preset's lr_factor (1.6 unless it says otherwise)"
            ". The estimate is the measured over the predicted ratio."
            " The beginnings of longer runs are the same steps as runs of that length, so they are not judged again. "
            "Parameters that are fitted were fitted to explored seeds, so that held-out ones test the theory"
        ),
        needs=f"{SWEEP}, at several widths, lengths, batch sizes and values of alpha; seeds around the optima",
        paper_value=source,
        unit="measured / predicted",
        experiments=("lr_ratio",),
        over=partial(_predicted_ratios, theory),
        columns=("hidden_size", "steps"),
    )(lambda ratio_and_prediction: ratio_and_prediction[0].judge(ratio_and_prediction[1]))
