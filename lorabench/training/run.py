"""Parts shared by the loops of SFT and RL: the machine, the outcome, the optimizer, gradient clipping."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor

from lorabench.config.experiments import Protocol
from lorabench.models.bf16_products import Products
from lorabench.models.lanes.shelf import Lane
from lorabench.runs import Run
from lorabench.store.schemas import CurvePoint, ExampleLoss
from lorabench.training.distributed import SINGLE_PROCESS, Processes, full_tensor

# Elements of a gradient whose squares are summed at once.
_PIECE = 1 << 16


@dataclass(frozen=True)
class Machine:
    """The device, limits and processes that compute a run; they change its numbers by no more than rounding."""

    device: torch.device
    max_batch_tokens: int
    checkpoint_seconds: float
    max_cache_tokens: int = 65_536
    packing: bool = False
    processes: Processes = SINGLE_PROCESS
    bf16_products: Products | None = None
    """How a CPU multiplies matrices in bf16; None on a GPU and in fp32."""

    def autocast(self, protocol: Protocol) -> torch.dtype | None:
        """Return the autocast type of the protocol's precision, None for fp32."""
        return torch.bfloat16 if protocol.precision == "bf16" else None


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


def make_optimizer(lane: Lane, run: Run, protocol: Protocol) -> torch.optim.Optimizer:
    """Return Adam over a run's trained parameters at its constant LR, multiplied by `lr_ratio` for LoRA's B."""
    ratio = run.condition.lr_ratio or 1.0
    groups: dict[float, dict[torch.nn.Parameter, None]] = {}
    for name, place in lane.places.items():
        groups.setdefault(run.lr * ratio if ".lora_B." in name else run.lr, {})[place.parameter] = None
    parameters: list[dict[str, Any]] = [{"params": list(group), "lr": lr} for lr, group in groups.items()]
    return torch.optim.AdamW(
        parameters,
        betas=(protocol.betas[0], protocol.betas[1]),
        eps=run.condition.eps,
        weight_decay=protocol.weight_decay,
        fused=True,
    )


def clip_gradient(lane: Lane, max_norm: float | None) -> float:
    """Clip the norm of a lane's gradient (None: no limit) and return the norm before clipping.

    On a CPU PyTorch adds the squares of a tensor one after another in fp32, which is off by 1% at 10^8 elements;
    therefore the norms of pieces are computed first.
    """
    gradients = [parameter.grad for parameter in lane.parameters if parameter.grad is not None]
    pieces: list[torch.Tensor] = []
    for gradient in gradients:
        undivided = isinstance(gradient, DTensor) or gradient.device.type != "cpu"
        pieces += [gradient] if undivided else gradient.flatten().split(_PIECE)
    norm = torch.nn.utils.get_total_norm(pieces)
    torch.nn.utils.clip_grads_with_norm_(lane.parameters, max_norm or math.inf, norm)
    return float(full_tensor(norm))
