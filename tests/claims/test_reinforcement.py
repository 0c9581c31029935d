from __future__ import annotations

import math

import pandas as pd
import pytest

from lorabench.claims.catalog import CLAIMS
from lorabench.claims.judge import judge_claims
from lorabench.tables.tables import Tables

from ..handmade.rl import BASE, LRS, OFFSETS, STEPS, UNPAIRED, arm, grown
from ..handmade.sft import arm as sft_arm
from ..handmade.sft import tables
from ..handmade.sft import tables as sft_tables

IDS = ["B10", "E5", "F1", "F2", "F3", "F4", "F5", "F6", "F7", "F8", "F9"]
ON_RUNS = [name for name in IDS if name not in ("F6", "F8")]
SWEEPS = ["B10", "F1", "F2", "F3", "F4", "F5"]  # of FullFT and LoRA on all layers

PER_RANK = {"attn": 100, "mlp": 200, "all": 300}  # parameters

# A world in which every claim holds, arm by arm, by rank and placement; a test changes some of them.
FULLFT, RANK_1, RANK_8 = (None, "all"), (1, "all"), (8, "all")
WORLD = {
    FULLFT: {"optimum": 1e-4, "curvature": 0.1},
    RANK_1: {"optimum": 8e-4, "curvature": 0.02},
    RANK_8: {"optimum": 9e-4, "curvature": 0.02},
    (17, "attn"): {"optimum": 1e-3, "peak": 0.7},
    (8, "mlp"): {"optimum": 1e-3},
}


def world(changes=None, every=None, without=(), **columns):
    """Make the tables of `WORLD`, with the settings of some arms changed, or of every arm."""
    arms = []
    for (rank, placement), settings in WORLD.items():
        if (rank, placement) in without:
            continue
        changed = settings | (every or {}) | (changes or {}).get((rank, placement), {})
        count = 10_000 if rank is None else PER_RANK[placement] * rank
        arms.append(arm(rank, placement=placement, trainable_params=count, **changed, **columns))
    return tables(arms)


def supervised(nats=0.7, model="tiny", dataset="instruct", **settings):
    """Make FullFT's SFT runs, with the loss of the first epoch in nats per token."""
    epoch = {"first_epoch_nats": nats * 1e4, "first_epoch_scored_tokens": 10_000}
    runs, _ = sft_tables([sft_arm(optimum=3e-4, model=model, dataset=dataset, **settings, **epoch)])
    runs["first_epoch_nats"] += runs["seed"].astype(float)
    return runs


def judged(runs=None, curves=None, counts=None, ids=IDS, claims=CLAIMS):
    tables_read = Tables(*(pd.DataFrame() if table is None else table for table in (runs, curves, None, counts)))
    return judge_claims(tables_read, [claim for claim in claims if claim.id in ids]).set_index("claim_id")


def rl_and_sft(tables_of_rl, *sft):
    runs, curves = tables_of_rl
    return pd.concat([runs, *(sft or (supervised(),))]), curves


@pytest.fixture(scope="module")
def confirmed():
    return judged(*rl_and_sft(world()))


def test_every_claim_on_runs_is_confirmed_where_all_hold(confirmed):
    assert list(confirmed.index) == IDS
    assert confirmed.loc[ON_RUNS, "verdict"].to_dict() == dict.fromkeys(ON_RUNS, "confirmed")
    assert confirmed.loc[["F6", "F8"], "verdict"].tolist() == ["not tested"] * 2
    assert not confirmed["reason"].str.contains("nan").any()


def test_the_numbers_are_those_of_the_tables(confirmed):
    estimates = confirmed["estimate"]
    assert estimates["B10"] == pytest.approx(9)
    assert estimates["F1"] == pytest.approx(0.03 * math.log(2) ** 2 - 0.0, abs=0.02)
    assert estimates["F3"] == pytest.approx(-estimates["F1"], abs=0.001)
    assert estimates["F4"] == pytest.approx(0)
    assert estimates["F5"] == pytest.approx(1)
    assert estimates["F7"] == 0
    # 300 tokens of 0.7 nats, over at most 1 bit.
    assert estimates["F9"] == pytest.approx(305 * 0.7 / math.log(2), rel=0.02)
    for claim in ("B10", "F1", "F2", "F3", "F4", "F5", "F9"):
        low, estimate, high = confirmed.loc[claim, ["ci_low", "estimate", "ci_high"]]
        assert low - 1e-9 <= estimate <= high + 1e-9
    assert confirmed.loc["B10", "n_runs"] == 2 * (len(LRS) + len(OFFSETS) - 1)


