"""Counts of parameters and FLOPs: of a model, and of LoRA on real architectures (the paper's table next to figure 4).

Experts are fused in this implementation: gate and up of an expert are one matrix and share an A, so that an expert has
r (d_in + 2 d_expert) + r (d_expert + d_in) LoRA parameters. The paper's scheme, with a LoRA each for gate, up and down,
would have 3 r (d_in + d_expert), which is 1.32 times as many in Qwen3-30B-A3B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from lorabench.config.fields import Placement
from lorabench.models.specs import architectures, dimensions_of_config

if TYPE_CHECKING:
    import torch

# Architecture, placement, rank and include_unembedding.
_CONDITIONS: tuple[tuple[str, Placement, int, bool], ...] = (
    ("llama-3.1-8b", "mlp", 256, True),
    ("llama-3.1-8b", "attn", 256, True),
    ("llama-3.1-8b", "all", 256, True),
    ("llama-3.1-8b", "mlp", 128, True),
    ("llama-3.1-8b", "all", 1, True),
    ("llama-3.1-8b", "all", 1, False),
    ("llama-3.2-1b", "all", 1, True),
    ("llama-3.2-1b", "all", 1, False),
    ("qwen3-8b", "all", 1, True),
    ("qwen3-8b", "all", 1, False),
    ("qwen3-30b-a3b", "all", 8, True),
    ("qwen3-30b-a3b", "all", 64, True),
)


def counts_table() -> pd.DataFrame:
    """Return the counts by which the claims on the paper's table and on its scheme for experts are judged.

    A row of the part `all` is of a whole adapter, whose rank in a mixture of experts is the total rank, and a whole
    model; in the mixture, rows of the parts `attention`, `experts` and `unembedding` are of these layers.
    """
    rows = []
    for architecture, placement, rank, include_unembedding in _CONDITIONS:
        sizes = dimensions_of_config(architectures()[architecture])
        condition = {"architecture": architecture, "placement": placement, "rank": rank}
        condition["include_unembedding"] = include_unembedding
        trained, _ = sizes.lora(placement, rank, include_unembedding)
        rows.append(condition | {"part": "all", "trainable_params": trained, "base_params": sizes.parameters})
        for name, part in (("attention", "attn"), ("experts", "experts"), ("unembedding", "unembedding")):
            if sizes.experts:
                trained, _ = sizes.lora(placement, rank, include_unembedding, part)
                base = sum(matrix.parameters for matrix in sizes.matrices if matrix.part == part)
                rows.append(condition | {"part": name, "trainable_params": trained, "base_params": base})
    return pd.DataFrame(rows)


def base_parameters(model: torch.nn.Module) -> int:
    """Return the number of parameters of the base, without adapters."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" not in name)


def train_flops_per_token(model: torch.nn.Module) -> int:
    """Return the FLOPs of a forward and backward pass per token, of linear layers only, as the paper counts them.

    A trained weight takes 6 FLOPs: 2 for the output, 2 for the gradient of the input, and 2 for its own gradient. A
    frozen weight takes 4. In a mixture of experts the active experts count, and the router does not.
    """
    import torch

    config: Any = model.config
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    active = config.num_experts_per_tok / experts if experts else 1.0
    weights = [(name, layer.weight) for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    # Some models keep all experts of a layer in one parameter.
    weights += [(name, p) for name, p in model.named_parameters() if p.ndim == 3 and ".experts." in name]
    flops = 0.0
    for name, weight in weights:
        flops += (active if ".experts." in name else 1.0) * weight.numel() * (6 if weight.requires_grad else 4)
    return round(flops)
