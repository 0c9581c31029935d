"""Claims B5, B6 and B11: the ratio of optimal learning rates across models."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lorabench.analysis.claims.claim import Claim
from lorabench.analysis.claims.models_shared import COLUMNS, EXPERIMENTS, MIN_MODELS, MODELS, across_models
from lorabench.analysis.finding import (
    Finding,
    Verdict,
    all_of,
    finding,
    interval_text,
    within,
)
from lorabench.analysis.lr_ratio import QUANTILES, RATIO_BAND, LrRatio
from lorabench.analysis.swept_models import SweptModel, run_ids

FLAT = 0.3
"""A slope against log hidden size, or an exponent's distance from the paper's, that counts as none."""


def _told(ratios: Sequence[tuple[SweptModel, LrRatio]]) -> str:
    """Each model's ratio in words, with what speaks against it."""
    ranks = sorted({model.lora["rank"] for model, _ in ratios})
    each = [
        f"{model.name} {ratio.short}" + (f" ({', '.join(ratio.problems)})" if ratio.problems else "")
        for model, ratio in ratios
    ]
    return f"LoRA {', '.join(f'r{rank}' for rank in ranks)} / FullFT: {', '.join(each)}"


def _slope(ratios: Sequence[tuple[SweptModel, LrRatio]]) -> tuple[float, tuple[float, float]]:
    """Slope of log ratio on log hidden size, and its 95% interval; NaN for fewer than 3 models or one size."""
    x = np.log([float(model.hidden_size) for model, _ in ratios])
    if len(x) < 3 or np.ptp(x) == 0:
        return math.nan, (math.nan, math.nan)
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    slope = float(weights @ np.log([ratio.estimate for _, ratio in ratios]))
    low, high = np.quantile(weights @ np.log([ratio.draws for _, ratio in ratios]), QUANTILES).tolist()
    return slope, (low, high)


def _slope_text(slope: float, interval: tuple[float, float]) -> str:
    if math.isnan(slope):
        return "no slope against hidden size"
    return f"slope of log ratio on log hidden size {slope:.2f} {interval_text(*interval, 2)}"


def ratio_independent_of_model(models: list[SweptModel]) -> Finding:
    """B5: each model's LR ratio against the band, and their slope against hidden size."""
    ratios = [(model, model.ratio) for model in models]
    resolved = [(model, ratio) for model, ratio in ratios if not ratio.problems]
    verdicts: list[Verdict] = [within(*ratio.interval, RATIO_BAND) for _, ratio in resolved]
    verdicts += ["inconclusive"] * (len(ratios) - len(resolved))
    slope, interval = _slope(resolved)
    verdicts.append(within(*interval, (-FLAT, FLAT)))
    furthest_model, furthest = max(
        resolved or ratios, key=lambda pair: np.nan_to_num(abs(math.log(pair[1].estimate / 10.0)), nan=-1.0)
    )
    estimates = [ratio.estimate for _, ratio in resolved]
    spread = f", largest / smallest {max(estimates) / min(estimates):.2f}" if len(estimates) > 1 else ""
    text = f"furthest from 10: {furthest_model.name}; {_told(ratios)}{spread}; {_slope_text(slope, interval)}"
    problems = []
    if len(models) < MIN_MODELS:
        problems.append(f"{len(models)} models, {MIN_MODELS} needed")
    if len({(model.lineage, model.hidden_size) for model in models}) < 2:
        problems.append("all of one family and size")
    strain = abs(math.log(furthest.estimate / 10.0))
    return finding(run_ids(models), text, all_of(verdicts), problems, furthest.estimate, furthest.interval, strain)


B5 = Claim(
    id="B5",
    kind="empirical",
    statement="The ratio of optimal LRs does not depend on the base model",
    figure="text",
    criterion=(
        "Over at least 4 models, of several families or sizes, on the same data, batch size and length, at the "
        "highest rank that all have: the 95% interval of every ratio lies within 6 to 16, and that of the slope "
        "of log ratio on log hidden size within -0.3 to 0.3 (bootstrap of the optima). Contradicted if one "
        "interval lies wholly outside. The estimate is the resolved ratio furthest from 10"
    ),
    needs=MODELS,
    paper_value="the same for 14 models; fitted slope 0",
    unit="ratio",
    experiments=EXPERIMENTS,
    judge=across_models(ratio_independent_of_model),
    columns=COLUMNS,
)


def models_swept(models: list[SweptModel]) -> Finding:
    """B11: how many models have both optima resolved, with B5's verdict on them."""
    count = sum(not model.ratio.problems for model in models)
    found = ratio_independent_of_model(models)
    enough = count >= MIN_MODELS
    text = f"{count} of {len(models)} models with both optima resolved; as B5 {found.verdict}: {found.reason}"
    return finding(found.run_ids, text, found.verdict if enough else "inconclusive", [], float(count), strain=-count)


B11 = Claim(
    id="B11",
    kind="empirical",
    statement="The LR ratio is found by sweeps of many models",
    figure="text",
    criterion=(
        "At least 4 models have resolved optima with both methods on the same data; the verdict is then that of "
        "B5, since a count alone says nothing"
    ),
    needs=MODELS,
    paper_value="14 models",
    unit="models",
    experiments=EXPERIMENTS,
    judge=across_models(models_swept),
    columns=COLUMNS,
)


def naive_ratio_is_wrong(models: list[SweptModel]) -> Finding:
    """B6: slope of log LR ratio on log hidden size, which the naive derivation says is 1."""
    ratios = [(model, model.ratio) for model in models]
    resolved = [(model, ratio) for model, ratio in ratios if not ratio.problems]
    slope, (low, high) = _slope(resolved)
    naive = ", ".join(f"{model.name} {model.hidden_size / 64:.3g}" for model in models)
    text = f"{_slope_text(slope, (low, high))}; {_told(ratios)}; hidden/64 would be {naive}"
    problems = []
    if len(resolved) < 3:
        problems.append(f"{len(resolved)} models with both optima resolved, 3 needed")
    elif math.isnan(slope):
        problems.append("all of one hidden size")
    verdict: Verdict = "inconclusive"
    if high < 1:
        verdict = "confirmed"
    elif low > 1 or 1 - FLAT <= low <= high <= 1 + FLAT:
        verdict = "contradicted"
    return finding(run_ids(models), text, verdict, problems, slope, (low, high), slope)


B6 = Claim(
    id="B6",
    kind="theory",
    statement="The ratio of optimal LRs does not grow as hidden size / (2 alpha), the naive derivation",
    figure="text",
    criterion=(
        "The 95% interval of the slope of log ratio on log hidden size is below 1, over at least 3 models with "
        "both optima resolved (bootstrap of the optima). Contradicted if it is above 1, or holds 1 and lies "
        "within 0.7 to 1.3"
    ),
    needs=MODELS,
    paper_value="fitted slope 0; naive: 1, with ratio hidden / 64",
    unit="slope",
    experiments=EXPERIMENTS,
    judge=across_models(naive_ratio_is_wrong),
    columns=COLUMNS,
)


CLAIMS = (
    B5,
    B6,
    B11,
)
