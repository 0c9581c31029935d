"""The paper's three placements of LoRA, as names of layers in the known decoder families, experts included."""

from __future__ import annotations

from typing import Literal

Placement = Literal["attn", "mlp", "all"]

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")
_MLP = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")

SUFFIXES: dict[Placement, tuple[str, ...]] = {"attn": _ATTENTION, "mlp": _MLP, "all": _ATTENTION + _MLP}
