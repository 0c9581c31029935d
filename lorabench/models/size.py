"""The size of a model, and the FLOPs of a training step per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sizes:
    """The number of parameters of the base, and the FLOPs per token of a training step.

    The functions of these names define both.
    """

    base_parameters: int
    train_flops_per_token: int

    @classmethod
    def of(cls, model: torch.nn.Module) -> Sizes:
        """Count the sizes of a model."""
        return cls(base_parameters(model), train_flops_per_token(model))


def base_parameters(model: torch.nn.Module) -> int:
    """Return the number of parameters of the base, without adapters."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" not in name)


def train_flops_per_token(model: torch.nn.Module) -> int:
    """Return the FLOPs of a forward and backward pass per token, of linear layers only, as the paper counts them.

    A trained weight takes 6 FLOPs: 2 for the output, 2 for the gradient of the input, and 2 for its own gradient. A
    frozen weight takes 4. LoRA's A and B are trained, the layers under them frozen. In a mixture of experts the active
    experts count, and the router does not; of several adapters the trained one counts.
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
        # Some models keep all experts of a layer in one parameter.
        if parameter.ndim == 3 and ".experts." in name:
            flops += _active_share(model) * parameter.numel() * (6 if parameter.requires_grad else 4)
    return round(flops)


def _active_share(model: torch.nn.Module) -> float:
    """Return the share of experts that are active for a token; 1 in a dense model."""
    config: Any = model.config
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    return float(config.num_experts_per_tok) / experts if experts else 1.0
