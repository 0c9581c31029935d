"""The figures of the experiment `capacity`, and the departures of figure 1, from tables made by hand."""

import math

import numpy as np
import pandas as pd
import pytest

from lorabench.analysis.comparison import comparisons
from lorabench.analysis.slopes import log_log
from lorabench.figures.capacity import best_stored
from lorabench.store.tables import Tables

from ..handmade import make_sweep, runs_table
from ..handmade.sft import arm as sft_arm
from ..handmade.sft import tables as handmade
from ..handmade.training import shared, trained
from .layout import draw, lines, only, texts

ENTROPY, TOKENS = 40_000.0, 13_000
EPOCH = {"first_epoch_nats": 9e4, "first_epoch_scored_tokens": 120_000, "dataset": "long"}
LEAVES = {1: 10, 4: 47, 16: 218}
"""The first steps of three of the windows in which a departure is sought, by the rank that leaves there."""


def learning(ranks=(None, 1, 4, 16, 64), **settings) -> Tables:
    """Make training and validation curves of ranks that leave the shared curve as LEAVES says; rank 64 stays on it."""

    def shape(rank):
        left = LEAVES.get(rank)
        gap = lambda step: 0.1 + 0.2 * math.log10(step / left) if left and step >= left else 0.0  # noqa: E731
        return lambda step: shared(step) + gap(step)

    arms = []
    for rank in ranks:
        about = {"optimum": 3e-4 if rank is None else 3e-3, "trainable_params": 1000 * (rank or 500)}
        arms.append(trained(rank, shape=shape(rank), **(about | EPOCH | settings)))
    runs, curves = handmade(arms)
    # The base model's loss, which the margin depends on, stays.
    kept = curves[(curves["split"] == "train") | (curves["step"] == 0)]
    validation = kept[kept["split"] == "train"].assign(split="validation")
    return Tables(runs, pd.concat([kept, validation], ignore_index=True))


def facts(stored) -> Tables:
    """Make arms that store the given bits in their run with the lowest loss."""
    rows = []
    for rank, bits in stored.items():
        sweep = make_sweep(rank, dataset="facts", entropy_bits=ENTROPY, test_scored_tokens=TOKENS)
        finished = [row for row in sweep if row["status"] == "done"]
        lowest = min(row["final_test_nll"] for row in finished)
        for row in finished:
            excess = row["final_test_nll"] - lowest
            row["final_test_nll"] = row["final_valid_nll"] = (ENTROPY - bits) * math.log(2) / TOKENS + excess
        rows += sweep
    return Tables(runs_table(rows), pd.DataFrame())


def test_departures_and_thresholds_are_those_of_the_verdicts():
    # Facts and another parametrization stand beside what is drawn.
    own, other = learning(), learning((16,), alpha=8.0)
    for table in (other.runs, other.curves):
        table["run_id"] += "-alpha8"
    runs = pd.concat([own.runs, other.runs, facts({1: 2_000.0}).runs], ignore_index=True)
    figure, plotted = draw("capacity", runs, pd.concat([own.curves, other.curves]))
    assert set(plotted["dataset"]) == {"long"}
    assert set(plotted["arm"].dropna()) == {"FullFT", "LoRA r1", "LoRA r4", "LoRA r16", "LoRA r64"}
    [comparison] = comparisons(own.runs, own.curves)
    assert only(plotted, "departure").set_index("rank")["step"].to_dict() == LEAVES
    assert set(only(plotted, "noise_band")["excess"]) == {2 * comparison.fit.sigma}
    threshold = only(plotted, "threshold")
    assert threshold["trainable_params"].tolist() == [1000 * rank for rank in LEAVES]
    assert threshold["tokens"].between(threshold["tokens_low"], threshold["tokens_high"]).all()
    marks = {(line.get_xdata()[0], line.get_ydata()[0]) for line in lines(figure.axes[1], marker="o")}
    assert marks == set(zip(threshold["trainable_params"], threshold["tokens"], strict=True))
    slope = only(plotted, "slope")
    fit = log_log(threshold["trainable_params"], threshold["tokens"])
    assert slope["slope"].tolist() == pytest.approx([fit.slope] * 3)
    fitted = 10 ** (fit.intercept + fit.slope * np.log10(slope["trainable_params"].astype(float)))
    np.testing.assert_allclose(slope["tokens"].astype(float), fitted, rtol=1e-3)
    # The description length is where two bits per parameter hold it.
    [held] = only(plotted, "description_length").to_dict("records")
    assert held["bits"] == pytest.approx(9e4 / math.log(2))
    assert held["trainable_params"] == round(9e4 / math.log(2) / 2)
    _, first = draw("fig1_envelopes", own)
    assert only(first, "departure").set_index("rank")["step"].to_dict() == LEAVES


def test_best_stored_is_that_of_the_fitted_minimum():
    tokens, entropy = 1000, 4000.0
    facts = {"optimum": 1e-3, "dataset": "facts", "entropy_bits": entropy, "test_scored_tokens": tokens}
    per_nat = tokens / math.log(2)
    fullft = sft_arm(floor=100 / per_nat, trainable_params=10**6, **facts)
    runs, _ = handmade([fullft, sft_arm(4, floor=1000 / per_nat, trainable_params=2000, **facts)])
    stored = best_stored(runs).set_index("method")
    assert stored[["lr_best", "n_seeds"]].values.tolist() == [[1e-3, 3]] * 2
    [comparison] = comparisons(runs, pd.DataFrame())
    low, high = comparison.fit.minima["LoRA r4"].interval()
    lora = stored.loc["lora"]
    assert lora["bits_stored"] == pytest.approx(3000, abs=60)
    assert lora["bits_stored_high"] == pytest.approx(entropy - low * per_nat)
    assert lora["bits_stored_low"] == pytest.approx(entropy - high * per_nat)
    assert lora["bits_per_parameter"] == pytest.approx(lora["bits_stored"] / 2000)


def test_bits_stored_are_those_of_the_tables():
    tables = facts({None: 39_000.0, 1: -30_000.0, 4: 20_000.0})
    figure, plotted = draw("memorisation", tables)
    assert "stored nothing: LoRA r1" in texts(figure)
    seeds = only(plotted, "seed").groupby("rank", dropna=False)["bits"]
    assert seeds.max().tolist() == pytest.approx([-30_000, 20_000, 39_000])
    stored, expected = only(plotted, "stored"), best_stored(tables.runs)
    for name in ("bits", "bits_low", "bits_high"):
        np.testing.assert_allclose(stored[name], expected[name.replace("bits", "bits_stored")])
    assert only(plotted, "entropy")["bits"].tolist() == [ENTROPY]
    ends = only(plotted, "per_parameter")
    assert sorted(ends["bits"] / ends["trainable_params"]) == [1, 1, 2, 2]