def test_reasons_name_problems_ranks_and_accuracies(confirmed):
    reasons = confirmed["reason"]
    for claim in [*SWEEPS, "E5", "F9"]:
        assert reasons[claim].startswith("tiny/problems: ")
    assert "LoRA r8 / FullFT" in reasons["B10"]
    assert "FullFT 0.800, base 0.100" in reasons["F1"]
    for claim in ("F2", "F3", "F4", "F5"):
        assert "LoRA r1: " in reasons[claim]
        assert "LoRA r8: " in reasons[claim]
    assert "aime24" in reasons["F4"]
    assert "binomial margin" in reasons["F4"]
    assert "go back or check" in reasons["F5"]
    assert "attention alone is worse? confirmed" in reasons["E5"]


LOST = {"train": {"reward": lambda done: 0.2}}
SHORT_AT_LAST = {"train": {"response_length": grown(200, 300)}}
SHRINKING = {"train": {"response_length": grown(400, 200)}}
MLP_ALL = {"peak": 0.7}


@pytest.mark.parametrize(
    ("claims", "changes"),
    [
        (["B10"], {RANK_8: {"optimum": 2e-4}}),
        (["B10"], {RANK_8: {"optimum": 2.8e-3, "curvature": 0.08}, FULLFT: {"optimum": 4e-5}}),
        (["E5"], {(17, "attn"): {"peak": 0.8}}),
        (["E5"], {(8, "mlp"): {"peak": 0.72}, (17, "attn"): {"peak": 0.65}}),
        (["F1"], {RANK_1: {"peak": 0.7}}),
        (["F2"], {RANK_1: {"curvature": 0.1}, FULLFT: {"curvature": 0.01}}),
        (["F2"], {RANK_8: {"curvature": 0.1}, FULLFT: {"curvature": 0.01}}),
        (["F3"], {RANK_1: LOST}),
        (["F4"], {RANK_1: {"sets": {"aime24": 0.3, "aime25": 0.05}}}),
        (["F5"], {RANK_1: SHORT_AT_LAST}),
        (["F5"], {RANK_1: {"train": {"response_length": lambda done: 0.0}}}),
        (["F5"], {FULLFT: SHRINKING, RANK_1: SHRINKING, RANK_8: SHRINKING}),
        (["F7"], {RANK_1: {"train": {"grad_norm": lambda done: 0.3}}}),
    ],
)
def test_contradicted_where_it_fails(claims, changes):
    verdicts = judged(*world(changes), ids=claims)["verdict"]
    assert verdicts[claims].tolist() == ["contradicted"] * len(claims)


def test_a_better_rank_1_reaches_the_peak_too():
    claim = judged(*world({RANK_1: {"peak": 0.9}}), ids=["F1"]).loc["F1"]
    assert claim["verdict"] == "confirmed"
    assert claim["estimate"] < -0.05


