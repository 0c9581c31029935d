"""Claims on reinforcement learning: B10, E5 and F.

Two final accuracies are compared as error rates, 1 - accuracy (see `lorabench.analysis.rewards`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import entr

from lorabench.analysis.arms import arm_label, is_rl
from lorabench.analysis.claims.claim import Claim, untestable
from lorabench.analysis.claims.evidence import (
    NEEDED_BY,
    Arm,
    Comparison,
    Evidence,
    comparisons,
    judge_each,
    require,
)
from lorabench.analysis.claims.finding import (
    MAX_ERROR_MARGIN,
    MIN_SEEDS,
    Finding,
    UnjudgedError,
    Verdict,
    error_equality_problems,
    finding,
    interval_text,
    noise_problems,
    sigma_text,
    together,
    within,
)
from lorabench.analysis.claims.learning_rate import all_of, judge_ratio
from lorabench.analysis.claims.placement import both_parts
from lorabench.analysis.gaps import mean_interval
from lorabench.analysis.memorisation import description_lengths, is_memorisation
from lorabench.analysis.rewards import TestReward, band_draws, errors, good_bands, points_of
from lorabench.analysis.student import t_quantile

LR_BAND = (5.0, 20.0)
"""LR ratios that count as the paper's 10 in RL: within a factor of 2."""

LENGTH_BAND = (0.8, 1.25)
"""Ratios of two response lengths that count as the same."""

BITS_BAND = (100.0, 10_000.0)
"""Ratios that count as about 1,000."""

MIN_CHAIN = 100
"""Tokens of a mean response from which on it may hold a chain of thought; shorter ones are bare answers."""

MAX_TRUNCATED = 0.1
"""Share of responses cut off above which their mean length is that of the limit."""

MAX_OPEN = 0.025
"""Share of draws in which a range of good LRs may reach its grid's edge and still count as closed."""

MATH_BITS = 10_000 * 32
"""What RL on MATH can teach at 1 bit per episode: problems times samples of each."""

_OWN_SPLITS = ("train", "validation", "test")
_FIRST_EPOCH = ("first_epoch_nats", "first_epoch_scored_tokens")


def over_problems(
    judge: Callable[[Comparison], Finding], test_reward: TestReward = "final_reward"
) -> Callable[[Evidence], Finding]:
    """Judge each model and problem set by itself, on error rates; the worst finding decides.

    A set that no run ever got a reward on says nothing but what F7 is about.
    """

    def over_rewarded(evidence: Evidence) -> Finding:
        rewarded = rewarded_errors(evidence.standard, test_reward)
        if rewarded.empty:
            raise UnjudgedError("not tested", "no run ever got a reward")
        return judge_each(
            (comparison.label, partial(judge, comparison)) for comparison in comparisons(rewarded, evidence.curves)
        )

    return over_rewarded


def rewarded_errors(runs: pd.DataFrame, test_reward: TestReward = "final_reward") -> pd.DataFrame:
    """RL runs as from `errors`, of the models and problem sets on which any run ever got a reward."""
    rewarded = runs["status"].ne("unrewarded").groupby([runs["model"], runs["dataset"]]).transform("any")
    return errors(runs[rewarded.astype(bool)], test_reward)


def lr_ratio_ten_in_rl(comparison: Comparison) -> Finding:
    """B10: optimal LR of the highest rank over that of FullFT."""
    lora, fullft = require(("LoRA above rank 1", comparison.highest), ("FullFT", comparison.fullft))
    found = judge_ratio(comparison, lora, fullft, band=LR_BAND, expected=10.0)
    return if_learned(comparison, found, [lora, fullft])


def placement_in_rl(comparison: Comparison) -> Finding:
    """E5: attention is worse, and the MLP alone is as good as all layers."""
    return if_learned(comparison, both_parts(comparison), list(comparison.placed("mlp").values()))


def rank_1_reaches_the_peak(comparison: Comparison) -> Finding:
    """F1: error rate of rank 1 minus FullFT's; that rank 1 is better speaks for it."""
    rank_1, fullft = require(("LoRA r1", comparison.lora.get(1)), ("FullFT", comparison.fullft))
    found = comparison.equal_losses(rank_1, fullft, better_too=True)
    return if_learned(comparison, found, [fullft])


