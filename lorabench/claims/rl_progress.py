"""Claims F3 to F5: train rewards, further problem sets and response lengths during reinforcement learning (RL)."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pandas as pd

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Arm, Comparison
from lorabench.analysis.finding import (
    MAX_ERROR_MARGIN,
    SIGMAS,
    Finding,
    UnjudgedError,
    all_of,
    error_equality_problems,
    finding,
    noise_problems,
    sigma_text,
    within,
)
from lorabench.analysis.gaps import mean_interval
from lorabench.analysis.student import t_quantile
from lorabench.claims.claim import Claim
from lorabench.claims.evidence import judge_each
from lorabench.claims.rl_shared import (
    DEEPMATH_EXPERIMENTS,
    LEARNED,
    MIN_CHAIN,
    RL_RUNS,
    at_best,
    difference,
    each_rank,
    over_problems,
    pair_problems,
    tenths,
)
from lorabench.utils.formats import fixed_interval

LENGTH_BAND = (0.8, 1.25)
"""The ratios of two response lengths that count as the same."""

MAX_TRUNCATED = 0.1
"""The share of responses cut off above which their mean length says more about the limit than about them."""

_OWN_SPLITS = ("train", "validation", "test")

# The quantile of the normal distribution for a 95% interval.
_Z = 1.96


def _pooled(tables: list[pd.DataFrame]) -> tuple[float, int]:
    """Compute the standard deviation over seeds, pooled over tables and columns, and its degrees of freedom.

    Columns of one seed are not independent, so the degrees of freedom count seeds alone.
    """
    repeated = [table for table in tables if len(table) > 1 and table.shape[1]]
    dof = sum(len(table) - 1 for table in repeated)
    squares = sum((len(table) - 1) * float(table.var().mean()) for table in repeated)
    return (math.sqrt(squares / dof) if dof else math.nan), dof


def same_progress(comparison: Comparison) -> Finding:
    """F3: judge the mean train reward of each LoRA rank minus FullFT's, in each tenth of the steps after the first."""
    rewards = {
        arm_label(arm): tenths(comparison, arm, "reward").drop(columns=1, errors="ignore") for arm in comparison.arms
    }
    sigma, dof = _pooled(list(rewards.values()))

    def judge(lora: Arm, fullft: Arm) -> Finding:
        gaps = difference(rewards[arm_label(lora)], rewards[arm_label(fullft)])
        if gaps.empty:
            raise UnjudgedError("not tested", "no train rewards at steps that FullFT has too")
        tenth = gaps.columns[int(gaps.mean().abs().argmax())]
        estimate, n = float(gaps[tenth].mean()), len(gaps)
        # The tenths of one run are not independent: they steady the spread but add no degrees of freedom.
        half = t_quantile(n - 1) * math.sqrt(gaps.var().mean() / n) if n > 1 else math.nan
        interval = (estimate - half, estimate + half)
        margin = SIGMAS * sigma
        verdict = within(*interval, (-margin, margin))
        text = (
            f"mean train reward - FullFT's is furthest off in tenth {tenth} of the steps: {estimate:+.4f} "
            f"{fixed_interval(*interval, 4)} over {n} seeds, {sigma_text(sigma)}"
        )
        problems = noise_problems(sigma, dof) + error_equality_problems(verdict, margin)
        problems += pair_problems(comparison, lora, fullft, n)
        run_ids = comparison.of([lora, fullft])["run_id"]
        return finding(run_ids, text, verdict, problems, estimate, interval, abs(estimate))

    return each_rank(comparison, judge, lambda lora, fullft: [fullft])


F3 = Claim(
    id="F3",
    kind="empirical",
    statement="In RL on DeepMath, all ranks and full fine-tuning progress alike",
    figure="7",
    criterion=(
        "Train rewards at the best LRs are averaged over tenths of the steps and paired by seed. For every LoRA rank, "
        "in the tenth after the first where it is furthest from FullFT, the 95% interval of the difference lies "
        f"within {SIGMAS} sigma, the seed noise of such a mean, which must be at most {MAX_ERROR_MARGIN:g}. "
        f"{LEARNED.format('FullFT')}"
    ),
    needs=RL_RUNS.format("LoRA") + ", with train rewards",
    paper_value="almost identical; no number",
    unit="accuracy",
    experiments=DEEPMATH_EXPERIMENTS,
    judge=over_problems(same_progress),
    columns=("base_reward",),
    task="rl",
)


