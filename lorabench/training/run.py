"""Parts shared by the loops of SFT and RL: machine, outcome, data order, optimizer, and gradients that repeat.

By default the backward pass of PyTorch's fused attention on a GPU, and of indexing, adds in an order that differs from
call to call, so that a resumed run would differ. `torch.use_deterministic_algorithms` selects kernels with a fixed
order. It has to be strict, since with `warn_only` fused attention keeps its default.
"""

from __future__ import annotations

import logging
import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from lorabench.config.execution import Execution
from lorabench.config.experiments import Protocol
from lorabench.errors import UserError
from lorabench.models.base import package_versions
from lorabench.models.bf16_products import Products, choose_faster
from lorabench.planning.plan import Plan
from lorabench.runs import Run
from lorabench.store.schemas import CurvePoint, ExampleLoss
from lorabench.training.distributed import SINGLE_PROCESS, Processes, full_tensor
from lorabench.utils.exhaustion import keep_freed_memory
from lorabench.utils.gpus import ON_CPU, difference_from, none_seen, processor

NONDETERMINISTIC = "LORABENCH_NONDETERMINISTIC"
"""The environment variable with which training on a GPU does without deterministic kernels."""


@dataclass(frozen=True)
class Machine:
    """The device, limits and processes that compute a run; they change its numbers by no more than rounding."""

    device: torch.device
    max_batch_tokens: int
    """Limit of the tokens, padding included, that go through the model at once in training and evaluation."""
    checkpoint_seconds: float = math.inf
    max_cache_tokens: int = 65_536
    """Limit of the tokens whose keys and values are held at once in sampling."""
    processes: Processes = SINGLE_PROCESS
    autocast: torch.dtype | None = None
    """The type of products; None for fp32."""
    bf16_products: Products | None = None
    """How a CPU multiplies matrices in bf16; None on a GPU and in fp32."""

    def cast(self) -> torch.autocast:
        """Return a context in which products are computed in the type `autocast`."""
        return torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)


