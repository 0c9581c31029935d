"""Claims B5, B6 and B11: the ratio of optimal learning rates across models."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lorabench.analysis.arms import STANDARD
from lorabench.analysis.finding import Finding, Verdict, all_of, finding, within
from lorabench.analysis.lr_ratio import PAPER_RATIO, QUANTILES, RATIO_BAND, LrRatio
from lorabench.analysis.swept_models import SweptModel, run_ids
from lorabench.claims.across_models import COLUMNS, EXPERIMENTS, MIN_MODELS, MODELS, across_models
from lorabench.claims.claim import Claim
from lorabench.utils.formats import fixed_interval

FLAT = 0.3
"""The slope of log ratio on log hidden size, or its distance from another slope, up to which it counts as none."""

NAIVE_SLOPE = 1.0
"""The slope of log ratio on log hidden size in the naive derivation: the ratio is hidden size / (2 alpha)."""

NAIVE_DIVISOR = 2 * STANDARD["alpha"]
"""The divisor of the hidden size in the naive derivation."""

MIN_SLOPE_MODELS = 3
"""The number of models that a slope needs."""


def _ratios_text(ratios: Sequence[tuple[SweptModel, LrRatio]]) -> str:
    """Format each model's ratio with what speaks against it."""
    ranks = sorted({model.lora["rank"] for model, _ in ratios})
    each = [
        f"{model.name} {ratio.short}" + (f" ({', '.join(ratio.problems)})" if ratio.problems else "")
        for model, ratio in ratios
    ]
    return f"LoRA {', '.join(f'r{rank}' for rank in ranks)} / FullFT: {', '.join(each)}"


def _slope(ratios: Sequence[tuple[SweptModel, LrRatio]]) -> tuple[float, tuple[float, float]]:
    """Return the slope of log ratio on log hidden size with its 95% interval; NaN for too few models or one size."""
    x = np.log([float(model.hidden_size) for model, _ in ratios])
    if len(x) < MIN_SLOPE_MODELS or np.ptp(x) == 0:
        return math.nan, (math.nan, math.nan)
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    slope = float(weights @ np.log([ratio.estimate for _, ratio in ratios]))
    low, high = np.quantile(weights @ np.log([ratio.draws for _, ratio in ratios]), QUANTILES).tolist()
    return slope, (low, high)


def _slope_text(slope: float, interval: tuple[float, float]) -> str:
    if math.isnan(slope):
        return "no slope against hidden size"
    return f"slope of log ratio on log hidden size {slope:.2f} {fixed_interval(*interval, 2)}"


def _distance(ratio: LrRatio) -> float:
    """Return the distance of a ratio from the paper's, as a log."""
    return abs(math.log(ratio.estimate / PAPER_RATIO))


def ratio_independent_of_model(models: list[SweptModel]) -> Finding:
    """B5: judge each model's LR ratio, and their slope against hidden size."""
    ratios = [(model, model.ratio) for model in models]
    resolved = [(model, ratio) for model, ratio in ratios if not ratio.problems]
    verdicts: list[Verdict] = [within(*ratio.interval, RATIO_BAND) for _, ratio in resolved]
    verdicts += ["inconclusive"] * (len(ratios) - len(resolved))
    slope, interval = _slope(resolved)
    verdicts.append(within(*interval, (-FLAT, FLAT)))
    furthest_model, furthest = max(resolved or ratios, key=lambda pair: np.nan_to_num(_distance(pair[1]), nan=-1.0))
    estimates = [ratio.estimate for _, ratio in resolved]
    spread = f", largest / smallest {max(estimates) / min(estimates):.2f}" if len(estimates) > 1 else ""
    text = (
        f"furthest from {PAPER_RATIO:g}: {furthest_model.name}; {_ratios_text(ratios)}{spread}; "
        f"{_slope_text(slope, interval)}"
    )
    problems = []
    if len(models) < MIN_MODELS:
        problems.append(f"{len(models)} models, {MIN_MODELS} needed")
    if len({(model.lineage, model.hidden_size) for model in models}) < 2:
        problems.append("all of one family and size")
    strain = _distance(furthest)
    return finding(run_ids(models), text, all_of(verdicts), problems, furthest.estimate, furthest.interval, strain)


