"""The figures of the experiment `capacity`, from tables made by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from lorabench.analysis.curves import envelopes
from lorabench.analysis.departure import departures
from lorabench.analysis.memorisation import best_stored, stored_bits
from lorabench.analysis.noise import seed_noise
from lorabench.analysis.slopes import log_log
from lorabench.figures.catalog import FIGURES
from lorabench.store.tables import Tables

from ..handmade import STEPS, make_run, make_sweep, runs_table
from .layout import lay_out

ENTROPY, TOKENS = 40_000.0, 13_000
RANKS = (None, 1, 4, 16, 64)
EPOCH = {"first_epoch_nats": 9e4, "first_epoch_scored_tokens": 120_000, "dataset": "long"}
LAST = STEPS[-1]


def learning(ranks=RANKS, first=4, **changes) -> Tables:
    """Make tables whose ranks leave the shared curve at a step that grows with rank; the highest rank stays on it."""
    runs = runs_table([row for rank in ranks for row in make_sweep(rank, **(EPOCH | changes))])
    lowest = runs.groupby("rank", dropna=False)["final_valid_nll"].transform("min")
    rows = [
        {
            "run_id": run.run_id,
            "step": step,
            "examples": 16 * step,
            "tokens": 1600 * step,
            "split": "validation",
            "metric": "nll",
            "value": shape(run.rank, step, first) + (0.0 if pd.isna(above) else above),
        }
        for run, above in zip(runs.itertuples(), runs["final_valid_nll"] - lowest, strict=True)
        for step in STEPS
        if run.status == "done" or step < 20
    ]
    return Tables(runs, pd.DataFrame(rows))


def shape(rank, step, first):
    left = LAST + 1 if pd.isna(rank) or rank == 64 else first * rank**0.75
    return 4 - 0.3 * math.log1p(step) + (0.2 * math.log1p(step / left) if step >= left else 0.0)


def facts(stored, **changes) -> Tables:
    """Make arms that store the given bits in their run with the lowest loss."""
    rows = []
    for rank, bits in stored.items():
        sweep = make_sweep(rank, dataset="facts", entropy_bits=ENTROPY, test_scored_tokens=TOKENS, **changes)
        finished = [row for row in sweep if row["status"] == "done"]
        lowest = min((row["final_test_nll"] for row in finished), default=math.nan)
        for row in finished:
            excess = row["final_test_nll"] - lowest
            row["final_test_nll"] = row["final_valid_nll"] = (ENTROPY - bits) * math.log(2) / TOKENS + excess
        rows += sweep
    return Tables(runs_table(rows), pd.DataFrame())


def both(first: Tables, second: Tables) -> Tables:
    return Tables(pd.concat([first.runs, second.runs], ignore_index=True), pd.concat([first.curves, second.curves]))


def capacity(tables):
    return FIGURES["capacity"].draw(tables)


def memorisation(tables):
    return FIGURES["memorisation"].draw(tables)


def of(plotted, element):
    return plotted[plotted["element"] == element]


def texts(figure):
    return " ".join(text.get_text() for axes in figure.axes for text in axes.texts)


def test_excess_is_that_of_the_envelopes():
    tables = learning()
    figure, plotted = capacity(tables)
    envelope = envelopes(tables.runs, tables.curves).query("step > 0")
    lowest = envelope.groupby("step")["value"].transform("min")
    excess = of(plotted, "excess")
    np.testing.assert_allclose(excess["excess"], envelope["value"] - lowest)
    np.testing.assert_allclose(excess["nll"], envelope["value"])
    assert len(excess) == len(RANKS) * (len(STEPS) - 1)
    drawn = [line for line in figure.axes[0].get_lines() if line.get_marker() == "None"]
    assert sorted(y for line in drawn for y in line.get_ydata()) == pytest.approx(sorted(excess["excess"]))


def test_departures_band_and_thresholds():
    tables = learning()
    figure, plotted = capacity(tables)
    noise = seed_noise(tables.runs)
    left = departures(envelopes(tables.runs, tables.curves), noise).query("departed")
    assert of(plotted, "departure").set_index("rank")["step"].to_dict() == left.set_index("rank")["step"].to_dict()
    assert set(of(plotted, "noise_band")["excess"]) == {2 * noise["sigma_valid"].item()}
    threshold = of(plotted, "threshold").set_index("rank")
    assert threshold["tokens"].to_dict() == {row.rank: 1600 * row.step for row in left.itertuples()}
    before = {step: STEPS[place - 1] for place, step in enumerate(STEPS)}
    assert threshold["tokens_low"].to_dict() == {row.rank: 1600 * before[row.step] for row in left.itertuples()}
    assert threshold["trainable_params"].to_dict() == {rank: 14_000 * rank for rank in left["rank"]}
    stays = of(plotted, "stays").to_dict("records")
    assert [(row["rank"], row["tokens"]) for row in stays] == [(64, 1600 * LAST)]
    circles = [line for line in figure.axes[1].get_lines() if line.get_marker() == "o"]
    drawn = {(line.get_xdata()[0], line.get_ydata()[0]) for line in circles}
    assert drawn == set(zip(threshold["trainable_params"], threshold["tokens"], strict=True))


def test_the_fitted_line_and_its_interval():
    figure, plotted = capacity(learning())
    threshold, slope = of(plotted, "threshold"), of(plotted, "slope")
    fit = log_log(threshold["trainable_params"], threshold["tokens"])
    assert slope["slope"].tolist() == pytest.approx([fit.slope] * 3)
    fitted = 10 ** (fit.intercept + fit.slope * np.log10(slope["trainable_params"].astype(float)))
    np.testing.assert_allclose(slope["tokens"], fitted, rtol=1e-3)
    assert (slope["tokens_low"] <= slope["tokens"] * 1.0001).all()
    assert (slope["tokens"] <= slope["tokens_high"] * 1.0001).all()
    ends = of(plotted, "proportional")
    ratio = (ends["tokens"] / ends["trainable_params"].astype(float)).tolist()
    assert ratio == pytest.approx([ratio[0]] * 3, rel=1e-3)
    row = slope.iloc[0]
    assert f"slope {row['slope']:.2f} [{row['slope_low']:.2f}, {row['slope_high']:.2f}]" in texts(figure)


def test_the_description_length_is_where_two_bits_per_parameter_hold_it():
    figure, plotted = capacity(learning())
    [held] = of(plotted, "description_length").to_dict("records")
    assert held["bits"] == pytest.approx(9e4 / math.log(2))
    assert held["trainable_params"] == round(9e4 / math.log(2) / 2)
    vertical = [line for line in figure.axes[1].get_lines() if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in vertical] == [held["trainable_params"]]
    assert "130 kbit" in texts(figure)


def test_facts_and_other_parametrizations_are_not_in_the_capacity_figure():
    tables = learning()
    other = learning((16,), alpha=8.0)
    other.runs["run_id"] += "-alpha8"
    other.curves["run_id"] += "-alpha8"
    _, plotted = capacity(both(both(tables, facts({1: 2_000.0})), other))
    pd.testing.assert_frame_equal(plotted, capacity(tables)[1], check_dtype=False)


def test_bits_stored_are_those_of_the_tables():
    tables = facts({None: 39_000.0, 1: 20_000.0, 4: 35_000.0})
    figure, plotted = memorisation(tables)
    stored, expected = of(plotted, "stored"), best_stored(tables.runs)
    for drawn, name in (("bits", "bits_stored"), ("bits_low", "bits_stored_low"), ("bits_high", "bits_stored_high")):
        np.testing.assert_allclose(stored[drawn], expected[name])
    seeds = of(plotted, "seed").set_index("run_id")["bits"]
    assert len(seeds) == 3 * 3
    np.testing.assert_allclose(seeds, stored_bits(tables.runs).set_index("run_id")["bits_stored"][seeds.index])
    assert of(plotted, "entropy")["bits"].tolist() == [ENTROPY]
    lines = of(plotted, "per_parameter")
    assert (lines["bits"] / lines["trainable_params"]).tolist() == [1, 1, 2, 2]
    assert len(of(plotted, "diverged")) == 3
    levels = [line.get_ydata()[0] for line in figure.axes[0].get_lines() if list(line.get_xdata()) == [0, 1]]
    assert levels == [ENTROPY]
    squares = [line for line in figure.axes[0].get_lines() if line.get_marker() == "s"]
    assert [line.get_xdata()[0] for line in squares] == [828_288]


def test_what_a_logarithmic_axis_cannot_show_is_said():
    figure, plotted = memorisation(facts({1: -30_000.0, 4: 20_000.0}))
    assert (of(plotted, "stored").set_index("rank")["bits"] < 0).to_dict() == {1: True, 4: False}
    assert "stored nothing: LoRA r1" in texts(figure)


def test_without_facts_a_sentence_says_so():
    figure, plotted = memorisation(learning())
    assert plotted.empty
    assert "element" in plotted
    assert "no runs on a dataset of random facts" in texts(figure)
    figure, plotted = capacity(facts({1: 2_000.0}))
    assert plotted.empty
    assert "no runs on a dataset other" in texts(figure)


ODD = {
    "both": lambda: both(learning(), facts({None: 39_000.0, 1: 2_000.0})),
    "one seed": lambda: both(learning((None, 1), seeds=1), facts({1: 2_000.0, 4: 3_000.0}, seeds=1)),
    "no full fine-tuning": lambda: both(learning((1, 4)), facts({4: 2_000.0})),
    "full fine-tuning alone": lambda: both(learning((None,)), facts({None: 2_000.0})),
    "never joined, nothing stored": lambda: both(learning(first=1e-3), facts({1: -50_000.0})),
    "diverged": lambda: both(learning((None, 1), diverged_from=0.0), facts({1: 0.0}, diverged_from=0.0)),
    "no curves": lambda: Tables(learning().runs, pd.DataFrame()),
    "less than an epoch": lambda: learning(first_epoch_nats=None, first_epoch_scored_tokens=None),
    "two models": lambda: both(learning(), learning(model="$x^$")),
    "one run each": lambda: Tables(runs_table([make_run(None, 1e-3), make_run(8, 1e-3)]), learning().curves.iloc[:0]),
    "nothing": lambda: Tables(learning().runs.iloc[:0], learning().curves.iloc[:0]),
    "fewer columns": lambda: Tables(
        learning().runs.drop(columns=["entropy_bits", "trainable_params", "first_epoch_nats"]), learning().curves
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["capacity", "memorisation"])
@pytest.mark.parametrize("case", ODD)
def test_odd_tables_are_drawn(name, case):
    figure, plotted = FIGURES[name].draw(ODD[case]())
    assert isinstance(plotted, pd.DataFrame)
    lay_out(figure)


def test_diverged_runs_are_in_the_table_and_counted():
    tables = learning()
    figure, plotted = capacity(tables)
    lost = tables.runs.loc[tables.runs["status"] == "diverged", "run_id"]
    assert set(of(plotted, "diverged")["run_id"]) == set(lost)
    assert f"{len(lost)} diverged" in texts(figure)
