"""Claims B5, B6 and B11: the ratio of optimal learning rates across models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lorabench.analysis.arms import STANDARD
from lorabench.analysis.estimate import Estimate, combined, unknown
from lorabench.analysis.finding import Finding, decide, finding, in_unit, worst
from lorabench.analysis.optima import as_ratio, in_words
from lorabench.analysis.rules import Above, Problem, Remedy, Within
from lorabench.analysis.swept_models import SweptModel, by_base, mean_of, run_ids, slope_over_models, swept_models
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
from lorabench.claims.conditions import Condition
from lorabench.claims.evidence import Evidence
from lorabench.claims.learning_rate import LR_RATIO
from lorabench.utils.formats import fixed_interval

SLOPE_MARGIN = 0.3
"""The least distance of a slope of log ratio on log hidden size from the naive one that matters."""

NAIVE_SLOPE = 1.0
"""The slope of log ratio on log hidden size in the naive derivation: the ratio is hidden size / (2 alpha)."""

NAIVE_DIVISOR = 2 * STANDARD["alpha"]
"""The divisor of the hidden size in the naive derivation."""

MIN_SLOPE_MODELS = 3
"""The number of models that a slope needs."""

PAPER_MODELS = 14
"""The number of models that the paper swept."""


def _ratios_text(models: Sequence[SweptModel]) -> str:
    """Format each model's ratio with what speaks against it."""
    ranks = sorted({model.lora["rank"] for model in models})
    each = [
        f"{model.name} {in_words(model.log_ratio)}"
        + (f" ({', '.join(problem.text for problem in model.problems)})" if model.problems else "")
        for model in models
    ]
    return f"LoRA {', '.join(f'r{rank}' for rank in ranks)} / FullFT: {', '.join(each)}"


def _slope(models: Sequence[SweptModel]) -> Estimate:
    """Return the slope of log ratio on log hidden size; it is unknown for too few models or one size."""
    bases = by_base(models)
    if len(bases) < MIN_SLOPE_MODELS:
        return unknown()
    sizes = [math.log(of_base[0].hidden_size) for of_base in bases]
    name = "LR ratio on hidden size: " + ", ".join(model.name for model in models)
    return slope_over_models(sizes, [_log_ratio(of_base) for of_base in bases], ["all"] * len(bases), name)


def _log_ratio(of_base: Sequence[SweptModel]) -> Estimate:
    """Return the log ratio of a base, the mean over its models."""
    return mean_of([model.log_ratio for model in of_base])


def ratio_independent_of_model(models: list[SweptModel]) -> Finding:
    """B5: judge each base's LR ratio against the geometric mean of all."""
    resolved = [model for model in models if not model.problems]
    log_ratios = [_log_ratio(of_base) for of_base in by_base(resolved or models)]
    problems = too_few(len(by_base(models)), MIN_MODELS, "bases")
    if len({(model.lineage, model.hidden_size) for model in models}) < 2:
        problems.append(Problem("all of one family and size", Remedy("models of another family or hidden size")))
    factor = models[0].comparison.judging.margins.lr_factor
    rule = Within(-math.log(factor), math.log(factor))
    margin_rule = f"within a factor of {factor:g}, the preset's lr_factor"
    findings = []
    for of_base in by_base(models):
        distance = combined(lambda own, *ratios: own - np.mean(ratios, axis=0), _log_ratio(of_base), *log_ratios)
        names = " and ".join(model.name for model in of_base)
        text = f"{names} over the mean of {len(log_ratios)} bases {in_words(distance)}"
        against = [*problems, *of_models(of_base)]
        findings.append(as_ratio(decide(rule, distance, text, run_ids(models), against, margin_rule)))
    decisive = worst(findings)
    return replace(decisive, reason=f"{decisive.reason}; {_ratios_text(models)}")


