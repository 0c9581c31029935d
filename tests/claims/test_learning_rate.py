"""Claims B1, B3 to B9 and B11 on tables whose optima are known."""

import math

import numpy as np
import pandas as pd
import pytest

from lorabench.analysis.lr_law import LrLaw, predict_lr

from ..handmade.sft import CURVATURE, arm, tables
from . import judged, verdict_is

SEEDS = (0.0, 0.004, -0.004)


def jitter(runs, sigma):
    """Add noise to the losses of each run, the same to both splits."""
    noise = sigma * np.random.default_rng(0).standard_normal(len(runs))
    return runs.assign(**{name: runs[name] + noise for name in ("final_valid_nll", "final_test_nll")})


# One model -----------------------------------------------------------------------------------------------------------


def around(optimum):
    """Return an LR grid of thirds of decades whose middle is near the optimum but not at it."""
    return [1.1 * optimum * 2.15**step for step in (-2, -1, 0, 1, 2)]


def ranks(optima, **settings):
    """Make FullFT and LoRA arms with the given optima by rank."""
    runs, curves = tables(
        arm(rank, optimum=optimum, lrs=around(optimum), offsets=SEEDS, **settings)
        for rank, optimum in {None: 1e-4, **optima}.items()
    )
    return jitter(runs, 1e-4), curves


@pytest.mark.parametrize(
    ("claim", "optima", "verdict", "estimate"),
    [
        ("B1", {1: 5e-4, 4: 1e-3, 64: 1e-3}, "confirmed", 10),
        ("B1", {4: 1e-3, 64: 4e-4}, "contradicted", 4),
        ("B3", {1: 1e-4, 4: 1e-3, 16: 2e-3, 64: 1.3e-3}, "confirmed", 1.3),
        ("B3", {4: 1e-3, 16: 1e-3, 64: 4e-4}, "contradicted", 0.4),
        ("B4", {1: 5e-4, 4: 1e-4, 16: 1e-3, 64: 2.25e-3}, "confirmed", 3),
        ("B4", {1: 5e-4, 16: 5e-4, 64: 6.05e-4}, "right sign, below the margin", 1.1),
        ("B4", {1: 5e-4, 16: 5e-4, 64: 3.2e-4}, "contradicted", 0.8),
    ],
)
def test_ratios_of_optima(claim, optima, verdict, estimate):
    row = judged(claim, *ranks(optima))
    assert row["verdict"] == verdict
    assert row["estimate"] == pytest.approx(estimate, rel=0.01)
    assert row["ci_low"] < row["estimate"] < row["ci_high"]


def test_what_leaves_a_ratio_open():
    row = judged("B1", *ranks({4: 1e-3, 64: 1e-3}, diverges_from=1.2e-3))
    verdict_is(row, "inconclusive", "LoRA r64: no finished LR within a factor")
    runs, curves = ranks({4: 1e-3, 64: 1e-3})
    verdict_is(judged("B4", runs, curves), "inconclusive")
    verdict_is(judged("B3", runs[runs["method"] == "fullft"], curves), "not tested")
    verdict_is(judged("B3", runs[runs["rank"].fillna(4) < 64], curves), "setting not met", "fewer than two LoRA ranks")


def together(*worlds):
    """Put the tables of several worlds together."""
    return tuple(pd.concat(parts, ignore_index=True) for parts in zip(*worlds, strict=True))


def test_a_dataset_without_rank_1_leaves_its_ratio_as_it_is():
    low = ranks({1: 5e-4, 64: 1.5e-3})
    both = together(low, ranks({64: 1e-3}, dataset="second"))
    verdict_is(judged("B4", *both), "confirmed")
    assert judged("B4", *both)["estimate"] == pytest.approx(judged("B4", *low)["estimate"])


def test_the_ratio_of_ten_is_about_runs_of_more_than_100_steps():
    short, long = ranks({64: 4e-4}, steps=50), ranks({64: 1e-3}, steps=500)
    row = judged("B1", *short)
    assert (row["verdict"], row["estimate"]) == ("setting not met", pytest.approx(4, rel=0.01))
    assert row["missing"].startswith("runs of more than 100 steps (here at most 50 steps; the preset laptop_more, ")
    # Random facts, learned by heart in thousands of steps, do not count.
    facts = ranks({64: 2e-4}, dataset="facts", steps=2000, entropy_bits=100.0)
    row = judged("B1", *together(short, long, facts))
    assert (row["verdict"], row["estimate"]) == ("confirmed", pytest.approx(10, rel=0.01))
    assert judged("B1", *together(short, facts))["verdict"] == "setting not met"


# Models --------------------------------------------------------------------------------------------------------------

