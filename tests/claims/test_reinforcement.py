from __future__ import annotations

import math
import zlib

import numpy as np
import pandas as pd
import pytest
from scipy.special import ndtri

from lorabench.claims.judge import CLAIMS, judge_claims
from lorabench.claims.rl_progress import progress_windows
from lorabench.store.tables import Tables

from ..handmade.rl import BASE, LRS, STEPS, arm, grown
from ..handmade.sft import arm as sft_arm
from ..handmade.sft import tables

IDS = ["B10", "F1", "F2", "F3", "F4", "F5", "F6", "F7", "F8", "F9"]
ON_RUNS = [name for name in IDS if name not in ("F6", "F8")]
COMPARED = ["B10", "F1", "F2", "F3", "F4", "F5"]  # of FullFT and LoRA

# A world in which every claim holds, arm by arm, by rank; a test changes some of them.
FULLFT, RANK_1, RANK_8 = None, 1, 8
WORLD = {
    FULLFT: {"optimum": 1e-4, "curvature": 0.1},
    RANK_1: {"optimum": 1e-3, "curvature": 0.01},
    RANK_8: {"optimum": 1e-3, "curvature": 0.01},
}
NOISE = 0.003  # the standard deviation of accuracies
PROBLEMS = 20_000  # of a further set, so many that they hardly add to an error


def noisy(values, names, size=NOISE):
    """Add normal noise to the values that depends on their names alone."""
    uniform = np.array([(zlib.crc32(name.encode()) + 0.5) / 2**32 for name in names])
    return (values + size * ndtri(uniform)).clip(0, 1)


def world(changes=None, every=None, without=(), noise=NOISE, problems=PROBLEMS, **columns):
    """Make the tables of `WORLD`, with the settings of some arms changed, or of every arm."""
    arms = []
    for rank, settings in WORLD.items():
        if rank not in without:
            changed = {"offsets": (0.0,) * 4} | settings | (every or {}) | (changes or {}).get(rank, {})
            arms.append(arm(rank, **changed, **columns))
    runs, curves = tables(arms)
    for name in ("final_reward", "final_valid_reward"):
        runs[name] = noisy(runs[name], runs["run_id"] + name, noise)
    accuracies = curves["metric"].isin(["reward", "accuracy"]) & curves["step"].gt(0)
    about = curves["run_id"] + " " + curves["step"].astype(str) + " " + curves["split"]
    curves.loc[accuracies, "value"] = noisy(curves.loc[accuracies, "value"], about[accuracies], noise)
    lengths = curves["metric"] == "response_length"
    curves.loc[lengths, "value"] *= 1 + noisy(0.0, about[lengths], 0.01)
    counts = curves[curves["metric"] == "n_samples"].assign(metric="n_problems", value=float(problems))
    return runs, pd.concat([curves, counts], ignore_index=True)


def supervised(nats=0.7, model="tiny", dataset="instruct", **settings):
    """Make FullFT's SFT runs, with the loss of the first epoch in nats per token."""
    epoch = {"first_epoch_nats": nats * 1e4, "first_epoch_scored_tokens": 10_000}
    runs, _ = tables([sft_arm(optimum=3e-4, model=model, dataset=dataset, **settings, **epoch)])
    runs["first_epoch_nats"] += runs["seed"].astype(float)
    return runs


def judged(runs=None, curves=None, counts=None, ids=IDS):
    read = Tables(*(pd.DataFrame() if table is None else table for table in (runs, curves, None, counts)))
    return judge_claims(read, [claim for claim in CLAIMS if claim.id in ids]).set_index("claim_id")


def rl_and_sft(tables_of_rl, *sft):
    runs, curves = tables_of_rl
    return pd.concat([runs, *(sft or (supervised(),))]), curves


@pytest.fixture(scope="module")
def confirmed():
    return judged(*rl_and_sft(world()))


def test_every_claim_on_runs_is_confirmed_where_all_hold(confirmed):
    assert confirmed.loc[ON_RUNS, "verdict"].to_dict() == dict.fromkeys(ON_RUNS, "confirmed")
    assert confirmed.loc[["F6", "F8"], "verdict"].tolist() == ["not tested"] * 2
    assert not confirmed["reason"].str.contains("nan").any()
    assert confirmed.loc[["F6", "F7", "F9"], "kind"].tolist() == ["count", "derivation", "derivation"]
    assert "true by construction" in confirmed.loc["F7", "reason"]
    assert confirmed.loc[COMPARED, "scope"].tolist() == [f"tiny, {STEPS} steps, RL on problems"] * len(COMPARED)


