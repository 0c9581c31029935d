"""Claims B5 to B8 and B11: the optimal learning rate, its ratio and its law across several models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from lorabench.analysis import lr_law
from lorabench.analysis.arms import STANDARD, arm_label
from lorabench.analysis.estimate import N_DRAWS, Estimate, combined, generator, unknown
from lorabench.analysis.finding import SEVERITY, Finding, Outcomes, decide, finding, in_unit, together, without, worst
from lorabench.analysis.optima import as_ratio, in_words
from lorabench.analysis.rules import Above, Problem, Remedy, Within
from lorabench.claims.claim import Evidence, claim, condition, named_problems, number, problem_if, unjudged_if
from lorabench.claims.scope import SHORT_RUN, at_papers_alpha, chosen, papers_alpha, widths

# Bounds whose meaning the criteria say.
MIN_MODELS = 4
MIN_SLOPE_MODELS = 3
PAPER_MODELS = 14
SLOPE_MARGIN = 0.3
MAX_EXPONENT_DISTANCE = 0.3
MIN_WIDTHS = 3

NAIVE_SLOPE, NAIVE_DIVISOR = 1.0, 2 * STANDARD["alpha"]
"""The slope of log ratio on log hidden size in the naive derivation, hidden size / (2 alpha), and the divisor there."""

MAX_REGRET = 0.005
"""The mean regret, as a share of the lowest loss, up to which a law predicts the optimal LR: the number of the authors'
documentation."""

SMALLEST_WIDTH = 1024
"""The smallest hidden size that the paper's law is about: that of Qwen3-0.6B."""

_PRESETS = ("core", "paper")


def _swept_models(evidence: Evidence) -> list[list[lr_law.SweptModel]]:
    """Return the groups of models with one dataset, batch size and length, at the paper's alpha if some have it."""
    return lr_law.swept_models([comparison for _, comparison in chosen(at_papers_alpha)(evidence)])


def model_groups(evidence: Evidence) -> list[tuple[str, list[lr_law.SweptModel]]]:
    """Return the groups of models with one dataset, batch size and length, each after its name.

    Groups of fewer than MIN_MODELS models are left out, unless no group is larger: then the largest are judged.
    """
    groups, named = _swept_models(evidence), []
    largest = max(map(len, groups), default=0)
    unjudged_if(largest < 2, "no two models with FullFT and LoRA swept on the same data")
    for models in groups:
        if len(models) >= min(MIN_MODELS, largest):
            first = models[0].fullft
            length = f", {first['steps']} steps" if first["steps"] is not None else ""
            named.append((f"{len(models)} models on {first['dataset']}, batch {first['batch_size']}{length}", models))
    return named


def long_groups(evidence: Evidence) -> list[tuple[str, list[lr_law.SweptModel]]]:
    """Return the groups of models with runs of more than `SHORT_RUN` steps; all groups if there are none."""
    groups = model_groups(evidence)
    return [(name, models) for name, models in groups if (models[0].fullft["steps"] or 0) > SHORT_RUN] or groups


@condition(f"runs of more than {SHORT_RUN} steps on several models", *_PRESETS)
def _long_runs_of_models(evidence: Evidence) -> str | None:
    models = evidence.runs.groupby(["dataset", "batch_size", "steps"], dropna=False)["model"].nunique()
    steps = models[models > 1].index.get_level_values("steps").astype(float).max()
    if steps > SHORT_RUN:
        return None
    return "no two models with runs of a known length" if math.isnan(steps) else f"at most {steps:,.0f} steps"


@condition(f"{PAPER_MODELS} models swept with FullFT and LoRA", "paper")
def _as_many_models(evidence: Evidence) -> str | None:
    swept = max(map(len, _swept_models(evidence)), default=0)
    return None if swept >= PAPER_MODELS else f"{swept} models"


_claim = partial(claim, over=model_groups, columns=("family", "hidden_size"))


def _too_few(number: int, needed: int, what: str) -> list[Problem]:
    remedy = Remedy(f"{needed} {what} (now {number})")
    return problem_if(number < needed, f"{number} {what}, {needed} needed", remedy)


def _problems(models: Sequence[lr_law.SweptModel]) -> list[Problem]:
    by_model = (named_problems(model.problems, f"{model.name}:", f" on {model.name}") for model in models)
    return [problem for problems in by_model for problem in problems]


def _or_more_models(judged: Finding) -> Finding:
    """Return a finding with the remedy of more models, if it is inconclusive and no number of seeds decides it."""
    more = Remedy("more models, since these scatter more than the errors of their optima")
    return replace(judged, remedy=judged.remedy or more) if judged.verdict == "inconclusive" else judged


def _ratios_text(models: Sequence[lr_law.SweptModel]) -> str:
    ranks = sorted({model.lora["rank"] for model in models})
    each = [
        f"{model.name} {in_words(model.log_ratio)}"
        + (f" ({', '.join(problem.text for problem in model.problems)})" if model.problems else "")
        for model in models
    ]
    return f"LoRA {', '.join(f'r{rank}' for rank in ranks)} / FullFT: {', '.join(each)}"