LAW = LrLaw(base=1e-4, multiplier=10.0, exponents={"llama": 0.78, "qwen": 0.08})
WIDE = {
    "llama-2": ("llama", 2048),
    "llama-3": ("llama", 3072),
    "llama-4": ("llama", 4096),
    "qwen-1": ("qwen3", 1024),
    "qwen-2": ("qwen3_moe", 2048),
    "qwen-4": ("qwen3", 4096),
}
FOUR = {name: WIDE[name] for name in ("llama-2", "llama-4", "qwen-1", "qwen-4")}


def world(models=WIDE, law=LAW, lora=lambda name, lr: lr, fullft=lambda name, lr: lr, sigma=1e-4, **by_model):
    """Make models whose optima follow a law, changed by functions of the model; settings are by model."""
    arms = []
    for name, (family, size) in models.items():
        for rank, method, change in ((None, "fullft", fullft), (16, "lora", lora)):
            optimum = change(name, predict_lr(law, family, size, method))
            about = {"model": name, "family": family, "hidden_size": size, "lrs": around(optimum)}
            arms.append(arm(rank, optimum=optimum, offsets=SEEDS, **(about | by_model.get(name.replace("-", "_"), {}))))
    runs, curves = tables(arms)
    return jitter(runs, sigma), curves


@pytest.mark.slow
def test_a_base_and_models_trained_from_it_count_once():
    # The ratio of one twin is 3 times too high and that of the other 3 times too low: their mean is right.
    factors = {"llama-2": 3.0, "llama-2-chat": 1 / 3}
    runs, curves = world(FOUR | {"llama-2-chat": WIDE["llama-2"]}, lora=lambda name, lr: lr * factors.get(name, 1.0))
    runs = runs.assign(base_params=runs["hidden_size"].astype(int) * 1_000_000)
    verdict_is(judged("B5", runs, curves), "confirmed", "over the mean of 4 bases")
    assert "3 bases, 4 needed" in judged("B5", runs[runs["model"] != "qwen-4"], curves)["reason"]


def test_all_hold_where_the_optima_follow_the_law():
    claims = judged(["B5", "B6", "B7", "B8", "B11"], *world())
    assert claims["verdict"].tolist() == ["confirmed"] * 4 + ["setting not met"]
    assert claims.loc[["B5", "B6", "B11"], "estimate"].tolist() == pytest.approx([1, 0, 6], abs=0.02)
    assert claims.loc["B7", "estimate"] == pytest.approx(0, abs=1e-5)
    assert claims.loc["B11", "missing"].startswith("14 models swept with FullFT and LoRA (here 6 models;")
    assert (claims["n_runs"].drop("B8") == 6 * 2 * 7).all()
    assert not claims["reason"].str.contains("nan").any()
    assert "hidden/64 would be llama-2 32, llama-3 48" in claims.loc["B6", "reason"]
    assert "base 0.0001, M 10, exponents llama 0.78, qwen 0.08" in claims.loc["B7", "reason"]


def test_one_model_off_the_mean_contradicts_that_all_are_alike():
    row = judged("B5", *world(FOUR, lora=lambda name, lr: lr * (3 if name == "qwen-1" else 1)))
    verdict_is(row, "contradicted", "4 models on instruct, batch 16, 128 steps: qwen-1 over the mean of 4 bases")
    assert row["estimate"] == pytest.approx(3 / 3 ** (1 / 4), rel=0.02)
    # A factor that all share is B1's affair.
    assert judged("B5", *world(FOUR, lora=lambda name, lr: lr / 3))["verdict"] == "confirmed"


def test_the_slope_against_the_naive_one():
    for power, verdict in ((0.5, "confirmed"), (1.0, "contradicted")):
        row = judged("B6", *world(FOUR, lora=lambda name, lr, power=power: lr * (WIDE[name][1] / 2048) ** power))
        assert (row["verdict"], row["estimate"]) == (verdict, pytest.approx(power, abs=0.03))
        assert row["margin_high"] == pytest.approx(0.7)


def test_optima_off_the_law_and_its_published_exponents_contradict():
    row = judged("B7", *world(fullft=lambda name, lr: lr * (6 if name == "llama-3" else 1)))
    assert row["verdict"] == "contradicted"
    assert row["ci_low"] > 0.005
    row = judged("B8", *world(FOUR, law=LrLaw(1e-4, 10.0, {"llama": 0.78, "qwen": 0.8})))
    assert (row["verdict"], row["estimate"]) == ("contradicted", pytest.approx(0.8, abs=0.03))
    assert "qwen: exponent" in row["reason"].split(";")[0]


def test_a_law_that_fits_but_does_not_predict_is_left_open():
    # A model at the end of a line bends it, so that the others miss it.
    def bent(name, lr):
        return lr * (3.5 if name == "qwen-4" else 1.0)

    row = judged("B7", *world(lora=bent, fullft=bent))
    assert row["verdict"] == "inconclusive"
    assert row["would_decide"].startswith("more models")