def test_the_numbers_are_those_of_the_tables(confirmed):
    estimates = confirmed["estimate"]
    assert estimates["B10"] == pytest.approx(10, rel=0.2)
    assert estimates["F1"] == pytest.approx(0, abs=0.005)
    # Good LRs are those within a factor of exp(sqrt(0.04 / curvature)), in half-decade steps.
    assert estimates["F2"] == pytest.approx(4 / math.log(10) - 2 * math.sqrt(0.4) / math.log(10), abs=0.25)
    assert abs(estimates["F3"]) < 0.01
    assert abs(estimates["F4"]) < 0.01
    assert estimates["F7"] == 0
    # 300 tokens of 0.7 nats, over at most 1 bit.
    assert estimates["F9"] == pytest.approx(305 * 0.7 / math.log(2), rel=0.02)
    assert confirmed.loc["F1", "margin_high"] == pytest.approx(0.1 * (0.8 - BASE), abs=0.002)
    assert confirmed.loc["F4", "margin_high"] == pytest.approx(0.1 * (0.2 - 0.02), abs=0.002)
    assert confirmed.loc["B10", ["margin_low", "margin_high"]].tolist() == pytest.approx([6.25, 16])
    for claim in ("B10", "F1", "F2", "F3", "F4", "F5", "F9"):
        low, estimate, high = confirmed.loc[claim, ["ci_low", "estimate", "ci_high"]]
        assert low <= estimate <= high


LATE = {"train": {"reward": lambda done: BASE + 0.7 * done**3}}
SHORT_AT_LAST = {"train": {"response_length": grown(200, 300)}}
SHRINKING = {"train": {"response_length": grown(400, 250)}}


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("B10", {RANK_8: {"optimum": 2e-4, "curvature": 0.1}}),
        ("F1", {RANK_1: {"peak": 0.65}}),
        ("F2", {RANK_1: {"curvature": 0.2}, FULLFT: {"curvature": 0.008}}),
        ("F3", {RANK_8: LATE}),  # the same at last, but not on the way
        ("F4", {RANK_1: {"sets": {"aime24": 0.3, "aime25": 0.1}}}),
        ("F5", {RANK_1: SHORT_AT_LAST}),
        ("F5", {FULLFT: SHRINKING, RANK_1: SHRINKING, RANK_8: SHRINKING}),
        ("F7", {RANK_1: {"train": {"grad_norm": lambda done: 0.3}}}),
    ],
)
def test_contradicted_where_it_fails(claim, changes):
    assert judged(*world(changes), ids=[claim]).loc[claim, "verdict"] == "contradicted"


@pytest.mark.parametrize(
    ("claims", "settings", "reason"),
    [
        (COMPARED, {"every": {"offsets": (0.0,)}}, "1 paired seeds, 3 needed"),
        (["F1"], {"changes": {RANK_1: {"peak": 0.73}}}, "in error rate"),  # at the margin
        (["F4"], {"problems": 30}, "on 30 problems"),
        (["F5"], {"changes": {RANK_1: {"train": {"truncated": grown(0, 0.5)}}}}, "of its last responses cut off"),
        (COMPARED, {"without": [FULLFT]}, "no runs of FullFT"),
    ],
)
def test_inconclusive_where_noise_or_data_leave_it_open(claims, settings, reason):
    judged_claims = judged(*world(**settings), ids=claims)
    assert judged_claims["verdict"].to_dict() == dict.fromkeys(claims, "inconclusive")
    for found in judged_claims["reason"]:
        assert reason in found


def test_the_remedy_of_an_open_range_is_lrs_where_it_ends():
    claim = judged(*world({RANK_1: {"curvature": 0.05}, RANK_8: {"curvature": 0.05}}), ids=["F2"]).loc["F2"]
    assert claim["verdict"] == "inconclusive"
    assert claim["would_decide"].startswith("LRs where the ranges end")
    assert any(text.startswith("FullFT=5") for text in claim["decide_lrs"])


