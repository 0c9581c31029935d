"""Claims F6, F7 and F9: how much information reinforcement learning (RL) gives."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import NEEDED_BY, Arm, Comparison, require
from lorabench.analysis.finding import Finding, UnjudgedError, Verdict, finding, together, within
from lorabench.analysis.gaps import mean_interval
from lorabench.analysis.memorisation import description_lengths, is_memorisation
from lorabench.claims.claim import Claim
from lorabench.claims.evidence import Evidence
from lorabench.claims.rl_shared import MIN_CHAIN, RL_EXPERIMENTS, at_best, over_problems, tenths
from lorabench.tables.checks import is_rl
from lorabench.utils.formats import fixed_interval

MATH_PROBLEMS = 10_000
"""The number of problems in the paper's RL on MATH."""

MATH_SAMPLES = 32
"""The number of samples of each problem there."""

MATH_BITS = MATH_PROBLEMS * MATH_SAMPLES
"""The bits that RL on MATH gives at most, at 1 bit per episode."""


def rank_1_holds_math(evidence: Evidence) -> Finding:
    """F6: judge the rank-1 parameters on Llama-3.1-8B over the bits of RL on MATH."""
    counts = evidence.counts
    if counts.empty:
        raise UnjudgedError("not tested", "there is no table of parameter counts")
    rank_1 = counts["architecture"].eq("llama-3.1-8b") & counts["placement"].eq("all") & counts["rank"].eq(1)
    rows = counts[rank_1 & counts["part"].eq("all")].dropna(subset=["include_unembedding", "trainable_params"])
    by_unembedding = {bool(row["include_unembedding"]): int(row["trainable_params"]) for row in rows.to_dict("records")}
    if True not in by_unembedding:
        raise UnjudgedError(
            "not tested", "the counts table has no rank 1 on all layers and unembedding of llama-3.1-8b"
        )
    ratios = {include: parameters / MATH_BITS for include, parameters in by_unembedding.items()}
    verdict: Verdict = "confirmed" if min(ratios.values()) > 1 else "contradicted"
    counted = ", ".join(
        f"{parameters:,} {'with' if include else 'without'} the unembedding ({ratios[include]:.1f} times)"
        for include, parameters in sorted(by_unembedding.items())
    )
    return Finding(verdict, f"rank-1 parameters over {MATH_BITS:,} bits: {counted}", estimate=ratios[True])


F6 = Claim(
    id="F6",
    kind="theory",
    statement="Rank-1 LoRA has far more parameters than RL on MATH gives bits",
    figure="text",
    criterion=(
        "Llama-3.1-8B has more rank-1 parameters, counted with and without the unembedding, than RL on MATH gives "
        f"bits: {MATH_BITS:,}, from {MATH_PROBLEMS:,} problems with {MATH_SAMPLES} samples each at 1 bit per episode. "
        "The estimate is their ratio with the unembedding"
    ),
    needs="the table of parameter counts; no runs",
    paper_value="3M parameters for 320,000 bits, almost 10 times",
    unit="ratio",
    experiments=(),
    judge=rank_1_holds_math,
)


def _train_steps(evidence: Evidence) -> pd.DataFrame:
    """Return the share of groups with equal rewards and the gradient norm of every train step, by run and step."""
    names = ["equal_groups", "grad_norm"]
    curves = evidence.curves
    if not curves.empty:
        curves = curves[curves["split"].eq("train") & curves["metric"].isin(names) & curves["value"].notna()]
    if curves.empty:
        return pd.DataFrame(columns=names, index=pd.MultiIndex.from_arrays([[], []], names=["run_id", "step"]))
    return curves.pivot(index=["run_id", "step"], columns="metric", values="value").reindex(columns=names).dropna()


def _never_rewarded(runs: pd.DataFrame, equal_groups: pd.Series[float]) -> pd.DataFrame:
    """Return the finished runs in which every group had equal rewards at every step."""
    least = runs["run_id"].map(equal_groups.groupby("run_id").min())
    finished = runs["status"].ne("diverged")
    return runs[runs["status"].eq("unrewarded") | (finished & least.eq(1).fillna(False))]


def _before_and_after(evidence: Evidence, runs: pd.DataFrame) -> pd.DataFrame:
    """Return the accuracies before and after training on the test and validation splits, where both are known."""
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


def equal_rewards_teach_nothing(evidence: Evidence) -> Finding:
    """F7: judge the gradients of steps whose groups all have equal rewards, and runs that have no other steps."""
    steps = _train_steps(evidence)
    equal = steps["equal_groups"] == 1
    never = _never_rewarded(evidence.runs, steps["equal_groups"])
    if not equal.any() and never.empty:
        raise UnjudgedError("not tested", "no step whose groups all have equal rewards")
    before_and_after = _before_and_after(evidence, never)
    changed = before_and_after["before"] != before_and_after["after"]
    largest = float(steps.loc[equal, "grad_norm"].max())
    learning = steps.loc[~equal, "grad_norm"] > 0
    texts = [f"{learning.sum()} of {len(learning)} other steps have a gradient above 0"]
    problems = []
    if equal.any():
        texts.insert(0, f"largest gradient of {equal.sum()} steps whose groups all have equal rewards: {largest:.3g}")
    else:
        problems.append("no step whose groups all have equal rewards has a gradient norm")
    if len(before_and_after):
        n_runs = before_and_after["run_id"].nunique()
        texts.append(
            f"of {n_runs} runs without other steps {changed.sum()} of {len(before_and_after)} accuracies changed"
        )
    if not learning.any():
        problems.append("no step learns, so gradients of 0 are no evidence")
    verdict: Verdict = "confirmed"
    if largest > 0 or changed.any():
        # These steps learned, whatever other steps did.
        verdict, problems = "contradicted", []
    run_ids = {*steps.index[equal].get_level_values("run_id"), *before_and_after["run_id"]}
    return finding(run_ids, "; ".join(texts), verdict, problems, largest)


