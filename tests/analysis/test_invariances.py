"""Pairs of runs that invariances of LoRA make equivalent, and measures of how far runs differ."""

import math

import pytest

from lorabench.analysis import invariances

from ..handmade.lora import lora_run, lora_tables, update_norm


def table(*configurations):
    return lora_tables(lora_run(**config) for config in configurations)[0]


def test_transformed_runs_are_equivalent():
    p, q = 0.01, 3.0
    first = {"alpha": 11.0, "init_a": 0.3, "lr": 1e-3, "lr_ratio": 1.0}
    second = {"alpha": 11.0 / (p * q), "init_a": 0.3 * p, "lr": 1e-3 * p, "lr_ratio": q / p}
    [pair] = invariances.run_pairs(table(first, second)).to_dict("records")
    assert pair["equivalent"]
    assert pair["time_ratio"] == pytest.approx(1)


def test_controls_are_of_settings_with_equivalent_runs_at_the_smallest_epsilon():
    plus, same_ratio = {"alpha": 8.0, "lr_ratio": 4.0}, {"alpha": 8.0, "init_a": 2.0, "lr": 2e-3, "lr_ratio": 1.0}
    other_eps = ({**config, "eps": 1e-8} for config in ({}, plus))
    pairs = invariances.invariance_pairs(
        table({}, plus, {"lr": 2e-3}, {"rank": 16}, {"rank": 16, "lr": 2e-3}, *other_eps)
    )
    assert sorted(pairs["equivalent"]) == [False, False, True]
    assert (set(pairs["rank"]), set(pairs["eps"])) == ({8}, {1e-30})
    assert (
        len(invariances.invariance_pairs(table({}, same_ratio)))
        == len(invariances.invariance_pairs(table({}, plus), plus=True))
        == 1
    )
    assert invariances.invariance_pairs(table({}, same_ratio), plus=True).empty
    assert invariances.invariance_pairs(table({})).empty


def test_first_descents_by_rule_are_per_unit_of_lr():
    configurations = [{"rank": r} for r in (1, 4, 16)] + [{"rank": 4, "lr": 5e-3}, {"rank": 4, "lr_ratio": 3.0}]
    configurations += [{"rank": r, "alpha": 32 * math.sqrt(r)} for r in (4, 16)]
    configurations += [{"rank": r, "alpha": 2.0 * r} for r in (4, 8)] + [{"rank": 4, "init_a": 2.0}]
    made = [lora_run(**config, seed=seed) for config in configurations for seed in (0, 1)]
    measured = invariances.first_descents(
        *lora_tables(made, descent=lambda run, step: run["alpha"] * run["lr"] * run["lr_ratio"])
    )
    ranks = {rule: sorted(set(rows["rank"])) for rule, rows in measured.groupby("rule")}
    # Alpha 32 at rank 16 follows alpha = 2 r as well.
    assert ranks == {"alpha / r": [1, 4, 16], "alpha / sqrt(r)": [1, 4, 16], "constant factor": [4, 8, 16]}
    assert measured["descent"].tolist() == pytest.approx(measured["alpha"].tolist())
    rank_4 = measured[(measured["rule"] == "alpha / r") & (measured["rank"] == 4)]
    assert rank_4["run_ids"].map(len).tolist() == [3, 3]


def test_a_has_moved_where_a_power_law_reaches_1():
    times = invariances.move_times(*lora_tables([lora_run()], a_moved=lambda run, step: (step / 62.7) ** 3.0))
    assert times[["limit", "bound"]].values.tolist() == [[pytest.approx(62.7), 0]]


def test_step_sizes_are_of_the_longest_standard_runs_at_the_fitted_optimum():
    made = []
    for lr in (3e-4, 1e-3, 3e-3):
        loss = 2.0 + math.log(lr / 1e-3) ** 2
        made += [lora_run(lr=lr, steps=n, final_valid_nll=loss, final_test_nll=loss) for n in (8, 16)]
    made += [lora_run(seed=1, steps=16), lora_run(seed=0, steps=16, alpha=8.0)]
    runs, curves = lora_tables(made)
    measured = invariances.step_sizes(runs, curves)
    columns = ["lr", "steps", "seed", "alpha"]
    assert set(measured[columns].itertuples(index=False, name=None)) == {(1e-3, 16, 0, 32.0), (1e-3, 16, 1, 32.0)}
    at = measured[(measured["seed"] == 1) & (measured["step"] == 8)]["size"].item()
    assert at == pytest.approx(update_norm(lora_run(seed=1), 8) / 1e-3)
