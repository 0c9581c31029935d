"""How large a model is: all its parameters, and those that take part in a token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def base_parameters(model: torch.nn.Module) -> int:
    """Parameters of the base, adapters left out."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" not in name)


def active_parameters(model: torch.nn.Module) -> int:
    """Parameters of the base that take part in a token: of a mixture of experts, the share of the active ones."""
    config: Any = model.config
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if not experts:
        return base_parameters(model)
    in_experts = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if ".experts." in name and ".lora_" not in name
    )
    return base_parameters(model) - in_experts + in_experts * config.num_experts_per_tok // experts
