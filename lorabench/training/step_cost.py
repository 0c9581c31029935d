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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lorabench.config.experiments import Protocol
from lorabench.config.fields import Placement
from lorabench.config.inputs import ModelSpec
from lorabench.config.preset import Preset
from lorabench.errors import UserError
from lorabench.models import bf16_products
from lorabench.models.base import load_model
from lorabench.models.counts import base_parameters
from lorabench.models.lora import add_lora, targets, use_fast_products
from lorabench.models.passes import trained_parameters
from lorabench.store.schemas import COMPUTE
from lorabench.training.context import machine_state
from lorabench.training.loss import MAX_LOGITS, Batch, add_gradient, check_plain_head
from lorabench.utils.exhaustion import keep_freed_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Steps before time is measured: the optimizer's state is allocated and caches fill.
_WARM_UP = 2

# The operations of linear layers, forward and backward. Products in attention have a batch dimension and are bmm.
_LINEAR = (torch.ops.aten.mm, torch.ops.aten.addmm)


def compute_table(preset: Preset, model: str) -> pd.DataFrame:
    """Measure one model of a preset's experiment `compute` and return its rows of the table `compute`.

    Raises:
        UserError: `measure_compute` refuses the model.
    """
    experiment = preset.experiments.compute
    assert experiment is not None
    rows = measure_compute(
        model,
        preset.models[model],
        experiment.ranks,
        "all",
        experiment.batch_size,
        experiment.sequence_length,
        experiment.repeats,
        preset.execution.threads,
        preset.protocol,
    )
    return pd.DataFrame(rows, columns=COMPUTE.names).astype({"rank": "Int64"})


