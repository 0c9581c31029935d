"""How large a model is, and what a token costs in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sizes:
    """Of a model that is about to be trained."""

    base_parameters: int
    train_flops_per_token: int

    @classmethod
    def of(cls, model: torch.nn.Module) -> Sizes:
        """Counted from the model."""
        return cls(base_parameters(model), train_flops_per_token(model))


def base_parameters(model: torch.nn.Module) -> int:
    """Parameters of the base, adapters left out."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" not in name)


def train_flops_per_token(model: torch.nn.Module) -> int:
    """FLOPs of a forward and backward pass for one token, linear layers only, as the paper counts (paper.md, 3.6).

    A weight that is trained takes 6: 2 for the output, 2 for the gradient of the input, 2 for its own. A frozen one
    takes 4. LoRA's A and B are trained, the layers below them frozen. Of a mixture of experts the active
    ones count, without their router; of several adapters the one that is trained.
    """
    import torch

    flops = 0.0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            if ".lora_" in name and not module.weight.requires_grad:
                continue
            share = _active_share(model) if ".experts." in name else 1.0
            flops += share * module.weight.numel() * (6 if module.weight.requires_grad else 4)
    for name, parameter in model.named_parameters():
        # Experts that are one parameter for all.
        if parameter.ndim == 3 and ".experts." in name:
            flops += _active_share(model) * parameter.numel() * (6 if parameter.requires_grad else 4)
    return round(flops)


def _active_share(model: torch.nn.Module) -> float:
    """Active experts over all; 1 in a dense model."""
    config: Any = model.config
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    return float(config.num_experts_per_tok) / experts if experts else 1.0
