"""The cost of a training step by method and rank: counted FLOPs, measured time and memory.

The formula for the FLOPs is that of the paper's section on compute efficiency, extended to layers that are not square.
For one token, a linear layer of d_in x d_out costs full fine-tuning (FullFT) 3 d_in d_out multiply-adds: d_in d_out
each for the output, the gradient of the input and the gradient of the weight. LoRA of rank R saves the gradient of the
weight and adds the three products of A (R x d_in) and of B (d_out x R): 2 d_in d_out + 3 R (d_in + d_out). Summed over
all layers, and in sum' over the layers that carry LoRA,

    LoRA / FullFT = 2/3 + R sum'(d_in + d_out) / sum(d_in d_out) = 2/3 + 2R/N
    N = 2 sum(d_in d_out) / sum'(d_in + d_out)

For square N x N layers that all carry LoRA this N is the paper's. The tables have it in the column `effective_width`.
"""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Callable
from statistics import median
from typing import Any

import pandas as pd
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lorabench.config.experiments import ComputeExperiment, Protocol
from lorabench.config.inputs import ModelSpec
from lorabench.errors import UserError
from lorabench.models import bf16_products
from lorabench.models.base import load_model
from lorabench.models.counts import base_parameters
from lorabench.models.fused import fuse
from lorabench.models.lora import add_lora, hold_in_bf16, targets, use_fast_products
from lorabench.models.passes import trained_parameters
from lorabench.store.schemas import COMPUTE
from lorabench.training.loss import MAX_LOGITS, Batch, add_gradient, check_plain_head
from lorabench.training.run import machine_state
from lorabench.utils.exhaustion import keep_freed_memory

# Steps before time is measured: the optimizer's state is allocated and caches fill.
_WARM_UP = 2


def measure_compute(
    name: str,
    spec: ModelSpec,
    experiment: ComputeExperiment,
    threads: int,
    protocol: Protocol,
    device: torch.device,
    fused_kernels: bool = False,
) -> pd.DataFrame:
    """Measure a step of FullFT and of LoRA on all layers at each rank, on random tokens that are all scored.

    The rows of the table `compute` that this returns, FullFT first, have in the columns

    - `linear_flops` the products of the linear layers, with 2 FLOPs per multiply-add, and in `total_flops` those of
      attention too, without the saving of a causal mask. They are counted while PEFT computes LoRA.
    - `step_s` the median of the seconds of forward pass, backward pass and AdamW update, for which arms take turns.
    - `peak_mem_bytes` the size of parameters, buffers and optimizer state, plus the most that other tensors take at any
      time in a step, without the memory of libraries.

    UserError says that the model has experts, changes its logits, or takes fewer tokens.
    """
    bf16, cuda = protocol.precision == "bf16", device.type == "cuda"
    torch.set_num_threads(threads)
    if not cuda:
        keep_freed_memory()
        if bf16:
            bf16_products.choose_faster()
    base, length = load_model(spec).to(device), experiment.sequence_length
    check_plain_head(base)
    if cuda and fused_kernels:
        fuse(base)
    longest = base.config.max_position_embeddings
    if length > longest:
        raise UserError(f"sequence_length = {length}: model {name!r} takes at most {longest} tokens")
    if getattr(base.config, "num_experts_per_tok", None):
        raise UserError(f"{type(base).__name__} has experts; the count of FLOPs is that of a dense model")
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, torch.nn.Linear)}
    chosen = [layers[name] for name in targets(base, "all", protocol.include_unembedding)[0]]
    products = sum(layer.in_features * layer.out_features for layer in layers.values())
    common = {
        "model": name,
        "batch_size": experiment.batch_size,
        "sequence_length": length,
        "effective_width": 2 * products / sum(layer.in_features + layer.out_features for layer in chosen),
        "base_params": base_parameters(base),
        "device": machine_state(device)["device"],
        "threads": torch.get_num_threads(),
    }
    generator, shape = torch.Generator().manual_seed(0), (2, experiment.batch_size, length)
    batch = Batch(*torch.randint(base.config.vocab_size, shape, generator=generator).to(device))
    rows: list[dict[str, Any]] = []
    steps = []
    for rank in (None, *experiment.ranks):
        model: Any = base
        if rank is not None:
            # The copy shares the parameters' memory but has `requires_grad` flags of its own.
            shared = copy.deepcopy(base, {id(p): torch.nn.Parameter(p.detach()) for p in base.parameters()})
            if bf16:
                hold_in_bf16(shared)
            model = add_lora(shared, rank, "all", protocol.alpha, protocol.include_unembedding, seed=0)
        linear_flops, total_flops = count_flops(model, batch, bf16)
        if rank is not None:
            use_fast_products(model)
        step, optimizer = training_step(model, batch, protocol)
        steps.append(step)
        rows.append(
            common
            | {
                "method": "fullft" if rank is None else "lora",
                "rank": rank,
                "placement": None if rank is None else "all",
                "linear_flops": linear_flops,
                "total_flops": total_flops,
                "peak_mem_bytes": peak_memory(model, optimizer, step),
                "trainable_params": sum(parameter.numel() for parameter in trained_parameters(model).values()),
            }
        )
    seconds: list[list[float]] = [[] for _ in steps]
    for turn in range(_WARM_UP + experiment.repeats):
        for step, measured in zip(steps, seconds, strict=True):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
            if turn >= _WARM_UP:
                measured.append(time.perf_counter() - start)
    table = pd.DataFrame(rows).assign(step_s=[median(measured) for measured in seconds])
    return table.reindex(columns=COMPUTE.names).astype({"rank": "Int64"})


