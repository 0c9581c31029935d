"""Claims P1 to P7: theories of the LR ratio, which are predictions of this project and not claims of the paper."""

from __future__ import annotations

from functools import partial

from lorabench.analysis.arms import kept
from lorabench.claims.claim import Evidence, claim, unjudged_if
from studies.lr_ratio.conditions import MeasuredRatio, measured_ratios, stated_predictions
from studies.lr_ratio.theories import LogRatio, predicted

_THEORIES = ("movement", "scale", "fixed_lora", "constant", "naive", "mu_a", "still")
"""The theory of each claim from P1 on."""


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


for number, theory in enumerate(_THEORIES, 1):
    claim(f"P{number}", over=partial(_predicted_ratios, theory), columns=("hidden_size", "steps"))(
        lambda ratio_and_prediction: ratio_and_prediction[0].judge(ratio_and_prediction[1])
    )
