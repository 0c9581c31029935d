"""Claims C1 to C11 on tables in which each holds, fails, or is left open."""

import math
from itertools import product

import pandas as pd
import pytest

from ..handmade.lora import descent, lora_run, lora_tables, luck, nll
from ..handmade.sft import arm, tables
from . import judged, verdict_is

SEEDS = range(5)


def grid(*configurations, seeds=SEEDS, **columns):
    """Make a run per configuration and seed."""
    return [lora_run(**(columns | config), seed=seed) for config in configurations for seed in seeds]


# Curves of several ranks at one LR ------------------------------------------------------------------------------------

MARGIN = 0.02 * 0.9  # of the fall from 3.0 nats to 2.1


def early(excess, seeds=SEEDS, ranks=(4, 16, 64)):
    """Make runs whose loss is above that of an infinite rank by `excess(seed, step)` * 64/3 / rank nats from step 2."""

    def loss(run, step):
        return nll(run, step) + (excess(run["seed"], step) * 64 / 3 / run["rank"] if step > 1 else 0.0)

    final = {"steps": 128, "final_valid_nll": 2.1, "final_test_nll": 2.0}
    return lora_tables([lora_run(rank, seed=seed, **final) for rank in ranks for seed in seeds], nll=loss)


def growing(size, wobble=0.1):
    """Return a difference of ranks 16 and 64 that grows with log step, a little more or less by seed."""
    return lambda seed, step: size * math.log10(step) * (1 + luck(seed, size=wobble))


@pytest.mark.parametrize(
    ("claim", "excess", "verdict"),
    [
        # Rank 4, four times as far from rank 16 as rank 64 is, doesn't count.
        ("C1", growing(0.3 * MARGIN), "confirmed"),
        ("C1", growing(1.5 * MARGIN), "contradicted"),
        ("C1", growing(0.55 * MARGIN, wobble=0.6), "inconclusive"),
        ("C2", growing(0.001), "confirmed"),
        ("C2", lambda seed, step: 0.02 / step, "contradicted"),
        ("C2", lambda seed, step: 0.01 * step ** luck(seed, size=0.3), "inconclusive"),
        ("C3", growing(-0.001), "confirmed"),
        ("C3", growing(0.001), "contradicted"),
    ],
)
def test_early_curves(claim, excess, verdict):
    row = judged(claim, *early(excess))
    verdict_is(row, verdict, "r16 - r64")
    assert row["ci_low"] <= row["estimate"] <= row["ci_high"]
    assert row["n_runs"] == 10


def test_what_early_curves_need():
    claim = "C2"  # all three judge the same difference
    low = judged(claim, *early(growing(-0.001), ranks=(1, 4, 16)))
    verdict_is(low, "setting not met", "two ranks of 16 or more (here r1, r4, r16)")
    runs, curves = early(growing(-0.001))
    fullft = runs.assign(method="fullft", rank=pd.NA, placement=None).drop_duplicates(["lr", "seed"])
    assert judged(claim, fullft, curves)["verdict"] == "not tested"
    lost = (runs["rank"] == 64) & (runs["seed"] == 4)
    runs.loc[lost, ["status", "final_valid_nll", "final_test_nll"]] = ["diverged", math.nan, math.nan]
    assert "1 runs at that LR diverged" in judged(claim, runs, curves)["reason"]


# The first update ---------------------------------------------------------------------------------------------------

RANKS = (1, 4, 16)
FLAT = [{"rank": rank} for rank in RANKS]
ROOT = [{"rank": rank, "alpha": 32 * math.sqrt(rank)} for rank in RANKS[1:]]
CONSTANT = [{"rank": rank, "alpha": 32.0 * rank} for rank in RANKS[1:]]


