"""The objective: its measures, and its gradient by the reference, whose rows hold one response each."""

import copy
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabench.errors import UserError
from lorabench.models.fused import fuse
from lorabench.models.passes import trained_parameters
from lorabench.planning.flops import row_limit
from lorabench.training import reference
from lorabench.training.loss import MAX_LOGITS
from lorabench.training.rl import objective
from lorabench.training.rl.objective import ResponseGroup, backward, check_finite, row_parts
from lorabench.training.rl.sampler import Request, Response

from ..conftest import DEVICES
from .conftest import drawn, machine


def response(tokens, logprobs=None):
    tokens = np.array(tokens)
    return Response(tokens, np.zeros(len(tokens), np.float32) if logprobs is None else np.array(logprobs), False)


def gradients(model):
    gradients = {name: parameter.grad.clone() for name, parameter in trained_parameters(model).items()}
    model.zero_grad()
    return gradients


def test_a_log_probability_that_is_not_finite_is_refused_unless_the_policy_has_none(base):
    requests = [Request((5, 9), (0, number)) for number in range(3)]
    responses = [response([7, 8], [-2.0, -3.0]), response([7], [-1.0]), response([9, 7, 8], [-1.0, np.inf, -2.0])]
    check_finite(base, requests[:2], responses[:2], machine())
    with pytest.raises(UserError, match="gives token 2 of .* prompt of 2 tokens the log-probability inf, "):
        check_finite(base, requests, responses, machine())
    # Weights of a run that diverged.
    with torch.no_grad():
        base.get_submodule("model.norm").weight.fill_(np.nan)
    check_finite(base, requests, responses, machine())


def plain_gradients(model, groups):
    """Return gradients and loss of the reference, which computes each response by itself."""
    plain = [
        (group.prompt, [(r.tokens.tolist(), r.logprobs.tolist()) for r in group.responses], group.rewards.tolist())
        for group in groups
    ]
    loss = reference.policy_loss(model, plain)
    loss.backward()
    return gradients(model), loss.item()


def sharing_rows(tokens):
    """Return a context in which rows of more than some tokens have one response."""
    return mock.patch.multiple(objective, SHARED_ROW=tokens, row_limit=lambda *given: min(tokens, row_limit(*given)))


@pytest.mark.parametrize(
    ("max_tokens", "at_once", "shared", "one_row"),
    [(60, 7, 2048, False), (10_000, 10_000, 26, False), (60, 7, 2048, True), (10_000, 10_000, 26, True)],
)
@pytest.mark.usefixtures("varlen_on_cpu")
def test_sharing_a_prompt_and_splitting_a_batch_or_its_logits_change_nothing(
    base, groups, max_tokens, at_once, shared, one_row, monkeypatch
):
    monkeypatch.setitem(MAX_LOGITS, "cpu", at_once * base.config.vocab_size)
    expected, loss = plain_gradients(base, groups)
    if one_row:
        fuse(base)
        # It is done in bf16 alone, whose rounding would hide errors.
        monkeypatch.setattr(objective, "share_rows", lambda model, machine: True)
    with sharing_rows(shared):
        measured = backward(base, groups, machine(max_batch_tokens=max_tokens))
    assert measured.loss == pytest.approx(loss, abs=1e-5)
    assert measured.tokens == sum(len(r.tokens) for group in groups for r in group.responses)
    for name, gradient in gradients(base).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("varlen_on_cpu")
def test_rounding_to_bf16_is_as_large_in_one_row_as_with_a_mask(base, groups, device):
    errors: dict[bool, list[float]] = {False: [], True: []}
    for seed in range(5):
        # What a gradient loses by rounding differs by a factor of two between prompts, and between processors.
        shuffle = np.random.default_rng(seed).permutation
        shuffled = [replace(group, prompt=tuple(map(int, shuffle(group.prompt)))) for group in groups]
        expected, _ = plain_gradients(base, shuffled)
        whole = sum(float(known.square().sum()) for known in expected.values())
        for one_row, relative in errors.items():
            model = copy.deepcopy(base).to(device)
            if one_row:
                fuse(model)
            backward(model, shuffled, machine(device=torch.device(device), autocast=torch.bfloat16))
            own = gradients(model)
            off = sum(float((own[name].cpu() - known).square().sum()) for name, known in expected.items())
            relative.append(off / whole)
    assert np.mean(errors[True]) ** 0.5 < 1.5 * np.mean(errors[False]) ** 0.5 < 0.06


