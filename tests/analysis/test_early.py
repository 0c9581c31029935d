"""The first steps of runs: early differences of ranks, and short runs from long ones."""

import math

import numpy as np
import pytest

from lorabench.analysis.comparison import comparisons
from lorabench.analysis.curves import early_difference, inverse_rank_fit
from lorabench.analysis.estimate import combined, student
from lorabench.analysis.optima import coupled

from ..handmade.lora import difficulty, lora_run, lora_tables, nll
from ..handmade.sft import arm, tables

SEEDS = range(3)


def early_tables(ranks=(1, 4, 64), seeds=SEEDS):
    """Return tables in which rank 4 lies above the other ranks by 0.01 * step * (1 + seed)."""

    def loss(run, step):
        return nll(run, step) + (0.01 * step * (1 + run["seed"]) if run["rank"] == 4 else 0.0)

    return lora_tables([lora_run(rank, seed=seed, lr=1e-3, steps=16) for rank in ranks for seed in seeds], nll=loss)


def test_the_difference_is_paired_by_seed_and_step():
    early = early_difference(*early_tables())
    assert (early.low, early.high, early.lr, early.curves.n_seeds) == (4, 64, 1e-3, 3)
    for seed in SEEDS:
        np.testing.assert_allclose(early.curves.by_seed[seed], [0.01 * step * (1 + seed) for step in range(1, 17)])
    assert list(early_difference(*early_tables(), first_steps=5).curves.by_seed.index) == [1, 2, 3, 4, 5]
    # The deviation of batches is pooled over both ranks.
    luck = np.array([[difficulty(seed, step) for seed in SEEDS] for step in range(1, 17)])
    fall = np.array([[nll(lora_run(4), step) - difficulty(0, step)] for step in range(1, 17)])
    upper = luck + fall + 0.01 * np.arange(1, 17)[:, None] * (1 + np.arange(3))
    pooled = (luck.var(axis=1, ddof=1).mean() + upper.var(axis=1, ddof=1).mean()) / 2
    assert early.sigma_batch == pytest.approx(math.sqrt(pooled))


def test_differences_of_all_pairs_go_as_inverse_ranks():
    early = early_difference(*early_tables(ranks=(4, 16, 64)))
    pairs = early.by_inverse_rank.set_index(["low", "high"])
    # Rank 4 alone lies above the others, by 0.02 * step from step 2 on.
    assert pairs.loc[(4, 16)].tolist() == pytest.approx([3 / 16, 0.02 * 9])
    as_theory = early.by_inverse_rank.assign(difference=0.3 * early.by_inverse_rank["inverse"])
    assert inverse_rank_fit(as_theory) == pytest.approx((0.3, 1.0))
    # A difference that does not fall with rank does not go as theory says.
    assert inverse_rank_fit(as_theory.assign(difference=[0.01, -0.01, 0.02]))[1] < 0.5


def noisy(sigma, shared, number):
    """Return a comparison of runs with noise, of which a share of the variance is the same for all numbers."""
    runs, curves = tables(arm(rank, optimum=optimum) for rank, optimum in ((None, 3.2e-4), (16, 3.3e-3)))
    own, common = (np.random.default_rng(seed).standard_normal(len(runs)) for seed in (number, 0))
    loss = runs["final_valid_nll"] + sigma * (math.sqrt(shared) * common + math.sqrt(1 - shared) * own)
    [comparison] = comparisons(runs.assign(final_valid_nll=loss, final_test_nll=loss), curves)
    return comparison


@pytest.mark.parametrize(("shared", "low", "high"), [(1.0, 0.9, 1.0), (0.0, -0.05, 0.4)])
def test_errors_of_two_lengths_are_coupled_as_the_residuals_of_their_runs(shared, low, high):
    short, full = noisy(0.01, shared, 1), noisy(0.01, shared, 2)
    first, second = student(0.5, 1.0, 10, "first"), student(0.2, 2.0, 10, "second")
    reordered = coupled(short, full, first, second, "ratio")
    assert reordered.value == 0.2
    np.testing.assert_array_equal(np.sort(reordered.seed_part), np.sort(second.seed_part))
    assert low < np.corrcoef(first.seed_part, reordered.seed_part)[0, 1] < high
    assert combined(np.subtract, first, reordered).value == pytest.approx(0.3)
