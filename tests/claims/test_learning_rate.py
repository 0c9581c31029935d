"""Claims B1, B3 to B9 and B11 on tables whose optima are known."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from lorabench.analysis.lr_law import LrLaw, predict_lr
from lorabench.claims.judge import CLAIMS as ALL
from lorabench.claims.judge import judge_claims
from lorabench.config.margins import DEFAULT_MARGINS
from lorabench.store.tables import Tables

from ..handmade.sft import CURVATURE, arm, tables

CLAIMS = {claim.id: claim for claim in ALL}
SEEDS = (0.0, 0.004, -0.004)
LOSSES = ["final_valid_nll", "final_test_nll"]


def jitter(runs, sigma, number=0):
    """Add noise to the losses of each run, the same to both splits."""
    noise = sigma * np.random.default_rng(number).standard_normal(len(runs))
    return runs.assign(**{name: runs[name] + noise for name in LOSSES})


def judged(runs, curves, *ids):
    table = judge_claims(Tables(runs, curves), [CLAIMS[name] for name in ids]).set_index("claim_id")
    return table if len(ids) > 1 else table.loc[ids[0]]


# One model -----------------------------------------------------------------------------------------------------------


def around(optimum, off=1.1):
    """Return an LR grid of half decades whose middle is near the optimum but not at it."""
    return [off * optimum * 3.0**step for step in (-2, -1, 0, 1, 2)]


def ranks(optima, fullft=1e-4, sigma=1e-4, seeds=SEEDS, **settings):
    """Make FullFT and LoRA arms with the given optima by rank."""
    arms = [arm(None, optimum=fullft, lrs=around(fullft), offsets=seeds, **settings)]
    arms += [
        arm(rank, optimum=optimum, lrs=around(optimum), offsets=seeds, **settings) for rank, optimum in optima.items()
    ]
    runs, curves = tables(arms)
    return jitter(runs, sigma), curves


@pytest.mark.parametrize(
    ("claim", "optima", "verdict", "estimate"),
    [
        ("B1", {1: 5e-4, 4: 1e-3, 64: 1e-3}, "confirmed", 10),
        ("B1", {4: 1e-3, 64: 4e-4}, "contradicted", 4),
        ("B3", {1: 1e-4, 4: 1e-3, 16: 2e-3, 64: 1.5e-3}, "confirmed", 1.5),
        ("B3", {4: 1e-3, 16: 1e-3, 64: 4e-4}, "contradicted", 0.4),
        ("B4", {1: 5e-4, 4: 1e-4, 16: 1e-3, 64: 2e-3}, "confirmed", 2),
        ("B4", {1: 5e-4, 16: 1e-3, 64: 6e-4}, "contradicted", 1.2),
    ],
)
def test_ratios_of_optima(claim, optima, verdict, estimate):
    row = judged(*ranks(optima), claim)
    assert row["verdict"] == verdict
    assert row["estimate"] == pytest.approx(estimate, rel=0.01)
    assert row["ci_low"] < row["estimate"] < row["ci_high"]
    assert row["detectable"] > 1


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"diverges_from": 1.2e-3}, "LoRA r64: no finished LR within a factor"),
    ],
)
def test_what_leaves_a_ratio_open(settings, reason):
    row = judged(*ranks({4: 1e-3, 64: 1e-3}, **settings), "B1")
    assert row["verdict"] == "inconclusive"
    assert reason in row["reason"]
    assert row["would_decide"]


def test_the_margin_is_that_of_the_preset():
    runs, curves = ranks({4: 1e-3, 64: 2.5e-3})
    wide = DEFAULT_MARGINS.model_copy(update={"lr_factor": 3.0})
    row = judge_claims(Tables(runs, curves), [CLAIMS["B1"]], wide).iloc[0]
    assert row["verdict"] == "confirmed"
    assert (row["margin_low"], row["margin_high"]) == pytest.approx((10 / 3, 30))


def test_missing_arms():
    runs, curves = ranks({4: 1e-3, 64: 1e-3})
    assert judged(runs, curves, "B4")["verdict"] == "inconclusive"
    assert judged(runs[runs["method"] == "lora"], curves, "B1")["verdict"] == "inconclusive"
    assert judged(runs[runs["method"] == "fullft"], curves, "B3")["verdict"] == "not tested"
    assert judged(runs[runs["rank"].fillna(4) < 64], curves, "B3")["verdict"] == "inconclusive"


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
NARROW = {name: (family, size // 32) for name, (family, size) in WIDE.items()}


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


def test_a_base_and_models_trained_from_it_count_once():
    twins = {"llama-2": ("llama", 2048), "llama-2-chat": ("llama", 2048), "qwen-1": ("qwen3", 1024)}
    # The ratio of one twin is 3 times too high and that of the other 3 times too low: their mean is right.
    factors = {"llama-2": 3.0, "llama-2-chat": 1 / 3}
    runs, curves = world(
        {**twins, "llama-4": ("llama", 4096), "qwen-4": ("qwen3", 4096)},
        lora=lambda name, lr: lr * factors.get(name, 1.0),
    )
    assert judged(runs, curves, "B5")["verdict"] == "contradicted"
    runs = runs.assign(base_params=runs["hidden_size"].astype(int) * 1_000_000)
    row = judged(runs, curves, "B5")
    assert row["verdict"] == "confirmed"
    assert "over the mean of 4 bases" in row["reason"]
    few = runs[runs["model"] != "qwen-4"]
    assert "3 bases, 4 needed" in judged(few, curves, "B5")["reason"]


def test_all_hold_where_the_optima_follow_the_law():
    claims = judged(*world(), "B5", "B6", "B7", "B8", "B11")
    assert claims["verdict"].to_dict() == dict.fromkeys(["B5", "B6", "B7", "B8"], "confirmed") | {
        "B11": "setting not met"
    }
    assert claims.loc["B5", "estimate"] == pytest.approx(1, abs=0.02)
    assert claims.loc["B6", "estimate"] == pytest.approx(0, abs=0.02)
    assert claims.loc["B7", ["estimate", "margin_low"]].tolist() == pytest.approx([0, 0], abs=1e-5)
    assert claims.loc["B11", "estimate"] == 6
    assert claims.loc["B11", "missing"] == (
        "14 models swept with FullFT and LoRA (here 6 models; the preset paper meets it)"
    )
    for claim in ("B5", "B6", "B7", "B8"):
        low, estimate, high = claims.loc[claim, ["ci_low", "estimate", "ci_high"]]
        assert low <= estimate <= high
    assert (claims["n_runs"].drop("B8") == 6 * 2 * 7).all()
    assert not claims["reason"].str.contains("nan").any()
    assert "hidden/64 would be llama-2 32, llama-3 48" in claims.loc["B6", "reason"]
    assert "llama: exponent 0.78" in claims.loc["B8", "reason"]
    assert "base 0.0001, M 10, exponents llama 0.78, qwen 0.08" in claims.loc["B7", "reason"]


def test_fourteen_models_are_enough_to_count():
    many = {f"llama-{number}": ("llama", 1024 + 128 * number) for number in range(14)}
    assert judged(*world(many), "B11")["verdict"] == "confirmed"


def test_small_models_are_not_the_law_s_setting_but_are_measured():
    claims = judged(*world(NARROW), "B5", "B7", "B8")
    assert claims["verdict"].to_dict() == {"B5": "confirmed", "B7": "setting not met", "B8": "setting not met"}
    assert claims.loc["B8", "missing"].count("2 hidden sizes of 1,024 or more") == 2
    assert "exponent 0.78" in claims.loc["B8", "reason"]
    # One family of large models does not make up for the other.
    half = {name: WIDE[name] if name.startswith("qwen") else NARROW[name] for name in WIDE}
    assert judged(*world(half), "B8")["missing"].startswith("2 hidden sizes of 1,024 or more in the family llama")


def test_one_model_off_the_mean_contradicts_that_all_are_alike():
    row = judged(*world(lora=lambda name, lr: lr * (3 if name == "qwen-1" else 1)), "B5")
    assert row["verdict"] == "contradicted"
    assert row["estimate"] == pytest.approx(3 / 3 ** (1 / 6), rel=0.02)
    assert row["reason"].startswith("6 models on instruct, batch 16, 128 steps: qwen-1 over the mean of 6 bases")
    # A factor that all share is B1's affair.
    assert judged(*world(lora=lambda name, lr: lr / 3), "B5")["verdict"] == "confirmed"


@pytest.mark.parametrize(("power", "verdict"), [(0.5, "confirmed"), (1.0, "contradicted")])
def test_the_slope_against_the_naive_one(power, verdict):
    row = judged(*world(lora=lambda name, lr: lr * (WIDE[name][1] / 2048) ** power), "B6")
    assert row["verdict"] == verdict
    assert row["estimate"] == pytest.approx(power, abs=0.03)
    assert row["margin_high"] == pytest.approx(0.7)


def test_optima_off_any_law_contradict_it():
    row = judged(*world(fullft=lambda name, lr: lr * (6 if name == "llama-3" else 1)), "B7")
    assert row["verdict"] == "contradicted"
    assert row["ci_low"] > 0.005


def test_a_law_that_fits_but_does_not_predict_is_left_open():
    # Without the only model of a family, nothing gives the family's exponent.
    few = {name: WIDE[name] for name in ("llama-2", "llama-3", "llama-4", "qwen-1")}
    row = judged(*world(few), "B7")
    assert row["verdict"] == "inconclusive"
    assert "unknown (too few hidden sizes) with the law fitted to the other models" in row["reason"]
    # A model at the end of a line bends it, so that the others miss it.
    bent = judged(*world(lora=_bent, fullft=_bent), "B7")
    assert bent["verdict"] == "inconclusive"
    assert bent["would_decide"].startswith("more models")


def _bent(name, lr):
    return lr * (2.4 if name == "qwen-4" else 1.0)


def test_an_exponent_far_from_the_published_one_contradicts():
    row = judged(*world(law=LrLaw(1e-4, 10.0, {"llama": 0.78, "qwen": 0.8})), "B8")
    assert row["verdict"] == "contradicted"
    assert row["estimate"] == pytest.approx(0.8, abs=0.03)
    assert "qwen: exponent" in row["reason"].split(";")[0]


def test_noise_leaves_all_open():
    claims = judged(*world(sigma=0.1), "B5", "B6", "B7", "B8")
    assert set(claims["verdict"]) == {"inconclusive"}
    assert claims["would_decide"].notna().all()


def test_an_optimum_at_the_edge_leaves_its_model_out():
    cut = {"lrs": [1e-2, 3e-2, 9e-2]}
    claims = judged(*world(qwen_1=cut), "B5", "B6", "B7", "B8")
    assert claims["verdict"].to_dict() == dict.fromkeys(["B5", "B7", "B8"], "inconclusive") | {"B6": "confirmed"}
    assert claims["reason"].str.contains("edge of its grid").all()
    assert claims.loc["B5", "decide_lrs"]
    # One unresolved model can not save a claim that another contradicts.
    beyond = world(lora=lambda name, lr: lr * (6 if name == "llama-2" else 1), qwen_1=cut)
    assert judged(*beyond, "B5")["verdict"] == "contradicted"


def test_too_few_models_decide_nothing():
    three = {name: WIDE[name] for name in ("llama-2", "llama-3", "qwen-1")}
    claims = judged(*world(three), "B5", "B6", "B7")
    assert claims["verdict"].to_dict() == {"B5": "inconclusive", "B6": "confirmed", "B7": "inconclusive"}
    assert "3 bases, 4 needed" in claims.loc["B5", "reason"]
    single = judged(*world({"llama-2": WIDE["llama-2"]}), "B5", "B6", "B7", "B8", "B11")
    assert set(single["verdict"]) == {"not tested"}


def test_models_of_one_size_do_not_show_that_size_does_not_matter():
    claims = judged(*world({f"llama-{letter}": ("llama", 2048) for letter in "abcd"}), "B5", "B6", "B7", "B8")
    assert set(claims.drop(["B7", "B8"])["verdict"]) == {"inconclusive"}
    assert "one family and size" in claims.loc["B5", "reason"]
    assert "one hidden size" in claims.loc["B6", "reason"]
    assert "too few hidden sizes" in claims.loc["B7", "reason"]
    assert "qwen: fewer than two hidden sizes" in claims.loc["B8", "reason"]


# Short and long runs -------------------------------------------------------------------------------------------------

LENGTHS = {50: 16.0, 100: 14.0, 1000: 10.0}


def lengths(ratios=LENGTHS, sigma=1e-4, shared=0.0, steps=1000, fullft=3e-4, seeds=SEEDS):
    """Make runs of FullFT and rank 16 whose LR ratio differs by length.

    `sigma` is the noise of a loss at a length, and `shared` the noise of a run that all its lengths have.
    """
    full = ratios[max(ratios)] * fullft
    runs, _ = tables(
        arm(rank, optimum=optimum, steps=steps, offsets=seeds, lrs=[optimum * 2.0**step for step in range(-3, 4)])
        for rank, optimum in ((None, fullft), (16, full))
    )
    random = np.random.default_rng(1)
    luck = dict(zip(runs["run_id"], shared * random.standard_normal(len(runs)), strict=True))
    rows = []
    for run in runs.to_dict("records"):
        for length, ratio in ratios.items():
            at = ratio * fullft if run["method"] == "lora" else fullft
            value = 2.5 + CURVATURE * math.log(run["lr"] / at) ** 2 + seeds[run["seed"]] + luck[run["run_id"]]
            value += sigma * random.standard_normal()
            rows.append({"run_id": run["run_id"], "step": length, "split": "validation", "metric": "nll"})
            rows[-1]["value"] = value
    curves = pd.DataFrame(rows)
    final = curves[curves["step"] == max(ratios)].set_index("run_id")["value"]
    return runs.assign(final_valid_nll=runs["run_id"].map(final)), curves


def test_short_runs_want_more_where_they_do():
    row = judged(*lengths(), "B9")
    assert row["verdict"] == "confirmed"
    assert "at 1000 steps, by validation losses: optimal LR LoRA r16 / FullFT = 10.0" in row["reason"]
    assert "at step 100 optimal LR LoRA r16 / FullFT = 14.0" in row["reason"]
    assert "ratio at step 100 over that at the end 1.4" in row["reason"]
    assert row["n_runs"] == 2 * 9
    assert row["fact"] == CLAIMS["B1"].fact


@pytest.mark.parametrize(
    ("ratios", "estimate"),
    [
        pytest.param({50: 30, 100: 18, 1000: 13}, 30, id="beyond the band at 50 steps"),
        pytest.param({50: 16, 100: 12, 1000: 12}, 1, id="no growth"),
    ],
)
def test_short_runs_contradict(ratios, estimate):
    row = judged(*lengths(ratios), "B9")
    assert row["verdict"] == "contradicted"
    assert row["estimate"] == pytest.approx(estimate, rel=0.02)


def test_short_runs_left_open():
    assert judged(*lengths(sigma=0.02), "B9")["verdict"] == "inconclusive"


def test_the_errors_of_two_lengths_of_the_same_runs_cancel():
    def width(row):
        return math.log(row["ci_high"] / row["ci_low"])

    # With nothing but noise that both lengths share, growth is known far better than either ratio.
    shared = judged(*lengths({50: 10, 1000: 10}, sigma=1e-5, shared=0.01), "B9")
    apart = judged(*lengths({50: 10, 1000: 10}, sigma=0.01), "B9")
    assert shared["estimate"] == pytest.approx(1, abs=0.01)
    assert width(shared) < 0.3 * width(apart)


def test_one_short_length_is_enough_and_none_is_not_tested():
    runs, curves = lengths()
    assert judged(runs, curves[curves["step"] != 100], "B9")["verdict"] == "confirmed"
    none = judged(runs, curves[curves["step"] == 1000], "B9")
    assert none["verdict"] == "not tested"
    assert "no validation losses of both methods at step 50" in none["reason"]
    assert judged(runs, pd.DataFrame(), "B9")["verdict"] == "not tested"
    assert judged(runs.assign(steps=40), curves, "B9")["verdict"] == "not tested"
    assert judged(runs[runs["method"] == "lora"], curves, "B9")["verdict"] == "inconclusive"