@pytest.mark.parametrize("tied", [(1e-4, 3e-4), (3e-5, 1e-4, 3e-4)])
def test_a_flat_top_has_no_optimal_lr(tied):
    runs, curves = world()
    top = runs["method"].eq("fullft") & runs["lr"].isin(tied)
    for name in ("final_reward", "final_valid_reward"):
        # Two tied LRs would give a parabola whose optimum lies halfway between them, with a small error.
        runs.loc[top, name] = 0.82 if len(tied) == 2 else noisy(0.82, runs.loc[top, "run_id"] + name)
    claim = judged(runs, curves, ids=["B10"]).loc["B10"]
    assert claim["verdict"] == "inconclusive"
    assert f"FullFT: LRs {', '.join(f'{lr:.2g}' for lr in tied)} are equally good" in claim["reason"]


def test_an_optimum_between_two_breakdowns_is_not_known():
    claim = judged(*world({FULLFT: {"curvature": 0.4}}), ids=["B10"]).loc["B10"]
    assert (claim["verdict"], "breaks down at both LRs beside 0.0001" in claim["reason"]) == ("inconclusive", True)
    assert claim["decide_lrs"] == ["FullFT=5.48e-05", "FullFT=0.000173"]


def test_seeds_that_agree_exactly_or_a_peak_between_lrs_decide_nothing_on_f1():
    runs, curves = world()
    rank_1 = runs["rank"].eq(1).fillna(False)
    alike = runs.assign(final_reward=runs["final_reward"].mask(rank_1 & runs["lr"].eq(1e-3), 0.8))
    claim = judged(alike, curves, ids=["F1"]).loc["F1"]
    assert (claim["verdict"], "all 4 seeds have the accuracy 0.800" in claim["reason"]) == ("inconclusive", True)
    # Between two LRs with breakdowns at both sides a parabola has its peak where no run was.
    broken = runs["final_reward"].mask(rank_1, 0.2).mask(rank_1 & runs["lr"].isin([1e-3, 3e-3]), runs["final_reward"])
    cliffs = runs.assign(final_reward=broken)
    claim = judged(cliffs, curves, ids=["F1"]).loc["F1"]
    assert (claim["verdict"], "but no LR has more than" in claim["reason"]) == ("inconclusive", True)
    assert claim["decide_lrs"][0].startswith("LoRA_r1=")


def test_nothing_is_claimed_of_arms_that_do_not_learn():
    never = {"peak": BASE + 0.04, "curvature": 0.001, "sets": {"aime24": 0.02}}
    claims = judged(*world(every=never), ids=COMPARED)
    assert not set(claims["verdict"]) & {"confirmed", "contradicted"}
    for claim in ("B10", "F1", "F2", "F3"):
        assert "has not learned" in claims.loc[claim, "reason"]
    unknown = judged(*world(base_reward=None), ids=["F1"]).loc["F1"]
    assert (unknown["verdict"], "base not known" in unknown["reason"]) == ("inconclusive", True)


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        (
            {"every": {"lrs": LRS[1:6]}},
            "sweeps with the best LR between two others and 3 seeds at these, or of 6 LRs (here at most 5 LRs of",
        ),
        (
            {"every": {"train": {"response_length": grown(2, 2)}}},
            "8 tokens or more (here 2.0 tokens on average",
        ),
        (
            {"rule_reward": 0.7},
            "15 points above the best constant answer and cheap rule (here tiny/problems: FullFT 0.80",
        ),
    ],
)
def test_a_setting_that_is_not_met_is_named(settings, missing):
    claims = judged(*world(**settings), ids=["B10", "F1", "F2", "F3", "F4"])
    assert set(claims["verdict"]) == {"setting not met"}
    for text in claims["missing"]:
        assert missing in text


def test_a_bracketed_optimum_with_seeds_around_it_needs_no_more_lrs():
    few = world(every={"lrs": LRS[1:6]})
    repeated = []
    for seed in (1, 2):
        runs = few[0][few[0]["seed"].eq(0)].assign(seed=seed)
        runs["run_id"] += f"-again-{seed}"
        for name in ("final_reward", "final_valid_reward"):
            runs[name] = noisy(runs[name], runs["run_id"] + name)
        repeated.append(runs)
    runs = pd.concat([few[0][few[0]["seed"].eq(0)], *repeated], ignore_index=True)
    assert judged(runs, few[1], ids=["F1"]).loc["F1", "verdict"] == "confirmed"


