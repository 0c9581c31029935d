"""Claims B1, B3 to B9 and B11: the optimal learning rate, its ratio on one model and over several, and its law."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from lorabench.analysis import lr_law
from lorabench.analysis.alpha_rules import judged_arms
from lorabench.analysis.arms import STANDARD, arm_label
from lorabench.analysis.comparison import COMPARED, Comparison, Judging, comparisons, highest_and_full, require
from lorabench.analysis.curves import at_step
from lorabench.analysis.estimate import N_DRAWS, Estimate, combined, generator, unknown
from lorabench.analysis.finding import SEVERITY, Finding, Outcomes, decide, finding, in_unit, together, without, worst
from lorabench.analysis.memorisation import is_memorisation
from lorabench.analysis.optima import PAPER_RATIO, as_ratio, coupled, in_words, judge_ratio, ratio_text
from lorabench.analysis.rules import Above, Problem, Remedy, Verdict, Within
from lorabench.claims import scope
from lorabench.claims.claim import Evidence, claim, condition, doubted, judge_each, named_problems, number, unjudged_if
from lorabench.claims.scope import FULL_STEPS, HIGH_RANK, SHORT_RUN, papers_alpha

# Bounds whose meaning the criteria say.
LOW_RANK = 4
SHORT_STEPS = (50, 100)
SHORT_RATIO = 15.0
MIN_MODELS = 4
MIN_SLOPE_MODELS = 3
PAPER_MODELS = 14
SLOPE_MARGIN = 0.3
MAX_EXPONENT_DISTANCE = 0.3
MIN_WIDTHS = 3

SAME_FACTOR, SAME_DOUBLINGS = 2.0, 7
"""The factor between two optimal LRs up to which the paper calls them nearly the same, and the number of doublings of
the rank, from 4 to 512, over which it does."""

MIN_SPAN = 16
"""The least ratio of two ranks whose optimal LRs are compared: 4 doublings, about half of the paper's. With three seeds
an equality over 4 doublings is seen in three cases of four or more, over 2 in one of four to a half, over 1 never."""

LEAST_SHIFT = 1.25
"""The least factor by which rank 1's optimal LR is lower: in published sweeps of Qwen3-30B-A3B it is 1.2 to 2.4."""

GROWTH = math.sqrt(SHORT_RATIO / PAPER_RATIO)
"""The least growth of the ratio, from long runs to short ones, that matters: half of the paper's on a log axis."""

NAIVE_SLOPE, NAIVE_DIVISOR = 1.0, 2 * STANDARD["alpha"]
"""The slope of log ratio on log hidden size in the naive derivation, hidden size / (2 alpha), and the divisor there."""

MAX_REGRET = 0.005
"""The mean regret, as a share of the lowest loss, up to which a law predicts the optimal LR: the number of the authors'
documentation."""

SMALLEST_WIDTH = 1024
"""The smallest hidden size that the paper's law is about: that of Qwen3-0.6B."""

_PRESETS = ("core", "paper")


def ratio_rule(ratio: float, factor: float) -> tuple[Within, str]:
    """Return the rule that the logarithm of a ratio is that of another within a factor, and a text on the margin."""
    rule = Within(math.log(ratio / factor), math.log(ratio * factor))
    return rule, f"within a factor of {factor:g} of {ratio:g}, by the preset's lr_factor"


@claim(
    "B1",
    over=scope.chosen(scope.learning, scope.at_papers_alpha, scope.sweeps_of_both, scope.beyond_short),
    conditions=(papers_alpha, scope.longer_runs),
)
def _lr_ratio_ten(comparison: Comparison) -> Finding:
    lora, fullft = highest_and_full(comparison)
    return judge_ratio(comparison, lora, fullft, *ratio_rule(PAPER_RATIO, comparison.judging.margins.lr_factor))


def same_factor(low: int, high: int) -> float:
    """Return the factor up to which the optimal LRs of two ranks are nearly the same: the paper's, by doublings."""
    return float(SAME_FACTOR ** (math.log2(high / low) / SAME_DOUBLINGS))


FROM_4_TO_64 = same_factor(4, 64)


def _spans(runs: pd.DataFrame) -> pd.Series[float]:
    """Return for each run the ratio of the highest to the lowest rank from `LOW_RANK` up in its comparison."""
    lora = runs[(runs["method"] == "lora") & judged_arms(runs) & runs["placement"].fillna("all").eq("all")]
    by_comparison = lora[lora["rank"] >= LOW_RANK].groupby(COMPARED, dropna=False)["rank"]
    spans: pd.Series[float] = (by_comparison.transform("max") / by_comparison.transform("min")).astype(float)
    return spans


wide_spans = scope.those(lambda comparison: _spans(comparison.runs).max() >= MIN_SPAN, or_all=True)
"""Leave out comparisons whose ranks span less than a factor of `MIN_SPAN`, if others span more."""


@condition(
    f"LoRA ranks from {LOW_RANK} up over a factor of {MIN_SPAN}",
    *("laptop", "long_runs", "overnight", "smollm2", "first_gpu", "core", "paper"),
)
def wide_span(evidence: Evidence) -> str | None:
    spans = _spans(evidence.runs[~is_memorisation(evidence.runs)])
    if spans.empty:
        return "no such ranks"
    return f"a factor of {spans.max():g}" if spans.max() < MIN_SPAN else None