def wider_range_of_lrs(comparison: Comparison) -> Finding:
    """F2: width of the range of good LRs of each LoRA rank minus that of FullFT."""
    bands = {arm_label(row): row for _, row in good_bands(comparison.runs).iterrows()}
    return _each_rank(comparison, partial(_wider, comparison, bands), lambda lora, fullft: [lora, fullft])


def _wider(comparison: Comparison, of_arm: dict[str, pd.Series[Any]], lora: Arm, fullft: Arm) -> Finding:
    """F2 for one rank."""
    arms = [lora, fullft]
    bands = [of_arm[arm_label(arm)] for arm in arms]
    draws = [band_draws(comparison.rows[arm_label(arm)], comparison.noise) for arm in arms]
    estimate, step = float(bands[0]["width"] - bands[1]["width"]), max(float(band["step"]) for band in bands)
    if math.isnan(estimate):
        raise UnjudgedError("inconclusive", "no accuracies above 0 of both")
    low, high = np.quantile(draws[0].widths - draws[1].widths, [0.025, 0.975]).tolist()
    verdict: Verdict = "inconclusive"
    if abs(estimate) > step and (low > 0 or high < 0):
        verdict = "confirmed" if low > 0 else "contradicted"
    sigma, dof = comparison.sigma("test")
    text = (
        f"{_range(bands[0])} - FullFT's {_range(bands[1])} = {estimate:.2f} {interval_text(low, high, 2)} decades of "
        f"good LRs, of grids {step:.2f} apart, {sigma_text(sigma)}"
    )
    problems = noise_problems(sigma, dof) + comparison.edge_problems(arms)
    # The wider range may go on beyond its grid, the narrower not.
    open_share = {"confirmed": draws[1], "contradicted": draws[0]}
    if verdict != "inconclusive" and open_share[verdict].open.mean() > MAX_OPEN:
        problems.append("the narrower range may go on beyond its grid")
    return finding(comparison.of(arms)["run_id"], text, verdict, problems, estimate, (low, high), -estimate)


def _range(band: pd.Series[Any]) -> str:
    """A range of good LRs in words."""
    at_least = "at least " if band["open_low"] or band["open_high"] else ""
    return f"{at_least}{band['width']:.2f} ({band['lr_low']:.2g} to {band['lr_high']:.2g})"


def same_progress(comparison: Comparison) -> Finding:
    """F3: mean train reward of each LoRA rank minus FullFT's, in each tenth of the steps after the first."""
    rewards = {
        arm_label(arm): _tenths(comparison, arm, "reward").drop(columns=1, errors="ignore") for arm in comparison.arms
    }
    sigma, dof = _pooled(list(rewards.values()))

    def judge(lora: Arm, fullft: Arm) -> Finding:
        gaps = _difference(rewards[arm_label(lora)], rewards[arm_label(fullft)])
        if gaps.empty:
            raise UnjudgedError("not tested", "no train rewards at steps that FullFT has too")
        tenth = gaps.columns[int(gaps.mean().abs().argmax())]
        estimate, n = float(gaps[tenth].mean()), len(gaps)
        # The tenths of one run go together: they give a steadier spread, but no degrees of freedom.
        half = t_quantile(n - 1) * math.sqrt(gaps.var().mean() / n) if n > 1 else math.nan
        interval = (estimate - half, estimate + half)
        verdict = within(*interval, (-2 * sigma, 2 * sigma))
        text = (
            f"mean train reward - FullFT's is furthest off in tenth {tenth} of the steps: {estimate:+.4f} "
            f"{interval_text(*interval, 4)} over {n} seeds, {sigma_text(sigma)}"
        )
        problems = noise_problems(sigma, dof) + error_equality_problems(verdict, 2 * sigma)
        problems += _pair_problems(comparison, lora, fullft, n)
        run_ids = comparison.of([lora, fullft])["run_id"]
        return finding(run_ids, text, verdict, problems, estimate, interval, abs(estimate))

    return _each_rank(comparison, judge, lambda lora, fullft: [fullft])


def _at_best(comparison: Comparison, arm: Arm, split: str, metric: str) -> pd.DataFrame:
    """A measure over training at an arm's best LR: seed, step and value."""
    best = comparison.losses[arm_label(arm)]
    points = points_of(comparison.curves, split, metric)
    points = points[points["run_id"].isin(best["run_ids"])]
    return points.assign(seed=points["run_id"].map(dict(zip(best["run_ids"], best["seeds"], strict=True))))


