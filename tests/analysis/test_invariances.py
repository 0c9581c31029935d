"""Pairs of runs that invariances of LoRA make equivalent, and measures of how far runs differ."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from lorabench.analysis.invariances import (
    descent_ratios,
    differences,
    first_descents,
    invariance_pairs,
    move_times,
    run_pairs,
    step_sizes,
)

from ..handmade.lora import lora_run, lora_tables, nll, update_norm


def table(*configurations, seeds=(0,)):
    return lora_tables(lora_run(**config, seed=seed) for config in configurations for seed in seeds)[0]


@pytest.mark.parametrize(("p", "q"), [(0.01, 3.0), (7.0, 100.0)])
def test_transformed_runs_are_equivalent(p, q):
    first = {"alpha": 11.0, "init_a": 0.3, "lr": 1e-3, "lr_ratio": 1.0}
    second = {"alpha": 11.0 / (p * q), "init_a": 0.3 * p, "lr": 1e-3 * p, "lr_ratio": q / p}
    runs = pd.DataFrame([lora_run(**config) | {"run_id": name} for name, config in (("a", first), ("b", second))])
    [pair] = run_pairs(runs).to_dict("records")
    assert pair["equivalent"]
    assert pair["time_ratio"] == pytest.approx(1)


def test_controls_are_of_settings_with_equivalent_runs_at_the_smallest_epsilon():
    plus, same_ratio = {"alpha": 8.0, "lr_ratio": 4.0}, {"alpha": 8.0, "init_a": 2.0, "lr": 2e-3, "lr_ratio": 1.0}
    other_eps = ({**config, "eps": 1e-8} for config in ({}, plus))
    pairs = invariance_pairs(table({}, plus, {"lr": 2e-3}, {"rank": 16}, {"rank": 16, "lr": 2e-3}, *other_eps))
    assert sorted(pairs["equivalent"]) == [False, False, True]
    assert (set(pairs["rank"]), set(pairs["eps"])) == ({8}, {1e-30})
    assert len(invariance_pairs(table({}, same_ratio))) == len(invariance_pairs(table({}, plus), plus=True)) == 1
    assert invariance_pairs(table({}, same_ratio), plus=True).empty
    assert invariance_pairs(table({})).empty


def test_differences_grow_to_the_largest_so_far():
    bumps = {1: 0.0, 2: 3e-3, 3: -1e-3, 4: -5e-3}

    def loss(run, step):
        return nll(run | {"lr": 1e-3}, step) + (bumps.get(step, 0.0) if run["lr"] == 2e-3 else 0.0)

    runs, curves = lora_tables([lora_run(lr=1e-3, steps=8), lora_run(lr=2e-3, steps=8)], nll=loss)
    measured = differences(run_pairs(runs), curves, 6)
    assert measured["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert measured["difference"].tolist() == pytest.approx([0, 3e-3, 3e-3, 5e-3, 5e-3, 5e-3])
    gone = curves[~((curves["run_id"] == runs["run_id"].iloc[1]) & (curves["step"] > 3))]
    assert differences(run_pairs(runs), gone, 6)["step"].tolist() == [1, 2, 3]
    assert differences(run_pairs(runs), curves.iloc[:0], 6).empty
    assert differences(run_pairs(runs).iloc[:0], curves, 6).empty


def test_first_descents_by_rule_are_per_unit_of_lr():
    configurations = [{"rank": r} for r in (1, 4, 16)] + [{"rank": 4, "lr": 5e-3}, {"rank": 4, "lr_ratio": 3.0}]
    configurations += [{"rank": r, "alpha": 32 * math.sqrt(r)} for r in (4, 16)]
    configurations += [{"rank": r, "alpha": 2.0 * r} for r in (4, 8)] + [{"rank": 4, "init_a": 2.0}]
    made = [lora_run(**config, seed=seed) for config in configurations for seed in (0, 1)]
    measured = first_descents(*lora_tables(made, descent=lambda run, step: run["alpha"] * run["lr"] * run["lr_ratio"]))
    ranks = {rule: sorted(set(rows["rank"])) for rule, rows in measured.groupby("rule")}
    # Alpha 32 at rank 16 follows alpha = 2 r as well.
    assert ranks == {"alpha / r": [1, 4, 16], "alpha / sqrt(r)": [1, 4, 16], "constant factor": [4, 8, 16]}
    assert measured["descent"].tolist() == pytest.approx(measured["alpha"].tolist())
    rank_4 = measured[(measured["rule"] == "alpha / r") & (measured["rank"] == 4)]
    assert len(rank_4) == 2
    assert rank_4["run_ids"].map(len).tolist() == [3, 3]


def test_ratios_are_paired_by_seed():
    rows = [
        {"rule": "alpha / r", "rank": rank, "seed": seed, "descent": value, "run_ids": [f"{rank}-{seed}"]}
        for rank, values in ((1, (1.0, 2.0, 9.0)), (8, (2.0, 4.0)))
        for seed, value in enumerate(values)
    ]
    common = {"model": "m", "dataset": "d", "placement": None, "batch_size": 8, "eps": math.nan}
    [low, high] = descent_ratios(pd.DataFrame(rows).assign(**common)).to_dict("records")
    assert (low["ratio"], low["low"], low["high"], low["n_seeds"]) == pytest.approx((0.5, 0.5, 0.5, 2))
    assert low["run_ids"] == ["1-0", "1-1", "8-0", "8-1"]
    assert high["ratio"] == 1
    assert math.isnan(high["low"])


@pytest.mark.parametrize(("power", "at"), [(0.2, 1.5), (3.0, 62.7)])
def test_a_has_moved_where_a_power_law_reaches_1(power, at):
    times = move_times(*lora_tables([lora_run()], a_moved=lambda run, step: (step / at) ** power))
    assert times[["limit", "bound"]].values.tolist() == [[pytest.approx(at), 0]]


def test_step_sizes_are_of_the_longest_standard_runs_at_the_fitted_optimum():
    def loss(lr):
        return 2.0 + math.log(lr / 1e-3) ** 2

    grid = [(lr, steps) for lr in (3e-4, 1e-3, 3e-3) for steps in (8, 16)]
    made = [lora_run(lr=lr, steps=n, final_valid_nll=loss(lr), final_test_nll=loss(lr)) for lr, n in grid]
    made += [lora_run(seed=1, steps=16), lora_run(seed=0, steps=16, alpha=8.0)]
    runs, curves = lora_tables(made)
    measured = step_sizes(runs, curves)
    columns = ["lr", "steps", "seed", "alpha"]
    assert set(measured[columns].itertuples(index=False, name=None)) == {(1e-3, 16, 0, 32.0), (1e-3, 16, 1, 32.0)}
    at = measured[(measured["seed"] == 1) & (measured["step"] == 8)]["size"].item()
    assert at == pytest.approx(update_norm(lora_run(seed=1), 8) / 1e-3)
