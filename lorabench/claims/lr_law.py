"""Claims B7 and B8: the law of the optimal learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lorabench.analysis.arms import arm_label
from lorabench.analysis.estimate import N_DRAWS, Estimate, generator
from lorabench.analysis.finding import Finding, Outcome, UnjudgedError, decide, finding, in_unit, together, without
from lorabench.analysis.lr_law import PIVOT, PUBLISHED, ArmOptimum, fit_lr_law, predict_lr, prediction_errors
from lorabench.analysis.rules import Problem, Remedy, Within
from lorabench.analysis.swept_models import METHODS, SweptModel, by_base, mean_of, run_ids, slope_over_models
from lorabench.claims.across_models import (
    COLUMNS,
    EXPERIMENTS,
    MIN_MODELS,
    MODELS,
    across_models,
    of_models,
    or_more_models,
    too_few,
)
from lorabench.claims.claim import Claim
from lorabench.claims.conditions import Condition, widths
from lorabench.claims.evidence import Evidence
from lorabench.utils.formats import fixed_interval

MAX_REGRET = 0.005
"""The mean regret, as a share of the lowest loss, up to which a law predicts the optimal LR: the number of the authors'
documentation."""

MAX_EXPONENT_DISTANCE = 0.3
"""The distance of an exponent from the published one up to which the two count as the same."""

SMALLEST_WIDTH = 1024
"""The smallest hidden size that the paper's law is about: that of Qwen3-0.6B."""

MIN_WIDTHS = 3
"""The number of hidden sizes that the law needs."""

_PRESETS = ("core", "paper")


def _errors(arms: Sequence[tuple[SweptModel, str]], part: str) -> np.ndarray | None:
    """Return draws of the errors of the optima of arms from `seed_part` or `example_part`, (arms, draws)."""
    draws = [getattr(model.log_optimum(method), part) for model, method in arms]
    return None if any(draw is None for draw in draws) else np.array(draws)


def _mean_regret(
    arms: Sequence[tuple[SweptModel, str]], optima: Sequence[ArmOptimum], errors: np.ndarray, method: str
) -> Estimate:
    """Estimate the mean over models of the regret of a method.

    The errors of all optima are drawn together and move both the law's predictions and the optima. A regret is a
    square, so its draws lie above the estimate on average. Their distance from it is therefore taken to both sides,
    which makes the interval wide rather than shifted.

    Args:
        arms: the model and method of each optimum.
        optima: the optima.
        errors: as from `prediction_errors`.
        method: the method.
    """
    of_method = np.array([m == method for _, m in arms])
    steepness = np.array([optimum.steepness for optimum in optima])[of_method]
    off = (errors @ np.array([optimum.log_lr for optimum in optima]))[of_method]
    mean = float((steepness * off**2).mean())
    parts: list[np.ndarray | None] = []
    for part in ("seed_part", "example_part"):
        draws = _errors(arms, part)
        if draws is None:
            parts.append(None)
            continue
        drawn = off[:, None] + (errors @ draws)[of_method]
        sides = generator(f"sides of {part}").choice([-1.0, 1.0], N_DRAWS)
        parts.append(sides * np.abs((steepness[:, None] * drawn**2).mean(0) - mean))
    of_seeds, of_examples = parts
    estimates = [model.log_optimum(m) for model, m in arms]
    n_seeds, n_examples = (min(getattr(e, name) for e in estimates) for name in ("n_seeds", "n_examples"))
    return Estimate(
        mean, np.full(N_DRAWS, math.nan) if of_seeds is None else of_seeds, of_examples, n_seeds, n_examples
    )


def _share(regret: Estimate) -> str:
    low, high = regret.interval()
    if not math.isfinite(regret.value):
        return "unknown (too few hidden sizes)"
    return f"{regret.value:.2%}" + (f" [{max(0.0, low):.2%}, {high:.2%}]" if regret.known else "")