def measure_compute(
    name: str,
    spec: ModelSpec,
    ranks: Iterable[int],
    placement: Placement,
    batch_size: int,
    sequence_length: int,
    repeats: int,
    threads: int,
    protocol: Protocol,
) -> list[dict[str, Any]]:
    """Measure a step of FullFT and of LoRA at each rank, on random tokens that are all scored.

    - `linear_flops` counts the products of the linear layers, forward and backward, with 2 FLOPs per multiply-add. As
      in the formula, every layer computes the gradient of its input. In training LoRA needs no such gradient below the
      first adapted layer, so the output of the embedding is made to require one, in both arms and for the count alone.
      `total_flops` also counts the products of attention in full, without the saving of a causal mask.
    - `step_s` is the median of the seconds of forward pass, backward pass and AdamW update. Arms take turns, so that
      changes of the machine's speed affect all arms alike.
    - `peak_mem_bytes` is the size of parameters, buffers and optimizer state, plus the most that other tensors
      (gradients, activations, temporaries) take at any time in a step. On a GPU the latter is read from the allocator,
      on a CPU from the lifetime of every tensor's storage; neither includes the memory of libraries.

    Args:
        name: name of the model in the table.
        ranks: ranks of LoRA.
        placement: the layers that carry LoRA, besides the unembedding if the protocol includes it.
        batch_size: sequences per step.
        sequence_length: tokens per sequence.
        repeats: number of timed steps.
        threads: number of CPU threads.
        protocol: provides alpha, Adam's settings and the precision.

    Returns:
        Rows of the table `compute`, FullFT first.

    Raises:
        UserError: the model cannot be read, has experts (to which the formula does not apply), changes its logits, or
            takes fewer tokens than `sequence_length`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(threads)
    if device.type == "cpu":
        keep_freed_memory()
        if protocol.precision == "bf16":
            bf16_products.choose_faster()
    base = load_model(spec).to(device)
    check_plain_head(base)
    longest = base.config.max_position_embeddings
    if sequence_length > longest:
        raise UserError(f"sequence_length = {sequence_length}: model {name!r} takes at most {longest} tokens")
    width = effective_width(base, placement, protocol.include_unembedding)
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, sequence_length)
    inputs, next_tokens = (
        torch.randint(base.config.vocab_size, shape, generator=generator).to(device) for _ in range(2)
    )
    arms = [_Arm(None, base, inputs, next_tokens, protocol)]
    for rank in ranks:
        # The copy shares the parameters' memory but has `requires_grad` flags of its own.
        shared = copy.deepcopy(base, {id(p): torch.nn.Parameter(p.detach()) for p in base.parameters()})
        model = add_lora(shared, rank, placement, protocol.alpha, protocol.include_unembedding, seed=0)
        arms.append(_Arm(rank, model, inputs, next_tokens, protocol))
    common = {
        "model": name,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "effective_width": width,
        "base_params": base_parameters(base),
        "device": machine_state(device)["device"],
        "threads": torch.get_num_threads(),
    }
    peaks = [arm.peak_memory() for arm in arms]
    times = _interleaved([arm.step for arm in arms], repeats, device)
    return [
        common
        | {
            "method": "fullft" if arm.rank is None else "lora",
            "rank": arm.rank,
            "placement": None if arm.rank is None else placement,
            "linear_flops": arm.linear_flops,
            "total_flops": arm.total_flops,
            "peak_mem_bytes": peak,
            "trainable_params": sum(parameter.numel() for parameter in arm.parameters),
            "step_s": seconds,
        }
        for arm, peak, seconds in zip(arms, peaks, times, strict=True)
    ]


def effective_width(model: PreTrainedModel, placement: Placement, include_unembedding: bool) -> float:
    """Return N of the formula in the module's docstring.

    Raises:
        UserError: the model has experts, each of which computes only some of the tokens.
    """
    chosen = targets(model, placement, include_unembedding)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    if getattr(model.config, "num_experts_per_tok", None):
        raise UserError(f"{type(model).__name__} has experts; the count of FLOPs is that of a dense model")
    products = sum(layer.in_features * layer.out_features for layer in layers.values())
    return 2 * products / sum(layers[name].in_features + layers[name].out_features for name in chosen.modules)


def count_flops(model: Any, inputs: torch.Tensor, targets: torch.Tensor, bf16: bool) -> tuple[int, int]:
    """Count the FLOPs of one forward and backward pass: those of the linear layers, and the total.

    Nothing is computed: the tensors have shapes and types but no content. Only the plain attention kernel has its
    products counted on every device, and at lengths of thousands of tokens its scores would not fit into a GPU.
    """
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        model.enable_input_require_grads()
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
            logits = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits.float(), targets.flatten(), reduction="sum")
        loss.backward()
        model.disable_input_require_grads()
    model.zero_grad()
    # Counts by module would be wrong: the counter attributes to a layer the backward pass of layers that share its
    # input.
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(operation, 0) for operation in _LINEAR), counter.get_total_flops()


@dataclass
class _Arm:
    """A model with its optimizer and one batch; `rank` is the rank of LoRA, None for FullFT.

    FLOPs are counted while PEFT computes LoRA; time and memory are measured with the layers that runs are trained with.
    """

    rank: int | None
    model: Any
    inputs: torch.Tensor
    targets: torch.Tensor
    protocol: Protocol

    def __post_init__(self) -> None:
        bf16 = self.protocol.precision == "bf16"
        self.linear_flops, self.total_flops = count_flops(self.model, self.inputs, self.targets, bf16)
        if self.rank is not None:
            use_fast_products(self.model)
        self.parameters = list(trained_parameters(self.model).values())
        # At LR 0 a step does all its work and does not change the weights, which the arms share.
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=0.0,
            betas=(self.protocol.betas[0], self.protocol.betas[1]),
            eps=self.protocol.eps,
            weight_decay=self.protocol.weight_decay,
            fused=True,
        )

    def step(self) -> None:
        """Make one optimizer step and delete the gradients."""
        autocast = torch.bfloat16 if self.protocol.precision == "bf16" else None
        max_logits = MAX_LOGITS[self.inputs.device.type]
        add_gradient(self.model, Batch(self.inputs, self.targets), self.targets.numel(), autocast, max_logits)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peak_memory(self) -> int:
        """Return the bytes held between steps plus the most that a step allocates beyond them."""
        self.step()
        state = [value for parameter_state in self.optimizer.state.values() for value in parameter_state.values()]
        held: dict[int, int] = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in (*self.model.parameters(), *self.model.buffers(), *state)
        }
        return sum(held.values()) + growth(self.step, self.inputs.device)


def growth(step: Callable[[], None], device: torch.device) -> int:
    """Return the most bytes that a step had allocated at any time beyond those allocated before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return int(torch.cuda.max_memory_allocated(device) - before)
    new = _NewStorages()
    with new:
        step()
    return new.peak


class _NewStorages(TorchDispatchMode):
    """Tracks the bytes of the storages that operations allocate, until each is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes, self.peak = 0, 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._seen.update(_storages((args, kwargs)))
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage not in self._seen:
                self._seen.add(storage)
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return out

    def _freed(self, size: int) -> None:
        self.bytes -= size


def _storages(tree: Any) -> list[Any]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _interleaved(steps: list[Callable[[], None]], repeats: int, device: torch.device) -> list[float]:
    """Return the median seconds of each step; the steps take turns."""
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds: list[list[float]] = [[] for _ in steps]
    for turn in range(_WARM_UP + repeats):
        for step, measured in zip(steps, seconds, strict=True):
            wait()
            start = time.perf_counter()
            step()
            wait()
            if turn >= _WARM_UP:
                measured.append(time.perf_counter() - start)
    return [median(measured) for measured in seconds]