@settings(max_examples=15)
@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.lists(st.integers(1, 90), min_size=2, max_size=9)), min_size=1, max_size=6
    ),
    st.sampled_from([50, 200, 1000]),
    st.sampled_from([30, 100, 2048]),
    st.booleans(),
)
def test_parts_hold_every_response_once_and_fit(shapes, limit, shared, one_row):
    groups = [
        ResponseGroup.of((number,) * prompt, [response([1] * n) for n in lengths], np.arange(float(len(lengths))))
        for number, (prompt, lengths) in enumerate(shapes)
    ]
    with sharing_rows(shared):
        parts = list(row_parts(groups, limit, one_row=one_row))
    held = sorted((row.prompt[0], reward) for part in parts for row in part for reward in row.rewards)
    assert held == sorted((group.prompt[0], reward) for group in groups for reward in group.rewards)
    assert sum(row.advantages.sum() for part in parts for row in part) == pytest.approx(0, abs=1e-9)
    for part in parts:
        lengths = [len(row.prompt) + sum(len(r.tokens) - 1 for r in row.responses) for row in part]
        tokens = sum(lengths) if one_row else len(part) * max(lengths)
        assert tokens <= limit or len(part) == len(part[0].responses) == 1
        if one_row:
            continue
        # Rows without a mask have one response, and are in other parts than rows with a mask.
        assert max(lengths) <= shared or min(lengths) > shared
        assert max(lengths) <= shared or {len(row.responses) for row in part} == {1}


def test_equal_responses_are_computed_once_and_count_as_often_as_they_were_drawn(base):
    twice = response([3, 1], [-1.0, -16.0])
    drawn = [twice, response([4], [-2.0]), twice, response([3], [-1.0])]
    group = ResponseGroup.of((5, 9), drawn, np.array([1.0, 0.0, 1.0, 0.0]))
    # The same tokens with another reward, for instance after a timeout of the grader, are another response.
    judged_apart = ResponseGroup.of((5, 9), [response([3, 1])] * 2, np.array([1.0, 0.0]))
    [[row, apart]] = row_parts([group, judged_apart], 10_000)
    assert [response.tokens.tolist() for response in row.responses] == [[3, 1], [4], [3]]
    assert row.times.tolist() == [2, 1, 1]
    assert apart.times.tolist() == [1, 1]

    expected, loss = plain_gradients(base, [group])
    measured = backward(base, [group], machine())
    for name, gradient in gradients(base).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=2e-5)
    # The reference has each response alone in its own row.
    singly = [backward(base, [ResponseGroup.of((5, 9), [response], np.zeros(1))], machine()) for response in drawn]
    tokens = [len(response.tokens) for response in drawn]
    assert (measured.loss, measured.tokens) == (pytest.approx(loss, abs=1e-5), sum(tokens))
    for measure in ("entropy", "kl", "ratio_mean", "ratio_above_2"):
        mean = np.average([getattr(step, measure) for step in singly], weights=tokens)
        assert getattr(measured, measure) == pytest.approx(mean, rel=1e-4, abs=1e-5)
    # The base gives the second token of the response that was drawn twice about four times that probability.
    assert measured.ratio_above_2 == pytest.approx(2 / 6)
    assert measured.ratio_max == pytest.approx(max(step.ratio_max for step in singly), rel=1e-4)


def test_measures_are_those_of_the_two_distributions(base, tokenizer, prompts):
    exact = drawn(base, tokenizer, [Request(prompts[0], (0, 0, 0, s)) for s in range(6)])
    rewards = np.array([1.0, 0, 0, 0, 0, 0])

    def group(shift, rewards=rewards):
        return ResponseGroup.of(
            prompts[0], [Response(r.tokens, r.logprobs + np.float32(shift), r.truncated) for r in exact], rewards
        )

    off = backward(base, [group(np.log(2))], machine())
    assert off.ratio_mean == pytest.approx(0.5, abs=1e-4)
    assert off.kl == pytest.approx(np.log(2), abs=1e-4)
    # A group of equal rewards counts as the others do.
    mixed = backward(base, [group(0), group(-np.log(3), np.zeros(6))], machine())
    assert (mixed.ratio_above_2, mixed.ratio_max) == (pytest.approx(0.5), pytest.approx(3, abs=1e-3))
    ids = torch.tensor([prompts[0]])
    with torch.no_grad():
        first = base(ids).logits[0, -1].log_softmax(-1)
    single = [Response(r.tokens[:1], r.logprobs[:1], False) for r in exact]
    entropy = backward(base, [ResponseGroup.of(prompts[0], single, rewards)], machine()).entropy
    assert entropy == pytest.approx(-(first.exp() * first).sum().item(), rel=1e-4)
