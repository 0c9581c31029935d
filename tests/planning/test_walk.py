"""The walk of a sweep that finds its learning rates, on loss functions whose optimum is known."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabench import runs
from lorabench.analysis.lr_law import PUBLISHED, predict_lr
from lorabench.planning.plan import merge_sweeps, starting_lr
from lorabench.runs import Condition, Lattice, Racing, Seeds, Sweep, best_lr, finished_losses, next_runs

LATTICE = Lattice(per_decade=3, further=6)
CONDITION = Condition("sft", "tiny", "worked", "lora", 4, "all", 32.0, 8, 50, "identity")
# It starts with 4.64e-4, 1e-3 and 2.15e-3.
SWEEP = Sweep(CONDITION, LATTICE.around(1.2e-3), Seeds(3, around=3), ("rank",), LATTICE)


def walk(loss, sweep=SWEEP):
    losses, waves = {}, []
    while wave := next_runs(sweep, losses):
        assert len({(run.lr, run.seed) for run in wave}) == len(wave)
        assert not {(run.lr, run.seed) for run in wave} & set(losses)
        assert {run.run_id for run in wave} <= sweep.run_ids
        waves.append(sorted({run.lr for run in wave}))
        losses |= {(run.lr, run.seed): loss(run.lr, run.seed) for run in wave}
    assert len(losses) <= sweep.most_runs
    assert finished_losses(sweep, lambda run: loss(run.lr, run.seed)) == losses
    return losses, waves


def parabola(optimum, seed_shift=0.0):
    return lambda lr, seed: math.log(lr / optimum) ** 2 + seed_shift * seed


def diverging(above):
    return lambda lr, seed: math.inf if lr > above else -lr


# By the first seed 1e-3 is best, by the mean of all 4.64e-4, whose lower neighbour is not trained yet.
def best_elsewhere_by_the_mean(lr, seed):
    return abs(math.log(lr / (1e-3 if seed == 0 else 3e-4)))


FIRST = [4.64e-4, 1e-3, 2.15e-3]
# The losses, the waves after the first one, the best LR, and the number of runs.
WALKS = [
    (parabola(1.1e-3, 0.1), [FIRST], 1e-3, 9),
    (parabola(1e-2), [[4.64e-3], [1e-2], [2.15e-2], [4.64e-3, 1e-2, 2.15e-2]], 1e-2, 12),
    # The third LR with seeds is the next but one below.
    (parabola(1e2), [[4.64e-3]], 2.15e-1, 9 + 6),
    # Equal lowest losses are enclosed together; where all are equal the walk stops.
    (lambda lr, seed: -0.6 if 3e-4 < lr < 5e-3 else -0.3, [[2.15e-4, 4.64e-3], [1e-2]], 1e-3, 12),
    (lambda lr, seed: -0.6, [], 1e-3, 9 + 6),
    # A diverged LR counts as higher, and a finer one is tried before it.
    (diverging(1.2e-3), [[1.47e-3], [4.64e-4, 6.81e-4, 1e-3]], 1e-3, 11),
    (diverging(0), [[2.15e-4], [1e-4]], None, 9),
    (best_elsewhere_by_the_mean, [FIRST, [2.15e-4]], 4.64e-4, 12),
]


@pytest.mark.parametrize(("loss", "waves_after_first", "best", "runs"), WALKS)
def test_a_walk_encloses_the_best_lr(loss, waves_after_first, best, runs):
    losses, waves = walk(loss)
    assert waves[: 1 + len(waves_after_first)] == [FIRST, *waves_after_first]
    assert best_lr(SWEEP, losses) == best
    assert len(losses) == runs


def test_in_rl_all_good_lrs_are_enclosed_and_the_best_of_them_is_chosen():
    def minus_accuracy(lr, seed):
        return {2.15e-4: -0.7, 4.64e-4: -0.78, 1e-3: -0.81, 2.15e-3: -0.80, 4.64e-3: -0.79}.get(lr, -0.5)

    rl = replace(SWEEP, condition=replace(CONDITION, task="rl"))
    losses, waves = walk(minus_accuracy, rl)
    assert waves[:3] == [FIRST, [2.15e-4, 4.64e-3], [1e-2]]
    assert best_lr(rl, losses) == 1e-3
    assert walk(minus_accuracy)[1] == [FIRST, FIRST]


def test_a_fixed_grid_of_the_same_condition_is_part_of_the_walk():
    fixed = Sweep(CONDITION, (1e-4, 3e-4, 1e-3, 3e-3), Seeds(2, given=((1e-4, 2),)), ("early",))
    [merged] = merge_sweeps([fixed, SWEEP])
    assert merged.lrs == (1e-4, 3e-4, 4.64e-4, 1e-3, 2.15e-3, 3e-3)
    assert (merged.seeds, merged.lattice, merged.experiments) == (Seeds(3, 3, ((1e-4, 2),)), LATTICE, ("early", "rank"))
    _, waves = walk(parabola(3e-3), merged)
    assert waves == [list(merged.lrs), [4.64e-3], [2.15e-3, 3e-3, 4.64e-3]]
    # A step of the fixed grid that is wider than one of the lattice is filled.
    _, waves = walk(parabola(1e-4), merged)
    assert waves[1:] == [[4.64e-5, 2.15e-4], [4.64e-5, 1e-4, 2.15e-4]]


def test_a_fixed_grid_has_seeds_at_its_best_lr():
    fixed = Sweep(CONDITION, (1e-4, 3e-4, 1e-3), Seeds(3), ("rank",))
    losses, waves = walk(lambda lr, seed: 1.0 if lr > 2e-4 else math.inf, fixed)
    # Of equally good LRs the lowest is the best.
    assert waves == [[1e-4, 3e-4, 1e-3], [3e-4]]
    assert (best_lr(fixed, losses), len(losses)) == (3e-4, fixed.n_runs)
    # By the first seed 1e-4 is best, by the mean of the two that have both LRs 3e-4; a third has one LR only.
    losses = {(1e-4, 0): 2.0, (3e-4, 0): 2.1, (1e-4, 1): 2.5, (3e-4, 1): 2.1, (1e-4, 2): 0.0}
    fixed = Sweep(CONDITION, (1e-4, 3e-4), Seeds(1, given=((1e-4, 3), (3e-4, 2))), ("rank",))
    assert best_lr(fixed, losses) == 3e-4
    # A seed that diverged does not choose. An LR at which the first seed diverged is not chosen, and the other seeds
    # choose without it.
    assert best_lr(fixed, losses | {(3e-4, 1): math.inf}) == 1e-4
    assert best_lr(fixed, losses | {(1e-4, 0): math.inf}) == 3e-4


def test_with_another_first_seed_a_walk_takes_the_same_steps():
    sweep = replace(SWEEP, seeds=Seeds(6, around=3))
    later = replace(SWEEP, seeds=Seeds(6, around=3, first=100))
    losses, waves = walk(best_elsewhere_by_the_mean, sweep)
    others, other_waves = walk(lambda lr, seed: best_elsewhere_by_the_mean(lr, seed - 100), later)
    assert other_waves == waves
    assert others == {(lr, seed + 100): loss for (lr, seed), loss in losses.items()}
    assert best_lr(later, others) == best_lr(sweep, losses)
    assert not later.run_ids & sweep.run_ids
    assert later.sweep_id != sweep.sweep_id


RACED = replace(SWEEP, seeds=Seeds(5, around=5, racing=Racing(level=0.05, least=2)))


def test_an_lr_that_is_surely_worse_gets_no_more_seeds():
    # The lower LR is behind 1e-3 by 0.2 and 0.4, the higher one by 0.1 and 0.3. The pooled variance is 0.02 with two
    # degrees of freedom, so t is 3 and 2, where the quantile is 2.92. By the variance of all five differences, with
    # three degrees of freedom, the lower LR would come in again after the next seed.
    behind = {4.64e-4: [0.2, 0.4], 2.15e-3: [0.1, 0.3, 0.6, 0.3, 0.3]}

    def loss(lr, seed):
        return seed + (0.0 if lr == 1e-3 else behind[lr][seed])

    losses, waves = walk(loss, RACED)
    assert waves[:3] == [FIRST, FIRST, [1e-3, 2.15e-3]]
    assert [1e-3] in waves[3:]
    assert best_lr(RACED, losses) == 1e-3
    # A stricter test gives up neither.
    stricter = replace(RACED, seeds=Seeds(3, 3, racing=Racing(0.01, 2)))
    assert next_runs(stricter, {(lr, seed): loss(lr, seed) for lr in FIRST for seed in (0, 1)})[0].lr == 4.64e-4


def test_equally_good_lrs_race_to_the_end_and_a_diverged_one_is_out():
    def equal(lr, seed):
        return 0.1 * ((seed + [1e-3, 4.64e-4, 2.15e-3].index(lr)) % 3) if lr in FIRST else 1.0

    assert sorted(walk(equal, RACED)[0]) == [(lr, seed) for lr in FIRST for seed in range(5)]
    losses, _ = walk(lambda lr, seed: math.inf if lr > 2e-3 and seed == 1 else equal(lr, seed), RACED)
    assert max(seed for lr, seed in losses if lr == 2.15e-3) == 1


@given(
    seeds=st.integers(1, 4),
    log_optimum=st.floats(-4, -2),
    noise=st.sampled_from([0, 0.3, 3]),
    log_diverges=st.floats(-3, 0),
    racing=st.sampled_from([None, Racing(0.05, 2)]),
    draw=st.integers(0, 10**6),
)
def test_every_walk_ends_with_all_seeds_around_the_best_lr(seeds, log_optimum, noise, log_diverges, racing, draw):
    optimum, diverges = 10**log_optimum, 10**log_diverges
    sweep = replace(SWEEP, seeds=Seeds(seeds, around=seeds, racing=racing))

    def loss(lr, seed):
        rng = random.Random(f"{draw}, {lr}, {seed}")
        return math.inf if lr > diverges else round(math.log(lr / optimum) ** 2 + rng.gauss(0, noise), 1)

    losses, _ = walk(loss, sweep)
    best = best_lr(sweep, losses)
    complete = [lr for lr, seed in losses if seed == 0 and all((lr, other) in losses for other in range(seeds))]
    assert best in complete
    if racing is not None and seeds > racing.least:
        return
    assert len(complete) >= 3
    enclosed = min(complete) < best < max(complete)
    assert enclosed or len({lr for lr, _ in losses}) == 9 or best < diverges < best * 2.2


def test_all_sweeps_share_the_lattice_and_start_at_the_papers_law():
    assert [LATTICE.lr(position) for position in (-10, -9, -8, -7)] == [4.64e-4, 1e-3, 2.15e-3, 4.64e-3]
    assert Lattice(3, 6, scale=4.0).around(1e-3) == (4 * 4.64e-4, 4 * 1e-3, 4 * 2.15e-3)
    assert Lattice(4, 6).around(1e-3) == (5.62e-4, 1e-3, 1.78e-3)
    # The start is the geometric mean of the law for both methods, in RL a quarter of it.
    laws = [predict_lr(PUBLISHED, "llama", 128, method) for method in ("fullft", "lora")]
    assert starting_lr(128, "sft") == pytest.approx(math.sqrt(math.prod(laws)))
    assert starting_lr(128, "rl") == pytest.approx(starting_lr(128, "sft") / 4)


def test_the_lowest_loss_of_a_grid_and_the_lowest_lr_of_equals():
    assert runs.lowest({1e-3: 2.0, 1e-4: 3.0, 3e-4: 2.0, 1e-2: math.nan, 3e-2: math.inf}) == 3e-4
    assert runs.lowest({1e-4: 2.0 + runs.TIE / 2, 3e-4: 2.0}) == 3e-4
    assert runs.lowest({1e-4: 2.0 + runs.TIE / 2, 3e-4: 2.0}, runs.TIE) == 1e-4
    assert runs.lowest({1e-4: math.nan, 3e-4: math.inf}) is None


def test_a_walk_to_one_further_lr_has_the_expected_waves():
    # Of the neighbours of the best LR, 4.64e-3 is far worse than 2.15e-3, and 1e-3 as good but for noise.
    losses = {4.64e-4: [2.0] * 4, 1e-3: [0.2, 0.0, 0.2, 0.0], 2.15e-3: [0.1, 0.05, 0.1, 0.05], 4.64e-3: [2.0] * 4}
    fixed = Sweep(CONDITION, (4.64e-4, 2.15e-3), Seeds(3, given=((4.64e-4, 2),)), ("rank",))
    for sweep, expected in (
        (replace(SWEEP, seeds=Seeds(4, around=3)), [3, 1, 6, 1]),
        (replace(SWEEP, seeds=Seeds(4, around=4, racing=Racing(0.05, 2))), [3, 1, 3, 2, 2]),
        (fixed, [3, 2]),
    ):
        numbers, done = [], {}
        while wave := next_runs(sweep, done):
            numbers.append(len(wave))
            done |= {(run.lr, run.seed): losses.get(run.lr, [1.0] * 4)[run.seed] for run in wave}
        assert sweep.expected_waves() == numbers == expected
        assert sweep.n_runs == sum(numbers)
