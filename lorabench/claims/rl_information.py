"""Claims F6, F7 and F9: how much information reinforcement learning (RL) gives."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from lorabench.analysis.comparison import NEEDED_BY, Arm, Comparison, require
from lorabench.analysis.estimate import Estimate, combined, exact, mean_over_seeds
from lorabench.analysis.finding import Finding, UnjudgedError, decide, finding, together, worst
from lorabench.analysis.memorisation import description_lengths, is_memorisation
from lorabench.analysis.optima import as_ratio
from lorabench.analysis.rules import Above, Problem, Verdict, Within
from lorabench.claims.claim import Claim
from lorabench.claims.conditions import response_length
from lorabench.claims.evidence import Evidence
from lorabench.claims.rl_shared import (
    LONG_PRESETS,
    LONG_RESPONSE,
    RL_EXPERIMENTS,
    over_problems,
    points_at_optimum,
    tenths,
)
from lorabench.store.checks import is_rl

MATH_PROBLEMS = 10_000
"""The number of problems in the paper's RL on MATH."""

MATH_SAMPLES = 32
"""The number of samples of each problem there."""

MATH_BITS = MATH_PROBLEMS * MATH_SAMPLES
"""The bits that RL on MATH gives at most, at 1 bit per episode."""

FAR_MORE = 5.0
"""The ratio from which on there are far more parameters than bits; the paper has almost 10."""


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
    findings = []
    for include, parameters in sorted(by_unembedding.items()):
        ratio = parameters / MATH_BITS
        text = f"{parameters:,} {'with' if include else 'without'} the unembedding ({ratio:.1f} times)"
        findings.append(decide(Above(FAR_MORE), exact(ratio), text, (), (), f"a factor of {FAR_MORE:g}"))
    counted = ", ".join(judged.reason for judged in findings)
    return replace(worst(findings), reason=f"rank-1 parameters over {MATH_BITS:,} bits: {counted}")


F6 = Claim(
    id="F6",
    kind="count",
    statement="Rank-1 LoRA has far more parameters than RL on MATH gives bits",
    figure="text",
    criterion=(
        f"Llama-3.1-8B has at least {FAR_MORE:g} times as many rank-1 parameters, counted with and without the "
        f"unembedding, as RL on MATH gives bits: {MATH_BITS:,}, from {MATH_PROBLEMS:,} problems with {MATH_SAMPLES} "
        "samples each at 1 bit per episode. The estimate is the smaller ratio. It is a count, which no run can change"
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
    problems: list[Problem] = []
    if equal.any():
        texts.insert(0, f"largest gradient of {equal.sum()} steps whose groups all have equal rewards: {largest:.3g}")
    else:
        problems.append(Problem("no step whose groups all have equal rewards has a gradient norm"))
    if len(before_and_after):
        n_runs = before_and_after["run_id"].nunique()
        texts.append(
            f"of {n_runs} runs without other steps {changed.sum()} of {len(before_and_after)} accuracies changed"
        )
    if not learning.any():
        problems.append(Problem("no step learns, so the gradients of 0 check nothing"))
    verdict: Verdict = "confirmed"
    if largest > 0 or changed.any():
        # These steps learned, whatever other steps did.
        verdict, problems = "contradicted", []
        texts.append("the trainer does not do what the derivation says")
    else:
        texts.append("true by construction, so it only checks the trainer")
    run_ids = {*steps.index[equal].get_level_values("run_id"), *before_and_after["run_id"]}
    return finding(run_ids, "; ".join(texts), verdict, problems, largest)


F7 = Claim(
    id="F7",
    kind="derivation",
    statement="Where all samples of a group get the same reward, RL learns nothing",
    figure="text",
    criterion=(
        "It is true by construction here: equal rewards have advantages of 0, and the trainer skips the optimizer at a "
        "gradient of 0. So it is no evidence for the paper, only a check of the trainer: at every step whose groups "
        "all have equal rewards the gradient is exactly 0, while at other steps it is not; and a run without other "
        "steps ends with exactly the accuracies of its base model on validation and test. The estimate is the largest "
        "gradient norm of a step with equal rewards"
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

    share = points_at_optimum(comparison, arm, "train", "reward")["value"].to_numpy(float)
    if not len(share):
        return "at most 1 bit each"
    return f"at most 1 bit each ({float(np.mean(entr(share) + entr(1 - share))) / math.log(2):.2f} by the mean rewards)"


def _bits_per_token(sft: pd.DataFrame, run_ids: list[str]) -> Estimate:
    """Estimate the mean first-epoch loss of runs of SFT, in bits per scored token."""
    runs = sft[sft["run_id"].isin(run_ids)]
    nats, tokens = (runs[name].astype(float) for name in _FIRST_EPOCH)
    return mean_over_seeds(nats / tokens / math.log(2), f"first epoch of {' '.join(run_ids)}")


def _bits(sft: pd.DataFrame, lengths: pd.DataFrame, comparison: Comparison) -> Finding:
    """Judge F9 for one model and problem set, against every dataset that the model was fine-tuned on."""
    highest = next(reversed(comparison.lora.values()), None)
    [arm] = require(("FullFT or LoRA on all layers", comparison.fullft or highest))
    tokens = tenths(comparison, arm, "response_length").mean(axis=1)
    if tokens.empty:
        raise UnjudgedError("not tested", "no response lengths")
    per_episode = mean_over_seeds(tokens, f"tokens of {comparison.label}")
    episodes = f"{per_episode.value:.3g} tokens per episode, {_entropy(comparison, arm)}"
    findings = []
    for row in lengths[lengths["model"] == arm["model"]].to_dict("records"):
        per_token = _bits_per_token(sft, row["run_ids"])
        ratio = combined(lambda bits, length: np.log(np.maximum(bits * length, 1e-9)), per_token, per_episode)
        bits = f"SFT on {row['dataset']} {per_token.value:.3g} bits per token, ratio {math.exp(ratio.value):.3g}"
        run_ids = [*comparison.at_optimum(arm)["run_id"], *row["run_ids"]]
        rule = Within(*map(math.log, BITS_BAND))
        findings.append(as_ratio(decide(rule, ratio, bits, run_ids, (), f"a factor of 10 around {BITS_RATIO:,.0f}")))
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
    return over_problems(partial(_bits, sft, lengths))(evidence)


F9 = Claim(
    id="F9",
    kind="derivation",
    statement="RL takes in about 1,000 times fewer bits per token than SFT",
    figure="text",
    criterion=(
        "That an episode gives at most 1 bit is derived; what is measured is the length of responses and the loss of "
        "SFT. On every problem set and against every dataset of the same model, SFT's first-epoch bits per scored "
        "token times the mean tokens of an RL response is within "
        f"{BITS_BAND[0]:,.0f} to {BITS_BAND[1]:,.0f}. Both are of FullFT, or else of the highest LoRA rank, near its "
        "optimal LR"
    ),
    needs=f"RL runs with responses of {LONG_RESPONSE} tokens or more, and SFT runs of the same model; 2 seeds of both",
    paper_value="about 1,000",
    unit="ratio",
    experiments=RL_EXPERIMENTS,
    judge=fewer_bits_per_token,
    task="rl",
    conditions=(response_length(LONG_RESPONSE, LONG_PRESETS),),
)

CLAIMS = (F6, F7, F9)
