"""The loss is that of transformers; micro-batches cost least; curves on few examples."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorabench.config.experiments import Protocol
from lorabench.errors import UserError
from lorabench.models.base import load_model
from lorabench.training.loss import (
    MAX_LOGITS,
    check_plain_head,
    example_nlls,
    mean_nll,
    micro_batches,
    scored_by_example,
)
from lorabench.training.run import Machine
from lorabench.training.sft import curve_steps

from .conftest import TINY, condition_of, series, train

CPU = torch.device("cpu")


def test_nll_is_token_weighted_and_equals_transformers(data, monkeypatch):
    model = load_model(TINY)
    split = data["test"]
    nats, count = [], 0
    for index in range(len(split)):
        ids, scored = split.example(index)
        labels = torch.from_numpy(np.where(scored, ids, -100).astype(np.int64))[None]
        with torch.no_grad():
            nll = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None], labels=labels).loss.item()
        nats.append(nll * scored.sum())
        count += scored.sum()
    assert mean_nll(model, split, Machine(CPU, 16_384)) == pytest.approx(sum(nats) / count, rel=1e-5)
    # Few logits and few tokens at a time.
    monkeypatch.setitem(MAX_LOGITS, "cpu", 7 * 1024)
    assert example_nlls(model, split, Machine(CPU, 64)) == pytest.approx(nats, rel=1e-4)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(UserError, match="final_logit_softcapping"):
        check_plain_head(model)


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


def test_curve_steps_by_hand_and_protocol_defaults_that_are_the_papers():
    assert curve_steps(1000, Protocol(curve_points=4, validate_at=[50, 100, 2000])) == {1, 10, 50, 100, 1000}
    protocol = Protocol()
    assert (protocol.alpha, protocol.include_unembedding) == (32.0, True)
    assert (protocol.betas, protocol.eps, protocol.weight_decay, protocol.clip_norm) == ([0.9, 0.95], 1e-8, 0.0, None)


def test_a_curve_on_few_examples_falls_as_these_do_from_the_loss_of_all_and_ends_with_that_of_all(data, tmp_path):
    condition, protocol = condition_of("lora", 4, steps=4, batch_size=4), Protocol(curve_points=2, probe_points=3)
    split, machine = data["validation"], Machine(CPU, 16_384)
    (whole, _), (few, model) = (
        train(condition, data, tmp_path / str(number), 1e-2, protocol=protocol, curve_examples=number)
        for number in (None, 3)
    )
    expected, curve = (series(outcome, "nll", "validation") for outcome in (whole, few))
    # The movement of weights may be recorded at more steps.
    assert [point.step for point in whole.curve if point.metric == "a_moved"] == [1, 2, 4]
    assert len(curve) == len(expected) == 3
    assert curve[0] == expected[0]
    assert curve != expected
    assert few.final_valid_nll == whole.final_valid_nll == expected[-1]
    assert few.final_test_nll == whole.final_test_nll
    # Of the 8 examples in this order, three that are spread evenly.
    places = [0, 2, 5]
    base, trained = (example_nlls(each, split, machine)[places] for each in (load_model(TINY), model))
    fall = (base.sum() - trained.sum()) / scored_by_example(split)[places].sum()
    assert curve[0] - curve[-1] == pytest.approx(fall, abs=1e-6)
