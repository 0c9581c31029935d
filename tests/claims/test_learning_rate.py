"""Claims B5 to B11 on tables built to confirm, to contradict, and to leave them open; B1 to B4 are in test_claims."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from lorabench.analysis.lr_law import LrLaw, predict_lr
from lorabench.claims.catalog import CLAIMS
from lorabench.claims.judge import judge_claims
from lorabench.tables.tables import Tables

from ..handmade.sft import CURVATURE, OFFSETS, arm, tables

ACROSS = ["B5", "B6", "B7", "B8", "B11"]
LAW = LrLaw(base=1e-4, multiplier=10.0, exponents={"llama": 0.78, "qwen": 0.08})
MODELS = {
    "llama-64": ("llama", 64),
    "llama-128": ("llama", 128),
    "llama-256": ("llama", 256),
    "qwen-64": ("qwen3", 64),
    "qwen-128": ("qwen3_moe", 128),
}
NOISY = (0.0, 0.06, -0.06)


def judged(runs, curves, ids):
    table = judge_claims(Tables(runs, curves), [claim for claim in CLAIMS if claim.id in ids])
    return table.set_index("claim_id")


def swept(name, family, hidden_size, rank, optimum, off_grid=1.0, **settings):
    """Make an arm whose grid holds its optimum, or lies beside it by a factor."""
    lrs = [off_grid * optimum * factor for factor in (1 / 9, 1 / 3, 1, 3, 9)]
    settings = {"lrs": lrs, "model": name, "family": family, "hidden_size": hidden_size} | settings
    return arm(rank, optimum=optimum, **settings)


def world(models=MODELS, law=LAW, lora=lambda name, lr: lr, fullft=lambda name, lr: lr, every=None, **by_model):
    """Make models whose optima follow a law, changed by functions of the model; settings are for all, or by model."""
    arms = []
    for name, (family, hidden_size) in models.items():
        settings = (every or {}) | by_model.get(name.replace("-", "_"), {})
        for rank, method, change in ((None, "fullft", fullft), (16, "lora", lora)):
            optimum = change(name, predict_lr(law, family, hidden_size, method))
            arms.append(swept(name, family, hidden_size, rank, optimum, **settings))
    return tables(arms)


def test_all_hold_where_the_optima_follow_the_law():
    claims = judged(*world(), ACROSS)
    assert claims["verdict"].to_dict() == dict.fromkeys(ACROSS, "confirmed")
    assert claims.loc["B5", "estimate"] == pytest.approx(10)
    assert claims.loc["B6", "estimate"] == pytest.approx(0, abs=1e-9)
    assert claims.loc["B7", "estimate"] == pytest.approx(0, abs=1e-6)
    assert claims.loc["B11", "estimate"] == 5
    for claim in ("B5", "B6", "B7", "B8"):
        low, estimate, high = claims.loc[claim, ["ci_low", "estimate", "ci_high"]]
        assert low - 1e-9 <= estimate <= high + 1e-9
    assert (claims["n_runs"] == 5 * 2 * 7).all()
    assert not claims["reason"].str.contains("nan").any()


def test_reasons_name_models_data_and_numbers():
    claims = judged(*world(), ACROSS)["reason"]
    assert claims.str.contains("5 models on instruct, batch 16, 128 steps").all()
    for claim in ("B5", "B6", "B11"):
        assert all(name in claims[claim] for name in MODELS)
    assert "hidden/64 would be llama-64 1, llama-128 2" in claims["B6"]
    assert "llama: exponent 0.78" in claims["B8"]
    assert "qwen: exponent 0.08" in claims["B8"]
    assert "published constants" in claims["B7"]
    assert "exponents llama 0.78, qwen 0.08" in claims["B7"]


def test_the_published_constants_are_held_against_the_same_losses():
    same = LrLaw(base=5e-5, multiplier=10.0, exponents={"llama": 0.781, "qwen": 0.0775})
    assert "0.00% [0.00%, 0.00%] with the published constants" in judged(*world(law=same), ["B7"]).loc["B7", "reason"]
    far = LrLaw(base=5e-3, multiplier=10.0, exponents={"llama": 0.781, "qwen": 0.0775})
    claim = judged(*world(law=far), ["B7"]).loc["B7"]
    assert "unknown (a predicted LR lies outside of its grid) with the published constants" in claim["reason"]
    assert claim["verdict"] == "confirmed"


def test_one_model_beyond_the_band_contradicts_that_all_are_alike():
    claims = judged(*world(lora=lambda name, lr: lr * (2.5 if name == "qwen-64" else 1)), ["B5", "B11"])
    assert claims["verdict"].to_dict() == {"B5": "contradicted", "B11": "contradicted"}
    assert claims.loc["B5", "estimate"] == pytest.approx(25)
    assert "furthest from 10: qwen-64" in claims.loc["B5", "reason"]


def test_a_ratio_that_follows_the_width_contradicts_though_all_are_in_the_band():
    wide = {name: settings for name, settings in MODELS.items() if name != "llama-256"} | {"qwen-256": ("qwen3", 256)}
    claims = judged(*world(wide, lora=lambda name, lr: lr * (int(name.rsplit("-")[1]) / 128) ** 0.5), ["B5", "B6"])
    assert claims.loc["B5", "verdict"] == "contradicted"
    assert "slope of log ratio on log hidden size 0.50" in claims.loc["B5", "reason"]
    assert claims.loc["B6", "verdict"] == "confirmed"


@pytest.mark.parametrize("power", [1.0, 1.5])
def test_the_naive_ratio_contradicts_that_it_is_wrong(power):
    claim = judged(*world(lora=lambda name, lr: lr * (int(name.rsplit("-")[1]) / 128) ** power), ["B6"]).loc["B6"]
    assert claim["verdict"] == "contradicted"
    assert claim["estimate"] == pytest.approx(power)


def test_optima_off_any_law_contradict_it():
    claim = judged(*world(fullft=lambda name, lr: lr * (6 if name == "llama-128" else 1)), ["B7"]).loc["B7"]
    assert claim["verdict"] == "contradicted"
    assert claim["ci_low"] > 0.005
    assert claim["reason"].split("FullFT")[0].count("LoRA") == 0


def test_a_law_that_fits_but_does_not_predict_is_left_open():
    # One exponent can follow either width of qwen. Fitted to all it follows one, fitted to the others neither.
    claim = judged(*world(lora=_qwen_off, fullft=_qwen_off), ["B7"]).loc["B7"]
    assert claim["verdict"] == "inconclusive"
    assert claim["estimate"] > 0.005


def _qwen_off(name, lr):
    return lr * (1.6 if name == "qwen-64" else 1.0)


@pytest.mark.parametrize(
    ("exponents", "family"), [({"llama": 0.1, "qwen": 0.08}, "llama"), ({"llama": 0.78, "qwen": 0.8}, "qwen")]
)
def test_an_exponent_far_from_the_published_one_contradicts(exponents, family):
    law = LrLaw(1e-4, 10.0, exponents)
    claim = judged(*world(law=law), ["B8"]).loc["B8"]
    assert claim["verdict"] == "contradicted"
    assert claim["estimate"] == pytest.approx(exponents[family])
    assert f"{family}: exponent" in claim["reason"].split(";")[0]


def test_noise_leaves_all_open():
    claims = judged(*world(every={"offsets": NOISY}), ACROSS)
    assert claims.loc[["B5", "B7", "B8", "B11"], "verdict"].tolist() == ["inconclusive"] * 4
    slope = judged(*world(every={"offsets": (0.0, 0.3, -0.3)}), ["B6"]).loc["B6"]
    assert slope["verdict"] == "inconclusive"


def test_one_seed_decides_nothing():
    claims = judged(*world(every={"offsets": (0.0,)}), ACROSS)
    assert set(claims["verdict"]) == {"inconclusive"}
    assert claims["reason"].str.contains("noise not measured|optima resolved").all()


def test_a_coarse_grid_cannot_show_a_law_by_linear_interpolation():
    claim = judged(*world(every={"off_grid": 3**0.3}), ["B7"]).loc["B7"]
    assert claim["verdict"] == "inconclusive"
    assert "grids too coarse" in claim["reason"]


def test_an_optimum_at_the_edge_leaves_its_model_out():
    cut = {"lrs": [1e-2, 3e-2, 9e-2]}
    claims = judged(*world(qwen_64=cut), ACROSS)
    assert claims["verdict"].to_dict() == dict.fromkeys(ACROSS, "inconclusive") | {"B6": "confirmed"}
    assert claims["reason"].str.contains("edge of its grid").all()
    assert claims.loc["B11", "estimate"] == 4
    # One unresolved model can not save a claim that another contradicts.
    beyond = world(lora=lambda name, lr: lr * (4 if name == "llama-64" else 1), qwen_64=cut)
    assert judged(*beyond, ["B5"]).loc["B5", "verdict"] == "contradicted"


def test_too_few_models_decide_nothing():
    three = {name: MODELS[name] for name in ("llama-64", "llama-128", "qwen-64")}
    claims = judged(*world(three), ACROSS)
    assert claims["verdict"].to_dict() == dict.fromkeys(ACROSS, "inconclusive") | {"B6": "confirmed"}
    assert "3 models, 4 needed" in claims.loc["B5", "reason"]
    assert "qwen: fewer than two hidden sizes" in claims.loc["B8", "reason"]
    single = judged(*world({"llama-64": MODELS["llama-64"]}), ACROSS)
    assert set(single["verdict"]) == {"not tested"}


def test_models_of_one_size_do_not_show_that_size_does_not_matter():
    same = {f"llama-{letter}": ("llama", 64) for letter in "abcd"}
    claims = judged(*world(same), ACROSS)
    assert set(claims["verdict"]) == {"inconclusive"}
    assert "one family and size" in claims.loc["B5", "reason"]
    assert "one hidden size" in claims.loc["B6", "reason"]
    assert "too few hidden sizes" in claims.loc["B7", "reason"]


def test_models_are_compared_on_the_same_data_only():
    runs, curves = world()
    some = runs["model"].isin(["qwen-64", "qwen-128"])
    claim = judged(runs.assign(dataset=runs["dataset"].where(~some, "worked")), curves, ["B5"]).loc["B5"]
    assert claim["verdict"] == "inconclusive"
    assert "3 models on instruct" in claim["reason"]
    # A single model on other data, as in the experiment of ranks, is no part of the comparison.
    odd = (
        swept("llama-64", "llama", 64, 16, 1e-3, dataset="worked"),
        swept("llama-64", "llama", 64, None, 1e-3, dataset="worked"),
    )
    more, more_curves = tables(odd)
    both = judged(pd.concat([runs, more]), pd.concat([curves, more_curves]), ["B5"]).loc["B5"]
    assert both["verdict"] == "confirmed"


def test_the_rank_is_one_that_all_models_have():
    runs, curves = world()
    more, more_curves = tables([swept("llama-64", "llama", 64, 64, 1e-4)])
    claim = judged(pd.concat([runs, more]), pd.concat([curves, more_curves]), ["B5"]).loc["B5"]
    assert claim["verdict"] == "confirmed"
    assert "LoRA r16 / FullFT" in claim["reason"]


def test_families_and_sizes_must_be_known():
    runs, curves = world()
    claims = judged(runs.drop(columns="hidden_size"), curves, ACROSS)
    assert set(claims["verdict"]) == {"not tested"}
    assert claims["reason"].str.contains("no column hidden_size").all()
    assert set(judged(runs.assign(hidden_size=None), curves, ACROSS)["verdict"]) == {"not tested"}


def test_other_families_have_no_published_exponent():
    other = {f"gemma-{size}": ("gemma3", size) for size in (64, 128, 256, 512)}
    law = LrLaw(1e-4, 10.0, {"gemma3": 0.5})
    claims = judged(*world(other, law), ["B7", "B8"])
    assert claims["verdict"].to_dict() == {"B7": "confirmed", "B8": "not tested"}


# Short and long runs.

LENGTHS = (50, 100, 400)


def lengths(ratios, offsets=OFFSETS, steps=400, fullft=3e-4):
    """Make runs of FullFT and rank 16 whose LR ratio differs by length, and curves at these lengths only."""
    full = {length: ratio * fullft for length, ratio in ratios.items()}
    runs, _ = tables(
        arm(rank, optimum=optimum, steps=steps, offsets=offsets) for rank, optimum in ((None, fullft), (16, full[400]))
    )
    rows = []
    for run in runs.to_dict("records"):
        for length, optimum in full.items():
            at = optimum if run["method"] == "lora" else fullft
            value = 2.5 + CURVATURE * math.log(run["lr"] / at) ** 2 + offsets[run["seed"]]
            point = {"run_id": run["run_id"], "step": length, "split": "validation", "metric": "nll", "value": value}
            rows.append(point)
    return runs, pd.DataFrame(rows)


def test_short_runs_want_more_where_they_do():
    claim = judged(*lengths({50: 16, 100: 14, 400: 10}), ["B9"]).loc["B9"]
    assert claim["verdict"] == "confirmed"
    assert claim["estimate"] in (pytest.approx(16), pytest.approx(14))
    assert "400 steps: optimal LR LoRA r16 / FullFT = 10.00" in claim["reason"]
    assert "100 steps: optimal LR LoRA r16 / FullFT = 14.00" in claim["reason"]
    assert "over that at 400 steps 1.40" in claim["reason"]
    assert claim["n_runs"] == 2 * 8


@pytest.mark.parametrize(
    "ratios",
    [
        pytest.param({50: 16, 100: 14, 400: 20}, id="the ratio grows with length"),
        pytest.param({50: 30, 100: 14, 400: 10}, id="beyond the band at 50 steps"),
        pytest.param({50: 5, 100: 5, 400: 3}, id="higher, but not about 15"),
    ],
)
def test_short_runs_contradict(ratios):
    assert judged(*lengths(ratios), ["B9"]).loc["B9", "verdict"] == "contradicted"


@pytest.mark.parametrize(
    ("ratios", "settings"),
    [
        ({50: 16, 100: 14, 400: 10}, {"offsets": (0.0, 0.06, -0.06)}),
        ({50: 16, 100: 14, 400: 13.9}, {"offsets": (0.0, 0.01, -0.01)}),
        ({50: 16, 100: 14, 400: 10}, {"offsets": (0.0,)}),
        ({50: 120, 100: 120, 400: 10}, {}),
    ],
)
def test_short_runs_left_open(ratios, settings):
    assert judged(*lengths(ratios, **settings), ["B9"]).loc["B9", "verdict"] == "inconclusive"


def test_one_short_length_is_enough_and_none_is_not_tested():
    runs, curves = lengths({50: 16, 100: 14, 400: 10})
    assert judged(runs, curves[curves["step"] != 100], ["B9"]).loc["B9", "verdict"] == "confirmed"
    none = judged(runs, curves[curves["step"] == 400], ["B9"]).loc["B9"]
    assert none["verdict"] == "not tested"
    assert "no validation losses of both methods at step 50" in none["reason"]
    assert judged(runs, pd.DataFrame(), ["B9"]).loc["B9", "verdict"] == "not tested"


def test_a_full_length_that_is_short_tests_nothing():
    claim = judged(*lengths({50: 16, 100: 14, 400: 10}, steps=150), ["B9"]).loc["B9"]
    assert claim["verdict"] == "not tested"
    assert "150 steps" in claim["reason"]


def test_short_runs_need_both_methods():
    runs, curves = lengths({50: 16, 100: 14, 400: 10})
    assert judged(runs[runs["method"] == "lora"], curves, ["B9"]).loc["B9", "verdict"] == "inconclusive"
