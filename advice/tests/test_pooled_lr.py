"""The pooled optimal LR, against made-up sources."""

import math
from dataclasses import replace

import numpy as np
import pytest
from lora_advice import pooled_lr
from lora_advice.pooled_lr import PRIORS, REFERENCE, Optimum, Place, PooledLr

HERE = Place.at("llama", 2000, "fullft", REFERENCE["batch_size"], REFERENCE["steps"])


def made(rng, sources, between, offset=0.0, batch=0.5, steps=0.0, within=0.0, error=0.1, each=2):
    """Return optima of made-up sources, the same number of each, of two models, at random batch sizes and lengths."""
    optima = []
    for source in range(sources):
        effect, deviations = rng.normal(0, between), rng.normal(0, within, 2)
        for number in range(each):
            place = replace(HERE, batch_size=float(8 * 2 ** rng.integers(0, 6)), steps=float(10 ** rng.uniform(2, 4)))
            log_lr = place.log_law + offset + effect + deviations[number % 2] + rng.normal(0, error)
            log_lr += batch * math.log(place.batch_size / 128) + steps * math.log(place.steps / 780)
            optima.append(Optimum(f"source {source}", f"model {number % 2}", place, log_lr, error))
    return optima


def test_the_law_of_a_place():
    assert math.exp(HERE.log_law) == pytest.approx(5e-5)
    assert math.exp(Place.at("qwen3", 2000, "lora", 8, 100).log_law) == pytest.approx(5e-4)
    llama, qwen, other = (Place.at(name, 1000, "lora", 8, 100) for name in ("llama", "qwen2", "mistral"))
    assert other.log_law == pytest.approx((llama.log_law + qwen.log_law) / 2)
    assert (llama.law_error, qwen.law_error) == (0, 0)
    assert other.law_error == pytest.approx((0.781 - 0.0775) * math.log(2) / 2)
    assert Place.at("llama", math.nan, "lora", 8, 100).law_error == pytest.approx(0.781 * math.log(2))


def test_intervals_hold_as_many_further_sources_as_they_say(monkeypatch):
    # A coarser grid takes a sixth of the time.
    monkeypatch.setattr(pooled_lr, "BETWEEN", np.linspace(0.0, 3.0, 13))
    monkeypatch.setattr(pooled_lr, "WITHIN", np.linspace(0.0, 1.2, 5))
    rng = np.random.default_rng(2)
    inside: dict[float, list[bool]] = {0.8: [], 0.95: []}
    for _ in range(25):
        # The truth of each coefficient is drawn from its prior.
        batch, steps = (rng.normal(prior.mean, prior.sd) for prior in PRIORS.values())
        truth = {"batch": batch, "steps": steps, "offset": rng.normal(0, 1)}
        pooled = PooledLr(made(rng, 8, 0.7, within=0.3, **truth))
        for further in made(rng, 4, 0.7, within=0.3, each=1, **truth):
            for probability, held in inside.items():
                predicted = pooled.predict(further.place, probability, error=further.error)
                held.append(predicted.low <= further.log_lr <= predicted.high)
    # 100 draws in 25 worlds: two standard errors are 0.14 at most.
    # The flat priors of the deviations err on the wide side.
    assert 0.7 < np.mean(inside[0.8]) < 0.92
    assert np.mean(inside[0.95]) > 0.9
