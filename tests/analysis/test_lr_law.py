"""The law of LRs is the published one, and a fit gives its constants back."""

import math

import numpy as np
import pytest

from lorabench.analysis import lr_law
from lorabench.analysis.estimate import student

# Family, hidden size, and the LRs of FullFT and LoRA by `get_lr` of the authors' tinker-cookbook, to four digits.
TABLE = [
    ("llama", 2048, 4.908e-5, 4.908e-4),
    ("llama", 8192, 1.662e-5, 1.662e-4),
    ("qwen3", 1024, 5.266e-5, 5.266e-4),
    ("qwen3_moe", 5120, 4.649e-5, 4.649e-4),
]
SIZES = (("llama", 64), ("llama", 256), ("llama", 2048), ("qwen3", 64), ("qwen3", 512))


def test_published_lrs():
    for family, hidden_size, *lrs in TABLE:
        predicted = [lr_law.predict_lr(lr_law.PUBLISHED, family, hidden_size, method) for method in ("fullft", "lora")]
        assert [f"{lr:.3e}" for lr in predicted] == [f"{lr:.3e}" for lr in lrs]
    assert math.isnan(lr_law.predict_lr(lr_law.PUBLISHED, "gemma3", 2048, "lora"))


def optima(law, steepness=0.05):
    return [
        lr_law.ArmOptimum(
            lr_law.lineage(family), size, method, math.log(lr_law.predict_lr(law, family, size, method)), steepness
        )
        for family, size in SIZES
        for method in ("fullft", "lora")
    ]


def test_a_law_gives_its_constants_back():
    fitted = lr_law.fit_lr_law(optima(lr_law.LrLaw(1e-4, 7.0, {"llama": -0.3, "qwen": 1.2})))
    assert (fitted.base, fitted.multiplier) == pytest.approx((1e-4, 7.0))
    assert fitted.exponents == pytest.approx({"llama": -0.3, "qwen": 1.2})


def test_the_fit_has_the_lowest_summed_regret():
    random = np.random.default_rng(0)
    noisy = [
        each._replace(log_lr=each.log_lr + random.normal(), steepness=random.uniform(0.01, 0.2))
        for each in optima(lr_law.PUBLISHED)
    ]

    def regret(law):
        off = [math.log(lr_law.predict_lr(law, o.lineage, o.hidden_size, o.method)) - o.log_lr for o in noisy]
        return sum(o.steepness * distance**2 for o, distance in zip(noisy, off, strict=True))

    law = lr_law.fit_lr_law(noisy)
    errors = lr_law.prediction_errors(noisy) @ [o.log_lr for o in noisy]
    assert sum(o.steepness * e**2 for o, e in zip(noisy, errors, strict=True)) == pytest.approx(regret(law))
    for factor in (0.97, 1.03):
        assert regret(lr_law.LrLaw(law.base * factor, law.multiplier, law.exponents)) > regret(law)
        assert regret(lr_law.LrLaw(law.base, law.multiplier * factor, law.exponents)) > regret(law)
        assert regret(
            lr_law.LrLaw(law.base, law.multiplier, law.exponents | {"qwen": law.exponents["qwen"] * factor})
        ) > regret(law)


def test_errors_of_predictions_from_the_other_models():
    exact = optima(lr_law.LrLaw(1e-4, 10.0, {"llama": 0.78, "qwen": 0.08}))
    models = [(o.lineage, o.hidden_size) for o in exact]
    moved = [o._replace(log_lr=o.log_lr + 0.3) if o.hidden_size == 256 else o for o in exact]
    errors = lr_law.prediction_errors(moved, models) @ [o.log_lr for o in moved]
    by_model = dict(zip(models, errors, strict=True))
    # The other models know nothing of the one that moved, and are misled by it.
    assert by_model[("llama", 256)] == pytest.approx(-0.3)
    assert abs(by_model[("llama", 2048)]) > 0.01
    # Without all models of a family its exponent is not determined.
    assert np.isnan(lr_law.prediction_errors(exact, [o.lineage for o in exact])).any()


def numbers(values, error=0.1):
    return [student(value, error, 10, f"number {place}") for place, value in enumerate(values)]


def test_a_slope_over_models_carries_the_errors_of_their_numbers():
    slope = lr_law.slope_over_models([0.0, 1.0, 2.0, 3.0], numbers([1.0, 3.0, 5.0, 7.0]), ["all"] * 4, "slope")
    assert slope.value == pytest.approx(2)
    # The standard deviation of a slope is that of a number over the root of the summed squares of x, here 5.
    assert slope.draws.std() == pytest.approx(0.1 * math.sqrt(10 / 8) / math.sqrt(5), rel=0.05)
    # Groups have intercepts of their own.
    values, groups = numbers([1.0, 3.0, 101.0, 103.0], 0.1), ["a", "a", "b", "b"]
    assert lr_law.slope_over_models([0.0, 1.0, 0.0, 1.0], values, groups, "slope").value == pytest.approx(2)
    assert not lr_law.slope_over_models([0.0, 0.0, 1.0, 1.0], values, groups, "slope").known


def test_scatter_around_the_line_widens_a_slope():
    y = [1.0, 4.0, 4.0, 7.0]
    slope = lr_law.slope_over_models([0.0, 1.0, 2.0, 3.0], numbers(y, 0.01), ["all"] * 4, "slope")
    residual = np.array(y) - np.polyval(np.polyfit(range(4), y, 1), range(4))
    error = math.sqrt((residual**2).sum() / 2 / 5)
    low, high = slope.interval()
    assert (high - low) / 2 == pytest.approx(4.303 * error, rel=0.02)
    assert slope.n_seeds == 0
