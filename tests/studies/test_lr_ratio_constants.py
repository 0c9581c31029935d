"""The constants of the theories of the LR ratio are found in ratios that follow them; what wrong LRs cost."""

import math
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest

from advice.benchmarks.lr_left_out import condition_of
from lorabench.sources.lr_optima import LrOptimum
from lorabench.sources.source import read_sources, source_folders
from lorabench.store.published import PUBLISHED
from lorabench.store.tables import Tables
from studies.lr_ratio.predictions import MovementTheory, Predictions
from studies.lr_ratio.scripts import a_without_mean
from studies.lr_ratio.scripts.constants import fitted, variants
from studies.lr_ratio.scripts.regret import PAGE, known_gains, page_part, regrets
from studies.lr_ratio.theories import Setting, predicted

from ..conftest import REPOSITORY
from .test_variants import PREDICTED, world


def test_constants_are_found_again():
    theory = Predictions(movement=MovementTheory(c=2.0, u0=3e-3, k=0.7))
    rows = []
    for width, steps, init_a, rank, frozen in (
        *((width, 50, 1.0, rank, True) for width in (64, 256) for rank in (1, 16)),
        *((width, steps, init_a, 16, False) for width in (64, 256) for steps in (50, 800) for init_a in (0.25, 1.0)),
    ):
        setting, lr = Setting(width, steps, 8, 32.0, init_a, frozen, rank), 0.05 / width
        ratio = float(np.exp(predicted(theory, setting)["movement"](np.asarray(math.log(lr)))))
        ends = {"ratio": ratio, "ratio_low": 0.8 * ratio, "ratio_high": 1.25 * ratio}
        rows.append(asdict(setting) | {"fullft_lr": lr} | ends)
    found = fitted(pd.DataFrame(rows))
    assert found.movement.model_dump() == pytest.approx({"c": 2.0, "u0": 3e-3, "k": 0.7}, rel=0.01)
    assert found.mu_a.c > 0


def test_the_table_of_runs_without_the_mean_input_is_that_of_the_published_preset():
    table = pd.read_csv(REPOSITORY / a_without_mean.PUBLISHED_RATIOS)
    assert a_without_mean.page_part(table) in (REPOSITORY / a_without_mean.PAGE).read_text()


def test_theories_are_told_apart_by_variants():
    """In this world rsLoRA and LoRA+ have the best LRs that `movement` predicts."""
    off = variants(Tables(*world())).iloc[-1]
    assert off["movement"] == pytest.approx(1.0, abs=0.05)
    # By the others the ratios are 1/2 and 1/16, or the roots of these.
    for theory, power in (("still", 1.0), ("mu_a", 0.5)):
        logs = [math.log(PREDICTED[variant] * more**power) for variant, more in (("rslora", 2), ("lora_plus", 16))]
        assert off[theory] == pytest.approx(math.exp(math.hypot(*logs) / math.sqrt(2)), rel=0.05)


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
    [row] = regrets(optima, {condition_of(full): 1.0}).to_dict("records")
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


def test_gains_are_those_on_the_same_examples():
    gains = known_gains(read_sources(source_folders()), [REPOSITORY / PUBLISHED / "laptop_more"])
    table = pd.read_csv(REPOSITORY / PUBLISHED / "laptop_more/fig1_envelopes.csv")
    losses = table[table["method"].eq("fullft") | table["element"].eq("before_training")].set_index("step")["nll"]
    # By the validation loss; by the test loss, which is lower here, it would be 0.79 nats.
    assert gains["lorabench", "tiny", "instruct", "8.0", "50.0"] == pytest.approx(losses[0] - losses[50])
    assert losses[0] - losses[50] == pytest.approx(0.535, abs=0.001)
    # A source without a loss of the base has no gain, one that has only the loss of its first batch that of training.
    assert math.isnan(gains["nayyirahsan", "Qwen3-0.6B-Base", "sql-2000", "32.0", "126.0"])
    place = ("apertus", "Apertus-70B-Instruct-2509", "swiss_judgment_prediction", "128.0", "467.0")
    assert gains[place] == pytest.approx(1.034, abs=0.001)
    assert gains["orbit", "llama3.1-8b", "math", "1024.0", "150.0"] == pytest.approx(0.21)


def test_the_table_of_costs_is_that_of_the_published_conditions():
    table = pd.read_csv(REPOSITORY / PUBLISHED / "evidence/lr_ratio_regret.csv")
    assert page_part(table) in (REPOSITORY / PAGE).read_text()
