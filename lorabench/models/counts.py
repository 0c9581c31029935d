"""Counts of parameters and FLOPs: of a model, and of LoRA on real architectures (the paper's table beside figure 4).

`architectures/NAME.json` holds the public configuration of each architecture; nothing is downloaded, and no weight is
allocated. The counted parameters are those that `add_lora` makes trainable. All decoder layers of these architectures
are alike, so models of one and of two layers tell the counts of all layers.

Experts are fused in this implementation: gate and up of an expert are one matrix and share an A, so that an expert has
r (d_in + 2 d_expert) + r (d_expert + d_in) LoRA parameters. The paper's scheme, with a LoRA each for gate, up and down,
would have 3 r (d_in + d_expert), which is 1.32 times as many in Qwen3-30B-A3B.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pandas as pd

from lorabench.config.fields import SUFFIXES, Placement
from lorabench.models.lora import add_lora, in_expert, lora_layers
from lorabench.models.specs import ARCHITECTURES

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

# Architecture, placement, rank, include_unembedding, and whether to count by part.
_CONDITIONS: tuple[tuple[str, Placement, int, bool, bool], ...] = (
    ("llama-3.1-8b", "mlp", 256, True, False),
    ("llama-3.1-8b", "attn", 256, True, False),
    ("llama-3.1-8b", "all", 256, True, False),
    ("llama-3.1-8b", "mlp", 128, True, False),
    ("llama-3.1-8b", "all", 1, True, False),
    ("llama-3.1-8b", "all", 1, False, False),
    ("llama-3.2-1b", "all", 1, True, False),
    ("llama-3.2-1b", "all", 1, False, False),
    ("qwen3-8b", "all", 1, True, False),
    ("qwen3-8b", "all", 1, False, False),
    ("qwen3-30b-a3b", "all", 8, True, True),
    ("qwen3-30b-a3b", "all", 64, True, True),
)


def counts_table() -> pd.DataFrame:
    """Return the counts by which the claims on the paper's table and on its scheme for experts are judged.

    There is one row per architecture, placement, rank (in a mixture of experts the total rank), include_unembedding and
    part:

    - part `all`: trainable_params of the whole adapter, base_params of the whole model, one row each.
    - parts `experts`, `attention` and `unembedding`, only in the mixture of experts: trainable_params of LoRA on these
      layers, base_params of the layers themselves. Their trainable_params add up to those of `all`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    rows = []
    for architecture, placement, rank, include_unembedding, by_part in _CONDITIONS:
        configuration: dict[str, Any] = json.loads((ARCHITECTURES / f"{architecture}.json").read_text())
        counts = []
        for layers in (1, 2):
            config = AutoConfig.for_model(**configuration | {"num_hidden_layers": layers})
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
                counts.append(_counts(add_lora(model, rank, placement, 32.0, include_unembedding, seed=0)))
        more = configuration["num_hidden_layers"] - 1
        for part, (trainable, base) in counts[0].items():
            if by_part or part == "all":
                whole = trainable + more * (counts[1][part][0] - trainable), base + more * (counts[1][part][1] - base)
                rows.append((architecture, placement, rank, include_unembedding, part, *whole))
    columns = ["architecture", "placement", "rank", "include_unembedding", "part", "trainable_params", "base_params"]
    return pd.DataFrame(rows, columns=columns)


def _counts(model: PeftModel) -> dict[str, tuple[int, int]]:
    """Return the trainable and base parameters of the whole model (`all`), and of the layers with LoRA by part."""
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    parts: defaultdict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    parts["all"] = trainable, sum(p.numel() for p in parameters) - trainable
    head = model.get_base_model().get_output_embeddings()
    for name, layer in lora_layers(model):
        if layer is head:
            part = "unembedding"
        elif in_expert(name):
            part = "experts"
        else:
            part = "attention" if name.rpartition(".")[2] in SUFFIXES["attn"] else "mlp"
        adapted = layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight
        lora = layer.lora_A["default"].weight.numel() + layer.lora_B["default"].weight.numel()
        parts[part] = parts[part][0] + lora, parts[part][1] + adapted.numel()
    return parts


def base_parameters(model: torch.nn.Module) -> int:
    """Return the number of parameters of the base, without adapters."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" not in name)


def train_flops_per_token(model: torch.nn.Module) -> int:
    """Return the FLOPs of a forward and backward pass per token, of linear layers only, as the paper counts them.

    A trained weight takes 6 FLOPs: 2 for the output, 2 for the gradient of the input, and 2 for its own gradient. A
    frozen weight takes 4. LoRA's A and B are trained, the layers under them frozen. In a mixture of experts the active
    experts count, and the router does not.
    """
    import torch

    flops = 0.0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
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
