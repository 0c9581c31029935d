"""Parts shared by the loops of SFT and RL: machine, outcome, data order, optimizer, and gradients that repeat.

By default the backward pass of PyTorch's fused attention on a GPU, and of indexing, adds in an order that differs from
one call to the next. Two runs that are equivalent by argument, or a run that was resumed, would then differ from the
first step on. `torch.use_deterministic_algorithms` selects kernels with a fixed order; it has to be strict, since with
`warn_only` fused attention keeps its default. cuBLAS also needs a workspace of a fixed size.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from lorabench.config.experiments import Protocol
from lorabench.models.bf16_products import Products, choose_faster
from lorabench.planning.plan import Plan
from lorabench.runs import Run
from lorabench.store.schemas import CurvePoint, ExampleLoss
from lorabench.training.distributed import SINGLE_PROCESS, Processes, full_tensor
from lorabench.utils.exhaustion import keep_freed_memory
from lorabench.utils.gpus import difference_from

T = TypeVar("T")

# Elements of a gradient whose squares are summed at once.
_PIECE = 1 << 16

_NO_KERNEL = "does not have a deterministic implementation"
_without_kernel: list[str] = []


@dataclass(frozen=True)
class Machine:
    """The device, limits and processes that compute a run; they change its numbers by no more than rounding."""

    device: torch.device
    max_batch_tokens: int
    checkpoint_seconds: float
    max_cache_tokens: int = 65_536
    processes: Processes = SINGLE_PROCESS
    bf16_products: Products | None = None
    """How a CPU multiplies matrices in bf16; None on a GPU and in fp32."""

    def autocast(self, protocol: Protocol) -> torch.dtype | None:
        """Return the autocast type of the protocol's precision, None for fp32."""
        return torch.bfloat16 if protocol.precision == "bf16" else None


def machine_of(plan: Plan, processes: Processes = SINGLE_PROCESS) -> Machine:
    """Return the machine of this process: a GPU if there is one, else the CPU with the preset's number of threads."""
    execution = plan.preset.execution
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if processes.count == 1 else processes.device
    products: Products | None = None
    if device.type == "cpu":
        torch.set_num_threads(max(1, execution.threads // processes.count))
        keep_freed_memory()
        if plan.preset.protocol.precision == "bf16":
            products = choose_faster()
    else:
        if execution.gpu is not None and processes.first:
            memory = torch.cuda.get_device_properties(device).total_memory
            difference = difference_from(execution.gpu, torch.cuda.get_device_name(device), memory)
            if difference is not None:
                logging.warning(difference)
        # cuBLAS gets workspaces of a fixed size, unless the user has chosen some, before the first product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Autocast passes over the products of experts, which would otherwise be computed in fp32 without tensor cores.
        # TF32 has more digits than the bf16 of all other layers.
        torch.backends.cuda.matmul.allow_tf32 = plan.preset.protocol.precision == "bf16"
    return Machine(
        device,
        execution.max_batch_tokens,
        execution.checkpoint_minutes * 60,
        max_cache_tokens=execution.max_cache_tokens,
        processes=processes,
        bf16_products=products,
    )


@dataclass
class Outcome:
    """The part of a run's outcome that SFT and RL share."""

    status: Literal["done", "diverged", "unrewarded"]
    """`unrewarded`: no response of an RL run was ever right, so it was stopped early."""
    diverged_at: int | None = None
    """The step whose loss or gradient was not finite."""
    train_tokens: int = 0
    wall_s: float = 0.0
    """Seconds of the run, those before a resume included."""
    curve: list[CurvePoint] = field(default_factory=list)
    test_losses: list[ExampleLoss] = field(default_factory=list)
    """The loss of each test example after the last step; empty if the run did not get there."""


def data_order(n_examples: int, steps: int, batch_size: int, seed: int) -> np.ndarray:
    """Return the example indices of every step, (steps, batch_size), with a new shuffle for each epoch.

    The order depends on the seed alone, so all conditions with one seed see the same batches in the same order.
    """
    epochs = -(-steps * batch_size // n_examples)
    rng = np.random.default_rng(seed)
    shuffled = np.concatenate([rng.permutation(n_examples) for _ in range(epochs)])
    return shuffled[: steps * batch_size].reshape(steps, batch_size)


def make_optimizer(parameters: Mapping[str, torch.nn.Parameter], run: Run, protocol: Protocol) -> torch.optim.Optimizer:
    """Return Adam over a run's trained parameters at its constant LR, multiplied by `lr_ratio` for LoRA's B."""
    ratio = run.condition.lr_ratio or 1.0
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(run.lr * ratio if ".lora_B." in name else run.lr, []).append(parameter)
    options: list[dict[str, Any]] = [{"params": group, "lr": lr} for lr, group in groups.items()]
    return torch.optim.AdamW(
        options,
        betas=(protocol.betas[0], protocol.betas[1]),
        eps=run.condition.eps,
        weight_decay=protocol.weight_decay,
        fused=True,
    )


def clip_gradient(parameters: Iterable[torch.nn.Parameter], max_norm: float | None) -> float:
    """Clip the norm of the gradient of all parameters (None: no limit) and return the norm before clipping.

    On a CPU PyTorch adds the squares of a tensor one after another in fp32, which is off by 1% at 10^8 elements;
    therefore the norms of pieces are computed first.
    """
    parameters = list(parameters)
    pieces: list[torch.Tensor] = []
    for gradient in (parameter.grad for parameter in parameters if parameter.grad is not None):
        undivided = isinstance(gradient, DTensor) or gradient.device.type != "cpu"
        pieces += [gradient] if undivided else gradient.flatten().split(_PIECE)
    norm = torch.nn.utils.get_total_norm(pieces)
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm or math.inf, norm)
    return float(full_tensor(norm))


def deterministically(compute: Callable[[], T], undo: Callable[[], None], device: torch.device) -> T:
    """Return the result of `compute`, on a GPU with deterministic kernels.

    If an operation has none, a warning names it, and this call and all later ones do without.

    Args:
        compute: computes a gradient.
        undo: discards what `compute` has done so far, before it is called again.
        device: the device that computes.
    """
    if device.type != "cuda":
        return compute()
    if not _without_kernel:
        try:
            with _strict():
                return compute()
        except RuntimeError as error:
            if _NO_KERNEL not in str(error):
                raise
            _without_kernel.append(str(error).split(_NO_KERNEL, maxsplit=1)[0].strip())
            logging.warning("training on this GPU is not deterministic: %s has no such kernel", _without_kernel[0])
        undo()
    return compute()


@contextmanager
def _strict() -> Iterator[None]:
    setting: Any = torch.utils.deterministic
    fill = setting.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # It would write into each new tensor, to show errors in programs.
    setting.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        setting.fill_uninitialized_memory = fill
