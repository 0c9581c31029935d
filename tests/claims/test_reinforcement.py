import math
import zlib

import numpy as np
import pandas as pd
import pytest
from scipy.special import ndtri

from lorabench.claims.reinforcement import progress_windows

from ..handmade.rl import BASE, LRS, STEPS, arm, grown
from ..handmade.sft import arm as sft_arm
from ..handmade.sft import tables
from . import judged, verdict_is

IDS = ["B10", "F1", "F2", "F3", "F4", "F5", "F6", "F7", "F8", "F9"]
ON_RUNS = [name for name in IDS if name not in ("F6", "F8")]
COMPARED = ["B10", "F1", "F2", "F3", "F4", "F5"]  # of FullFT and LoRA

# A world in which every claim holds, arm by arm, by rank; a test changes some of them.
FULLFT, RANK_1, RANK_8 = None, 1, 8
WORLD = {
    FULLFT: {"optimum": 1e-4, "curvature": 0.1},
    RANK_1: {"optimum": 1e-3, "curvature": 0.02},
    RANK_8: {"optimum": 1e-3, "curvature": 0.02},
}
NOISE = 0.003  # the standard deviation of accuracies


def noisy(values, names, size):
    """Add normal noise to the values that depends on their names alone."""
    uniform = np.array([(zlib.crc32(name.encode()) + 0.5) / 2**32 for name in names])
    return (values + size * ndtri(uniform)).clip(0, 1)


def world(changes=None, every=None, without=(), problems=20_000, **columns):
    """Make the tables of `WORLD`, with the settings of some arms changed, or of every arm.

    The problems of further sets are so many that they hardly add to an error.
    """
    arms = []
    for rank, settings in WORLD.items():
        if rank not in without:
            changed = {"offsets": (0.0,) * 4, "around": 1} | settings | (every or {}) | (changes or {}).get(rank, {})
            arms.append(arm(rank, **changed, **columns))
    runs, curves = tables(arms)
    for name in ("final_reward", "final_valid_reward"):
        runs[name] = noisy(runs[name], runs["run_id"] + name, NOISE)
    accuracies = curves["metric"].isin(["reward", "accuracy"]) & curves["step"].gt(0)
    about = curves["run_id"] + " " + curves["step"].astype(str) + " " + curves["split"]
    curves.loc[accuracies, "value"] = noisy(curves.loc[accuracies, "value"], about[accuracies], NOISE)
    lengths = curves["metric"] == "response_length"
    curves.loc[lengths, "value"] *= 1 + noisy(0.0, about[lengths], 0.01)
    counts = curves[curves["metric"] == "n_samples"].assign(metric="n_problems", value=float(problems))
    return runs, pd.concat([curves, counts], ignore_index=True)


def supervised(nats=0.7, **settings):
    """Make FullFT's SFT runs, with the loss of the first epoch in nats per token."""
    epoch = {"first_epoch_nats": nats * 1e4, "first_epoch_scored_tokens": 10_000}
    runs, _ = tables([sft_arm(optimum=3e-4, **settings, **epoch)])
    runs["first_epoch_nats"] += runs["seed"].astype(float)
    return runs


def rl_and_sft(*sft):
    runs, curves = world()
    return pd.concat([runs, *sft]), curves


def test_every_claim_on_runs_is_confirmed_where_all_hold():
    confirmed = judged(IDS, *rl_and_sft(supervised()))
    assert confirmed.loc[ON_RUNS, "verdict"].to_dict() == dict.fromkeys(ON_RUNS, "confirmed")
    assert confirmed.loc[["F6", "F8"], "verdict"].tolist() == ["not tested"] * 2
    assert not confirmed["reason"].str.contains("nan").any()
    assert confirmed.loc[COMPARED, "scope"].tolist() == [f"tiny, {STEPS} steps, RL on problems"] * len(COMPARED)
    estimates = confirmed["estimate"]
    assert estimates["B10"] == pytest.approx(10, rel=0.2)
    # A miss costs the difference of the mean squared distances in ln LR, 0.77 - 0.11, times the curvature.
    costs = [curvature * 0.663 / (0.8 - 0.11 * curvature) for curvature in (0.1, 0.01)]
    assert estimates["F2"] == pytest.approx(costs[0] - costs[1], abs=0.008)
    assert confirmed.loc["F2", "margin_low"] == pytest.approx(0.05)
    assert "at the best measured LRs, 0.001 and 0.0001: " in confirmed.loc["F1", "reason"]
    assert estimates["F1"] == pytest.approx(0, abs=0.005)
    assert estimates[["F3", "F4", "F7"]].tolist() == [pytest.approx(0, abs=0.01), pytest.approx(0, abs=0.01), 0]
    # 300 tokens of 0.7 nats, over at most 1 bit.
    assert estimates["F9"] == pytest.approx(305 * 0.7 / math.log(2), rel=0.02)
    assert confirmed.loc[["F1", "F3", "F4"], "margin_high"].tolist() == [0.02] * 3
    assert confirmed.loc["F1", "margin_rule"].endswith("2 points of accuracy")
    assert confirmed.loc["B10", ["margin_low", "margin_high"]].tolist() == pytest.approx([6.25, 16])


