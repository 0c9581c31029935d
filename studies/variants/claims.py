"""Claims X1 to X7 on variants of LoRA, which are predictions of this project and not claims of the paper."""

from __future__ import annotations

import math
from collections.abc import Callable

from lorabench.analysis.arms import is_standard, kept
from lorabench.analysis.comparison import Comparison, comparisons, require
from lorabench.analysis.estimate import combined
from lorabench.analysis.finding import Finding, UnjudgedError, decide, together
from lorabench.analysis.optima import as_ratio, in_words, judge_ratio, ratio_text
from lorabench.analysis.rules import Within
from lorabench.claims.claim import Evidence, claim, few_seeds, unjudged_if
from lorabench.claims.reinforcement import CONDITIONS, at_one_peak, if_learned, rewarded_errors
from lorabench.claims.scope import Named
from lorabench.config.fields import VARIANT_NAMES, Variant
from studies.lr_ratio.conditions import stated_predictions
from studies.variants.switches import Switch, switches

OTHERS = tuple(variant for variant in VARIANT_NAMES if variant != "lora")
"""All variants but LoRA itself."""


@kept
def _compared(evidence: Evidence) -> list[Comparison]:
    return comparisons(evidence.runs, evidence.curves, evidence.judging)


def beside_lora(*variants: Variant) -> Callable[[Evidence], list[tuple[str, Switch]]]:
    """Return a function that returns the arms of some variants, each beside LoRA and after its name."""

    def of(evidence: Evidence) -> list[tuple[str, Switch]]:
        named = [
            (f"{comparison.label} {switch.name}", switch)
            for comparison in _compared(evidence)
            for switch in switches(comparison, *variants)
        ]
        names = ", ".join(VARIANT_NAMES[variant] for variant in variants)
        unjudged_if(not named, f"no runs of {names} beside LoRA of the same rank and layers")
        return named

    return of


@claim("X1", over=beside_lora(*OTHERS))
def _no_lower_loss(switch: Switch) -> Finding:
    return switch.comparison.judge_gap(lambda margin: Within(-margin, math.inf), switch.arm, switch.lora)


@claim("X2", over=beside_lora("rslora", "lora_plus"), columns=("hidden_size", "steps"))
def _by_movement(switch: Switch) -> Finding:
    movement = stated_predictions(switch.comparison.judging).movement
    if movement is None:
        raise UnjudgedError("not tested", "the preset states no prediction of the theory movement")
    return _as_predicted(switch, switch.ratio_by_movement(movement))


@claim("X3", over=beside_lora("dora", "qlora"))
def _same_lr(switch: Switch) -> Finding:
    factor = switch.comparison.judging.margins.lr_factor
    rule = Within.margin(math.log(factor))
    return judge_ratio(switch.comparison, switch.arm, switch.lora, rule, f"a factor of {factor:g}")


@claim("X4", over=beside_lora("pissa"))
@claim("X5", over=beside_lora("olora"))
def _by_first_update(switch: Switch) -> Finding:
    return _as_predicted(switch, switch.ratio_by_first_update())


def _as_predicted(switch: Switch, predicted: float) -> Finding:
    """Judge whether the measured ratio of best LRs is the predicted one; the estimate is the one over the other."""
    comparison, factor = switch.comparison, switch.comparison.judging.margins.lr_factor
    unjudged_if(math.isnan(predicted), "what the prediction is made from is not known", "inconclusive")
    off = combined(lambda ratio: ratio - math.log(predicted), switch.log_ratio)
    text = (
        f"{ratio_text(comparison, switch.arm, switch.lora)}, where {predicted:.2f} is predicted; the measured ratio "
        f"over the predicted one is {in_words(off)}"
    )
    rule, margin_rule = Within.margin(math.log(factor)), f"a factor of {factor:g}"
    return as_ratio(comparison.decide(rule, off, text, switch.arms, margin_rule, resolved=True))


@claim("X6", over=beside_lora(*OTHERS))
def _no_wider(switch: Switch) -> Finding:
    comparison, factor = switch.comparison, switch.comparison.judging.margins.lr_factor
    wider = switch.log_width_ratio()
    text = "range of good LRs not known"
    if not math.isnan(wider.value):
        text = f"range of good LRs {in_words(wider)} times as wide as that of LoRA, {wider.n_seeds} seeds"
    problems = [*comparison.problems(switch.arms), *few_seeds(wider.n_seeds, "seeds at three neighbouring LRs")]
    rule = Within(-math.inf, math.log(factor))
    return as_ratio(decide(rule, wider, text, comparison.run_ids(switch.arms), problems, f"a factor of {factor:g}"))


def _rewarded(evidence: Evidence) -> Named:
    known = is_standard(evidence.runs) | (evidence.runs["method"] == "dora")
    compared = comparisons(rewarded_errors(evidence.runs[known]), evidence.curves, evidence.judging)
    unjudged_if(not compared, "no run ever got a reward")
    return [(comparison.label, comparison) for comparison in compared]


@claim("X7", over=_rewarded, columns=("base_reward",), conditions=CONDITIONS)
def _dora_no_better(comparison: Comparison) -> Finding:
    pairs = switches(comparison, "dora")
    _, fullft = require(
        ("DoRA beside LoRA of its rank", next((pair.arm for pair in pairs), None)), ("FullFT", comparison.fullft)
    )
    findings = []
    for pair in pairs:
        for other in (pair.lora, fullft):
            judged = comparison.judge_gap(lambda margin: Within(-margin, math.inf), pair.arm, other)
            findings.append(at_one_peak(judged, comparison, [pair.arm, other]))
    return if_learned(comparison, together(findings), [fullft])
