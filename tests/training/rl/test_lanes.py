"""The objective has the same gradient and measures for several lanes at once as for each lane alone."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch

from lorabench.models.base import load_model
from lorabench.models.lanes.lora import stack_lora
from lorabench.models.lora import add_adapter, add_lora
from lorabench.training.distributed import Processes
from lorabench.training.rl.objective import ResponseGroup, backward

from .conftest import TINY

NAMES = ("one", "two", "three")


def stack_of(base, names=NAMES):
    """Return a stack of LoRA lanes, each with its own B that is not zero."""
    first, *others = names
    model = add_lora(base, 4, "all", 32.0, True, NAMES.index(first), adapter=first)
    for name in others:
        add_adapter(model, name, NAMES.index(name))
    stack = stack_lora(model, names)
    for row, name in zip(stack.shelf.values, names, strict=True):
        generator = torch.Generator().manual_seed(NAMES.index(name))
        with torch.no_grad():
            row.copy_(0.05 * torch.randn(row.shape, generator=generator))
    return stack


def learned(stack, batches, max_tokens, **changes):
    """Return the measures and the gradient of each lane."""
    steps = backward(stack, batches, max_tokens, **changes)
    gradients = stack.shelf.gradients.clone()
    for lane in stack.lanes.values():
        lane.zero_grad()
    return steps, gradients


def equal(group):
    return ResponseGroup.of(group.prompt, group.responses, np.ones(len(group.responses)))


@pytest.fixture
def informative(groups):
    """The groups with rewards that are not all equal."""
    rewards = np.array([1.0, 0, 0, 1, 0, 0])
    return [
        ResponseGroup.of(group.prompt, group.responses, np.roll(rewards, turn)) for turn, group in enumerate(groups)
    ]


def batches_of(case, informative):
    """Return the groups that each lane learns from."""
    one, two, three, four, five = informative
    return {
        "as many": [[one, two], [three, four], [five, one]],
        "more and less": [[one, two, three, four], [five], [two, three]],
        "some idle": [[one, equal(two)], [three, four], [equal(five), two, equal(three)]],
        "one lane has equal rewards only": [[one, two], [equal(three), equal(four)], [five, equal(one)]],
        "all have": [[equal(one)], [equal(two), equal(three)], [equal(four)]],
        "two lanes": [[one, equal(two)], [three, four, five]],
    }[case]


CASES = ["as many", "more and less", "some idle", "one lane has equal rewards only", "all have", "two lanes"]


@pytest.mark.parametrize(
    ("case", "max_tokens"), [*((case, 10_000) for case in CASES), ("more and less", 200), ("some idle", 200)]
)
def test_lanes_have_the_gradient_and_the_measures_of_each_alone(case, max_tokens, base, informative):
    batches = batches_of(case, informative)
    names = NAMES[: len(batches)]
    steps, together = learned(stack_of(base, names), batches, max_tokens)
    for step, gradient, batch, name in zip(steps, together, batches, names, strict=True):
        [expected], [own] = learned(stack_of(load_model(TINY), [name]), [batch], max_tokens)
        assert asdict(step) == pytest.approx(asdict(expected), rel=1e-4, abs=1e-5)
        if all(group.equal for group in batch):
            assert not gradient.any()
            assert not own.any()
            continue
        assert (gradient - own).norm() <= 1e-4 * own.norm()


class WithAnIdlePart(Processes):
    """A process that computes one part less than another process."""

    def even(self, parts, nothing):
        return [*parts, nothing]


@pytest.mark.parametrize("count", [1, 3])
def test_a_part_without_any_response_adds_nothing(count, base, informative):
    stack, batches = stack_of(base, NAMES[:count]), batches_of("some idle", informative)[:count]
    steps, plain = learned(stack, batches, 10_000)
    idling_steps, idling = learned(stack, batches, 10_000, processes=WithAnIdlePart())
    assert idling_steps == steps
    assert torch.equal(idling, plain)


def test_in_bf16_lanes_have_the_gradient_of_each_alone_up_to_rounding(base, informative):
    batches = batches_of("more and less", informative)
    _, together = learned(stack_of(base), batches, 10_000, autocast=torch.bfloat16)
    for gradient, batch, name in zip(together, batches, NAMES, strict=True):
        _, [own] = learned(stack_of(load_model(TINY), [name]), [batch], 10_000, autocast=torch.bfloat16)
        assert (gradient - own).norm() <= 0.05 * own.norm()