def _tenths(comparison: Comparison, arm: Arm, metric: str) -> pd.DataFrame:
    """Means of a train metric at an arm's best LR: a row per seed, a column (1 to 10) per tenth of the steps."""
    points = _at_best(comparison, arm, "train", metric)
    points = points[points["step"] > 0]
    last = arm["steps"] or points["step"].max()
    tenths = np.ceil(10 * points["step"].astype(float) / last).clip(1, 10).astype(int).rename("tenth")
    return points.groupby(["seed", tenths])["value"].mean().unstack()


def _difference(table: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """One table of seeds minus another, of the seeds that both have in full."""
    found: pd.DataFrame = (table - other).dropna()
    return found


def _pooled(tables: list[pd.DataFrame]) -> tuple[float, int]:
    """Standard deviation over seeds, pooled over tables and their columns; degrees of freedom of the seeds alone."""
    repeated = [table for table in tables if len(table) > 1 and table.shape[1]]
    dof = sum(len(table) - 1 for table in repeated)
    squares = sum((len(table) - 1) * float(table.var().mean()) for table in repeated)
    return (math.sqrt(squares / dof) if dof else math.nan), dof


def further_sets_follow(comparison: Comparison) -> Finding:
    """F4: final accuracy of each LoRA rank minus FullFT's on further problem sets: on AIME if there."""
    curves = comparison.curves
    if not curves.empty:
        curves = curves[curves["run_id"].isin(comparison.runs["run_id"]) & curves["metric"].eq("accuracy")]
    names = [] if curves.empty else sorted(set(curves["split"]) - set(_OWN_SPLITS))
    aime = [name for name in names if name.lower().startswith("aime")]
    if not names:
        raise UnjudgedError("not tested", "no accuracies on further problem sets")
    found = judge_each(
        (name, partial(_each_rank, comparison, partial(_follows, comparison, name), lambda lora, fullft: []))
        for name in aime or names
    )
    return found if aime else replace(found, reason=f"{found.reason}; no AIME problems, these stand for them")


def _follows(comparison: Comparison, name: str, lora: Arm, fullft: Arm) -> Finding:
    """F4 for one further set and one rank."""
    accuracy = {arm["method"]: _first_and_last(comparison, arm, name, "accuracy") for arm in (lora, fullft)}
    samples = _first_and_last(comparison, fullft, name, "n_samples")["last"].min()
    gaps = _difference(accuracy["lora"][["last"]], accuracy["fullft"][["last"]])
    first, last = accuracy["fullft"].mean()[["first", "last"]]
    if gaps.empty or math.isnan(first):
        raise UnjudgedError("inconclusive", "no accuracies of both before and after training")
    estimate, low, high = mean_interval(gaps["last"])
    mean = (last + float(accuracy["lora"]["last"].mean())) / 2
    margin = 1.96 * math.sqrt(2 * mean * (1 - mean) / samples) if samples > 0 else math.nan
    verdict = within(low, high, (-margin, margin))
    text = (
        f"accuracy - FullFT's = {estimate:+.4f} {interval_text(low, high, 4)} over {len(gaps)} seeds, FullFT "
        f"{first:.3f} before and {last:.3f} after training"
    )
    problems = _pair_problems(comparison, lora, fullft, len(gaps)) + error_equality_problems(verdict, margin)
    if math.isnan(margin):
        problems.append("number of samples not known")
    else:
        text += f", binomial margin {margin:.3f} of {samples:.0f} samples"
        problems += ["accuracies of 0 or 1 leave no margin"] if margin == 0 else []
    if not last - first > margin:
        problems.append("FullFT got no better on it")
    run_ids = comparison.of([lora, fullft])["run_id"]
    return finding(run_ids, text, verdict, problems, estimate, (low, high), abs(estimate))


def _first_and_last(comparison: Comparison, arm: Arm, split: str, metric: str) -> pd.DataFrame:
    """A metric before training and at its end, `first` and `last`, by seed at an arm's best LR."""
    points = _at_best(comparison, arm, split, metric)
    steps = {"first": 0, "last": points["step"].max()}
    return pd.DataFrame(
        {name: points[points["step"] == step].set_index("seed")["value"] for name, step in steps.items()}
    )


def same_growth_of_responses(comparison: Comparison) -> Finding:
    """F5: mean length of train responses in the last tenth of the steps, over FullFT's and over the first tenth's."""
    lengths = {arm_label(arm): _tenths(comparison, arm, "response_length") for arm in comparison.arms}

    def judge(lora: Arm, fullft: Arm) -> Finding:
        # Responses of no tokens have no ratio to others: they count as one token.
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
        text = f"final length / FullFT's = {_told(ratio)} over {len(ratios)} seeds"
        text += f", grown by {_told(growths[0])}, FullFT by {_told(growths[1])}"
        problems = _pair_problems(comparison, lora, fullft, len(ratios))
        for arm in (lora, fullft):
            text += _reflection(comparison, arm)
            truncated = float(_tenths(comparison, arm, "truncated").reindex(columns=[10])[10].mean())
            if truncated > MAX_TRUNCATED:
                problems.append(f"{arm_label(arm)}: {truncated:.0%} of its last responses cut off")
        parts = [within(*ratio[1:], LENGTH_BAND), *(within(*growth[1:], (1.0, math.inf)) for growth in growths)]
        run_ids = comparison.of([lora, fullft])["run_id"]
        return finding(run_ids, text, all_of(parts), problems, ratio[0], ratio[1:], abs(math.log(ratio[0])))

    return _each_rank(comparison, judge, lambda lora, fullft: [fullft])


def _geometric_mean(ratios: pd.Series[float]) -> tuple[float, float, float]:
    """Geometric mean over seeds, and its 95% t interval."""
    mean, low, high = mean_interval(ratios.map(math.log))
    return math.exp(mean), math.exp(low), math.exp(high)


def _told(ratio: tuple[float, float, float]) -> str:
    return f"{ratio[0]:.2f} {interval_text(*ratio[1:], 2)}"


def _reflection(comparison: Comparison, arm: Arm) -> str:
    shares = _tenths(comparison, arm, "reflection").reindex(columns=[1, 10]).mean()
    if shares.isna().any():
        return ""
    return f"; {arm_label(arm)}: {shares[1]:.1%} of responses go back or check at first, {shares[10]:.1%} at last"


def _pair_problems(comparison: Comparison, lora: Arm, fullft: Arm, n_seeds: int) -> list[str]:
    """What speaks against a verdict on curves at two arms' best LRs, of which so many pairs of seeds are there."""
    problems = comparison.final_gap(lora, fullft)[3]
    return problems or ([f"curves of {n_seeds} paired seeds, {MIN_SEEDS} needed"] if n_seeds < MIN_SEEDS else [])


def _each_rank(
    comparison: Comparison, judge: Callable[[Arm, Arm], Finding], learners: Callable[[Arm, Arm], list[Arm]]
) -> Finding:
    """Judge every LoRA rank on all layers against FullFT; the worst finding decides.

    Args:
        comparison: of which the arms are.
        judge: given the LoRA arm and FullFT.
        learners: given the same, those that must have learned for a verdict.
    """
    fullft, _ = require(("FullFT", comparison.fullft), ("LoRA", next(iter(comparison.lora.values()), None)))

    def judge_one(lora: Arm) -> Finding:
        return if_learned(comparison, judge(lora, fullft), learners(lora, fullft))

    return judge_each((arm_label(lora), partial(judge_one, lora)) for lora in comparison.lora.values())


def if_learned(comparison: Comparison, found: Finding, arms: list[Arm]) -> Finding:
    """The finding with the accuracies of arms; inconclusive where one has not learned, as all are alike then."""
    if not arms:
        return found
    sigma = np.nan_to_num(comparison.sigma("test")[0])
    accuracy = {arm_label(arm): 1 - float(comparison.losses[arm_label(arm)]["loss_mean"]) for arm in arms}
    base = float(comparison.runs["base_reward"].astype(float).mean())
    if math.isnan(base):
        problems = ["accuracy of the base not known"]
    else:
        problems = [f"{label} has not learned" for label, value in accuracy.items() if not value - base > 2 * sigma]
    known = {label: value for label, value in (accuracy | {"base": base}).items() if not math.isnan(value)}
    told = ", ".join(f"{label} {value:.3f}" for label, value in known.items())
    reason = "; ".join([found.reason, *([f"test accuracy {told}"] if told else []), *problems])
    judged = found.verdict in ("confirmed", "contradicted")
    return replace(found, reason=reason, verdict="inconclusive" if judged and problems else found.verdict)


def equal_rewards_teach_nothing(evidence: Evidence) -> Finding:
    """F7: gradients of steps whose groups all have equal rewards, and accuracies of runs that have no other steps."""
    steps = _train_steps(evidence)
    equal = steps["equal_groups"] == 1
    never = _never_rewarded(evidence.runs, steps["equal_groups"])
    if not equal.any() and never.empty:
        raise UnjudgedError("not tested", "no step whose groups all have equal rewards")
    before_and_after = _before_and_after(evidence, never)
    changed = before_and_after["before"] != before_and_after["after"]
    largest = float(steps.loc[equal, "grad_norm"].max())
    learning = steps.loc[~equal, "grad_norm"] > 0
    told = [f"{learning.sum()} of {len(learning)} other steps have a gradient above 0"]
    problems = []
    if equal.any():
        told.insert(0, f"largest gradient of {equal.sum()} steps whose groups all have equal rewards: {largest:.3g}")
    else:
        problems.append("no step whose groups all have equal rewards has a gradient norm")
    if len(before_and_after):
        n_runs = before_and_after["run_id"].nunique()
        told.append(
            f"of {n_runs} runs without other steps {changed.sum()} of {len(before_and_after)} accuracies changed"
        )
    if not learning.any():
        problems.append("no step learns, so that gradients of 0 say nothing")
    verdict: Verdict = "confirmed"
    if largest > 0 or changed.any():
        # Whatever other steps do, these learned.
        verdict, problems = "contradicted", []
    run_ids = {*steps.index[equal].get_level_values("run_id"), *before_and_after["run_id"]}
    return finding(run_ids, "; ".join(told), verdict, problems, largest)


def _train_steps(evidence: Evidence) -> pd.DataFrame:
    """Share of groups with equal rewards and gradient norm of every train step, by run and step."""
    names = ["equal_groups", "grad_norm"]
    curves = evidence.curves
    if not curves.empty:
        curves = curves[curves["split"].eq("train") & curves["metric"].isin(names) & curves["value"].notna()]
    if curves.empty:
        return pd.DataFrame(columns=names, index=pd.MultiIndex.from_arrays([[], []], names=["run_id", "step"]))
    return curves.pivot(index=["run_id", "step"], columns="metric", values="value").reindex(columns=names).dropna()


def _never_rewarded(runs: pd.DataFrame, equal_groups: pd.Series[float]) -> pd.DataFrame:
    """Finished runs all of whose groups had equal rewards at every step."""
    least = runs["run_id"].map(equal_groups.groupby("run_id").min())
    finished = runs["status"].ne("diverged")
    return runs[runs["status"].eq("unrewarded") | (finished & least.eq(1).fillna(False))]


def _before_and_after(evidence: Evidence, runs: pd.DataFrame) -> pd.DataFrame:
    """Accuracies of the base and after training on the test and the validation split, where both are known."""
    curves = evidence.curves
    bases = pd.Series(dtype=float)
    if not curves.empty:
        start = curves["split"].eq("validation") & curves["metric"].eq("accuracy") & curves["step"].eq(0)
        bases = curves[start].set_index("run_id")["value"]
    pairs = [
        runs[["run_id"]].assign(before=runs["base_reward"], after=runs["final_reward"]),
        runs[["run_id"]].assign(before=runs["run_id"].map(bases), after=runs["final_valid_reward"]),
    ]
    return pd.concat(pairs).astype({"before": float, "after": float}).dropna()


def fewer_bits_per_token(evidence: Evidence) -> Finding:
    """F9: bits per token of SFT over the at most 1 bit per episode of RL by its tokens per episode."""
    sft = evidence.every_run[~is_rl(evidence.every_run)]
    if missing := [name for name in (*NEEDED_BY["sft"], *_FIRST_EPOCH) if name not in sft]:
        raise UnjudgedError("not tested", f"the runs table has no column {', '.join(missing)}")
    lengths = description_lengths(sft[~is_memorisation(sft)])
    return over_problems(partial(_bits, lengths))(evidence)


def _bits(lengths: pd.DataFrame, comparison: Comparison) -> Finding:
    """F9 for one model and problem set, against every dataset that the model was supervised on."""
    highest = next(reversed(comparison.lora.values()), None)
    [arm] = require(("FullFT or LoRA on all layers", comparison.fullft or highest))
    tokens = _tenths(comparison, arm, "response_length").mean(axis=1)
    if tokens.empty:
        raise UnjudgedError("not tested", "no response lengths")
    per_episode = mean_interval(tokens)
    told = f"{per_episode[0]:.3g} tokens per episode, {_entropy(comparison, arm)}"
    if per_episode[0] < MIN_CHAIN:
        raise UnjudgedError("not tested", f"{told}; the claim is about long responses, {MIN_CHAIN} tokens at least")
    found = []
    for row in lengths[lengths["model"] == arm["model"]].to_dict("records"):
        nats = [row["nats_per_token"], row["nats_low"], row["nats_high"]]
        # Ends times ends: wider than the interval of the product.
        ratio, low, high = (n / math.log(2) * t for n, t in zip(nats, per_episode, strict=True))
        bits = f"SFT on {row['dataset']} {nats[0] / math.log(2):.3g} bits per token"
        text = f"{bits}; ratio {ratio:.0f} {interval_text(low, high, 0)}"
        problems = comparison.edge_problems([arm])
        run_ids = [*comparison.losses[arm_label(arm)]["run_ids"], *row["run_ids"]]
        verdict = within(low, high, BITS_BAND)
        found.append(finding(run_ids, text, verdict, problems, ratio, (low, high), abs(math.log(ratio / 1000))))
    if not found:
        raise UnjudgedError("inconclusive", f"{told}; no SFT runs of {arm['model']} with first-epoch losses")
    decisive = together(found)
    return replace(decisive, reason=f"{told}; {decisive.reason}")


def _entropy(comparison: Comparison, arm: Arm) -> str:
    """What a reward tells at most, by the mean reward of each step, in words."""
    share = _at_best(comparison, arm, "train", "reward")["value"].to_numpy(float)
    if not len(share):
        return "at most 1 bit each"
    return f"at most 1 bit each ({float(np.mean(entr(share) + entr(1 - share))) / math.log(2):.2f} by the mean rewards)"


def rank_1_holds_math(evidence: Evidence) -> Finding:
    """F6: rank-1 parameters on Llama-3.1-8B over the bits of RL on MATH."""
    counts = evidence.counts
    if counts.empty:
        raise UnjudgedError("not tested", "there is no table of parameter counts")
    rank_1 = counts["architecture"].eq("llama-3.1-8b") & counts["placement"].eq("all") & counts["rank"].eq(1)
    rows = counts[rank_1 & counts["part"].eq("all")].dropna(subset=["include_unembedding", "trainable_params"])
    found = {bool(row["include_unembedding"]): int(row["trainable_params"]) for row in rows.to_dict("records")}
    if True not in found:
        raise UnjudgedError(
            "not tested", "the counts table has no rank 1 on all layers and unembedding of llama-3.1-8b"
        )
    ratios = {include: parameters / MATH_BITS for include, parameters in found.items()}
    verdict: Verdict = "confirmed" if min(ratios.values()) > 1 else "contradicted"
    told = ", ".join(
        f"{parameters:,} {'with' if include else 'without'} the unembedding ({ratios[include]:.1f} times)"
        for include, parameters in sorted(found.items())
    )
    return Finding(verdict, f"rank-1 parameters over {MATH_BITS:,} bits: {told}", estimate=ratios[True])


_RUNS = (
    "RL runs of {} and FullFT, each with an LR grid whose best LR is not at its edge and a peak above the base; "
    f"{MIN_SEEDS} seeds at the best LRs"
)
_LEARNED = "Inconclusive where {} is not above the untouched base by more than 2 sigma"
_PROBLEM_SETS = ("rl_math", "rl_gsm8k", "rl_deepmath", "rl_arithmetic")
_DEEPMATH = ("rl_deepmath", "rl_arithmetic")

CLAIMS = (
    Claim(
        id="B10",
        kind="empirical",
        statement="In RL too, the optimal LR of LoRA is 10 times that of full fine-tuning",
        figure="6, 7",
        criterion=(
            "On every problem set, the 95% interval of the ratio of the LRs with the highest validation accuracy, of "
            f"the highest rank to FullFT, lies within {LR_BAND[0]:g} to {LR_BAND[1]:g}; both by quadratic "
            f"interpolation in log LR. {_LEARNED.format('one of them')}"
        ),
        needs=_RUNS.format("LoRA above rank 1"),
        paper_value="10",
        unit="ratio",
        experiments=_PROBLEM_SETS,
        judge=over_problems(lr_ratio_ten_in_rl),
        columns=("base_reward",),
        task="rl",
    ),
    Claim(
        id="E5",
        kind="empirical",
        statement="In RL on MATH, attention alone is worse than the MLP alone, and adds nothing to it",
        figure="5",
        criterion=(
            "By the test error rate at the evaluation that is best on validation: of the arms nearest in parameter "
            "count (within 10%, attention having at least as many if such a pair is there), attention's minus the "
            "MLP's is more than 2 sigma with its 95% interval above 0; and at every rank that both have, the interval "
            "of the MLP's minus that of all layers lies within 2 sigma, which is at most "
            f"{MAX_ERROR_MARGIN:g}. {_LEARNED.format('the MLP')}"
        ),
        needs=(
            "RL runs of LoRA on attention and on the MLP at about equal parameter counts, and on the MLP and all "
            f"layers at one rank, each with an LR grid whose best LR is not at its edge; {MIN_SEEDS} seeds at the best "
            "LRs"
        ),
        paper_value="no number",
        unit="error rate",
        experiments=("placement_rl",),
        judge=over_problems(placement_in_rl, "best_reward"),
        columns=("base_reward", "best_reward", "trainable_params"),
        task="rl",
    ),
    Claim(
        id="F1",
        kind="empirical",
        statement="In RL on MATH and GSM8K, LoRA of rank 1 reaches the peak of full fine-tuning",
        figure="6",
        criterion=(
            "Test error rates after the last step, each at its best LR on validation, paired by seed: on every problem "
            "set the 95% interval of rank 1 minus FullFT lies below 2 sigma, which is at most "
            f"{MAX_ERROR_MARGIN:g}. Contradicted if wholly above. {_LEARNED.format('FullFT')}"
        ),
        needs=_RUNS.format("rank 1"),
        paper_value="the same peak; no number",
        unit="error rate",
        experiments=("rl_math", "rl_gsm8k", "rl_arithmetic"),
        judge=over_problems(rank_1_reaches_the_peak),
        columns=("base_reward",),
        task="rl",
    ),
    Claim(
        id="F2",
        kind="empirical",
        statement="In RL, LoRA has a wider range of good LRs than full fine-tuning",
        figure="6, 7",
        criterion=(
            "The width in log LR of the range with a test accuracy of at least 95% of an arm's own peak, linear "
            "between LRs: on every problem set, for every LoRA rank, the 95% interval of its width minus FullFT's lies "
            "above 0, the difference is more than one step of the grid, and the narrower range ends within its grid. "
            "Contradicted if it is the narrower by the same rule. "
            f"{_LEARNED.format('one of them')}"
        ),
        needs=_RUNS.format("LoRA"),
        paper_value="wider; no number",
        unit="decades of LR",
        experiments=_PROBLEM_SETS,
        judge=over_problems(wider_range_of_lrs),
        columns=("base_reward",),
        task="rl",
    ),
    Claim(
        id="F3",
        kind="empirical",
        statement="In RL on DeepMath, all ranks and full fine-tuning progress alike",
        figure="7",
        criterion=(
            "Train rewards at the best LRs, averaged over tenths of the steps and paired by seed: for every LoRA rank, "
            "in the tenth after the first where it is furthest from FullFT, the 95% interval of the difference lies "
            f"within 2 sigma, the seed noise of such a mean, which is at most {MAX_ERROR_MARGIN:g}. "
            f"{_LEARNED.format('FullFT')}"
        ),
        needs=_RUNS.format("LoRA") + ", with train rewards",
        paper_value="almost identical; no number",
        unit="accuracy",
        experiments=_DEEPMATH,
        judge=over_problems(same_progress),
        columns=("base_reward",),
        task="rl",
    ),
    Claim(
        id="F4",
        kind="empirical",
        statement="Held-out AIME 2024 and 2025 problems show the same as DeepMath",
        figure="8",
        criterion=(
            "On every AIME set, or where there is none on every other further set, for every LoRA rank: the 95% "
            "interval of its final accuracy minus FullFT's, paired by seed, lies within the 95% binomial interval of a "
            f"difference of two runs, which is at most {MAX_ERROR_MARGIN:g}. Inconclusive where FullFT's own "
            "accuracy does not rise by more than that"
        ),
        needs=_RUNS.format("LoRA") + "; evaluated on AIME 2024 and 2025, or another further set, from step 0 on",
        paper_value="no number",
        unit="accuracy",
        experiments=_DEEPMATH,
        judge=over_problems(further_sets_follow),
        task="rl",
    ),
    Claim(
        id="F5",
        kind="empirical",
        statement="In RL, chains of thought grow the same way in LoRA and full fine-tuning",
        figure="8",
        criterion=(
            "Mean length of train responses at the best LRs, paired by seed: for every LoRA rank, the 95% interval of "
            f"that in the last tenth of the steps over FullFT's lies within {LENGTH_BAND[0]:g} to {LENGTH_BAND[1]:g}, "
            "and those of both over their first tenth lie above 1. Not tested where responses end shorter than "
            f"{MIN_CHAIN} tokens; inconclusive where more than {MAX_TRUNCATED:.0%} of the last are cut off. "
            f"{_LEARNED.format('FullFT')}. Words of going back and checking are told, not judged"
        ),
        needs=_RUNS.format("LoRA") + ", with response lengths",
        paper_value="no number",
        unit="ratio",
        experiments=_DEEPMATH,
        judge=over_problems(same_growth_of_responses),
        columns=("base_reward",),
        task="rl",
    ),
    Claim(
        id="F6",
        kind="theory",
        statement="Rank-1 LoRA has far more parameters than RL on MATH gives bits",
        figure="text",
        criterion=(
            "Counted on Llama-3.1-8B, with and without the unembedding, there are more rank-1 parameters than "
            f"{MATH_BITS:,} bits (10,000 problems, 32 samples each, 1 bit per episode). The estimate is their ratio "
            "with the unembedding"
        ),
        needs="the table of parameter counts; no runs",
        paper_value="3M parameters for 320,000 bits, almost 10 times",
        unit="ratio",
        experiments=(),
        judge=rank_1_holds_math,
    ),
    Claim(
        id="F7",
        kind="theory",
        statement="Where all samples of a group get the same reward, RL learns nothing",
        figure="text",
        criterion=(
            "At every step whose groups all have equal rewards the gradient is exactly 0, while at others it is not; "
            "and a run without other steps ends with exactly its base's accuracy on validation and test. The estimate "
            "is the largest gradient norm of such a step"
        ),
        needs="RL runs with steps at which all samples of every group get the same reward",
        paper_value="the entropy of the advantage is 0",
        unit="gradient norm",
        experiments=("rl_arithmetic",),
        judge=equal_rewards_teach_nothing,
        columns=("base_reward",),
        task="rl",
    ),
    Claim(
        id="F8",
        kind="prediction",
        statement="RL at the scale of DeepSeek-R1-Zero can be reproduced with low-rank LoRA",
        figure="text",
        criterion="LoRA of low rank reaches the final reward of FullFT after 5.3 million episodes",
        needs="RL runs of 5.3 million episodes",
        paper_value="5.3M episodes; not run",
        unit="accuracy",
        experiments=(),
        judge=untestable("a prediction that the paper did not test; 5.3 million episodes are out of reach here"),
    ),
    Claim(
        id="F9",
        kind="theory",
        statement="RL takes in about 1,000 times fewer bits per token than SFT",
        figure="text",
        criterion=(
            "On every problem set, against every dataset of the same model: SFT's first-epoch bits per scored token "
            "times the mean tokens of an RL response, which teaches at most 1 bit, lies with its 95% interval within "
            f"{BITS_BAND[0]:,.0f} to {BITS_BAND[1]:,.0f}; both of FullFT, or else of the highest LoRA rank, at its "
            f"best LR. Not tested where responses are shorter than {MIN_CHAIN} tokens: the claim speaks of thousands"
        ),
        needs=f"RL runs with responses of {MIN_CHAIN} tokens or more, and SFT runs of the same model; 2 seeds of both",
        paper_value="about 1,000",
        unit="ratio",
        experiments=_PROBLEM_SETS,
        judge=fewer_bits_per_token,
        task="rl",
    ),
)
