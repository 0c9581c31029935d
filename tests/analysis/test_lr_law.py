from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabench.analysis.lr_law import (
    PUBLISHED,
    LrLaw,
    LrProblem,
    fit_lr_law,
    is_determined,
    lineage,
    lr_regret,
    predict_lr,
)

# Family, hidden size, and the LRs of FullFT and LoRA by `get_lr` of the authors' tinker-cookbook, to four digits.
TABLE = [
    ("llama", 2048, 4.908e-5, 4.908e-4),
    ("llama", 3072, 3.576e-5, 3.576e-4),
    ("llama", 4096, 2.856e-5, 2.856e-4),
    ("llama", 8192, 1.662e-5, 1.662e-4),
    ("qwen3", 1024, 5.266e-5, 5.266e-4),
    ("qwen3", 2048, 4.991e-5, 4.991e-4),
    ("qwen3", 2560, 4.905e-5, 4.905e-4),
    ("qwen3", 4096, 4.730e-5, 4.730e-4),
    ("qwen3_moe", 5120, 4.649e-5, 4.649e-4),
]
LRS = np.array([1e-4, 3e-4, 1e-3, 3e-3])
LOSSES = np.array([2.4, 2.0, 2.2, 3.0])


@pytest.mark.parametrize(("family", "hidden_size", "fullft", "lora"), TABLE)
def test_published_lrs(family, hidden_size, fullft, lora):
    fitted = [predict_lr(PUBLISHED, family, hidden_size, method) for method in ("fullft", "lora")]
    assert [f"{lr:.3e}" for lr in fitted] == [f"{fullft:.3e}", f"{lora:.3e}"]


def test_lineages():
    assert [lineage(name) for name in ("llama", "qwen2", "qwen3", "qwen3_moe", "Qwen3")] == ["llama", *["qwen"] * 4]
    assert lineage("gemma3") == "gemma3"
    assert math.isnan(predict_lr(PUBLISHED, "gemma3", 2048, "lora"))


def test_regret_is_linear_in_log_lr_between_the_measured():
    half_way = math.sqrt(3e-4 * 1e-3)
    assert lr_regret(LRS, LOSSES, half_way) == pytest.approx((2.1 - 2.0) / 2.0)
    for lr, loss in zip(LRS, LOSSES, strict=True):
        assert lr_regret(LRS, LOSSES, lr) == pytest.approx(loss / 2.0 - 1)
    assert lr_regret(LRS, LOSSES, 3e-4 * (1 + 1e-12)) == 0.0


@pytest.mark.parametrize("lr", [9e-5, 4e-3, math.nan, 0.0])
def test_no_regret_is_made_up_where_nothing_was_measured(lr):
    assert math.isnan(lr_regret(LRS, LOSSES, lr))


def test_beside_a_run_without_a_loss_the_regret_is_unknown():
    lost = np.array([2.4, 2.0, 2.2, math.nan])
    assert math.isnan(lr_regret(LRS, lost, 2e-3))
    assert math.isnan(lr_regret(LRS, lost, 3e-3))
    assert lr_regret(LRS, lost, 1e-3) == pytest.approx(0.1)
    assert math.isnan(lr_regret(LRS, np.full(4, math.nan), 1e-3))


def test_regret_of_many_draws():
    draws = np.stack([LOSSES, LOSSES + np.array([0, 0, -1.0, 0])])
    np.testing.assert_allclose(lr_regret(LRS, draws, 1e-3), [0.1, 0.0])
    assert np.isnan(lr_regret(LRS, draws, 1.0)).tolist() == [True, True]


def problem(law, family, hidden_size, method, factors=(1 / 9, 1 / 3, 1, 3, 9), centre=None):
    """Return losses that are a parabola in log LR around the law's LR, on a grid around it or around a given LR."""
    optimum = predict_lr(law, family, hidden_size, method)
    lrs = (centre or optimum) * np.array(factors)
    return LrProblem(lineage(family), hidden_size, method, lrs, 2.0 + 0.1 * np.log(lrs / optimum) ** 2)


def problems(law, **grid):
    return [
        problem(law, family, hidden_size, method, **grid)
        for family, hidden_size in (("llama", 64), ("llama", 256), ("llama", 2048), ("qwen3", 64), ("qwen3", 512))
        for method in ("fullft", "lora")
    ]


@settings(max_examples=20, deadline=None)
@given(
    base=st.floats(1e-5, 1e-2),
    multiplier=st.floats(1.0, 30.0),
    llama=st.floats(-0.5, 1.5),
    qwen=st.floats(-0.5, 1.5),
)
def test_a_law_gives_its_constants_back(base, multiplier, llama, qwen):
    law = LrLaw(base, multiplier, {"llama": llama, "qwen": qwen})
    fitted = fit_lr_law(problems(law))
    assert fitted.base == pytest.approx(base, rel=1e-4)
    assert fitted.multiplier == pytest.approx(multiplier, rel=1e-4)
    assert fitted.exponents == pytest.approx(law.exponents, abs=1e-4)


def test_on_one_grid_for_all_the_law_is_within_a_grid_step():
    law = LrLaw(3e-4, 9.8, {"llama": 0.6, "qwen": 0.1})
    fitted = fit_lr_law(problems(law, centre=1e-3, factors=10.0 ** np.arange(-3, 3.25, 0.25)))
    for family, hidden_size in (("llama", 128), ("qwen3", 128)):
        for method in ("fullft", "lora"):
            off = predict_lr(fitted, family, hidden_size, method) / predict_lr(law, family, hidden_size, method)
            assert abs(math.log10(off)) < 0.25


def test_the_fit_follows_most_models_past_one_that_is_off():
    law = LrLaw(1e-4, 10.0, {"llama": 0.78, "qwen": 0.08})
    off = LrLaw(4e-4, 10.0, law.exponents)
    mixed = [p for p in problems(law) if (p.lineage, p.hidden_size) != ("llama", 256)]
    fitted = fit_lr_law([*mixed, problem(off, "llama", 256, "fullft"), problem(law, "llama", 256, "lora")])
    assert fitted.base == pytest.approx(1e-4, rel=1e-3)
    assert fitted.exponents["llama"] == pytest.approx(0.78, abs=1e-3)


def test_lost_runs_do_not_stop_the_fit():
    law = LrLaw(1e-4, 10.0, {"llama": 0.78, "qwen": 0.08})
    lost = [p._replace(losses=np.where(p.lrs > 5 * p.lrs[2], math.nan, p.losses)) for p in problems(law)]
    assert fit_lr_law(lost).base == pytest.approx(1e-4, rel=1e-4)


def test_what_does_not_determine_a_law():
    law = LrLaw(1e-4, 10.0, {"llama": 0.78, "qwen": 0.08})
    every = problems(law)
    assert is_determined(every)
    assert not is_determined([])
    assert not is_determined([p for p in every if p.method == "lora"])
    assert not is_determined([p for p in every if p.hidden_size == 64 and p.lineage == "llama"])
    # With one hidden size per family, two exponents and a base are too many unknowns.
    assert not is_determined([p for p in every if p.hidden_size == 64])
    # A second hidden size of one family determines the base, and so the other family's exponent.
    assert is_determined([p for p in every if p.hidden_size == 64 or p.lineage == "llama"])
    with pytest.raises(ValueError, match="several hidden sizes"):
        fit_lr_law([p for p in every if p.hidden_size == 64])