@pytest.mark.parametrize(
    ("claims", "settings"),
    [
        ([*SWEEPS, "E5"], {"every": {"offsets": (0.0,)}}),
        (["E5", "F1", "F3", "F4"], {"every": {"offsets": (0.0, 0.01)}}),
        ([*SWEEPS, "E5"], {"every": {"lrs": LRS[5:]}}),
        (["B10", "F2"], {"every": {"offsets": (0.0, 0.2, -0.2)}}),
        (["F1"], {"changes": {RANK_1: {"peak": 0.78, "offsets": UNPAIRED}}}),
        (["E5"], {"changes": {(17, "attn"): {"peak": 0.785, "offsets": UNPAIRED}}}),
        (["F2"], {"changes": {RANK_1: {"curvature": 0.08}}}),
        (["F3"], {"changes": {RANK_1: {"offsets": (0.0, -0.04, 0.04)}}}),
        (["F4"], {"every": {"sets": {"aime24": 0.02}}}),
        (["F5"], {"changes": {RANK_1: {"train": {"truncated": grown(0, 0.5)}}}}),
        (["F1", "F3", "F4", "F5", "F2", "B10"], {"without": [FULLFT]}),
        (["F1"], {"without": [RANK_1]}),
        (["B10"], {"without": [RANK_8]}),
        (["E5"], {"without": [(17, "attn")]}),
    ],
)
def test_inconclusive_where_noise_or_data_leave_it_open(claims, settings):
    judged_claims = judged(*world(**settings), ids=claims)
    assert judged_claims.loc[claims, "verdict"].tolist() == ["inconclusive"] * len(claims)
    assert not judged_claims["reason"].str.contains("nan").any()


def test_luck_shared_by_both_arms_is_no_ground_for_equality():
    claims = judged(*world(every={"offsets": (0.0, 0.15, -0.15)}), ids=["F1", "F3"])
    for claim in ("F1", "F3"):
        assert claims.loc[claim, "verdict"] == "inconclusive"
        assert "is above 0.1" in claims.loc[claim, "reason"]


def test_nothing_is_claimed_of_arms_that_do_not_learn():
    never = {"peak": BASE + 0.005, "curvature": 0.0001, "sets": {"aime24": 0.02}}
    claims = judged(*world(every=never))
    assert not set(claims.loc[[*SWEEPS, "E5"], "verdict"]) & {"confirmed", "contradicted"}
    for claim in ("B10", "F1", "F2", "F3", "E5"):
        assert "has not learned" in claims.loc[claim, "reason"]
    unknown = judged(*world(base_reward=None), ids=["F1"]).loc["F1"]
    assert (unknown["verdict"], "base not known" in unknown["reason"]) == ("inconclusive", True)


def test_accuracies_of_1_decide_nothing():
    claims = judged(*world(every={"peak": 1.2}), ids=["B10", "F1", "F2"])
    assert claims.loc[["B10", "F1", "F2"], "verdict"].tolist() == ["inconclusive"] * 3
    assert "all seeds alike" in claims.loc["B10", "reason"]


def test_a_repeat_that_diverged_decides_nothing():
    runs, curves = world(every={"offsets": (0.0, 0.01, -0.01, 0.002)})
    lost = runs["rank"].eq(1).fillna(False) & runs["seed"].eq(2)
    runs.loc[lost, ["status", "final_valid_reward", "final_reward"]] = ["diverged", math.nan, math.nan]
    claims = judged(runs, curves, ids=["F1", "F3", "F4", "F5"])
    assert set(claims["verdict"]) == {"inconclusive"}
    assert "1 repeats at the best LR diverged" in claims.loc["F1", "reason"]


def test_a_range_beyond_its_grid_may_be_wider_but_not_narrower():
    def claim(fullft, lora):
        return judged(*world({FULLFT: fullft, RANK_1: lora, RANK_8: lora}), ids=["F2"]).loc["F2"]

    wide, narrow = {"curvature": 0.004}, {"curvature": 0.2}
    assert claim(narrow, wide)["verdict"] == "confirmed"
    assert claim(wide, narrow)["verdict"] == "contradicted"
    # The grids end before the good LRs do.
    short_fullft = claim({"curvature": 0.02, "lrs": LRS[1:4]}, {"curvature": 0.006})
    short_lora = claim({"curvature": 0.006}, {"curvature": 0.02, "lrs": LRS[3:6]})
    for cut in (short_fullft, short_lora):
        assert cut["verdict"] == "inconclusive"
        assert "at least" in cut["reason"]
        assert "narrower range may go on beyond its grid" in cut["reason"]