def test_first_updates_do_not_depend_on_rank():
    claim = judged("C4", *lora_tables(grid(*FLAT, *ROOT, *CONSTANT)))
    verdict_is(claim, "confirmed", "control alpha / sqrt(r)", "control constant factor")
    assert 0.95 < claim["ci_low"] < claim["estimate"] < claim["ci_high"] < 1.05
    assert claim["n_runs"] == 7 * len(SEEDS)

    def rising(run, step):
        return descent(run, step) * (1 + 0.1 * math.log2(run["rank"]))

    def flat_always(run, step):
        return descent(run | {"alpha": 32.0}, step)

    for configurations, change, verdict, reason in (
        (FLAT + ROOT, rising, "contradicted", "r1 0.7"),
        (FLAT + ROOT, flat_always, "inconclusive", "does not fail"),
        (FLAT, descent, "inconclusive", "no control"),
    ):
        verdict_is(judged("C4", *lora_tables(grid(*configurations), descent=change)), verdict, reason)


# Invariance ---------------------------------------------------------------------------------------------------------


def moved_by(p, q, alpha=32.0, lr=1e-3):
    """Return the configuration that is equivalent under p and q."""
    return {"alpha": alpha / (p * q), "init_a": p, "lr": lr * p, "lr_ratio": q / p}


EQUIVALENT = [moved_by(1, 1), moved_by(2, 1), moved_by(1, 3), moved_by(4, 4)]
OTHER = [{"lr": 1e-2, "lr_ratio": 0.1}, {"lr": 2e-3}]


def test_equivalent_runs_are_one_run():
    claims = judged(["C5", "C8"], *lora_tables(grid(*EQUIVALENT, *OTHER)))
    # There are six pairs a seed; C8 takes the pairs of equal LRs in one run with unequal LRs in the other.
    for claim, pairs in (("C5", 30), ("C8", 20)):
        verdict_is(claims.loc[claim], "confirmed", f"{pairs} equivalent pairs")
        assert claims.loc[claim, "estimate"] < 1e-12

    # The largest difference of equivalent runs is the estimate.
    def loss(run, step):
        return nll(run, step) + (3e-5 if run["lr_ratio"] == 3.0 and run["seed"] == 2 and step == 50 else 0.0)

    claims = judged(["C5", "C8"], *lora_tables(grid(*EQUIVALENT, *OTHER), nll=loss))
    assert claims["verdict"].tolist() == ["contradicted"] * 2
    assert claims["estimate"].tolist() == pytest.approx([3e-5] * 2)
    # After step 50 the losses of equivalent runs may differ.
    later = lora_tables(grid(*EQUIVALENT, *OTHER), nll=lambda run, step: loss(run, step - 1))
    assert judged("C5", *later)["estimate"] < 1e-12


def test_a_large_epsilon_contradicts_no_argument_about_zero():
    def loss(run, step):
        return nll(run, step) + (1e-4 * run["init_a"] if run["eps"] > 1e-9 else 0.0)

    coarse = grid(*EQUIVALENT, *OTHER, eps=1e-8)
    verdict_is(judged("C5", *lora_tables(coarse, nll=loss)), "inconclusive", "epsilon")
    # Of two values of epsilon, the smaller is judged.
    verdict_is(judged("C5", *lora_tables(coarse + grid(*EQUIVALENT, *OTHER), nll=loss)), "confirmed", "eps 1e-30")


def test_what_leaves_invariance_open():
    for configurations, change, verdict, reason in (
        (EQUIVALENT, nll, "inconclusive", "no pair that should differ"),
        (EQUIVALENT + OTHER, lambda run, step: 3.0, "inconclusive", "should differ do not"),
        (OTHER, nll, "not tested", "no runs that should be equivalent"),
    ):
        verdict_is(judged("C5", *lora_tables(grid(*configurations), nll=change)), verdict, reason)


# The initial slope and the time scale of A --------------------------------------------------------------------------

TENFOLD = [{}, {"lr": 1e-2, "lr_ratio": 0.1}, {"lr": 3e-3}]


def sooner(size):
    """Return a loss that falls more at every step with the larger LR of A, a little more or less by seed."""

    def loss(run, step):
        more = 0.01 * size + luck(run["seed"], size=1e-5)
        return nll(run, step) - (more * (step - 1) if run["lr"] == 1e-2 else 0.0)

    return loss


