"""Lanes share one base: each adds only its adapter, gradient, moments and activations."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from lorabench.config.experiments import Protocol
from lorabench.training.run import Machine, make_optimizer
from lorabench.training.sft.serve import SftGradientRequest, SftServer
from lorabench.training.step_cost import _NewStorages, _storages

from .lanes import CPU, base_of, run_of, stack_of

LANES, EXAMPLES = 8, np.arange(4)
# Allows for small tensors of each lane (Adam's step, divisor, sum) and for what does not grow with the lanes.
SLACK = 1.02


class Measured:
    """The bytes that lanes of a base hold between steps, and the most that a step allocates beyond them."""

    def __init__(self, lanes, data, precision):
        runs = [run_of("lora", 1e-3, seed) for seed in range(lanes)]
        protocol = Protocol(precision=precision)
        model = base_of("llama-128")
        self.base = sum(parameter.numel() * 4 for parameter in model.parameters())
        self.linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
        self.stack = stack_of(model, runs)
        self.adapter = 4 * next(iter(self.stack.lanes.values())).size
        machine = Machine(CPU, 1 << 20, 1e9)
        self.served = SftServer(self.stack, data, machine, machine.autocast(protocol))
        self.optimizers = [make_optimizer(self.stack.lanes[run.run_id], run, protocol) for run in runs]
        # The first backward pass leaves nothing behind but the frozen weights in autocast's type.
        with _NewStorages() as new:
            self.learn()
            gc.collect()
            self.kept = new.bytes
        self.update()
        self.held = self.kept + self._held()
        with _NewStorages() as new:
            self.learn()
            self.update()
            gc.collect()
            assert new.bytes == 0, "a step leaves something behind"
        self.growth = new.peak

    def learn(self):
        self.served({name: SftGradientRequest(EXAMPLES) for name in self.stack.lanes})

    def update(self):
        for lane, optimizer in zip(self.stack.lanes.values(), self.optimizers, strict=True):
            optimizer.step()
            lane.zero_grad()

    def _held(self):
        """Return the bytes of weights, gradients and moments, each storage once."""
        trained = [parameter for lane in self.stack.lanes.values() for parameter in lane.parameters]
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        tensors = [*self.stack.model.parameters(), *self.stack.model.buffers(), *trained]
        tensors += [tensor.grad for tensor in tensors if tensor.grad is not None]
        storages = _storages((tensors, states, list(self.stack.shelf.leaves.values())))
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_eight_lanes_take_one_base_and_eight_times_what_is_a_lanes_own(precision, short_data):
    one, many = Measured(1, short_data, precision), Measured(LANES, short_data, precision)
    # In bf16 all lanes share one copy of the linear weights.
    copied = 2 * one.linear if precision == "bf16" else 0
    assert one.kept == many.kept == copied
    assert one.adapter == many.adapter
    adapter, gradient, moments = one.adapter, one.adapter, 2 * one.adapter
    own = adapter + gradient + moments + one.growth
    assert many.held + many.growth <= SLACK * (one.base + copied + LANES * own)
    # The lanes do hold all of this.
    assert many.held >= one.base + copied + LANES * (adapter + gradient + moments)
    assert many.growth > 0.8 * LANES * one.growth
    assert one.growth > 4 * adapter, "activations take most of the memory"


def test_a_lane_that_leaves_takes_its_weights_along():
    stack = stack_of(base_of("llama-128"), [run_of("lora", 1e-3, seed) for seed in range(3)])
    first, *others = stack.lanes
    adapter = 4 * stack.lanes[first].size
    assert stack.shelf.values.untyped_storage().nbytes() == 3 * adapter
    for name in others:
        stack.drop(name)
    assert stack.shelf.values.numel() * 4 == stack.shelf.gradients.numel() * 4 == adapter
    assert stack.shelf.values.untyped_storage().nbytes() == adapter