LATE = {"train": {"reward": lambda done: BASE + 0.7 * done**3}}
SHORT_AT_LAST = {"train": {"response_length": grown(200, 300)}}


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("B10", {RANK_8: {"optimum": 2.5e-4, "curvature": 0.1}}),
        ("F1", {RANK_1: {"peak": 0.65}}),
        ("F2", {RANK_1: {"curvature": 0.2}, FULLFT: {"curvature": 0.008}}),
        ("F3", {RANK_8: LATE}),  # the same at last, but not on the way
        ("F4", {RANK_1: {"sets": {"aime24": 0.3, "aime25": 0.1}}}),
        ("F5", {RANK_1: SHORT_AT_LAST}),
        ("F5", {rank: {"train": {"response_length": grown(400, 250)}} for rank in WORLD}),
        ("F7", {RANK_1: {"train": {"grad_norm": lambda done: 0.3}}}),
    ],
)
def test_contradicted_where_it_fails(claim, changes):
    assert judged(claim, *world(changes))["verdict"] == "contradicted"


@pytest.mark.parametrize(
    ("claims", "settings", "reason"),
    [
        (COMPARED, {"every": {"offsets": (0.0,)}}, "1 paired seeds, 3 needed"),
        (["F1"], {"changes": {RANK_1: {"peak": 0.78}}}, "in error rate"),  # at the margin
        (["F4"], {"problems": 30}, "on 30 problems"),
        (["F5"], {"changes": {RANK_1: {"train": {"truncated": grown(0, 0.5)}}}}, "of its last responses cut off"),
        (COMPARED, {"without": [FULLFT]}, "no runs of FullFT"),
    ],
)
def test_inconclusive_where_noise_or_data_leave_it_open(claims, settings, reason):
    for _, row in judged(claims, *world(**settings)).iterrows():
        verdict_is(row, "inconclusive", reason)


def test_arms_that_are_all_about_perfect_decide_nothing():
    perfect = {FULLFT: {"peak": 0.985}, RANK_1: {"peak": 0.98}}
    claim = judged("F1", *world(perfect))
    verdict_is(claim, "inconclusive", "a ceiling")
    assert claim["margin_high"] == 0.02
    verdict_is(judged("F1", *world(perfect | {RANK_1: {"peak": 0.9}})), "contradicted")


def test_seeds_that_agree_exactly_or_a_peak_between_lrs_decide_nothing_on_f1():
    runs, curves = world()
    rank_1, rewards = runs["rank"].eq(1).fillna(False), runs["final_reward"]
    alike = runs.assign(final_reward=rewards.mask(rank_1 & runs["lr"].eq(1e-3), 0.8))
    verdict_is(judged("F1", alike, curves), "inconclusive", "all 4 seeds have the accuracy 0.800")
    # Between two LRs with breakdowns at both sides a parabola has its peak where no run was.
    broken = rewards.mask(rank_1 & ~runs["lr"].isin([1e-3, 3e-3]), 0.2)
    claim = judged("F1", runs.assign(final_reward=broken), curves)
    verdict_is(claim, "inconclusive", "but no LR has more than")
    assert claim["decide_lrs"][0].startswith("LoRA_r1=")


def test_nothing_is_claimed_of_arms_that_do_not_learn():
    never = {"peak": BASE + 0.04, "curvature": 0.001, "sets": {"aime24": 0.02}}
    claims = judged(COMPARED, *world(every=never))
    assert not set(claims["verdict"]) & {"confirmed", "contradicted"}
    for claim in ("B10", "F1", "F2", "F3"):
        assert "has not learned" in claims.loc[claim, "reason"]
    verdict_is(judged("F1", *world(base_reward=None)), "inconclusive", "base not known")


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        (
            {"every": {"lrs": LRS[1:6], "around": 0}},
            "and 3 seeds at these, or of 6 LRs (here at most 5 LRs of",
        ),
        ({"rule_reward": 0.7}, "the best constant answer and cheap rule (here tiny/problems: FullFT 0.80"),
    ],
)
def test_a_setting_that_is_not_met_is_named(settings, missing):
    claims = judged(["B10", "F1", "F2", "F3", "F4"], *world(**settings))
    assert set(claims["verdict"]) == {"setting not met"}
    assert claims["missing"].str.contains(missing, regex=False).all()