B5 = Claim(
    id="B5",
    kind="empirical",
    statement="The ratio of optimal LRs does not depend on the base model",
    figure="text",
    criterion=(
        f"Over at least {MIN_MODELS} bases of several families or sizes, on the same data, batch size and length, at "
        "the highest rank that all have: every base's ratio of fitted optimal LRs is the geometric mean of all "
        "within a factor that is the margin, the preset's lr_factor (1.6 unless it says otherwise). A base and models "
        "post-trained from it (the same family, hidden size and number of parameters) count once, with their mean. A "
        "model whose optima are not resolved leaves the claim open and is no part of the mean. The estimate is the "
        "ratio over the mean of the base that decides"
    ),
    needs=MODELS,
    paper_value="the same for 14 models; fitted slope 0",
    unit="ratio over the mean ratio",
    experiments=EXPERIMENTS,
    judge=across_models(ratio_independent_of_model),
    columns=COLUMNS,
    fact=LR_RATIO,
)


def models_swept(models: list[SweptModel]) -> Finding:
    """B11: count the models that were swept with both methods."""
    count = len(models)
    resolved = sum(not model.problems for model in models)
    text = f"{count} models swept with FullFT and LoRA, {resolved} of them with both optima resolved"
    return finding(run_ids(models), text, "confirmed", [], float(count), strain=-count)


def _as_many_models(evidence: Evidence) -> str | None:
    swept = max(map(len, swept_models(evidence.comparisons)), default=0)
    return None if swept >= PAPER_MODELS else f"{swept} models"


B11 = Claim(
    id="B11",
    kind="count",
    statement=f"The ratio of optimal LRs was determined by sweeps of {PAPER_MODELS} models",
    figure="text",
    criterion=(
        f"At least {PAPER_MODELS} models were swept with both methods on the same data. It says nothing about the "
        "world, so it is never contradicted"
    ),
    needs=MODELS,
    paper_value=f"{PAPER_MODELS} models",
    unit="models",
    experiments=EXPERIMENTS,
    judge=across_models(models_swept),
    columns=COLUMNS,
    conditions=(Condition(f"{PAPER_MODELS} models swept with FullFT and LoRA", _as_many_models, ("paper",)),),
    fact=LR_RATIO,
)


def naive_ratio_is_wrong(models: list[SweptModel]) -> Finding:
    """B6: judge by how much the slope of log LR ratio on log hidden size is below that of the naive derivation."""
    resolved = [model for model in models if not model.problems]
    slope = _slope(resolved)
    naive = ", ".join(f"{model.name} {model.hidden_size / NAIVE_DIVISOR:.3g}" for model in models)
    problems = too_few(len(by_base(resolved)), MIN_SLOPE_MODELS, "bases with both optima resolved")
    if problems:
        # What would resolve a model comes first, since the first remedy is the one that is given.
        problems = [*of_models(models), *problems]
    elif len({model.hidden_size for model in resolved}) < 2:
        problems.append(Problem("all of one hidden size", Remedy("models of another hidden size")))
    number = f"{slope.value:.2f} {fixed_interval(*slope.interval(), 2)}" if slope.known else "unknown"
    text = (
        f"slope of log ratio on log hidden size {number}; {_ratios_text(models)}; hidden/{NAIVE_DIVISOR:g} would be "
        f"{naive}"
    )
    below = combined(lambda value: NAIVE_SLOPE - value, slope)
    margin_rule = f"{SLOPE_MARGIN:g} below the naive slope"
    judged = decide(Above(SLOPE_MARGIN), below, text, run_ids(models), problems, margin_rule)
    return or_more_models(in_unit(judged, lambda distance: NAIVE_SLOPE - distance))


B6 = Claim(
    id="B6",
    kind="derivation",
    statement="The ratio of optimal LRs does not grow as hidden size / (2 alpha), as the naive derivation has it",
    figure="text",
    criterion=(
        f"Over at least {MIN_SLOPE_MODELS} bases with both optima resolved, the slope of log ratio on log hidden size "
        f"is below the naive {NAIVE_SLOPE:g} by a margin of {SLOPE_MARGIN:g}. Its error is that of the fitted optima, "
        "drawn together, or else that from the scatter of the bases around the line, where this is larger. A base and "
        "models post-trained from it are one point, their mean"
    ),
    needs=MODELS,
    paper_value="fitted slope 0; naive: 1, with ratio hidden / 64",
    unit="slope",
    experiments=EXPERIMENTS,
    judge=across_models(naive_ratio_is_wrong),
    columns=COLUMNS,
)

CLAIMS = (B5, B6, B11)