def count_flops(model: Any, batch: Batch, bf16: bool) -> tuple[int, int]:
    """Count the FLOPs of one forward and backward pass: those of the linear layers, and the total.

    As in the formula, every layer computes the gradient of its input. Nothing is computed: the tensors have no content,
    since the scores of the plain attention kernel, the only one that is counted everywhere, might not fit into a GPU.
    """
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        model.enable_input_require_grads()
        with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=bf16):
            logits = model(input_ids=batch.inputs, use_cache=False).logits.flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits.float(), batch.targets.flatten(), reduction="sum")
        loss.backward()
        model.disable_input_require_grads()
    model.zero_grad()
    # Products in attention have a batch dimension and are bmm. Counts by module would be wrong: the counter attributes
    # to a layer the backward pass of layers that share its input.
    counts = counter.get_flop_counts()["Global"]
    return counts.get(torch.ops.aten.mm, 0) + counts.get(torch.ops.aten.addmm, 0), counter.get_total_flops()


def training_step(model: Any, batch: Batch, protocol: Protocol) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """Return a function that makes one optimizer step on a batch and deletes the gradients, and its optimizer.

    At LR 0 a step does all its work and does not change the weights, which the arms share.
    """
    autocast = torch.bfloat16 if protocol.precision == "bf16" else None
    optimizer = torch.optim.AdamW(
        trained_parameters(model).values(), lr=0.0, weight_decay=protocol.weight_decay, fused=True
    )

    def step() -> None:
        add_gradient(model, batch, batch.targets.numel(), autocast, MAX_LOGITS[batch.inputs.device.type])
        optimizer.step()
        optimizer.zero_grad()

    return step, optimizer


def peak_memory(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], None]) -> int:
    """Return the bytes held between steps plus the most that a step allocates beyond them."""
    step()
    state = [value for parameter_state in optimizer.state.values() for value in parameter_state.values()]
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers(), *state)]
    held = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return int(sum(held.values())) + growth(step, next(model.parameters()).device)


def growth(step: Callable[[], None], device: torch.device) -> int:
    """Return the most bytes that a step had allocated at any time beyond those before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return int(torch.cuda.max_memory_allocated(device) - before)
    with NewStorages() as new:
        step()
    return int(new.peak)


class NewStorages(TorchDispatchMode):
    """Tracks the bytes of the storages that operations allocate within its context, until each is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes, self.peak = 0, 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def _add(self, size: int) -> None:
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self._seen.update(tensor.untyped_storage() for tensor in given)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return out