@claim("B3", over=scope.chosen(scope.learning, scope.at_one_alpha, wide_spans), conditions=(scope.one_alpha, wide_span))
def _lr_independent_of_rank(comparison: Comparison) -> Finding:
    arms = {rank: arm for rank, arm in comparison.lora.items() if rank >= LOW_RANK}
    few: Verdict = "inconclusive" if arms else "not tested"
    unjudged_if(len(arms) < 2, f"fewer than two LoRA ranks from {LOW_RANK} up", few)
    low, high = min(arms), max(arms)
    factor = same_factor(low, high)
    margin_rule = (
        f"within a factor of {factor:.2f}: the paper's {SAME_FACTOR:g} over {SAME_DOUBLINGS} doublings of the rank, "
        f"for the {math.log2(high / low):.2g} from {low} to {high}"
    )
    return judge_ratio(comparison, arms[high], arms[low], Within.margin(math.log(factor)), margin_rule)


@claim("B4", over=scope.chosen(scope.learning, scope.with_rank_1, scope.at_one_alpha), conditions=(scope.one_alpha,))
def _rank_1_lower_lr(comparison: Comparison) -> Finding:
    rank_1, highest = require(("LoRA r1", comparison.lora.get(1)), ("LoRA above rank 1", comparison.highest))
    others = [arm for rank, arm in comparison.lora.items() if rank >= HIGH_RANK] or [highest]
    ratios = [comparison.fit.log_ratio(arm_label(arm), arm_label(rank_1)) for arm in others]
    shift = combined(lambda *logs: np.mean(logs, axis=0), *ratios)
    by_rank = "; ".join(ratio_text(comparison, arm, rank_1) for arm in others)
    mean = f"their geometric mean is {in_words(shift)}" if len(others) > 1 else ""
    text = "; ".join(part for part in (by_rank, mean) if part)
    margin_rule = f"a factor of {LEAST_SHIFT:g}, about the least of published sweeps"
    rule, arms = Above(math.log(LEAST_SHIFT)), [rank_1, *others]
    return as_ratio(comparison.decide(rule, shift, text, arms, margin_rule, resolved=True))


@claim("B9", conditions=(papers_alpha,))
def _short_runs_want_more(evidence: Evidence) -> Finding:
    swept = scope.chosen(scope.learning, scope.at_papers_alpha, scope.sweeps_of_both)(evidence)
    lengths = [(comparison.runs["steps"].iloc[0], (name, comparison)) for name, comparison in swept]
    known = [(int(steps), named) for steps, named in lengths if not pd.isna(steps)]
    short = [named for steps, named in known if SHORT_STEPS[0] <= steps <= SHORT_STEPS[1]]
    whole = [named for steps, named in known if steps >= FULL_STEPS]
    text = f"no runs of {SHORT_STEPS[0]} to {SHORT_STEPS[1]} steps, and none of {FULL_STEPS:,} or more"
    unjudged_if(not short and not whole, text)
    text = f"no runs of {FULL_STEPS:,} steps or more, whose ratio at the end would have to be lower"
    lacking = [] if whole else [Problem(text, Remedy(f"runs of {FULL_STEPS:,} steps"))]
    return doubted(judge_each([*short, *whole], _ratio_of_length), lacking, ["confirmed"])


def _ratio_of_length(comparison: Comparison) -> Finding:
    lora, fullft = highest_and_full(comparison)
    steps, runs = fullft["steps"], comparison.of([lora, fullft])
    rule, margin_rule = ratio_rule(SHORT_RATIO, comparison.judging.margins.lr_factor)
    if steps < FULL_STEPS:
        judged = judge_ratio(comparison, lora, fullft, rule, margin_rule)
        return replace(judged, reason=f"{steps} steps, {judged.reason}")
    # The losses by test example are those at the end, and of another split.
    judging = Judging(comparison.judging.margins, noise=comparison.judging.noise)
    at_end = runs.assign(final_test_nll=runs["final_valid_nll"])
    [full] = comparisons(at_end, comparison.curves, judging)
    growing = f"half of the paper's growth, a factor of {GROWTH:.2f}"
    findings: list[Finding] = []
    for step in SHORT_STEPS:
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


def _swept_models(evidence: Evidence) -> list[list[lr_law.SweptModel]]:
    """Return the groups of models with one dataset, batch size and length, at the paper's alpha if some have it."""
    return lr_law.swept_models([comparison for _, comparison in scope.chosen(scope.at_papers_alpha)(evidence)])


def model_groups(evidence: Evidence) -> list[tuple[str, list[lr_law.SweptModel]]]:
    """Return the groups of models with one dataset, batch size and length, each after its name: those of MIN_MODELS
    models or more, or else the largest."""
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
    return [Problem(f"{number} {what}, {needed} needed", remedy)] if number < needed else []


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
    text = f"{count} models swept with FullFT and LoRA, {resolved} of them with both optima bounded"
    return finding(lr_law.run_ids(models), text, "confirmed", [], float(count), strain=-count)


@_claim("B6", over=long_groups, conditions=(papers_alpha, _long_runs_of_models))
def _naive_ratio_is_wrong(models: list[lr_law.SweptModel]) -> Finding:
    resolved = [model for model in models if not model.problems]
    bases, slope = lr_law.by_base(resolved), unknown()
    problems = _too_few(len(bases), MIN_SLOPE_MODELS, "bases with both optima bounded")
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

    A regret is a square, so its draws lie above the estimate on average. Their distance from it is therefore taken to
    both sides, which makes the interval wide rather than shifted.
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


@_claim("B7", conditions=(papers_alpha, scope.widths(SMALLEST_WIDTH, MIN_WIDTHS, _PRESETS)))
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


_FAMILY_WIDTHS = (scope.widths(SMALLEST_WIDTH, 2, _PRESETS, family) for family in lr_law.PUBLISHED.exponents)


@_claim("B8", conditions=(papers_alpha, *_FAMILY_WIDTHS))
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
