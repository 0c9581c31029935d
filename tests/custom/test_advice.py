"""The recommended settings, against numbers computed by hand from the law and rules of the paper's authors."""

from __future__ import annotations

import math

import pytest

from lorabench.custom import advice
from lorabench.custom.advice import batch_size, capacity_rank, law_lr, recommended_rank

# Family, width and FullFT LR: 5e-5 (2000 / width)^p, p = 0.781 for Llama and 0.0775 for Qwen (tinker-cookbook).
BY_HAND = [
    ("llama", 2048, 4.908e-5),
    ("llama", 3072, 3.576e-5),
    ("llama", 4096, 2.856e-5),
    ("llama", 8192, 1.662e-5),
    ("qwen3", 1024, 5.266e-5),
    ("qwen3_moe", 2048, 4.991e-5),
    ("qwen3", 2560, 4.905e-5),
    ("qwen2", 4096, 4.730e-5),
    ("qwen3", 5120, 4.649e-5),
]


@pytest.mark.parametrize(("family", "width", "lr"), BY_HAND)
def test_the_law_gives_the_numbers_computed_by_hand(family, width, lr):
    for method, ratio in (("fullft", 1), ("lora", 10)):
        recommended = law_lr(family, width, method)
        assert recommended.value == pytest.approx(ratio * lr, rel=1e-3)
        assert recommended.low == recommended.high == recommended.value


def test_another_family_has_a_range_around_the_covered_ones_and_no_number():
    recommended = law_lr("mistral", 4096, "lora")
    assert recommended.value is None
    assert recommended.low == pytest.approx(2.856e-4 / math.sqrt(10), rel=1e-3)
    assert recommended.high == pytest.approx(4.730e-4 * math.sqrt(10), rel=1e-3)


@pytest.mark.parametrize(
    ("examples", "size"), [(2, 2), (40, 4), (799, 4), (800, 8), (1600, 16), (3200, 32), (10**6, 32)]
)
def test_batches_are_small_and_make_a_hundred_steps_where_the_data_allow(examples, size):
    assert batch_size(examples) == size


def test_a_rank_has_a_parameter_for_each_scored_token():
    # Llama-3.1-8B has 2,753,792 parameters a rank, the unembedding included.
    per_rank = 2_753_792
    assert capacity_rank(per_rank, 1) == 1
    assert capacity_rank(per_rank, per_rank) == 1
    assert capacity_rank(per_rank, per_rank + 1) == 2
    assert capacity_rank(per_rank, 10 * per_rank) == 16
    assert recommended_rank(4096, per_rank, None) == advice.DEFAULT_RANK
    assert recommended_rank(4096, per_rank, 5e6) == advice.DEFAULT_RANK
    assert recommended_rank(4096, per_rank, 100 * per_rank) == 128
    assert recommended_rank(4096, per_rank, 1e12) == 512
    assert recommended_rank(128, 8_256, 1e12) == 64
