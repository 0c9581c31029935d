"""Compiled layers compute what they compute uncompiled: one code for all shapes, without falling back."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import torch._dynamo.testing

from lorabench.config import Protocol
from lorabench.training.batches import Batch
from lorabench.training.loss import add_gradient
from lorabench.training.run import Machine, compile_layers
from tests.training.lanes import base_of, run_of, series, stack_of, train_together

from .conftest import trained

STEPS = 6


@pytest.fixture(autouse=True)
def forgetful():
    """What was compiled, and counted, before and after."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def losses(runs, model, data, folder):
    """Training losses and the test loss of each run."""
    found = train_together(runs, model, data, folder)
    return {name: [*series(outcome, "nll"), outcome.final_test_nll] for name, outcome in found.items()}


def breaks():
    return dict(torch._dynamo.utils.counters["graph_break"])


@pytest.mark.parametrize(
    "name", ["llama-128", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen-64", "gemma"))]
)
@pytest.mark.parametrize("method", ["lora", "fullft"])
def test_losses_are_those_without_it(method, name, short_data, tmp_path):
    lrs = (1e-3, 4e-3, 1e-2) if method == "lora" else (1e-3,)
    runs = [run_of(method, lr, seed, steps=STEPS) for seed, lr in enumerate(lrs)]
    expected = losses(runs, base_of(name), short_data, tmp_path / "plain")
    model = base_of(name)
    compile_layers(model, "aot_eager")
    found = losses(runs, model, short_data, tmp_path / "compiled")
    assert breaks() == {}
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    for run in runs:
        np.testing.assert_allclose(found[run.run_id], expected[run.run_id], rtol=1e-5)


def gradient(protocol, compiled):
    """Of two lanes on one batch, B not zero, all of them as one vector."""
    model = base_of("llama-128")
    if compiled:
        compile_layers(model, "aot_eager")
    stack = stack_of(model, [run_of("lora", 1e-3, seed) for seed in range(2)])
    generator = torch.Generator().manual_seed(0)
    for leaf in stack.shelf.leaves.values():
        leaf.data.copy_(0.02 * torch.randn(leaf.shape, generator=generator))
    ids = torch.randint(3, 1000, (4, 31), generator=generator)
    autocast = Machine(torch.device("cpu"), 1, 1.0).autocast(protocol)
    add_gradient(stack.model, Batch(ids[:, :-1], ids[:, 1:], None), stack.rows, [60, 60], autocast, None)
    return stack.shelf.gradients.clone()


def test_in_bf16_gradients_are_as_near_to_those_of_fp32():
    exact = gradient(Protocol(precision="fp32"), compiled=False)
    plain, compiled = (gradient(Protocol(precision="bf16"), way) for way in (False, True))
    assert breaks() == {}
    assert (compiled - exact).norm() < 1.2 * (plain - exact).norm()
    assert 0 < (plain - exact).norm() < 0.1 * exact.norm()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="the compiler writes C++")
@pytest.mark.parametrize("method", ["lora", "fullft"])
def test_what_is_written_for_a_cpu_gives_the_losses_too(method, short_data, tmp_path):
    runs = [run_of(method, 3e-3, 0, steps=STEPS)]
    expected = losses(runs, base_of("llama-128"), short_data, tmp_path / "plain")
    model = base_of("llama-128")
    compile_layers(model)
    found = losses(runs, model, short_data, tmp_path / "compiled")
    np.testing.assert_allclose(found[runs[0].run_id], expected[runs[0].run_id], rtol=1e-4)


def test_layers_batches_ranks_and_lanes_share_their_code(short_data, tmp_path):
    """Compiled with and without gradients and no more, whatever the rank, the lanes that are left, and the batch."""
    made = torch._dynamo.testing.CompileCounter()
    for number, (rank, lanes) in enumerate([(4, 3), (8, 2), (16, 4)]):
        model = base_of("llama-128")
        compile_layers(model, made)
        runs = [run_of("lora", lr, 0, steps=3, rank=rank) for lr in (1e-3, 2e-3, 3e-3, 4e-3)[:lanes]]
        train_together(runs, model, short_data, tmp_path / str(number))
    assert made.frame_count <= 4
    assert breaks() == {}


def test_the_last_layer_is_left_out_and_asking_twice_changes_nothing():
    model = base_of("llama-128")
    compile_layers(model, "aot_eager")
    before = [layer._compiled_call_impl for layer in model.get_decoder().layers]
    assert [impl is not None for impl in before] == [True] * (len(before) - 1) + [False]
    compile_layers(model, "aot_eager")
    assert [layer._compiled_call_impl for layer in model.get_decoder().layers] == before


def test_a_job_compiles_what_it_trains_if_the_preset_says_so(ready, monkeypatch):
    from lorabench.training import sft_job

    compiled = []

    def eagerly(model):
        compiled.append(model)
        compile_layers(model, "eager")

    monkeypatch.setattr(sft_job, "compile_layers", eagerly)
    # A fullft model each: stacked weights are not compiled. LoRA's runs have one base.
    for method, models in (("lora", 1), ("fullft", 3)):
        lrs = {method: [1e-3, 3e-3]}
        plain, _ = trained(*ready(f"plain-{method}", {"lanes": 3, "compile": False}, **lrs), method)
        assert compiled == []
        found, _ = trained(*ready(f"compiled-{method}", {"lanes": 3, "compile": True}, **lrs), method)
        assert len({id(model) for model in compiled}) == models
        compiled.clear()
        assert list(found.run_id) == list(plain.run_id), "it is not part of what a run is"
        np.testing.assert_allclose(found.final_test_nll, plain.final_test_nll, rtol=1e-5)
