"""The memory of a step against measurements, and what several GPUs divide.

This module is also the program that runs in each of several processes.
"""

import subprocess
import sys
import weakref
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from lorabench.config.experiments import Protocol
from lorabench.config.inputs import TinyModel
from lorabench.config.loading import load_preset
from lorabench.errors import UserError
from lorabench.models import fused, lora
from lorabench.models.base import config_of, load_model
from lorabench.models.passes import recompute_activations, trained_parameters, without_peft
from lorabench.models.specs import Dimensions, dimensions
from lorabench.planning.memory import LOGITS_AT_ONCE, _layer_bytes, decided, gpus_needed, step_memory
from lorabench.planning.plan import make_plan
from lorabench.training import step_cost
from lorabench.training.distributed import join, leave, local_part
from lorabench.training.loss import MAX_LOGITS, Batch, add_gradient
from lorabench.training.rl.objective import ResponseGroup, backward
from lorabench.training.rl.sampler import Response
from lorabench.training.run import Machine

from ..conftest import REPOSITORY
from ..handmade import with_model


def laptop(precision, again=False):
    """Return the preset `laptop` with a precision and, of layers whose activations are recomputed, all or a number."""
    preset = load_preset("laptop").model_copy(update={"protocol": Protocol(precision=precision)})
    return preset.with_execution(activation_checkpointing=again)


PIECES = 1 << 18


def in_pieces(monkeypatch):
    for limits in (LOGITS_AT_ONCE, step_cost.MAX_LOGITS):
        monkeypatch.setitem(limits, "cpu", PIECES)


def prepared(name, rank, preset, method="lora"):
    """Return a tiny base as a job trains it, with its sizes; no rank is full fine-tuning."""
    spec = TinyModel(kind="tiny", name=name)
    model, sizes = load_model(spec), dimensions(spec)
    if rank:
        if preset.protocol.precision == "bf16" and method != "pissa":
            lora.hold_in_bf16(model)
        model = lora.add_lora(model, rank, "all", preset.protocol.alpha, True, seed=0, method=method)
        lora.use_fast_products(model)
    if recomputed := preset.execution.recomputed_layers(sizes.layers):
        recompute_activations(model, sizes.layers - recomputed)
    return model, sizes


@pytest.mark.parametrize(
    ("name", "rank", "precision", "again", "shape", "method", "most"),
    [
        # All logits at once.
        ("llama-128", None, "fp32", False, (3, 400), "lora", 1.1),
        ("qwen-64", 64, "bf16", False, (4, 128), "lora", 1.1),
        ("llama-64", 8, "bf16", False, (4, 128), "dora", 1.15),
        ("llama-64", 8, "bf16", False, (4, 128), "pissa", 1.15),
        # Logits in pieces; recomputed layers are bounded more coarsely.
        ("qwen-64", 8, "bf16", True, (4, 128), "pieces", 1.2),
        ("llama-128", None, "fp32", 2, (8, 128), "pieces", 1.2),
        ("moe-128", None, "fp32", True, (8, 128), "pieces", 1.2),
    ],
)
def test_memory_is_what_a_step_takes(name, rank, precision, again, shape, method, most, monkeypatch):
    preset, size, pieces = laptop(precision, again), shape[0] * shape[1], method == "pieces"
    if pieces:
        method = "lora"
        in_pieces(monkeypatch)
    model, sizes = prepared(name, rank, preset, method)
    step, optimizer = step_cost.training_step(model, Batch(*torch.randint(1024, (2, *shape))), preset.protocol)
    # The measurement does not see what a layer keeps besides parameters.
    kept = sum(factor.nbytes for layer in model.modules() for factor in getattr(layer, "initial_factors", ()))
    peak = step_cost.peak_memory(model, optimizer, step) + kept
    estimate = sum(step_memory(preset, sizes, rank, rank and "all", size, shape[1], method=method))
    # An upper bound: the last gradients come when the first activations are gone.
    assert 1.0 <= estimate / peak < most
    # All logits at once would take more than the estimate leaves room for.
    assert not pieces or estimate + 12 * (size * 1024 - PIECES) > 1.1 * peak


@pytest.mark.parametrize(("query_key_norms", "rank", "bf16"), [(False, 8, False), (True, None, True)])
def test_fused_layers_keep_what_the_plan_says_for_the_backward_pass(query_key_norms, rank, bf16):
    sizes = Dimensions(256, 3, 8, 2, 64, 320, 128, query_key_norms=query_key_norms)

    def kept(layers):
        config = config_of(replace(sizes, layers=layers), 1024)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").train()
        fused.fuse(model)
        if rank:
            model = lora.add_lora(model, rank, "all", 32.0, False, 0)
            lora.use_fast_products(model)
        saved = {}
        own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

        def keep(tensor):
            storage = tensor.untyped_storage()
            saved.setdefault(storage.data_ptr(), (tensor, storage.nbytes()))
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            # The result holds what is saved, so that no address is taken twice.
            output = without_peft(model).get_decoder()(input_ids=torch.zeros(2, 600, dtype=torch.long), use_cache=False)
        assert output.last_hidden_state.requires_grad
        return sum(size for place, (_, size) in saved.items() if place not in own)

    # Besides: both norms' scales and attention's sums, and copies of the weights in bf16.
    others = 8 + 4 * sizes.heads + (2 * sizes.layer_parameters / 1200 if bf16 else 0)
    assert (kept(3) - kept(2)) / 1200 - others == pytest.approx(_layer_bytes(sizes, rank, bf16, 1, True), rel=1e-3)