def device_of(execution: Execution) -> torch.device:
    """Return a GPU if there is one, else the CPU; UserError if the preset is for a GPU, and torch sees none."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if execution.gpu is not None and ON_CPU not in os.environ:
        raise UserError(none_seen(execution.gpu, torch.__version__, torch.version.cuda))
    return torch.device("cpu")


def machine_of(plan: Plan, processes: Processes = SINGLE_PROCESS) -> Machine:
    """Return the machine of this process: the GPU or CPU of `device_of`, with the preset's number of threads."""
    execution, bf16 = plan.preset.execution, plan.preset.protocol.precision == "bf16"
    device = device_of(execution)
    if processes.count > 1:
        device = processes.device
    products = None
    if device.type == "cpu":
        torch.set_num_threads(max(1, execution.threads // processes.count))
        keep_freed_memory()
        products = choose_faster() if bf16 else None
    else:
        if execution.gpu is not None and processes.first:
            memory = torch.cuda.get_device_properties(device).total_memory
            if difference := difference_from(execution.gpu, torch.cuda.get_device_name(device), memory):
                logging.warning(difference)
        # cuBLAS gets workspaces of a fixed size, unless the user has chosen some, before the first product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Autocast passes over the products of experts, which would otherwise be computed in fp32 without tensor cores.
        # TF32 has more digits than the bf16 of all other layers.
        torch.backends.cuda.matmul.allow_tf32 = bf16
        # Partial sums of a product in bf16 would otherwise be rounded to bf16 before they are added.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return Machine(
        device,
        execution.max_batch_tokens,
        execution.checkpoint_minutes * 60,
        execution.max_cache_tokens,
        processes,
        torch.bfloat16 if bf16 else None,
        products,
    )


def machine_state(device: torch.device) -> dict[str, Any]:
    """Return the device and what it is, the threads, the host and the package versions, for a record."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "device_type": device.type,
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        # The instructions of the processor that PyTorch uses, such as AVX2 or AVX512.
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "host": platform.node(),
        "python": platform.python_version(),
        "packages": package_versions(),
    }


@dataclass
class Outcome:
    """The part of a run's outcome that SFT and RL share."""

    status: Literal["done", "diverged", "unrewarded", "collapsed"]
    """`unrewarded`: no response of an RL run was ever right, so it was stopped early; `collapsed`: none was right any
    more."""
    diverged_at: int | None = None
    """The step whose loss or gradient was not finite."""
    train_tokens: int = 0
    wall_s: float = 0.0
    """Seconds of the run, those before a resume included."""
    curve: list[CurvePoint] = field(default_factory=list)
    test_losses: list[ExampleLoss] = field(default_factory=list)
    """The loss of each test example after the last step; empty if the run did not get there."""

    def record(self, step: int, examples: int, tokens: int, split: str, metrics: Mapping[str, float]) -> None:
        """Append values to the curve."""
        for metric, value in metrics.items():
            finite = value if math.isfinite(value) else None
            self.curve.append(CurvePoint(step, examples, tokens, split, metric, finite))

    def progress(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the outcome, as plain data."""
        curve = [vars(point) for point in self.curve]
        return {"train_tokens": self.train_tokens, "wall_s": self.wall_s, "curve": curve}

    def resume(self, saved: dict[str, Any]) -> None:
        """Go on from what `progress` returned."""
        self.train_tokens, self.wall_s = saved["train_tokens"], saved["wall_s"]
        self.curve = [CurvePoint(**point) for point in saved["curve"]]


def data_order(n_examples: int, steps: int, batch_size: int, seed: int) -> np.ndarray:
    """Return the example indices of every step, (steps, batch_size), with a new shuffle for each epoch.

    The order depends on the seed alone, so all conditions with one seed see the same batches in the same order, and at
    another batch size the same examples in the same order.
    """
    epochs = -(-steps * batch_size // n_examples)
    rng = np.random.default_rng(seed)
    shuffled = np.concatenate([rng.permutation(n_examples) for _ in range(epochs)])
    return shuffled[: steps * batch_size].reshape(steps, batch_size)


def make_optimizer(parameters: Mapping[str, torch.nn.Parameter], run: Run, protocol: Protocol) -> torch.optim.Optimizer:
    """Return Adam over a run's trained parameters at its LR, multiplied by `lr_ratio` for LoRA's B."""
    ratio = run.condition.lr_ratio or 1.0
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(run.lr * ratio if ".lora_B." in name else run.lr, []).append(parameter)
    # `initial_lr` is PyTorch's own name for what a schedule starts from.
    options: list[dict[str, Any]] = [{"params": group, "lr": lr, "initial_lr": lr} for lr, group in groups.items()]
    betas, eps = (protocol.betas[0], protocol.betas[1]), run.condition.eps
    return torch.optim.AdamW(options, betas=betas, eps=eps, weight_decay=protocol.weight_decay, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, step: int, steps: int, protocol: Protocol) -> None:
    """Set the LRs of a step, counted from 1: a linear schedule starts at the run's LR and would be 0 after the last."""
    if protocol.schedule == "linear":
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (steps - step + 1) / steps


def clip_gradient(parameters: Iterable[torch.nn.Parameter], max_norm: float | None) -> float:
    """Clip the norm of the gradient of all parameters (None: no limit) and return the norm before clipping.

    On a CPU PyTorch adds the squares of a tensor one after another in fp32, which is off by 1% at 10^8 elements;
    therefore the norms of pieces are computed first.
    """
    parameters = list(parameters)
    pieces: list[torch.Tensor] = []
    for gradient in (parameter.grad for parameter in parameters if parameter.grad is not None):
        undivided = isinstance(gradient, DTensor) or gradient.device.type != "cpu"
        pieces += [gradient] if undivided else gradient.flatten().split(1 << 16)
    norm = torch.nn.utils.get_total_norm(pieces)
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm or math.inf, norm)
    return float(full_tensor(norm))


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Within the context, in which a gradient is computed, a GPU uses deterministic kernels.

    UserError names an operation that has none, and the environment variable with which training does without them.
    """
    if device.type != "cuda" or NONDETERMINISTIC in os.environ:
        yield
        return
    setting: Any = torch.utils.deterministic
    fill, lacks = setting.fill_uninitialized_memory, "does not have a deterministic implementation"
    torch.use_deterministic_algorithms(True)
    # It would write into each new tensor, to show errors in programs.
    setting.fill_uninitialized_memory = False
    try:
        yield
    except RuntimeError as error:
        if lacks not in str(error):
            raise
        operation = str(error).split(lacks, maxsplit=1)[0].strip()
        raise UserError(
            f"{operation} has no deterministic kernel on this GPU; with {NONDETERMINISTIC}=1 in the environment runs "
            "are trained without such kernels, and do not come out again bit for bit"
        ) from error
    finally:
        torch.use_deterministic_algorithms(False)
        setting.fill_uninitialized_memory = fill