def test_further_sets_stand_for_aime_where_it_is_not_there():
    claim = judged(*world(every={"sets": {"longer_sums": 0.3}}), ids=["F4"]).loc["F4"]
    assert claim["verdict"] == "confirmed"
    assert "longer_sums" in claim["reason"]
    assert "no AIME problems" in claim["reason"]
    # With AIME in the tables they do not count.
    both = {RANK_1: {"sets": {"aime24": 0.3, "longer_sums": 0.1}}}
    beside = world(both, every={"sets": {"aime24": 0.3, "longer_sums": 0.3}})
    assert judged(*beside, ids=["F4"]).loc["F4", "verdict"] == "confirmed"
    assert judged(*world(every={"sets": {}}), ids=["F4"]).loc["F4", "verdict"] == "not tested"


def test_few_samples_are_no_ground_for_equality():
    runs, curves = world()
    curves.loc[curves["metric"] == "n_samples", "value"] = 30
    claim = judged(runs, curves, ids=["F4"]).loc["F4"]
    assert (claim["verdict"], "is above 0.1" in claim["reason"]) == ("inconclusive", True)
    unknown = judged(runs, curves[curves["metric"] != "n_samples"], ids=["F4"]).loc["F4"]
    assert (unknown["verdict"], "samples not known" in unknown["reason"]) == ("inconclusive", True)
    no_start = judged(runs, curves[curves["step"] > 0], ids=["F4"]).loc["F4"]
    assert (no_start["verdict"], "before and after" in no_start["reason"]) == ("inconclusive", True)


def test_bare_answers_are_no_chains_of_thought():
    claims = judged(*rl_and_sft(world(every={"train": {"response_length": grown(4, 6)}})), ids=["F1", "F5", "F9"])
    assert claims.loc[["F5", "F9"], "verdict"].tolist() == ["not tested"] * 2
    assert "6 tokens at most" in claims.loc["F5", "reason"]
    assert "5.05 tokens per episode" in claims.loc["F9", "reason"]
    assert claims.loc["F1", "verdict"] == "confirmed"


