"""A tiny base with other heads that computes the same: vLLM has no heads of 16 on a CPU, but heads of 32."""

from __future__ import annotations

from pathlib import Path

import torch

from lorabench.config.inputs import TinyModel
from lorabench.models.base import load_model, load_tokenizer

NARROW, WIDE = 16, 32


def widen(name: str, folder: Path) -> Path:
    """Write a Llama base with heads of 32 in place of 16 and the same logits; return its folder.

    Rotary embeddings turn dimensions i and i + d/2 of a head of size d at frequency theta^(-2i/d). So dimension i of 16
    becomes dimension 2i of 32, which has the same frequency; the other dimensions are zero. Queries are multiplied by
    sqrt(2), since scores are divided by the root of the size.
    """
    spec = TinyModel(kind="tiny", name=name)
    model = load_model(spec)
    half = torch.arange(NARROW // 2)
    to = torch.cat([2 * half, WIDE // 2 + 2 * half])
    heads = model.config.num_attention_heads
    for layer in model.model.layers:
        attention = layer.self_attn
        for projection, factor in (
            (attention.q_proj, (WIDE / NARROW) ** 0.5),
            (attention.k_proj, 1.0),
            (attention.v_proj, 1.0),
        ):
            old = projection.weight.detach().view(heads, NARROW, -1)
            new = torch.zeros(heads, WIDE, old.shape[-1])
            new[:, to] = factor * old
            projection.weight = torch.nn.Parameter(new.flatten(0, 1))
        old = attention.o_proj.weight.detach().view(-1, heads, NARROW)
        new = torch.zeros(len(old), heads, WIDE)
        new[..., to] = old
        attention.o_proj.weight = torch.nn.Parameter(new.flatten(1))
    model.config.head_dim = WIDE
    model.save_pretrained(folder)
    load_tokenizer(spec).save_pretrained(folder)
    return folder