def _published_regret(models: Sequence[SweptModel], method: str) -> str:
    regrets = []
    for model in models:
        lr, optimum = predict_lr(PUBLISHED, model.lineage, model.hidden_size, method), model.arm_optimum(method)
        lrs = model.comparison.fit.grids[arm_label(model.arm(method))].lrs
        if optimum is None or not lrs[0] <= lr <= lrs[-1]:
            return "unknown (a predicted LR lies outside of its grid)"
        regrets.append(optimum.steepness * (math.log(lr) - optimum.log_lr) ** 2)
    return f"{float(np.mean(regrets)):.2%}"


def law_predicts_the_optimum(models: list[SweptModel]) -> Finding:
    """B7: judge the mean regret over models, by method, of laws fitted to the other models and of the law of all."""
    problems = too_few(len(by_base(models)), MIN_MODELS, "bases") + of_models(models)
    arms = [(model, method) for model in models for method in METHODS]
    optima = [optimum for model, method in arms if (optimum := model.arm_optimum(method))]
    errors = prediction_errors(optima) if len(optima) == len(arms) else np.array(math.nan)
    if not np.isfinite(errors).all():
        problems.append(Problem("too few hidden sizes to fit the law", Remedy("models of further hidden sizes")))
        return finding(run_ids(models), "no law fitted", "inconclusive", problems)
    from_others = prediction_errors(optima, [model.base for model, _ in arms])
    findings = []
    for method in METHODS:
        fitted, predicted = (_mean_regret(arms, optima, of, method) for of in (errors, from_others))
        text = (
            f"{'FullFT' if method == 'fullft' else 'LoRA'}: mean regret {_share(predicted)} with the law fitted to the "
            f"other models, {_share(fitted)} fitted to all, {_published_regret(models, method)} with the published "
            "constants"
        )
        findings.append(_of_method(fitted, predicted, text, run_ids(models), problems))
    law = fit_lr_law(optima)
    exponents = ", ".join(f"{name} {value:.2f}" for name, value in law.exponents.items())
    constants = f"fitted to all: base {law.base:.2g}, M {law.multiplier:.3g}, exponents {exponents}"
    # The interval is symmetric, but no regret is below 0.
    decisive = in_unit(together(findings), lambda regret: max(0.0, regret))
    return replace(decisive, reason=f"{decisive.reason}; {constants}")


def _of_method(
    fitted: Estimate, predicted: Estimate, text: str, ids: Sequence[str], problems: Sequence[Problem]
) -> Finding:
    """Contradict by the regret of the law fitted to all models, and confirm by that of laws fitted to the others."""
    rule, margin_rule = Within(-math.inf, MAX_REGRET), f"{MAX_REGRET:.1%} of the loss, of the authors' documentation"
    against = decide(rule, fitted, text, ids, problems, margin_rule)
    if against.verdict == "contradicted":
        return against
    judged = decide(rule, predicted, text, ids, problems, margin_rule)
    if judged.verdict == "contradicted":
        remedy = Remedy("more models: the law of all may hold, but that of the others does not predict")
        judged = replace(judged, remedy=remedy)
    outcome, favoured, hindered = (
        Outcome("contradicted" if of_all.verdict == "contradicted" else of_others.verdict, of_all.against)
        for of_all, of_others in zip(against.outcomes, without(judged, "contradicted").outcomes, strict=True)
    )
    return replace(judged, **outcome._asdict(), favoured=favoured, hindered=hindered)


B7 = Claim(
    id="B7",
    kind="empirical",
    statement=f"A law in {PIVOT:g} / hidden size, with an exponent by family, predicts the optimal LR",
    figure="text",
    criterion=(
        "Regret is the rise of an arm's fitted parabola from its minimum to the predicted LR, as a share of the lowest "
        "loss; its mean over models is taken for each method. The law is fitted by minimal summed regret, as in the "
        f"paper. Confirmed if the mean regret is at most {MAX_REGRET:.1%} where each model is predicted from those of "
        "other bases. Contradicted if even the law fitted to all models has more. The intervals carry the errors of "
        "all fitted optima, drawn together. The published constants are reported but not judged, since they belong to "
        "other data and larger models"
    ),
    needs=f"{MODELS}; enough hidden sizes to fit the law without any one model",
    paper_value="less than 0.5% (authors' documentation)",
    unit="share of loss",
    experiments=EXPERIMENTS,
    judge=across_models(law_predicts_the_optimum),
    columns=COLUMNS,
    conditions=(widths(SMALLEST_WIDTH, MIN_WIDTHS, _PRESETS),),
)