def test_problem_sets_within_reach_of_a_cheap_rule_do_not_count_beside_others():
    runs, curves = world()
    easy, _ = world(dataset="easy", rule_reward=0.75, changes={RANK_1: {"peak": 0.3}})
    both = pd.concat([runs, easy], ignore_index=True)
    claim = judged(both, curves, ids=["F1"]).loc["F1"]
    assert (claim["verdict"], "easy" in claim["reason"]) == ("confirmed", False)


def test_a_repeat_that_diverged_decides_nothing_on_curves():
    runs, curves = world()
    lost = runs["rank"].eq(1).fillna(False) & runs["seed"].eq(2)
    runs.loc[lost, ["status", "final_valid_reward", "final_reward"]] = ["diverged", math.nan, math.nan]
    claims = judged(runs, curves, ids=["F3", "F4", "F5"])
    assert set(claims["verdict"]) == {"inconclusive"}
    assert "1 seeds diverged at its best LR" in claims.loc["F3", "reason"]


def test_the_plateau_divides_the_windows():
    rewards = pd.Series(np.minimum(np.arange(100) / 40, 1.0), index=range(1, 101))
    windows = progress_windows(list(rewards.index), rewards)
    plateau = windows[3][0]
    assert plateau == pytest.approx(1 + 0.9 * 40, abs=4)
    assert windows[4][0] == plateau + (101 - plateau) // 2 + (101 - plateau) % 2
    assert (windows[0][0], windows[-1][1]) == (2, 100)
    # Where nothing rises all steps but the last lie before the plateau.
    assert progress_windows(list(rewards.index), rewards * 0)[3:] == [(100, 100)]


def test_further_sets_stand_for_aime_where_it_is_not_there():
    claim = judged(*world(every={"sets": {"longer_sums": 0.3}}), ids=["F4"]).loc["F4"]
    assert (claim["verdict"], "no AIME problems" in claim["reason"]) == ("confirmed", True)
    # With AIME in the tables they do not count.
    both = {RANK_1: {"sets": {"aime24": 0.3, "longer_sums": 0.1}}}
    beside = world(both, every={"sets": {"aime24": 0.3, "longer_sums": 0.3}})
    assert judged(*beside, ids=["F4"]).loc["F4", "verdict"] == "confirmed"
    assert judged(*world(every={"sets": {}}), ids=["F4"]).loc["F4", "verdict"] == "not tested"


def test_a_further_set_needs_its_number_of_problems_and_a_start():
    runs, curves = world()
    unknown = judged(runs, curves[curves["metric"] != "n_problems"], ids=["F4"]).loc["F4"]
    assert (unknown["verdict"], "number of problems is not known" in unknown["reason"]) == ("inconclusive", True)
    no_start = judged(runs, curves[curves["step"] > 0], ids=["F4"]).loc["F4"]
    assert (no_start["verdict"], "before and after" in no_start["reason"]) == ("inconclusive", True)