B5 = Claim(
    id="B5",
    kind="empirical",
    statement="The ratio of optimal LRs does not depend on the base model",
    figure="text",
    criterion=(
        f"Over at least {MIN_MODELS} models of several families or sizes, on the same data, batch size and length, at "
        f"the highest rank that all have: the 95% interval of every ratio lies within {RATIO_BAND[0]:g} to "
        f"{RATIO_BAND[1]:g}, and the interval of the slope of log ratio on log hidden size within -{FLAT:g} to "
        f"{FLAT:g} (bootstrap of the optima). Contradicted if one interval lies wholly outside. The estimate is the "
        f"resolved ratio furthest from {PAPER_RATIO:g}"
    ),
    needs=MODELS,
    paper_value="the same for 14 models; fitted slope 0",
    unit="ratio",
    experiments=EXPERIMENTS,
    judge=across_models(ratio_independent_of_model),
    columns=COLUMNS,
)


def models_swept(models: list[SweptModel]) -> Finding:
    """B11: count the models that have both optima resolved; the verdict is that of B5 on them."""
    count = sum(not model.ratio.problems for model in models)
    judged = ratio_independent_of_model(models)
    enough = count >= MIN_MODELS
    text = f"{count} of {len(models)} models with both optima resolved; as B5 {judged.verdict}: {judged.reason}"
    return finding(judged.run_ids, text, judged.verdict if enough else "inconclusive", [], float(count), strain=-count)


B11 = Claim(
    id="B11",
    kind="empirical",
    statement="The ratio of optimal LRs can be determined by sweeps of many models",
    figure="text",
    criterion=(
        f"At least {MIN_MODELS} models have resolved optima with both methods on the same data; the verdict is then "
        "that of B5, since a count alone supports nothing"
    ),
    needs=MODELS,
    paper_value="14 models",
    unit="models",
    experiments=EXPERIMENTS,
    judge=across_models(models_swept),
    columns=COLUMNS,
)


def naive_ratio_is_wrong(models: list[SweptModel]) -> Finding:
    """B6: judge the slope of log LR ratio on log hidden size against that of the naive derivation."""
    ratios = [(model, model.ratio) for model in models]
    resolved = [(model, ratio) for model, ratio in ratios if not ratio.problems]
    slope, (low, high) = _slope(resolved)
    naive = ", ".join(f"{model.name} {model.hidden_size / NAIVE_DIVISOR:.3g}" for model in models)
    text = f"{_slope_text(slope, (low, high))}; {_ratios_text(ratios)}; hidden/{NAIVE_DIVISOR:g} would be {naive}"
    problems = []
    if len(resolved) < MIN_SLOPE_MODELS:
        problems.append(f"{len(resolved)} models with both optima resolved, {MIN_SLOPE_MODELS} needed")
    elif math.isnan(slope):
        problems.append("all of one hidden size")
    verdict: Verdict = "inconclusive"
    if high < NAIVE_SLOPE:
        verdict = "confirmed"
    elif low > NAIVE_SLOPE or NAIVE_SLOPE - FLAT <= low <= high <= NAIVE_SLOPE + FLAT:
        verdict = "contradicted"
    return finding(run_ids(models), text, verdict, problems, slope, (low, high), slope)


B6 = Claim(
    id="B6",
    kind="theory",
    statement="The ratio of optimal LRs does not grow as hidden size / (2 alpha), as the naive derivation has it",
    figure="text",
    criterion=(
        f"Over at least {MIN_SLOPE_MODELS} models with both optima resolved, the 95% interval of the slope of log "
        f"ratio on log hidden size is below {NAIVE_SLOPE:g} (bootstrap of the optima). Contradicted if it is above "
        f"{NAIVE_SLOPE:g}, or includes {NAIVE_SLOPE:g} and lies within {NAIVE_SLOPE - FLAT:g} to {NAIVE_SLOPE + FLAT:g}"
    ),
    needs=MODELS,
    paper_value="fitted slope 0; naive: 1, with ratio hidden / 64",
    unit="slope",
    experiments=EXPERIMENTS,
    judge=across_models(naive_ratio_is_wrong),
    columns=COLUMNS,
)

CLAIMS = (B5, B6, B11)
