"""The recommended settings, against numbers computed by hand from the rules of the paper's authors."""

from __future__ import annotations

from lorabench.custom.preset import DEFAULT_RANK, capacity_rank, recommended_batch, recommended_rank


def test_batches_are_small_and_make_a_hundred_steps_where_the_data_allow():
    sizes = {2: 2, 40: 4, 799: 4, 800: 8, 1600: 16, 3200: 32, 10**6: 32}
    assert {examples: recommended_batch(examples) for examples in sizes} == sizes


def test_a_rank_has_a_parameter_for_each_scored_token():
    # Llama-3.1-8B has 2,753,792 parameters a rank, the unembedding included.
    per_rank = 2_753_792
    assert capacity_rank(per_rank, 1) == 1
    assert capacity_rank(per_rank, per_rank) == 1
    assert capacity_rank(per_rank, per_rank + 1) == 2
    assert capacity_rank(per_rank, 10 * per_rank) == 16
    assert recommended_rank(4096, per_rank, None) == DEFAULT_RANK
    assert recommended_rank(4096, per_rank, 5e6) == DEFAULT_RANK
    assert recommended_rank(4096, per_rank, 100 * per_rank) == 128
    assert recommended_rank(4096, per_rank, 1e12) == 512
    assert recommended_rank(128, 8_256, 1e12) == 64