@pytest.mark.parametrize(
    ("size", "moved", "verdict", "left_out"),
    [(0.0, 0.0, "confirmed", 0), (1.0, 0.05, "contradicted", 0), (1.0, 0.5, "inconclusive", 1)],
)
def test_lr_a_does_not_matter_at_first(size, moved, verdict, left_out):
    runs, curves = lora_tables(grid(*TENFOLD), nll=sooner(size), a_moved=lambda run, step: moved)
    claim = judged("C6", runs, curves)
    verdict_is(claim, verdict, f"{left_out} pairs left out")
    assert claim["n_runs"] == 10 * (1 - left_out)
    assert size or 0.98 < claim["ci_low"] < claim["estimate"] < claim["ci_high"] < 1.02


def at_time_scale(init_a, lr):
    """Return a configuration with the update scale alpha * init_A * LR_B of the standard run."""
    return {"init_a": init_a, "lr": lr, "lr_ratio": 1e-3 / (init_a * lr)}


TIMES = [at_time_scale(1.0, lr) for lr in (5e-4, 1e-3, 2e-3, 8e-3)]


def moving(power):
    """Return a movement that reaches A's norm after a power of the time scale, a little more or less by seed."""

    def moved(run, step):
        reached = 2000 * (run["init_a"] / run["lr"] / 2000) ** power / 20 * (1 + luck(run["seed"], size=0.02))
        return step / reached if step > 1 else 0.0

    return moved


@pytest.mark.parametrize(("power", "verdict"), [(1.0, "confirmed"), (2.0, "contradicted")])
def test_the_time_scale_of_a(power, verdict):
    # Another initial scale at the same update scale is a time scale like any other.
    configurations = [*TIMES, at_time_scale(0.5, 1e-3), at_time_scale(4.0, 1e-3)]
    runs = grid(*configurations, steps=1024)
    claim = judged("C7", *lora_tables(runs, a_moved=moving(power), nll=lambda run, step: 3.0))
    times = f"{4 if power == 2 else 5} times and {int(power == 2)} bounds at 1 update scales"
    verdict_is(claim, verdict, times)
    assert claim["estimate"] == pytest.approx(power, abs=0.05)


def test_runs_in_which_a_does_not_move_that_far_are_bounds():
    slow = at_time_scale(1.0, 1e-4)
    claim = judged("C7", *lora_tables(grid(*TIMES, slow, steps=256), a_moved=moving(1.0)))
    verdict_is(claim, "confirmed", "4 times and 1 bounds")
    assert claim["n_runs"] == 5 * len(SEEDS)
    runs, curves = lora_tables(grid(*TIMES[:2], slow, steps=256), a_moved=moving(1.0))
    verdict_is(judged("C7", runs, curves), "inconclusive", "3 known times")
    assert judged("C7", runs, curves[curves["metric"] != "a_moved"])["verdict"] == "not tested"
    verdict_is(judged("C7", *lora_tables(grid({"lr": 1e-5}, {"lr": 2e-5}))), "inconclusive")


# Variants -----------------------------------------------------------------------------------------------------------

VARIANTS = [{"alpha": 8.0}, {"alpha": 128.0}, {"lr_ratio": 4.0}, {"lr_ratio": 16.0}]
LUCK = [(0, 0.004, -0.004), (0.001, 0.003, -0.005), (-0.001, 0.006, -0.004), (0, 0.005, -0.003), (0.001, 0.004, -0.006)]


def variants(changes=None, every=None, chosen=VARIANTS):
    """Make the standard arm and LR-tuned variants, with the loss of some changed by their place."""
    standard = {"alpha": 32.0, "lr_ratio": 1.0, "init_a": 1.0, "optimum": 3.2e-3}
    return tables(
        arm(16, **(standard | {"offsets": LUCK[place]} | variant | (every or {}) | (changes or {}).get(place, {})))
        for place, variant in enumerate([{}, *chosen])
    )