def test_memory_is_what_a_step_of_rl_takes_where_the_logits_come_in_pieces(monkeypatch):
    preset = laptop("bf16", True)
    in_pieces(monkeypatch)
    model, sizes = prepared("qwen-64", 8, preset)
    # Each of the groups fills a row of 252 tokens.
    responses = [Response(np.full(126, token), np.zeros(126, np.float32), False) for token in (1, 2)]
    groups = [ResponseGroup.of((1, 2), responses, np.array([0.0, 1.0])) for _ in range(3)]
    machine = Machine(torch.device("cpu"), 4096, autocast=torch.bfloat16)
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=0.0, fused=True)

    def step():
        backward(model, groups, machine)
        optimizer.step()
        optimizer.zero_grad()

    peak = step_cost.peak_memory(model, optimizer, step)
    estimate = sum(step_memory(preset, sizes, 8, "all", 3 * 252, 252, is_rl=True))
    assert 1.0 <= estimate / peak < 1.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rank", "again", "precision", "batch", "length", "pieces"),
    [
        ("llama-128", None, 2, "bf16", 16, 128, 1 << 18),
        # With few tokens, what is gathered and the gradients of embedding and unembedding weigh most.
        ("llama-128", None, False, "bf16", 2, 64, 1 << 14),
        pytest.param("moe-128", 8, True, "bf16", 2, 64, 1 << 24, marks=pytest.mark.long),
    ],
)
def test_memory_is_what_a_step_of_two_processes_takes(name, rank, again, precision, batch, length, pieces, monkeypatch):
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", pieces)
    sizes = dimensions(TinyModel(kind="tiny", name=name))
    preset = laptop(precision, again)
    recomputed = preset.execution.recomputed_layers(sizes.layers)
    settings = [name, rank or 0, recomputed, int(precision == "bf16"), batch, length, pieces]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    command += ["tests.planning.test_memory", *map(str, settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split("peak ")[1].split()[0])
    estimate = sum(step_memory(preset, sizes, rank, rank and "all", batch * length, length, gpus=2))
    assert 1.0 <= estimate / peak < 1.2


def test_the_limit_of_logits_is_that_of_the_loss():
    assert {"cpu": MAX_LOGITS["cpu"], "gpu": MAX_LOGITS["cuda"]} == LOGITS_AT_ONCE


def test_lora_of_8b_fits_one_80_gb_gpu_and_full_fine_tuning_takes_several():
    paper = load_preset("paper").with_execution(gpu="H100-80GB")
    plan = make_plan(with_model(paper, models=["llama-3-1-8b-base"], ranks={"all": [1, 64, 256]}))
    gpus = {sweep.condition.rank: gpus_needed(plan.preset, sweep) for sweep in plan.sweeps}
    assert gpus[1] == gpus[64] == gpus[256] == 1
    # So many also hold traces of 20,480 tokens, since layers are recomputed and logits computed in pieces.
    assert gpus[None] == 4


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


class Alive(TorchDispatchMode):
    """Tracks the bytes of the storages that are alive, whose sizes it reads at each operation.

    FSDP frees the storage of gathered weights and keeps the tensor.
    """

    def __init__(self, held):
        super().__init__()
        self.peak, self._storages = 0, {}
        self._see(held)

    def _see(self, tree):
        for leaf in tree_leaves(tree):
            if isinstance(leaf, torch.Tensor):
                storage = local_part(leaf).untyped_storage()
                self._storages.setdefault(storage._cdata, weakref.ref(storage))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self._see((args, kwargs, out))
        alive = {key: storage for key, reference in self._storages.items() if (storage := reference()) is not None}
        self._storages = {key: self._storages[key] for key in alive}
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive.values()))
        return out


def main(name: str, rank: int, recomputed: int, bf16: bool, batch: int, length: int, pieces: int) -> None:
    """Print the peak memory of a training step of one of several processes that share a model."""
    processes = join()
    model = load_model(TinyModel(kind="tiny", name=name))
    if rank:
        model = lora.add_lora(model, rank, "all", 32, True, seed=0)
    if recomputed:
        recompute_activations(model, model.config.num_hidden_layers - recomputed)
    sharded = processes.shard(model)
    inputs, targets = torch.randint(sharded.config.vocab_size, (2, batch, length))
    optimizer = torch.optim.AdamW([p for p in sharded.parameters() if p.requires_grad], lr=0.0, foreach=False)

    def step() -> None:
        for _ in range(2):
            # A batch has several parts, and the gradients of one wait for the next.
            cast = torch.bfloat16 if bf16 else None
            add_gradient(sharded, Batch(inputs, targets), 2 * targets.numel(), cast, pieces)
        optimizer.step()
        optimizer.zero_grad()

    step()
    with Alive([list(sharded.parameters()), [list(state.values()) for state in optimizer.state.values()]]) as alive:
        step()
    if processes.first:
        print(f"peak {alive.peak}")
    leave(processes)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
