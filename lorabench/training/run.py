"""What the loops of SFT and RL share: the machine, a point of a curve, the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lorabench.config import Protocol
from lorabench.models.lanes import Lane
from lorabench.plan import Run
from lorabench.training.distributed import ALONE, Processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Point:
    """One value of a learning curve."""

    step: int
    examples: int
    tokens: int
    split: str
    metric: str
    value: float | None


@dataclass(frozen=True)
class Machine:
    """How a run is computed; nothing here changes what it is."""

    device: torch.device
    max_batch_tokens: int
    checkpoint_seconds: float
    micro_groups: int = 2
    max_cache_tokens: int = 65_536
    packing: bool = False
    processes: Processes = ALONE

    def autocast(self, protocol: Protocol) -> torch.dtype | None:
        """The autocast type that the protocol asks for, None in fp32."""
        return torch.bfloat16 if protocol.precision == "bf16" else None


def recompute_activations(model: PreTrainedModel) -> None:
    """Keep what goes into a layer only; the backward pass computes the layer again, with the same result."""
    # No random numbers to restore: models have no dropout.
    model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})


def make_optimizer(lane: Lane, run: Run, protocol: Protocol) -> torch.optim.Optimizer:
    """Adam over what a run trains, at the run's constant LR; that of LoRA's B may differ."""
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
