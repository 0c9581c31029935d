"""Micro-batches hold each example once at the least cost; the data order; inputs and targets by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabench.config.experiments import Protocol
from lorabench.data.tokens import TokenizedSplit
from lorabench.training.loss import IGNORED, collate, micro_batches
from lorabench.training.run import data_order
from lorabench.training.sft import curve_steps


@given(
    lengths=st.lists(st.integers(2, 60), min_size=7, max_size=7),
    max_tokens=st.integers(1, 300),
    pass_tokens=st.integers(0, 200),
)
def test_micro_batches_are_the_batch_and_cost_least(lengths, max_tokens, pass_tokens):
    parts, examples = micro_batches(np.array(lengths), max_tokens, pass_tokens), len(lengths)
    assert sorted(np.concatenate(parts)) == list(range(examples))
    longest = np.sort(lengths)

    def cost(ends):
        """Return the cost of the parts with these ends, infinite if one does not fit."""
        sizes = np.diff([0, *ends])
        tokens = sizes * longest[np.array(ends) - 1]
        return np.where((tokens > max_tokens) & (sizes > 1), np.inf, tokens + pass_tokens).sum()

    chosen = cost(np.cumsum([len(part) for part in parts]))
    inner = itertools.chain.from_iterable(itertools.combinations(range(1, examples), n) for n in range(examples))
    assert chosen == pytest.approx(min(cost([*ends, examples]) for ends in inner))
    assert np.isfinite(chosen)


def test_arms_of_one_seed_see_the_same_batches_and_seeds_differ():
    order = data_order(64, 16, 4, seed=0)
    assert np.array_equal(order, data_order(64, 16, 4, seed=0))
    assert not np.array_equal(order, data_order(64, 16, 4, seed=1))
    assert sorted(order.flatten()) == list(range(64))
    two_epochs = data_order(64, 32, 4, seed=0)
    assert np.array_equal(two_epochs[:16], order)
    assert sorted(two_epochs[16:].flatten()) == list(range(64))


def test_collate_by_hand():
    split = TokenizedSplit(
        ids=np.array([5, 6, 7, 8, 9, 3], np.int32),
        scored=np.array([False, False, True, True, False, True]),
        offsets=np.array([0, 4, 6]),
    )
    inputs, targets = collate(split, np.array([1, 0]))
    assert inputs.tolist() == [[9, 0, 0], [5, 6, 7]]
    assert targets.tolist() == [[3, IGNORED, IGNORED], [IGNORED, 7, 8]]
    assert collate(split, []).scored == 0


def test_curve_steps_by_hand_and_protocol_defaults_that_are_the_papers():
    assert curve_steps(1000, Protocol(curve_points=4)) == {1, 10, 100, 1000}
    named = Protocol(curve_points=4, validate_at=[50, 100, 2000])
    assert curve_steps(1000, named) == {1, 10, 50, 100, 1000}
    protocol = Protocol()
    assert (protocol.alpha, protocol.include_unembedding) == (32.0, True)
    assert (protocol.betas, protocol.eps, protocol.weight_decay, protocol.clip_norm) == ([0.9, 0.95], 1e-8, 0.0, None)
