"""The cost model against the paper's formula."""

from __future__ import annotations

import pytest

from lorabench import cost
from lorabench.config import load_preset
from lorabench.plan import Condition, make_plan


def condition(rank):
    method = "fullft" if rank is None else "lora"
    return Condition("sft", "m", "d", method, rank, "all" if rank else None, 32.0 if rank else None, 16, 100, "x")


def test_full_fine_tuning_takes_six_flops_per_parameter_and_token():
    assert cost.train_flops(condition(None), 1000, 128, 50) == 6 * 1000 * 50


@pytest.mark.parametrize(
    # The table of section 3.6 of the notes on the paper.
    ("width", "rank", "ratio"),
    [(2048, 1, 0.6676), (2048, 512, 1.1667), (4096, 1, 0.6672), (4096, 128, 0.7292), (4096, 512, 0.9167)],
)
def test_lora_takes_two_thirds_and_its_own_part(width, rank, ratio):
    lora = cost.train_flops(condition(rank), 1000, width, 50) / cost.train_flops(condition(None), 1000, width, 50)
    assert lora == pytest.approx(ratio, abs=5e-5)


def test_more_cores_are_faster_until_there_are_no_more_sweeps():
    plan = make_plan(load_preset("smoke"))
    assert len(plan.sweeps) < 64
    minutes = [cost.estimate(plan, list(plan.sweeps), cores).minutes for cores in (1, 2, 64, 128)]
    assert minutes[0] > minutes[1] > minutes[2] == minutes[3]
    work = cost.estimate(plan, list(plan.sweeps), 2)
    # FullFT, two ranks, two placements: 3 LRs and a repeat each; two ranks with two seeds at one LR; RL like the first.
    assert (work.runs, work.sweeps) == (5 * 4 + 2 * 2 + 3 * 4, 10)