def _exponent(members: list[SweptModel], family: str) -> Finding:
    """Judge one family's slope of log optimal LR on log(PIVOT / hidden size), shared by both methods.

    Each method has an intercept of its own.
    """
    if len({model.hidden_size for model in members}) < 2:
        return Finding(
            "inconclusive",
            f"{family}: fewer than two hidden sizes",
            remedy=Remedy(f"{family} models of two hidden sizes or more"),
        )
    arms = [(of_base, method) for method in METHODS for of_base in by_base(members)]
    exponent = slope_over_models(
        [-math.log(of_base[0].hidden_size) for of_base, _ in arms],
        [mean_of([model.log_optimum(method) for model in of_base]) for of_base, method in arms],
        [method for _, method in arms],
        f"exponent of {', '.join(model.name for model in members)}",
    )
    expected = PUBLISHED.exponents[family]
    sizes = ", ".join(f"{model.name} ({model.hidden_size})" for model in members)
    text = (
        f"{family}: exponent {exponent.value:.2f} {fixed_interval(*exponent.interval(), 2)}, published {expected:.2g}; "
        f"over {sizes}"
    )
    rule = Within(expected - MAX_EXPONENT_DISTANCE, expected + MAX_EXPONENT_DISTANCE)
    margin_rule = f"{MAX_EXPONENT_DISTANCE:g} around the published exponent"
    return or_more_models(decide(rule, exponent, text, run_ids(members), of_models(members), margin_rule))


def families_scale_differently(models: list[SweptModel]) -> Finding:
    """B8: judge the exponent of each family against the published one."""
    by_family = {name: [model for model in models if model.lineage == name] for name in PUBLISHED.exponents}
    if not any(by_family.values()):
        raise UnjudgedError("not tested", "no models of the Llama and Qwen families")
    return together([_exponent(members, family) for family, members in by_family.items()])


def _two_widths_of(family: str) -> Condition:
    """Return the condition that two models of a family have hidden sizes that the paper's law is about."""
    of_all = widths(SMALLEST_WIDTH, 2, _PRESETS)

    def found(evidence: Evidence) -> str | None:
        runs = evidence.runs
        of_family = runs["family"].astype(str).str.lower().str.startswith(family)
        return of_all.found(replace(evidence, runs=runs[of_family]))

    return Condition(f"{of_all.text} in the family {family}", found, _PRESETS)


B8 = Claim(
    id="B8",
    kind="empirical",
    statement="The optimal LR scales with hidden size differently in the Llama and Qwen families",
    figure="text",
    criterion=(
        f"For each family, the exponent of {PIVOT:g} / hidden size is the published one (Llama "
        f"{PUBLISHED.exponents['llama']:.2f}, Qwen {PUBLISHED.exponents['qwen']:.2f}) within a margin of "
        f"{MAX_EXPONENT_DISTANCE:g}. The exponent is the slope of the log of the fitted optima, with an intercept for "
        "FullFT and one for LoRA, over at least 2 hidden sizes. Its error is that of the optima, drawn together, or "
        "else that from their scatter around the line, where this is larger; scatter between models that both methods "
        "share is seen only with 3 hidden sizes or more. A base and models post-trained from it are one point, their "
        "mean"
    ),
    needs="two hidden sizes of both Llama and Qwen, swept with FullFT and LoRA on the same data",
    paper_value=f"{PUBLISHED.exponents['llama']} and {PUBLISHED.exponents['qwen']} (authors' code)",
    unit="exponent",
    experiments=EXPERIMENTS,
    judge=across_models(families_scale_differently),
    columns=COLUMNS,
    conditions=tuple(_two_widths_of(family) for family in PUBLISHED.exponents),
)

CLAIMS = (B7, B8)