def unrewarded(after=BASE, with_steps=True):
    """Make runs of which one never got a reward and stopped after a fifth of its steps."""
    runs, curves = world()
    first = runs.loc[0, "run_id"]
    runs.loc[0, ["status", "final_valid_reward", "final_reward", "best_reward"]] = ["unrewarded", BASE, after, BASE]
    of_first = curves["run_id"] == first
    at_train = of_first & (curves["split"] == "train")
    curves = curves[~at_train | (curves["step"].le(STEPS // 5) & with_steps)]
    of_first = curves["run_id"] == first
    curves.loc[of_first & (curves["metric"] == "equal_groups"), "value"] = 1.0
    curves.loc[of_first & (curves["metric"] == "grad_norm"), "value"] = 0.0
    return runs, curves, first


@pytest.mark.parametrize("with_steps", [True, False])
def test_a_run_without_rewards_stays_its_base(with_steps):
    runs, curves, first = unrewarded(with_steps=with_steps)
    claim = judged(runs, curves, ids=["F7"]).loc["F7"]
    assert claim["verdict"] == "confirmed"
    assert "of 1 runs without other steps 0 of 2 accuracies changed" in claim["reason"]
    assert first in claim["run_ids"]
    equal = len(runs) - 1 + (STEPS // 5 if with_steps else 0)
    assert f"largest gradient of {equal} steps" in claim["reason"]
    runs, curves, _ = unrewarded(after=BASE + 0.001, with_steps=with_steps)
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
        ("contradicted", [supervised(), supervised(dataset="easy", nats=0.2)]),
        ("inconclusive", [supervised(model="other")]),
        ("inconclusive", [supervised(offsets=(0.0,))]),
        ("inconclusive", [supervised(entropy_bits=1e4)]),
        ("not tested", [supervised().drop(columns="first_epoch_nats")]),
    ],
)
def test_bits_per_token_against_sft_of_the_same_model(verdict, sft):
    assert judged(*rl_and_sft(world(), *sft), ids=["F9"]).loc["F9", "verdict"] == verdict


def test_bits_of_a_reward_are_reported():
    claim = judged(*rl_and_sft(world(every={"train": {"reward": lambda done: 0.5}})), ids=["F9"]).loc["F9"]
    assert "at most 1 bit each (1.00 by the mean rewards)" in claim["reason"]


def test_each_task_is_judged_by_its_own_claims():
    runs, curves = world()
    sft = supervised()
    others = ["A7", "B2", "E2", "G2", "N1"]
    assert {claim.id for claim in CLAIMS if claim.task == "rl"} == set(ON_RUNS)
    beside = pd.concat([sft, runs])
    pd.testing.assert_frame_equal(
        judged(beside, curves, ids=others, claims=CLAIMS),
        judged(sft.reindex(columns=beside.columns), curves, ids=others, claims=CLAIMS),
    )
    alone, with_sft = judged(runs, curves), judged(pd.concat([runs, sft]), curves)
    pd.testing.assert_frame_equal(alone.drop("F9"), with_sft.drop("F9"))
    claims = judged(sft, curves)
    assert set(claims["verdict"]) == {"not tested"}
    assert "no runs of the experiment rl_math or rl_gsm8k" in claims.loc["F1", "reason"]


def test_losses_named_as_rewards_are_not_tested():
    runs, curves = world()
    claims = judged(runs.drop(columns="final_reward"), curves)
    assert set(claims["verdict"]) == {"not tested"}
    assert claims.loc["F1", "reason"] == "the runs table has no column final_reward"
    assert judged(runs.drop(columns="best_reward"), curves, ids=["E5"]).loc["E5", "verdict"] == "not tested"


def test_only_runs_of_the_claims_experiment_are_read():
    runs, curves = world()
    claims = judged(runs.assign(experiments="rl_gsm8k"), curves)["verdict"]
    assert claims[["B10", "F1", "F2"]].tolist() == ["confirmed"] * 3
    assert claims[["E5", "F3", "F4", "F5", "F7"]].tolist() == ["not tested"] * 5


def test_problem_sets_are_judged_apart():
    good, bad = world(dataset="easy"), world({RANK_1: {"peak": 0.7}}, dataset="hard")
    claims = judged(*(pd.concat(both) for both in zip(good, bad, strict=True)), ids=["F1"])
    assert claims.loc["F1", "verdict"] == "contradicted"
    assert claims.loc["F1", "reason"].startswith("tiny/hard")
    assert "tiny/easy" in claims.loc["F1", "reason"]


def test_a_set_without_any_reward_decides_nothing_but_f7():
    good, bad = world(dataset="easy"), world(dataset="hopeless")
    bad[0]["status"], bad[0]["base_reward"] = "unrewarded", 0.0
    bad[0][["final_valid_reward", "final_reward", "best_reward"]] = 0.0
    both = judged(*(pd.concat(pair) for pair in zip(good, bad, strict=True)), ids=["F1"]).loc["F1"]
    assert both["verdict"] == "confirmed"
    assert "hopeless" not in both["reason"]
    assert judged(*bad, ids=["F1"]).loc["F1", "verdict"] == "not tested"


def test_best_rewards_are_compared_by_placement():
    # Only the best evaluations differ.
    changes = {
        (17, "attn"): {"peak": 0.8, "best_gain": 0.0},
        (8, "mlp"): {"best_gain": 0.1},
        RANK_8: {"best_gain": 0.1},
    }
    assert judged(*world(changes), ids=["E5"]).loc["E5", "verdict"] == "confirmed"


def test_tables_without_curves_test_no_curves():
    runs, curves = world()
    for none in (pd.DataFrame(), curves.iloc[:0]):
        claims = judged(pd.concat([runs, supervised()]), none)
        assert claims.loc[["B10", "E5", "F1", "F2"], "verdict"].tolist() == ["confirmed"] * 4
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
    assert claim["estimate"] == pytest.approx(2_753_792 / 320_000)
    assert "2,621,440 without the unembedding (8.2 times)" in claim["reason"]
    assert "2,753,792 with the unembedding (8.6 times)" in claim["reason"]
    assert judged(counts=rank_1(without_head=300_000)).loc["F6", "verdict"] == "contradicted"


@pytest.mark.parametrize(
    "counts", [pd.DataFrame(), rank_1(rank=2), rank_1(placement="mlp"), rank_1(part="experts"), rank_1().iloc[1:]]
)
def test_without_that_count_it_is_not_tested(counts):
    assert judged(counts=counts).loc["F6", "verdict"] == "not tested"