@_claim("B5", over=long_groups, conditions=(papers_alpha, _long_runs_of_models))
def _ratio_independent_of_model(models: list[lr_law.SweptModel]) -> Finding:
    bases = lr_law.by_base(models)
    problems = _too_few(len(bases), MIN_MODELS, "bases")
    if len({(model.lineage, model.hidden_size) for model in models}) < 2:
        problems.append(Problem("all of one family and size", Remedy("models of another family or hidden size")))
    resolved = lr_law.by_base([model for model in models if not model.problems]) or bases
    factor = models[0].comparison.judging.margins.lr_factor
    rule = Within(-math.log(factor), math.log(factor))
    margin_rule = f"within a factor of {factor:g}, the preset's lr_factor"
    findings = []
    for base in bases:
        ratios = [lr_law.mean_of([model.log_ratio for model in each]) for each in (base, *resolved)]
        distance = combined(lambda own, *ratios: own - np.mean(ratios, axis=0), *ratios)
        names = " and ".join(model.name for model in base)
        text = f"{names} over the mean of {len(resolved)} bases {in_words(distance)}"
        against = [*problems, *_problems(base)]
        findings.append(as_ratio(decide(rule, distance, text, lr_law.run_ids(models), against, margin_rule)))
    decisive = worst(findings)
    return replace(decisive, reason=f"{decisive.reason}; {_ratios_text(models)}")


@_claim("B11", conditions=(papers_alpha, _as_many_models))
def _models_swept(models: list[lr_law.SweptModel]) -> Finding:
    count, resolved = len(models), sum(not model.problems for model in models)
    text = f"{count} models swept with FullFT and LoRA, {resolved} of them with both optima resolved"
    return finding(lr_law.run_ids(models), text, "confirmed", [], float(count), strain=-count)


@_claim("B6", over=long_groups, conditions=(papers_alpha, _long_runs_of_models))
def _naive_ratio_is_wrong(models: list[lr_law.SweptModel]) -> Finding:
    resolved = [model for model in models if not model.problems]
    bases, slope = lr_law.by_base(resolved), unknown()
    problems = _too_few(len(bases), MIN_SLOPE_MODELS, "bases with both optima resolved")
    if problems:
        # What would resolve a model comes first, since the first remedy is the one that is given.
        problems = [*_problems(models), *problems]
    else:
        sizes = [math.log(base[0].hidden_size) for base in bases]
        ratios = [lr_law.mean_of([model.log_ratio for model in base]) for base in bases]
        name = "LR ratio on hidden size: " + ", ".join(model.name for model in resolved)
        slope = lr_law.slope_over_models(sizes, ratios, ["all"] * len(bases), name)
        if len({model.hidden_size for model in resolved}) < 2:
            problems.append(Problem("all of one hidden size", Remedy("models of another hidden size")))
    naive = ", ".join(f"{model.name} {model.hidden_size / NAIVE_DIVISOR:.3g}" for model in models)
    text = (
        f"slope of log ratio on log hidden size {number(slope) if slope.known else 'unknown'}; {_ratios_text(models)}; "
        f"hidden/{NAIVE_DIVISOR:g} would be {naive}"
    )
    below = combined(lambda value: NAIVE_SLOPE - value, slope)
    margin_rule = f"{SLOPE_MARGIN:g} below the naive slope"
    judged = decide(Above(SLOPE_MARGIN), below, text, lr_law.run_ids(models), problems, margin_rule)
    return _or_more_models(in_unit(judged, lambda distance: NAIVE_SLOPE - distance))


def _mean_regret(
    arms: Sequence[tuple[lr_law.SweptModel, str]], optima: Sequence[lr_law.ArmOptimum], errors: np.ndarray, method: str
) -> Estimate:
    """Estimate the mean over models of the regret of a method, from the `prediction_errors` of all arms.

    The errors of all optima are drawn together and move both the law's predictions and the optima. A regret is a
    square, so its draws lie above the estimate on average. Their distance from it is therefore taken to both sides,
    which makes the interval wide rather than shifted.
    """
    chosen = np.array([arm_method == method for _, arm_method in arms])
    steepness = np.array([optimum.steepness for optimum in optima])[chosen]

    def mean(*log_lrs: np.ndarray) -> np.ndarray:
        return np.asarray(steepness @ (errors @ np.array(log_lrs))[chosen] ** 2 / len(steepness))

    regret = combined(mean, *(model.log_optimum(arm_method) for model, arm_method in arms))
    sides = {
        part: generator(f"sides of {part}").choice([-1.0, 1.0], N_DRAWS) * np.abs(drawn)
        for part in ("seed_part", "example_part")
        if (drawn := getattr(regret, part)) is not None
    }
    return replace(regret, **sides)


def _share(regret: Estimate) -> str:
    low, high = regret.interval()
    if not math.isfinite(regret.value):
        return "unknown (too few hidden sizes)"
    return f"{regret.value:.2%}" + (f" [{max(0.0, low):.2%}, {high:.2%}]" if regret.known else "")


