"""Seconds of a run: what lanes share, and what long responses cost."""

from __future__ import annotations

import pytest

from lorabench.config.loading import load_preset
from lorabench.estimates.flops import run_tokens
from lorabench.estimates.lane_count import lane_count, turns
from lorabench.estimates.seconds import run_seconds, sweep_seconds
from lorabench.models.dimensions import dimensions
from lorabench.planning.plan import make_plan

from ..handmade.presets import with_execution


def test_lanes_share_launches_and_no_flops():
    together = load_preset("smollm2")
    plan, alone = make_plan(together), with_execution(together, lanes=1)
    layers = dimensions(together.models["smollm2-135m"]).layers
    sweep = next(s for s in plan.sweeps if (s.condition.dataset, s.condition.rank) == ("worked", 16))
    # Three LRs, one more that the walk is expected to try, then four seeds at three LRs.
    assert [len(wave) for wave in sweep.expected_waves()] == [3, 1, 12]
    assert (lane_count(together, sweep, 1), turns(together, sweep, 6)) == (6, 4)
    (computing, of_one), (same, of_six) = (run_seconds(preset, sweep, 1) for preset in (alone, together))
    assert computing == same
    # A batch, forward and backward, launched 4 times for 16 runs rather than 16 times.
    full = 3 * sweep.condition.steps * layers * 0.8e-3
    tokens = run_tokens(together, sweep.condition)
    fewer = max(full * 4 / 16, 3 * tokens.trained / together.execution.max_batch_tokens * layers * 0.8e-3)
    launching = full + tokens.evaluated / together.execution.max_batch_tokens * layers * 0.8e-3
    assert computing + of_one == pytest.approx(launching)
    assert of_six == pytest.approx(max(0, of_one - (full - fewer)))
    assert sweep_seconds(together, sweep, 1) < sweep_seconds(alone, sweep, 1) / 2


def test_long_responses_cost_more_than_their_tokens():
    paper = load_preset("paper")
    plan = make_plan(paper)
    gsm8k, deepmath = (
        next(s for s in plan.sweeps if s.condition.dataset == name and s.condition.method == "lora")
        for name in ("gsm8k", "deepmath")
    )
    per_token = [
        sweep_seconds(paper, sweep, 1) / sweep.n_runs / run_tokens(paper, sweep.condition).drawn
        for sweep in (gsm8k, deepmath)
    ]
    assert per_token[1] > 3 * per_token[0]