def unrewarded(after=BASE):
    """Make runs of which one never got a reward and stopped after a fifth of its steps."""
    runs, curves = world()
    first = runs.loc[0, "run_id"]
    runs.loc[0, ["status", "final_valid_reward", "final_reward", "best_reward"]] = ["unrewarded", BASE, after, BASE]
    of_first = curves["run_id"] == first
    at_train = of_first & (curves["split"] == "train")
    curves = curves[~at_train | curves["step"].le(STEPS // 5)]
    of_first = curves["run_id"] == first
    curves.loc[of_first & (curves["metric"] == "equal_groups"), "value"] = 1.0
    curves.loc[of_first & (curves["metric"] == "grad_norm"), "value"] = 0.0
    return runs, curves, first


def test_a_run_without_rewards_stays_its_base():
    runs, curves, first = unrewarded()
    claim = judged(runs, curves, ids=["F7"]).loc["F7"]
    assert claim["verdict"] == "confirmed"
    assert "of 1 runs without other steps 0 of 2 accuracies changed" in claim["reason"]
    assert first in claim["run_ids"]
    assert f"largest gradient of {len(runs) - 1 + STEPS // 5} steps" in claim["reason"]
    runs, curves, _ = unrewarded(after=BASE + 0.001)
    assert judged(runs, curves, ids=["F7"]).loc["F7", "verdict"] == "contradicted"


def test_gradients_of_0_need_others_beside_them():
    for gradients, verdict in ((lambda done: 0.0, "inconclusive"), (lambda done: 0.3 * (done > 0.5), "confirmed")):
        claim = judged(*world(every={"train": {"grad_norm": gradients}}), ids=["F7"]).loc["F7"]
        assert claim["verdict"] == verdict
    never = judged(*world(every={"train": {"equal_groups": lambda done: 0.5}}), ids=["F7"]).loc["F7"]
    assert never["verdict"] == "not tested"


@pytest.mark.parametrize(
    ("verdict", "sft"),
    [
        ("confirmed", [supervised(), supervised(dataset="hard", nats=2.0)]),
        ("contradicted", [supervised(nats=0.2)]),  # 305 tokens of 0.2 nats are 88 bits: below 100
        ("inconclusive", [supervised(offsets=(0.0,))]),
    ],
)
def test_bits_per_token_against_sft_of_the_same_model(verdict, sft):
    assert judged(*rl_and_sft(world(), *sft), ids=["F9"]).loc["F9", "verdict"] == verdict


def test_each_task_is_judged_by_its_own_claims():
    runs, curves = world()
    sft = supervised()
    alone, beside = (judged(table, curves, ids=["B10", "F1"]) for table in (runs, pd.concat([runs, sft])))
    pd.testing.assert_frame_equal(alone, beside)
    claims = judged(sft, curves)
    assert set(claims["verdict"]) == {"not tested"}
    assert "no runs of the experiment rl_math or rl_gsm8k" in claims.loc["F1", "reason"]


def test_a_set_without_any_reward_decides_nothing_but_f7():
    good, bad = world(dataset="easy"), world(dataset="hopeless")
    bad[0]["status"], bad[0]["base_reward"] = "unrewarded", 0.0
    bad[0][["final_valid_reward", "final_reward", "best_reward"]] = 0.0
    both = judged(*(pd.concat(pair) for pair in zip(good, bad, strict=True)), ids=["F1"]).loc["F1"]
    assert both["verdict"] == "confirmed"
    assert "hopeless" not in both["reason"]
    assert judged(*bad, ids=["F1"]).loc["F1", "verdict"] == "not tested"


def test_tables_without_curves_test_no_curves():
    runs, curves = world()
    for none in (pd.DataFrame(), curves.iloc[:0]):
        claims = judged(pd.concat([runs, supervised()]), none)
        assert claims.loc[["B10", "F1", "F2"], "verdict"].tolist() == ["setting not met"] * 3
        assert claims.loc[["F3", "F4", "F5", "F7", "F9"], "verdict"].tolist() == ["not tested"] * 5


def rank_1(with_head=2_753_792, without_head=2_621_440, **changes):
    rows = {
        "architecture": "llama-3.1-8b",
        "placement": "all",
        "part": "all",
        "rank": 1,
        "include_unembedding": [True, False],
        "trainable_params": [with_head, without_head],
        "base_params": 8_030_261_248,
    }
    return pd.DataFrame(rows | changes)


def test_rank_1_against_the_bits_of_math():
    claim = judged(counts=rank_1()).loc["F6"]
    assert claim["verdict"] == "confirmed"
    assert claim["estimate"] == pytest.approx(2_621_440 / 320_000)
    assert "2,621,440 without the unembedding (8.2 times)" in claim["reason"]
    assert "2,753,792 with the unembedding (8.6 times)" in claim["reason"]
    assert judged(counts=rank_1(without_head=900_000)).loc["F6", "verdict"] == "contradicted"
    for counts in (pd.DataFrame(), rank_1(rank=2), rank_1(placement="mlp"), rank_1(part="experts"), rank_1().iloc[1:]):
        assert judged(counts=counts).loc["F6", "verdict"] == "not tested"