def _published_regret(models: Sequence[lr_law.SweptModel], method: str) -> str:
    regrets = []
    for model in models:
        optimum = model.arm_optimum(method)
        lr = lr_law.predict_lr(lr_law.PUBLISHED, model.lineage, model.hidden_size, method)
        lrs = model.comparison.fit.grids[arm_label(model.arm(method))].lrs
        if optimum is None or not lrs[0] <= lr <= lrs[-1]:
            return "unknown (a predicted LR lies outside of its grid)"
        regrets.append(optimum.steepness * (math.log(lr) - optimum.log_lr) ** 2)
    return f"{float(np.mean(regrets)):.2%}"


@_claim("B7", conditions=(papers_alpha, widths(SMALLEST_WIDTH, MIN_WIDTHS, _PRESETS)))
def _law_predicts_the_optimum(models: list[lr_law.SweptModel]) -> Finding:
    ids = lr_law.run_ids(models)
    problems = _too_few(len(lr_law.by_base(models)), MIN_MODELS, "bases") + _problems(models)
    arms = [(model, method) for model in models for method in lr_law.METHODS]
    optima = [optimum for model, method in arms if (optimum := model.arm_optimum(method))]
    law = lr_law.fit_lr_law(optima) if len(optima) == len(arms) else None
    if law is None:
        problems.append(Problem("too few hidden sizes to fit the law", Remedy("models of further hidden sizes")))
        return finding(ids, "no law fitted", "inconclusive", problems)
    fits = lr_law.prediction_errors(optima), lr_law.prediction_errors(optima, [model.base for model, _ in arms])
    rule, margin_rule = Within(-math.inf, MAX_REGRET), f"{MAX_REGRET:.1%} of the loss, of the authors' documentation"
    findings = []
    for method in lr_law.METHODS:
        regrets = [_mean_regret(arms, optima, errors, method) for errors in fits]
        text = (
            f"{'FullFT' if method == 'fullft' else 'LoRA'}: mean regret {_share(regrets[1])} with the law fitted to "
            f"the other models, {_share(regrets[0])} fitted to all, {_published_regret(models, method)} with the "
            "published constants"
        )
        fitted, predicted = (decide(rule, regret, text, ids, problems, margin_rule) for regret in regrets)
        # The law of all models contradicts, and the laws of the others confirm.
        if fitted.verdict == "contradicted":
            findings.append(fitted)
            continue
        if predicted.verdict == "contradicted":
            remedy = Remedy("more models: the law of all may hold, but that of the others does not predict")
            predicted = replace(predicted, remedy=remedy)
        by_all, by_others = fitted.outcomes, without(predicted, "contradicted").outcomes
        contradicted = by_all.verdicts == SEVERITY.index("contradicted")
        verdicts = np.where(contradicted, by_all.verdicts, by_others.verdicts)
        findings.append(predicted.with_outcomes(Outcomes(verdicts, by_all.against)))
    exponents = ", ".join(f"{name} {value:.2f}" for name, value in law.exponents.items())
    constants = f"fitted to all: base {law.base:.2g}, M {law.multiplier:.3g}, exponents {exponents}"
    # The interval is symmetric, but no regret is below 0.
    decisive = in_unit(together(findings), lambda regret: max(0.0, regret))
    return replace(decisive, reason=f"{decisive.reason}; {constants}")


@_claim(
    "B8",
    conditions=(papers_alpha, *(widths(SMALLEST_WIDTH, 2, _PRESETS, family) for family in lr_law.PUBLISHED.exponents)),
)
def _families_scale_differently(models: list[lr_law.SweptModel]) -> Iterator[Finding]:
    by_family = {name: [model for model in models if model.lineage == name] for name in lr_law.PUBLISHED.exponents}
    unjudged_if(not any(by_family.values()), "no models of the Llama and Qwen families")
    for family, members in by_family.items():
        if len({model.hidden_size for model in members}) < 2:
            remedy = Remedy(f"{family} models of two hidden sizes or more")
            yield Finding("inconclusive", f"{family}: fewer than two hidden sizes", remedy=remedy)
            continue
        arms = [(base, method) for method in lr_law.METHODS for base in lr_law.by_base(members)]
        exponent = lr_law.slope_over_models(
            [-math.log(base[0].hidden_size) for base, _ in arms],
            [lr_law.mean_of([model.log_optimum(method) for model in base]) for base, method in arms],
            [method for _, method in arms],
            f"exponent of {', '.join(model.name for model in members)}",
        )
        expected = lr_law.PUBLISHED.exponents[family]
        sizes = ", ".join(f"{model.name} ({model.hidden_size})" for model in members)
        text = f"{family}: exponent {number(exponent)}, published {expected:.2g}; over {sizes}"
        rule = Within(expected - MAX_EXPONENT_DISTANCE, expected + MAX_EXPONENT_DISTANCE)
        margin_rule = f"{MAX_EXPONENT_DISTANCE:g} around the published exponent"
        judged = decide(rule, exponent, text, lr_law.run_ids(members), _problems(members), margin_rule)
        yield _or_more_models(judged)
