"""A run whose loss explodes or is not finite ends as `diverged`."""

from __future__ import annotations

import math

import pytest

from .conftest import condition_of, train


@pytest.mark.parametrize(("method", "rank"), [("fullft", None), ("lora", 4)])
def test_a_huge_learning_rate_ends_as_diverged(method, rank, data, tmp_path):
    outcome, _ = train(condition_of(method, rank, steps=20, batch_size=4), data, tmp_path, lr=1e3)
    assert outcome.status == "diverged"
    assert 1 < outcome.diverged_at <= 20
    assert (outcome.final_valid_nll, outcome.final_test_nll) == (None, None)
    assert max(point.step for point in outcome.curve) == outcome.diverged_at


def test_a_loss_that_is_not_a_number_ends_as_diverged(data, tmp_path, monkeypatch):
    from lorabench.training.sft import serve

    real, calls = serve.add_gradient, []

    def broken(*arguments):
        calls.append(None)
        # A batch of one example is one part, so that calls count steps.
        return real(*arguments) * (math.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(serve, "add_gradient", broken)
    outcome, model = train(condition_of("lora", 4, steps=20, batch_size=1), data, tmp_path, lr=1e-3)
    assert (outcome.status, outcome.diverged_at) == ("diverged", 3)
    last = [point for point in outcome.curve if point.step == 3 and point.metric == "nll"]
    assert [point.value for point in last] == [None]
    # The poisoned gradient was never applied.
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_sound_run_is_done(data, tmp_path):
    outcome, _ = train(condition_of("lora", 4, steps=10, batch_size=4), data, tmp_path, lr=1e-3)
    assert outcome.status == "done"
    assert outcome.diverged_at is None
    assert outcome.final_test_nll > 0
    assert outcome.final_valid_nll == outcome.curve[-1].value