def test_problem_sets_that_do_not_count_beside_others():
    runs, curves = world()
    # On one set a cheap rule is nearly as good, on the other no run ever got a reward.
    easy, _ = world(dataset="easy", rule_reward=0.75, changes={RANK_1: {"peak": 0.3}})
    hopeless, at_hopeless = world(dataset="hopeless")
    hopeless = hopeless.assign(status="unrewarded", base_reward=0.0)
    hopeless[["final_valid_reward", "final_reward", "best_reward"]] = 0.0
    claim = judged("F1", pd.concat([runs, easy, hopeless], ignore_index=True), pd.concat([curves, at_hopeless]))
    verdict_is(claim, "confirmed")
    assert not any(name in claim["reason"] for name in ("easy", "hopeless"))
    verdict_is(judged("F1", hopeless, at_hopeless), "not tested")


def test_the_plateau_divides_the_windows():
    rewards = pd.Series(np.minimum(np.arange(100) / 40, 1.0), index=range(1, 101))
    windows = progress_windows(list(rewards.index), rewards)
    assert windows[3][0] == pytest.approx(1 + 0.9 * 40, abs=4)
    assert (windows[0][0], windows[-1][1]) == (2, 100)
    # Where nothing rises all steps but the last lie before the plateau.
    assert progress_windows(list(rewards.index), rewards * 0)[3:] == [(100, 100)]


def test_further_sets_stand_for_aime_and_need_a_number_of_problems_and_a_start():
    verdict_is(judged("F4", *world(every={"sets": {"longer_sums": 0.3}})), "confirmed", "no AIME problems")
    runs, curves = world()
    unknown = judged("F4", runs, curves[curves["metric"] != "n_problems"])
    verdict_is(unknown, "inconclusive", "number of problems is not known")
    verdict_is(judged("F4", runs, curves[curves["step"] > 0]), "inconclusive", "before and after")


def test_a_run_without_rewards_stays_its_base():
    runs, curves = world()
    first = runs.loc[0, "run_id"]
    columns = ["status", "final_valid_reward", "final_reward", "best_reward"]
    # It stopped after a fifth of its steps.
    of_first = curves["run_id"].eq(first)
    curves = curves[~of_first | curves["split"].ne("train") | curves["step"].le(STEPS // 5)]
    for metric, value in (("equal_groups", 1.0), ("grad_norm", 0.0)):
        curves.loc[of_first & curves["metric"].eq(metric), "value"] = value
    for after, verdict, changed in ((BASE, "confirmed", 0), (BASE + 0.001, "contradicted", 1)):
        runs.loc[0, columns] = ["unrewarded", BASE, after, BASE]
        claim = judged("F7", runs, curves)
        steps = f"largest gradient of {len(runs) - 1 + STEPS // 5} steps"
        verdict_is(claim, verdict, f"of 1 runs without other steps {changed} of 2 accuracies changed", steps)
        assert first in claim["run_ids"]


def test_bits_per_token_against_sft_of_the_same_model():
    for verdict, sft in (
        ("confirmed", [supervised(), supervised(dataset="hard", nats=2.0)]),
        ("contradicted", [supervised(nats=0.2)]),  # 305 tokens of 0.2 nats are 88 bits: below 100
        ("inconclusive", [supervised(offsets=(0.0,))]),
    ):
        assert judged("F9", *rl_and_sft(*sft))["verdict"] == verdict


def test_each_task_is_judged_by_its_own_claims_and_curves_by_none_without_curves():
    runs, curves = world()
    sft = supervised()
    alone, beside = (judged(["B10", "F1"], table, curves) for table in (runs, pd.concat([runs, sft])))
    pd.testing.assert_frame_equal(alone, beside)
    claims = judged(IDS, sft, curves)
    assert set(claims["verdict"]) == {"not tested"}
    assert "no runs of the experiment rl_math or rl_gsm8k" in claims.loc["F1", "reason"]


def test_rank_1_against_the_bits_of_math():
    counted = {"architecture": "llama-3.1-8b", "placement": "all", "part": "all", "rank": 1}
    counted |= {"include_unembedding": [True, False], "trainable_params": [2_753_792, 2_621_440]}
    counts = pd.DataFrame(counted).assign(base_params=8_030_261_248)
    claim = judged("F6", counts=counts)
    without = "2,621,440 without the unembedding (8.2 times)"
    verdict_is(claim, "confirmed", without, "2,753,792 with the unembedding (8.6 times)")
    assert claim["estimate"] == pytest.approx(2_621_440 / 320_000)
    verdict_is(judged("F6", counts=counts.assign(trainable_params=[2_753_792, 900_000])), "contradicted")
    for none in (pd.DataFrame(), counts.iloc[1:], counts.assign(rank=2)):
        verdict_is(judged("F6", counts=none), "not tested")
