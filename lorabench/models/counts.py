"""Counts of parameters and FLOPs: of a model, and of LoRA on real architectures (the paper's table next to figure 4).

`architectures/NAME.json` holds the public configuration of each architecture; nothing is downloaded, and no weight is
allocated. The counted parameters are those that `add_lora` makes trainable. All decoder layers of these architectures
are alike, so models of one and of two layers tell the counts of all layers.

Experts are fused in this implementation: gate and up of an expert are one matrix and share an A, so that an expert has
r (d_in + 2 d_expert) + r (d_expert + d_in) LoRA parameters. The paper's scheme, with a LoRA each for gate, up and down,
would have 3 r (d_in + d_expert), which is 1.32 times as many in Qwen3-30B-A3B.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pandas as pd

from lorabench.config.fields import Placement, placement_of
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

    tables: list[pd.DataFrame] = []
    for architecture, placement, rank, include_unembedding, by_part in _CONDITIONS:
        configuration: dict[str, Any] = json.loads((ARCHITECTURES / f"{architecture}.json").read_text())
        counts = []
        for layers in (1, 2):
            config = AutoConfig.for_model(**configuration | {"num_hidden_layers": layers})
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
                counts.append(_counts(add_lora(model, rank, placement, 32.0, include_unembedding, seed=0)))
        whole = counts[0] + (configuration["num_hidden_layers"] - 1) * (counts[1] - counts[0])
        condition = {"architecture": architecture, "placement": placement, "rank": rank}
        condition["include_unembedding"] = include_unembedding
        tables.append((whole if by_part else whole.loc[["all"]]).reset_index().assign(**condition))
    return pd.concat(tables, ignore_index=True)


def _counts(model: PeftModel) -> pd.DataFrame:
    """Return trainable_params and base_params by part: of the whole model (`all`), and of the layers with LoRA."""
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    rows = [("all", trainable, sum(p.numel() for p in parameters) - trainable)]
    head = model.get_base_model().get_output_embeddings()
    for name, layer in lora_layers(model):
        if layer is head:
            part = "unembedding"
        elif in_expert(name):
            part = "experts"
        else:
            part = "attention" if placement_of(name) == "attn" else "mlp"
        adapted = layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight
        lora = layer.lora_A["default"].weight.numel() + layer.lora_B["default"].weight.numel()
        rows.append((part, lora, adapted.numel()))
    frame = pd.DataFrame(rows, columns=["part", "trainable_params", "base_params"])
    sums: pd.DataFrame = frame.groupby("part", sort=False).sum()
    return sums


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
