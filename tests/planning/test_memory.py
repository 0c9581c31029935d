"""The memory of a step against measurements, and what several GPUs divide."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from dataclasses import replace

import pytest

from lorabench.config.experiments import Protocol
from lorabench.config.inputs import TinyModel
from lorabench.config.loading import load_preset
from lorabench.errors import UserError
from lorabench.models.specs import dimensions
from lorabench.planning.memory import LOGITS_AT_ONCE, decided, gpus_needed, step_memory, sweep_memory
from lorabench.planning.plan import make_plan

from ..conftest import REPOSITORY
from ..handmade import with_model


def laptop(precision, again=False):
    """Return the preset `laptop` with a precision and, of layers whose activations are recomputed, all or a number."""
    preset = load_preset("laptop").model_copy(update={"protocol": Protocol(precision=precision)})
    return preset.with_execution(activation_checkpointing=again)


@pytest.mark.parametrize("rank", [None, 8, 64])
@pytest.mark.parametrize(
    ("name", "precision", "batch", "length"), [("llama-128", "fp32", 3, 400), ("qwen-64", "bf16", 8, 128)]
)
def test_memory_is_what_a_step_takes(name, precision, batch, length, rank):
    spec, preset = TinyModel(kind="tiny", name=name), laptop(precision)
    peak = peak_of_step(spec, rank, preset, (batch, length))
    estimate = step_memory(preset, dimensions(spec), rank, rank and "all", batch * length, length).total
    # An upper bound: the last gradients come when the first activations are gone.
    assert 1.0 <= estimate / peak < 1.1


def peak_of_step(spec, rank, preset, shape, method="lora"):
    """Return the peak of the memory of a training step, on examples and tokens of some shape; no rank is FullFT."""
    import torch

    from lorabench.models.base import load_model
    from lorabench.models.lora import add_lora, hold_in_bf16, use_fast_products
    from lorabench.models.passes import recompute_activations
    from lorabench.training import step_cost
    from lorabench.training.loss import Batch

    model, layers = load_model(spec), dimensions(spec).layers
    if rank:
        if preset.protocol.precision == "bf16" and method != "pissa":
            hold_in_bf16(model)
        model = add_lora(model, rank, "all", preset.protocol.alpha, True, seed=0, method=method)
        use_fast_products(model)
    if recomputed := preset.execution.recomputed_layers(layers):
        recompute_activations(model, layers - recomputed)
    tokens = torch.randint(1024, (2, *shape))
    step, optimizer = step_cost.training_step(model, Batch(*tokens), preset.protocol)
    # The measurement does not see what a layer keeps besides parameters.
    kept = sum(factor.nbytes for layer in model.modules() for factor in getattr(layer, "initial_factors", ()))
    return step_cost.peak_memory(model, optimizer, step) + kept


@pytest.mark.parametrize(
    ("name", "rank", "precision", "again"),
    [
        ("llama-128", 8, "fp32", False),
        ("qwen-64", 8, "bf16", True),
        ("llama-128", None, "fp32", 2),
        ("moe-128", None, "fp32", True),
    ],
)
def test_memory_is_what_a_step_takes_where_the_logits_come_in_pieces(name, rank, precision, again, monkeypatch):
    from lorabench.training import step_cost

    pieces, spec, preset = 1 << 18, TinyModel(kind="tiny", name=name), laptop(precision, again)
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", pieces)
    monkeypatch.setitem(step_cost.MAX_LOGITS, "cpu", pieces)
    peak = peak_of_step(spec, rank, preset, (16, 128))
    estimate = step_memory(preset, dimensions(spec), rank, rank and "all", 16 * 128, 128)
    # Recomputed layers are bounded more coarsely.
    assert 1.0 <= estimate.total / peak < (1.2 if again else 1.1)
    # All logits at once would take more than the estimate leaves room for.
    assert estimate.total + 12 * (16 * 128 * 1024 - pieces) > 1.1 * peak


@pytest.mark.parametrize("method", ["dora", "pissa"])
def test_memory_is_what_a_step_of_a_variant_takes(method):
    spec, preset = TinyModel(kind="tiny", name="llama-64"), laptop("bf16")
    peak = peak_of_step(spec, 8, preset, (16, 128), method)
    estimate = step_memory(preset, dimensions(spec), 8, "all", 16 * 128, 128, method=method).total
    assert 1.0 <= estimate / peak < 1.15


@pytest.mark.parametrize(("name", "rank", "again"), [("llama-128", None, False), ("qwen-64", 8, True)])
def test_memory_is_what_a_step_of_rl_takes_where_the_logits_come_in_pieces(name, rank, again, monkeypatch):
    import numpy as np
    import torch

    from lorabench.models.base import load_model
    from lorabench.models.lora import add_lora, hold_in_bf16, use_fast_products
    from lorabench.models.passes import recompute_activations, trained_parameters
    from lorabench.training import step_cost
    from lorabench.training.rl.objective import ResponseGroup, backward
    from lorabench.training.rl.sampler import Response
    from lorabench.training.run import Machine

    pieces, spec, preset = 1 << 18, TinyModel(kind="tiny", name=name), laptop("bf16", again)
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", pieces)
    monkeypatch.setitem(step_cost.MAX_LOGITS, "cpu", pieces)
    model = load_model(spec)
    if rank:
        hold_in_bf16(model)
        model = add_lora(model, rank, "all", preset.protocol.alpha, True, seed=0)
        use_fast_products(model)
    if again:
        recompute_activations(model)
    # Each of 8 groups fills a row of 252 tokens.
    responses = [Response(np.full(126, token), np.zeros(126, np.float32), False) for token in (1, 2)]
    groups = [ResponseGroup.of((1, 2), responses, np.array([0.0, 1.0])) for _ in range(8)]
    machine = Machine(torch.device("cpu"), 4096, autocast=torch.bfloat16)
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=0.0, fused=True)

    def step():
        backward(model, groups, machine)
        optimizer.step()
        optimizer.zero_grad()

    peak = step_cost.peak_memory(model, optimizer, step)
    estimate = step_memory(preset, dimensions(spec), rank, rank and "all", 8 * 252, 252, is_rl=True).total
    assert 1.0 <= estimate / peak < 1.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rank", "again", "precision", "batch", "length", "pieces"),
    [
        ("llama-128", None, 2, "bf16", 16, 128, 1 << 18),
        # With few tokens, what is gathered and the gradients of embedding and unembedding weigh most.
        ("llama-128", None, False, "bf16", 2, 64, 1 << 14),
        pytest.param("llama-128+tied", None, False, "fp32", 1, 16, 1 << 24, marks=pytest.mark.long),
        ("moe-128", 8, True, "bf16", 2, 64, 1 << 24),
    ],
)
def test_memory_is_what_a_step_of_two_processes_takes(name, rank, again, precision, batch, length, pieces, monkeypatch):
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", pieces)
    sizes = replace(dimensions(TinyModel(kind="tiny", name=name.split("+")[0])), tied="+tied" in name)
    preset = laptop(precision, again)
    recomputed = preset.execution.recomputed_layers(sizes.layers)
    settings = [name, rank or 0, recomputed, int(precision == "bf16"), batch, length, pieces]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    command += ["tests.planning.sharded_step", *map(str, settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split("peak ")[1].split()[0])
    estimate = step_memory(preset, sizes, rank, rank and "all", batch * length, length, gpus=2).total
    assert 1.0 <= estimate / peak < 1.2


def test_the_limit_of_logits_is_that_of_the_loss():
    from lorabench.training.loss import MAX_LOGITS

    assert {"cpu": MAX_LOGITS["cpu"], "gpu": MAX_LOGITS["cuda"]} == LOGITS_AT_ONCE
    core = load_preset("core")
    sizes = dimensions(core.models["llama-3-2-1b-base"])
    few, many = (step_memory(core, sizes, 8, "all", tokens, 512).logits for tokens in (512, 8192))
    assert few == 12 * sizes.vocabulary * 512
    # The gradient of the unembedding's input in addition to a piece, or later the gradients in a layer.
    assert many < 3 * few < 12 * sizes.vocabulary * 8192
    # RL also measures the entropy.
    assert step_memory(core, sizes, 8, "all", 512, 512, is_rl=True).logits == 16 * sizes.vocabulary * 512
    assert step_memory(core, sizes, 8, "all", 8192, 512, is_rl=True).logits < 1.5 * many
    assert step_memory(core, sizes, 8, "all", 8192, 512, gpus=2).logits == many


def test_lora_of_8b_fits_one_80_gb_gpu_and_full_fine_tuning_takes_several():
    paper = load_preset("paper").with_execution(gpu="H100-80GB")
    plan = make_plan(with_model(paper, models=["llama-3-1-8b-base"], ranks={"all": [1, 64, 256]}))
    gpus = {sweep.condition.rank: gpus_needed(plan.preset, sweep) for sweep in plan.sweeps}
    assert gpus[1] == gpus[64] == gpus[256] == 1
    # So many also hold traces of 20,480 tokens, since layers are recomputed and logits computed in pieces.
    assert gpus[None] == 4
    full = next(sweep for sweep in plan.sweeps if sweep.condition.rank is None)
    whole, quarter = (sweep_memory(decided(plan.preset, full), full, gpus) for gpus in (1, 4))
    assert (quarter.gradients, quarter.moments) == (whole.gradients / 4, whole.moments / 4)
    assert quarter.activations == whole.activations


def test_as_few_layers_are_recomputed_as_fit_the_fewest_gpus():
    core = load_preset("core")
    assert core.execution.activation_checkpointing == "auto"
    always, shares = core.with_execution(activation_checkpointing=True), []
    for sweep in make_plan(core).sweeps:
        layers = dimensions(core.models[sweep.condition.model]).layers
        again = decided(core, sweep).execution.recomputed_layers(layers)
        shares.append(again / layers)
        assert gpus_needed(core, sweep) == gpus_needed(always, sweep)
        if again:
            with suppress(UserError):
                fewer = core.with_execution(activation_checkpointing=again - 1)
                assert gpus_needed(fewer, sweep) > gpus_needed(core, sweep)
    assert min(shares) == 0
    assert any(0 < share < 1 for share in shares)
    cpu = load_preset("smoke").with_execution(activation_checkpointing="auto")
    assert decided(cpu, make_plan(cpu).sweeps[0]).execution.activation_checkpointing == 0