def _first_and_last(comparison: Comparison, arm: Arm, split: str, metric: str) -> pd.DataFrame:
    """Return a metric before training (`first`) and at its end (`last`), by seed at an arm's best LR."""
    points = at_best(comparison, arm, split, metric)
    steps = {"first": 0, "last": points["step"].max()}
    return pd.DataFrame(
        {name: points[points["step"] == step].set_index("seed")["value"] for name, step in steps.items()}
    )


def _follows(comparison: Comparison, name: str, lora: Arm, fullft: Arm) -> Finding:
    """Judge F4 for one further set and one rank."""
    accuracy = {arm["method"]: _first_and_last(comparison, arm, name, "accuracy") for arm in (lora, fullft)}
    samples = _first_and_last(comparison, fullft, name, "n_samples")["last"].min()
    gaps = difference(accuracy["lora"][["last"]], accuracy["fullft"][["last"]])
    first, last = accuracy["fullft"].mean()[["first", "last"]]
    if gaps.empty or math.isnan(first):
        raise UnjudgedError("inconclusive", "no accuracies of both before and after training")
    estimate, low, high = mean_interval(gaps["last"])
    mean = (last + float(accuracy["lora"]["last"].mean())) / 2
    margin = _Z * math.sqrt(2 * mean * (1 - mean) / samples) if samples > 0 else math.nan
    verdict = within(low, high, (-margin, margin))
    text = (
        f"accuracy - FullFT's = {estimate:+.4f} {fixed_interval(low, high, 4)} over {len(gaps)} seeds, FullFT "
        f"{first:.3f} before and {last:.3f} after training"
    )
    problems = pair_problems(comparison, lora, fullft, len(gaps)) + error_equality_problems(verdict, margin)
    if math.isnan(margin):
        problems.append("number of samples not known")
    else:
        text += f", binomial margin {margin:.3f} of {samples:.0f} samples"
        problems += ["accuracies of 0 or 1 leave no margin"] if margin == 0 else []
    if not last - first > margin:
        problems.append("FullFT got no better on it")
    run_ids = comparison.of([lora, fullft])["run_id"]
    return finding(run_ids, text, verdict, problems, estimate, (low, high), abs(estimate))


def further_sets_follow(comparison: Comparison) -> Finding:
    """F4: judge the final accuracy of each LoRA rank minus FullFT's on AIME, or else on other further sets."""
    curves = comparison.curves
    if not curves.empty:
        curves = curves[curves["run_id"].isin(comparison.runs["run_id"]) & curves["metric"].eq("accuracy")]
    names = [] if curves.empty else sorted(set(curves["split"]) - set(_OWN_SPLITS))
    aime = [name for name in names if name.lower().startswith("aime")]
    if not names:
        raise UnjudgedError("not tested", "no accuracies on further problem sets")
    judged = judge_each(
        (name, partial(each_rank, comparison, partial(_follows, comparison, name), lambda lora, fullft: []))
        for name in aime or names
    )
    return judged if aime else replace(judged, reason=f"{judged.reason}; no AIME problems, these stand for them")


F4 = Claim(
    id="F4",
    kind="empirical",
    statement="Held-out AIME 2024 and 2025 problems show the same as DeepMath",
    figure="8",
    criterion=(
        "On every AIME set, or on every other further set where there is no AIME set, for every LoRA rank: the 95% "
        "interval of its final accuracy minus FullFT's, paired by seed, lies within the 95% binomial interval of a "
        f"difference of two runs, which must be at most {MAX_ERROR_MARGIN:g}. Inconclusive where FullFT's own accuracy "
        "does not rise by more than that"
    ),
    needs=RL_RUNS.format("LoRA") + "; evaluated on AIME 2024 and 2025, or another further set, from step 0 on",
    paper_value="no number",
    unit="accuracy",
    experiments=DEEPMATH_EXPERIMENTS,
    judge=over_problems(further_sets_follow),
    task="rl",
)