F7 = Claim(
    id="F7",
    kind="theory",
    statement="Where all samples of a group get the same reward, RL learns nothing",
    figure="text",
    criterion=(
        "At every step whose groups all have equal rewards the gradient is exactly 0, while at other steps it is not; "
        "and a run without other steps ends with exactly the accuracies of its base model on validation and test. The "
        "estimate is the largest gradient norm of a step with equal rewards"
    ),
    needs="RL runs with steps at which all samples of every group get the same reward",
    paper_value="the entropy of the advantage is 0",
    unit="gradient norm",
    experiments=("rl_arithmetic",),
    judge=equal_rewards_teach_nothing,
    columns=("base_reward",),
    task="rl",
)

BITS_RATIO = 1000.0
"""The bits per token of SFT over those of RL that the paper gives."""

BITS_BAND = (100.0, 10_000.0)
"""The ratios that count as BITS_RATIO."""

_FIRST_EPOCH = ("first_epoch_nats", "first_epoch_scored_tokens")


def _entropy(comparison: Comparison, arm: Arm) -> str:
    """Format the bits that an episode gives at most, with their mean by the mean reward of each step."""
    from scipy.special import entr

    share = at_best(comparison, arm, "train", "reward")["value"].to_numpy(float)
    if not len(share):
        return "at most 1 bit each"
    return f"at most 1 bit each ({float(np.mean(entr(share) + entr(1 - share))) / math.log(2):.2f} by the mean rewards)"


def _bits(lengths: pd.DataFrame, comparison: Comparison) -> Finding:
    """Judge F9 for one model and problem set, against every dataset that the model was fine-tuned on."""
    highest = next(reversed(comparison.lora.values()), None)
    [arm] = require(("FullFT or LoRA on all layers", comparison.fullft or highest))
    tokens = tenths(comparison, arm, "response_length").mean(axis=1)
    if tokens.empty:
        raise UnjudgedError("not tested", "no response lengths")
    per_episode = mean_interval(tokens)
    episodes = f"{per_episode[0]:.3g} tokens per episode, {_entropy(comparison, arm)}"
    if per_episode[0] < MIN_CHAIN:
        raise UnjudgedError("not tested", f"{episodes}; the claim is about long responses, {MIN_CHAIN} tokens at least")
    findings = []
    for row in lengths[lengths["model"] == arm["model"]].to_dict("records"):
        nats = [row["nats_per_token"], row["nats_low"], row["nats_high"]]
        # The product of the ends is wider than the interval of the product, so it is cautious.
        ratio, low, high = (n / math.log(2) * t for n, t in zip(nats, per_episode, strict=True))
        bits = f"SFT on {row['dataset']} {nats[0] / math.log(2):.3g} bits per token"
        text = f"{bits}; ratio {ratio:.0f} {fixed_interval(low, high, 0)}"
        problems = comparison.edge_problems([arm])
        run_ids = [*comparison.losses[arm_label(arm)]["run_ids"], *row["run_ids"]]
        verdict = within(low, high, BITS_BAND)
        findings.append(
            finding(run_ids, text, verdict, problems, ratio, (low, high), abs(math.log(ratio / BITS_RATIO)))
        )
    if not findings:
        raise UnjudgedError("inconclusive", f"{episodes}; no SFT runs of {arm['model']} with first-epoch losses")
    decisive = together(findings)
    return replace(decisive, reason=f"{episodes}; {decisive.reason}")


def fewer_bits_per_token(evidence: Evidence) -> Finding:
    """F9: judge the bits per token of SFT over those of RL, which gives at most 1 bit per episode."""
    sft = evidence.every_run[~is_rl(evidence.every_run)]
    if missing := [name for name in (*NEEDED_BY["sft"], *_FIRST_EPOCH) if name not in sft]:
        raise UnjudgedError("not tested", f"the runs table has no column {', '.join(missing)}")
    lengths = description_lengths(sft[~is_memorisation(sft)])
    return over_problems(partial(_bits, lengths))(evidence)


F9 = Claim(
    id="F9",
    kind="theory",
    statement="RL takes in about 1,000 times fewer bits per token than SFT",
    figure="text",
    criterion=(
        "On every problem set and against every dataset of the same model: SFT's first-epoch bits per scored token "
        "times the mean tokens of an RL response, which gives at most 1 bit, lies with its 95% interval within "
        f"{BITS_BAND[0]:,.0f} to {BITS_BAND[1]:,.0f}. Both are of FullFT, or else of the highest LoRA rank, at its "
        f"best LR. Not tested where responses are shorter than {MIN_CHAIN} tokens, since the claim speaks of thousands"
    ),
    needs=f"RL runs with responses of {MIN_CHAIN} tokens or more, and SFT runs of the same model; 2 seeds of both",
    paper_value="about 1,000",
    unit="ratio",
    experiments=RL_EXPERIMENTS,
    judge=fewer_bits_per_token,
    task="rl",
)

CLAIMS = (F6, F7, F9)
