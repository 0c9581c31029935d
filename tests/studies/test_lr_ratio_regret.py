"""What wrong learning rates cost at every scale."""

import math
from dataclasses import replace

import pytest

from lorabench.sources.lr_optima import LrOptimum
from studies.lr_ratio.scripts.regret import regrets


def test_the_cost_of_a_ratio_by_hand():
    # LoRA's loss is 2 + 0.1 ln(LR / 5e-4)^2 on a fine grid from 1e-4 to 1e-2, and FullFT's lowest loss is 2 at 1e-4, so
    # that ten is a factor of two too high. Fifteen at 1e-3 of FullFT would be beyond the grid.
    lrs = [1e-4 * 10 ** (n / 20) for n in range(41)]
    losses = [2 + 0.1 * math.log(lr / 5e-4) ** 2 for lr in lrs]
    full = LrOptimum("a", "m", "llama", "d", "fullft", None, 2000, 128, 780, 32, False, 1e-4, 0.05, True)
    full = replace(full, log_lrs=(math.log(5e-5), math.log(1e-4), math.log(2e-4)), losses=(2.2, 2.0, 2.1))
    lora = replace(full, method="lora", rank=64, lr=5e-4, log_lrs=tuple(map(math.log, lrs)), losses=tuple(losses))
    others = [replace(optimum, source=source, log_lrs=(), losses=()) for source in "bc" for optimum in (full, lora)]
    optima = [full, lora, *others]
    [row] = regrets(optima, {("a", "m", "d"): 3.0}).to_dict("records")
    assert row["ten_cost"] == pytest.approx(0.1 * math.log(2) ** 2, rel=0.01)
    # FullFT gains 1 nat, so that a margin is 2% of it, which is less than 10% of the loss.
    assert row["ten_margins"] == pytest.approx(5 * math.log(2) ** 2, rel=0.01)
    assert row["fifteen_share"] == pytest.approx(0.1 * math.log(3) ** 2, rel=0.01)
    # The other sources have the same LR, so that the pooled one is nearly right.
    assert row["recommend_cost"] == pytest.approx(0, abs=0.01)
    # Another alpha is converted as in pooling: ten times is 10 (64/32)^-0.75 times.
    halved = [replace(optimum, alpha=64) if optimum.method == "lora" else optimum for optimum in optima]
    [row] = regrets(halved, {}).to_dict("records")
    assert row["ten_cost"] == pytest.approx(0.1 * math.log(2 * 2**-0.75) ** 2, abs=1e-3)
    assert math.isnan(row["ten_margins"])
