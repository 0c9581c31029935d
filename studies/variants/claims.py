"""Claims X1 to X7 on variants of LoRA, which are predictions of this project and not claims of the paper."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from lorabench.analysis.arms import is_standard, kept
from lorabench.analysis.comparison import Comparison, comparisons, require
from lorabench.analysis.estimate import combined
from lorabench.analysis.finding import MIN_SEEDS, Finding, UnjudgedError, decide, together
from lorabench.analysis.optima import as_ratio, in_words, judge_ratio, ratio_text
from lorabench.analysis.rules import Within
from lorabench.claims.claim import Evidence, claim, few_seeds, rewarded_errors, unjudged_if
from lorabench.claims.reinforcement import CONDITIONS, LEARNED, RL_RUNS, at_one_peak, if_learned
from lorabench.claims.scope import Named
from lorabench.config.fields import LORA_PLUS_RATIO, VARIANT_NAMES, Variant
from studies.lr_ratio.conditions import stated_predictions
from studies.variants.switches import Switch, switches

OTHERS = tuple(variant for variant in VARIANT_NAMES if variant != "lora")
"""All variants but LoRA itself."""

_FACTOR = "the preset's lr_factor (1.6 unless it says otherwise)"

_own = partial(claim, kind="own prediction", figure="own", paper_value="none: a prediction of this project")

_sft = partial(_own, experiments=("variants",))

_NEEDS = (
    "{} and LoRA of the same rank, each with an LR grid whose best LR is not at its edge; "
    f"{MIN_SEEDS} seeds at the LRs around each optimum"
)


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


@_sft(
    id="X1",
    over=beside_lora(*OTHERS),
    needs=_NEEDS.format("variants of LoRA"),
    statement="No variant of LoRA has a lower loss than LoRA, once each has its own best LR",
    criterion=(
        "For every variant, rank and dataset, the fitted lowest test NLL of the variant is no lower than that of LoRA "
        "of the same rank, within the margin of losses: a share (2% unless the preset says otherwise) of the gain from "
        "the base to full fine-tuning"
    ),
)
def _no_lower_loss(switch: Switch) -> Finding:
    return switch.comparison.judge_gap(lambda margin: Within(-margin, math.inf), switch.arm, switch.lora)


@_sft(
    id="X2",
    over=beside_lora("rslora", "lora_plus"),
    needs=_NEEDS.format("rsLoRA or LoRA+"),
    statement="The best LRs of rsLoRA and LoRA+ follow from LoRA's by their scaling and the movement of A",
    criterion=(
        "LR sqrt(1 + (LR / u*)^2) alpha is the same for LoRA and rsLoRA, whose alpha is sqrt(r) times as large. Here "
        "u* = u0 (128/d) sqrt(50/T) is the LR at which A moves by its own size in T steps at width d, with the u0 of "
        f"the preset's theory `movement`. For the LR of A, LoRA+ is LoRA with {LORA_PLUS_RATIO:g} times the alpha. In "
        "every comparison the ratio of the fitted best LRs is the one that this gives at LoRA's best LR, within a "
        f"factor that is {_FACTOR}. For rsLoRA it lies between 1/sqrt(r) and r^(-1/4)"
    ),
    unit="ratio",
    columns=("hidden_size", "steps"),
)
def _by_movement(switch: Switch) -> Finding:
    movement = stated_predictions(switch.comparison.judging).movement
    if movement is None:
        raise UnjudgedError("not tested", "the preset states no prediction of the theory movement")
    return _as_predicted(switch, switch.ratio_by_movement(movement))


@_sft(
    id="X3",
    over=beside_lora("dora", "qlora"),
    needs=_NEEDS.format("DoRA or QLoRA"),
    statement="The best LRs of DoRA and QLoRA are that of LoRA",
    criterion=f"In every comparison the ratio of the fitted best LRs is 1 within a factor that is {_FACTOR}",
    unit="ratio",
)
def _same_lr(switch: Switch) -> Finding:
    factor = switch.comparison.judging.margins.lr_factor
    rule = Within.margin(math.log(factor))
    return judge_ratio(switch.comparison, switch.arm, switch.lora, rule, f"a factor of {factor:g}")


_BY_FIRST_UPDATE = (
    "In every comparison the ratio of the fitted best LRs is the one by which the first update has the size of "
    f"LoRA's, within a factor that is {_FACTOR}. The size is the norm of the change of all weights by the first step "
    "over its LR; it follows from the initial factors, which are {}"
)


@_sft(
    id="X4",
    over=beside_lora("pissa"),
    needs=_NEEDS.format("PiSSA") + "; update_norm at step 1",
    statement="PiSSA's best LR is LoRA's over the factor by which its first update is larger",
    criterion=_BY_FIRST_UPDATE.format("the largest singular directions of the weights"),
    unit="ratio",
)
@_sft(
    id="X5",
    over=beside_lora("olora"),
    needs=_NEEDS.format("OLoRA") + "; update_norm at step 1",
    statement="OLoRA's best LR is LoRA's over the factor by which its first update is larger",
    criterion=_BY_FIRST_UPDATE.format("rows and columns of a QR decomposition of the weights"),
    unit="ratio",
)
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


@_sft(
    id="X6",
    over=beside_lora(*OTHERS),
    needs=_NEEDS.format("variants of LoRA"),
    statement="No variant of LoRA has a wider range of good LRs than LoRA",
    criterion=(
        "The range of LRs whose loss is within a margin of the lowest is as wide as the root of the margin over the "
        "curvature of the loss in ln LR, which is taken from the best LR of the grid and its two neighbours, as a mean "
        "over the seeds that have all three; its error is pooled over the arms. In every comparison the variant's "
        f"range is at most wider than LoRA's by a factor that is {_FACTOR}"
    ),
    unit="ratio",
)
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


@_own(
    id="X7",
    statement="In RL, DoRA is no better than LoRA or full fine-tuning",
    criterion=(
        "On every problem set and at every rank, the fitted lowest test error rate of DoRA is no lower than that of "
        "LoRA of the same rank, and than that of FullFT, within the margin of accuracies that the preset gives. "
        f"{LEARNED.format('FullFT')}"
    ),
    needs=RL_RUNS.format("DoRA, LoRA of the same rank"),
    unit="error rate",
    task="rl",
    experiments=("variants_rl",),
    over=_rewarded,
    columns=("base_reward",),
    conditions=CONDITIONS,
)
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