def test_noise_or_an_optimum_at_the_edge_leave_claims_open():
    claims = judged(["B5", "B6", "B7", "B8"], *world(sigma=0.1))
    assert set(claims["verdict"]) == {"inconclusive"}
    # An optimum at the edge leaves its model out.
    cut = {"lrs": [1e-2, 3e-2, 9e-2]}
    claims = judged(["B5", "B6", "B7", "B8"], *world(qwen_1=cut))
    assert claims["verdict"].to_dict() == dict.fromkeys(["B5", "B7", "B8"], "inconclusive") | {"B6": "confirmed"}
    assert claims["reason"].str.contains("edge of its grid").all()
    assert claims.loc["B5", "decide_lrs"]
    # One unresolved model can not save a claim that another contradicts.
    beyond = world(FOUR, lora=lambda name, lr: lr * (6 if name == "llama-2" else 1), qwen_1=cut)
    assert judged("B5", *beyond)["verdict"] == "contradicted"


def test_too_few_models_or_models_of_one_size_decide_nothing():
    single = judged(["B5", "B6", "B7", "B8", "B11"], *world({"llama-2": WIDE["llama-2"]}))
    assert set(single["verdict"]) == {"not tested"}
    alike = judged(["B5", "B6", "B7", "B8"], *world({f"llama-{letter}": ("llama", 2048) for letter in "abcd"}))
    verdict_is(alike.loc["B5"], "inconclusive", "one family and size")
    verdict_is(alike.loc["B6"], "inconclusive", "one hidden size")
    assert "too few hidden sizes" in alike.loc["B7", "reason"]
    assert "qwen: fewer than two hidden sizes" in alike.loc["B8", "reason"]


# Short and long runs -------------------------------------------------------------------------------------------------

LENGTHS = {50: 16.0, 100: 14.0, 1000: 10.0}


def lengths(ratios=LENGTHS, sigma=1e-4):
    """Make runs of FullFT and rank 16 whose LR ratio differs by length, with noise in the loss at each length."""
    fullft = 3e-4
    runs, _ = tables(
        arm(rank, optimum=optimum, steps=1000, offsets=SEEDS, lrs=[optimum * 2.0**step for step in range(-3, 4)])
        for rank, optimum in ((None, fullft), (16, ratios[max(ratios)] * fullft))
    )
    random, rows = np.random.default_rng(1), []
    for run in runs.to_dict("records"):
        for length, ratio in ratios.items():
            at = ratio * fullft if run["method"] == "lora" else fullft
            value = 2.5 + CURVATURE * math.log(run["lr"] / at) ** 2 + SEEDS[run["seed"]]
            value += sigma * random.standard_normal()
            rows.append({"run_id": run["run_id"], "step": length, "value": value})
    curves = pd.DataFrame(rows).assign(split="validation", metric="nll")
    final = curves[curves["step"] == max(ratios)].set_index("run_id")["value"]
    return runs.assign(final_valid_nll=runs["run_id"].map(final)), curves


@pytest.mark.slow
def test_short_runs_want_more_where_they_do():
    row = judged("B9", *lengths())
    at_100 = "at step 100 optimal LR LoRA r16 / FullFT = 14.0"
    verdict_is(row, "confirmed", at_100, "ratio at step 100 over that at the end 1.4")
    assert row["n_runs"] == 2 * 9
    verdict_is(judged("B9", *lengths(sigma=0.02)), "inconclusive")
    # A ratio beyond the band at 50 steps, and one that does not grow.
    for ratios, estimate in (({50: 30, 100: 18, 1000: 13}, 30), ({50: 16, 100: 12, 1000: 12}, 1)):
        row = judged("B9", *lengths(ratios))
        assert (row["verdict"], row["estimate"]) == ("contradicted", pytest.approx(estimate, rel=0.02))


@pytest.mark.slow
def test_short_runs_of_their_own_are_judged_by_fifteen():
    row = judged("B9", *ranks({64: 1.5e-3}, steps=50))
    verdict_is(row, "inconclusive", "50 steps, optimal LR LoRA r64 / FullFT = 15.0", "no runs of 1,000 steps or more")
    assert row["would_decide"] == "runs of 1,000 steps"
    # What is far off contradicts, whatever longer runs have.
    assert judged("B9", *together(ranks({64: 4e-4}, steps=50), lengths()))["verdict"] == "contradicted"
    assert judged("B9", *together(ranks({64: 1.5e-3}, steps=100), lengths()))["verdict"] == "confirmed"
    verdict_is(judged("B9", *ranks({64: 4e-4}, steps=400)), "not tested", "no runs of 50 to 100 steps")