def _geometric_mean(ratios: pd.Series[float]) -> tuple[float, float, float]:
    """Compute the geometric mean over seeds and its 95% t interval."""
    mean, low, high = mean_interval(ratios.map(math.log))
    return math.exp(mean), math.exp(low), math.exp(high)


def _ratio_text(ratio: tuple[float, float, float]) -> str:
    return f"{ratio[0]:.2f} {fixed_interval(*ratio[1:], 2)}"


def _reflection(comparison: Comparison, arm: Arm) -> str:
    shares = tenths(comparison, arm, "reflection").reindex(columns=[1, 10]).mean()
    if shares.isna().any():
        return ""
    return f"; {arm_label(arm)}: {shares[1]:.1%} of responses go back or check at first, {shares[10]:.1%} at last"


def same_growth_of_responses(comparison: Comparison) -> Finding:
    """F5: judge the mean length of the last train responses over FullFT's, and over that of the first ones."""
    lengths = {arm_label(arm): tenths(comparison, arm, "response_length") for arm in comparison.arms}

    def judge(lora: Arm, fullft: Arm) -> Finding:
        # Empty responses have no ratio of lengths, so they count as one token.
        both = [lengths[arm_label(arm)].reindex(columns=[1, 10]).dropna().clip(lower=1) for arm in (lora, fullft)]
        if any(table.empty for table in both):
            raise UnjudgedError("not tested", "no response lengths of both at the start and the end of training")
        final = max(float(table[10].mean()) for table in both)
        if final < MIN_CHAIN:
            raise UnjudgedError(
                "not tested", f"responses of {final:.0f} tokens at most hold no chain of thought ({MIN_CHAIN} needed)"
            )
        ratios = (both[0][10] / both[1][10]).dropna()
        ratio, *growths = map(_geometric_mean, (ratios, *(table[10] / table[1] for table in both)))
        text = f"final length / FullFT's = {_ratio_text(ratio)} over {len(ratios)} seeds"
        text += f", grown by {_ratio_text(growths[0])}, FullFT by {_ratio_text(growths[1])}"
        problems = pair_problems(comparison, lora, fullft, len(ratios))
        for arm in (lora, fullft):
            text += _reflection(comparison, arm)
            truncated = float(tenths(comparison, arm, "truncated").reindex(columns=[10])[10].mean())
            if truncated > MAX_TRUNCATED:
                problems.append(f"{arm_label(arm)}: {truncated:.0%} of its last responses cut off")
        parts = [within(*ratio[1:], LENGTH_BAND), *(within(*growth[1:], (1.0, math.inf)) for growth in growths)]
        run_ids = comparison.of([lora, fullft])["run_id"]
        return finding(run_ids, text, all_of(parts), problems, ratio[0], ratio[1:], abs(math.log(ratio[0])))

    return each_rank(comparison, judge, lambda lora, fullft: [fullft])


F5 = Claim(
    id="F5",
    kind="empirical",
    statement="In RL, chains of thought grow the same way in LoRA and full fine-tuning",
    figure="8",
    criterion=(
        "The measure is the mean length of train responses at the best LRs, paired by seed. For every LoRA rank, the "
        f"95% interval of the mean length in the last tenth of the steps over FullFT's lies within {LENGTH_BAND[0]:g} "
        f"to {LENGTH_BAND[1]:g}, and the intervals of both over their own first tenth lie above 1. Not tested where "
        f"the last responses are shorter than {MIN_CHAIN} tokens; inconclusive where more than {MAX_TRUNCATED:.0%} of "
        f"them are cut off. {LEARNED.format('FullFT')}. Words of backtracking and checking are reported, not judged"
    ),
    needs=RL_RUNS.format("LoRA") + ", with response lengths",
    paper_value="no number",
    unit="ratio",
    experiments=DEEPMATH_EXPERIMENTS,
    judge=over_problems(same_growth_of_responses),
    columns=("base_reward",),
    task="rl",
)

CLAIMS = (F3, F4, F5)