@pytest.mark.parametrize(
    ("changes", "verdict", "reason"),
    [
        ({}, "confirmed", "LoRA r16 alpha 8 - LoRA r16 = -0.0003"),
        ({2: {"floor": 1.9}}, "contradicted", "LoRA r16 alpha 128 - LoRA r16 = -0.09"),
        ({3: {"floor": 1.9405}}, "inconclusive", "LoRA r16 LR_B/LR_A 4 - LoRA r16 = -0.0588"),
    ],
)
def test_variants_of_the_parametrization(changes, verdict, reason):
    claim = judged("C9", *variants(changes))
    verdict_is(claim, verdict, reason)
    # 2% of the gain from the base's 5 nats to the standard arm's validation NLL of 2.1.
    assert claim["margin_low"] == pytest.approx(-0.058, abs=0.003)


# B against A --------------------------------------------------------------------------------------------------------


def sweeps(share):
    """Make LR grids whose middle LR is best and has several seeds."""
    made = []
    for rank, lr in product((1, 8), (3e-4, 1e-3, 3e-3)):
        for seed in SEEDS if lr == 1e-3 else (0,):
            loss = 2.0 + 0.1 * math.log(lr / 1e-3) ** 2 + luck(rank, seed, round(1e6 * lr), size=1e-3)
            made.append(lora_run(rank, lr=lr, seed=seed, steps=1000, final_valid_nll=loss, final_test_nll=loss))
    return lora_tables(made, b_over_a=share, nll=lambda run, step: 3.0)


@pytest.mark.parametrize(
    ("share", "verdict"),
    [
        (lambda run, step: 0.8 + luck(run["seed"], size=0.02), "confirmed"),
        (lambda run, step: 0.52 + luck(run["seed"], size=0.01), "right sign, below the margin"),
        (lambda run, step: 0.48 + luck(run["seed"], size=0.01), "contradicted"),
        (lambda run, step: 0.57 + luck(run["seed"], size=0.1), "inconclusive"),
    ],
)
def test_b_outgrows_a(share, verdict):
    claim = judged("C10", *sweeps(share))
    verdict_is(claim, verdict, "1000 steps")
    assert (claim["n_runs"], claim["margin_low"]) == (10, 0.6)


# The effective LR ---------------------------------------------------------------------------------------------------

MOVING_AND_STILL = [{}, {"lr": 1e-4, "lr_ratio": 10.0}]


def shrinking(by_a):
    """Return the size of a step, which shrinks as Adam's does, and grows by a power of the step where A moves."""

    def norm(run, step):
        noise = 1 + luck(run["seed"], step, round(run["lr_ratio"]), size=0.02)
        moves = 1.0 if run["lr_ratio"] == 1 else 0.0
        return run["lr"] * run["lr_ratio"] * noise * step ** (moves * by_a - 0.5)

    return norm


@pytest.mark.parametrize(("by_a", "verdict"), [(0.2, "confirmed"), (0.0, "contradicted")])
def test_the_effective_lr_beside_runs_in_which_a_is_still(by_a, verdict):
    claim = judged("C11", *lora_tables(grid(*MOVING_AND_STILL), update_norm=shrinking(by_a)))
    verdict_is(claim, verdict, "with LR_A 0.0001 and the same LR_B")
    assert claim["estimate"] == pytest.approx(64**by_a, rel=0.05)
    assert claim["n_runs"] == 2 * len(SEEDS)
    assert (claim["margin_low"], claim["margin_high"]) == pytest.approx((1.1, math.inf))


def test_what_c9_to_c11_need():
    verdict_is(judged("C9", *variants(chosen=VARIANTS[:2])), "inconclusive", "no variant of lr_ratio")
    # The end of runs at an optimum.
    runs, curves = sweeps(lambda run, step: 0.8 + luck(run["seed"], size=0.02))
    verdict_is(judged("C10", runs, curves[curves["step"] < 1000]), "not tested")
    # Steps that shrink without runs in which A is still, seeds and records.
    verdict_is(judged("C11", *lora_tables(grid({}), update_norm=shrinking(0.2))), "inconclusive")
    verdict_is(judged("C11", *lora_tables(grid({}), update_norm=shrinking(0.8))), "confirmed")
    runs, curves = lora_tables(grid({}))
    verdict_is(judged("C11", runs, curves[curves["step"] != 1]), "not tested")
