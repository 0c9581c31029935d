"""Variants of LoRA: which one an arm is, how its best learning rate follows from LoRA's, and how wide its optimum is.

rsLoRA and LoRA+ are LoRA with another alpha or another LR of B, so tables hold them under the method `lora`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lorabench.analysis.arms import STANDARD
from lorabench.config.fields import LORA_PLUS_RATIO, Variant

NAMES: dict[Variant, str] = {
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "lora_plus": "LoRA+",
    "dora": "DoRA",
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "qlora": "QLoRA",
}
"""The names of the variants, in the order in which they are shown."""


def variant_of(arm: Mapping[str, Any]) -> Variant | None:
    """Return which variant of LoRA an arm is; None for full fine-tuning and for any other parametrization.

    At rank 1 rsLoRA is LoRA.
    """
    if arm["method"] == "fullft":
        return None
    alpha, init_a, ratio = (arm[name] if arm[name] is not None else STANDARD[name] for name in STANDARD)
    if init_a != STANDARD["init_a"]:
        return None
    standard_alpha = alpha == STANDARD["alpha"]
    if arm["method"] != "lora":
        same = [variant for variant in NAMES if variant == arm["method"]]
        return same[0] if standard_alpha and ratio == STANDARD["lr_ratio"] else None
    if ratio == LORA_PLUS_RATIO:
        return "lora_plus" if standard_alpha else None
    if ratio != STANDARD["lr_ratio"]:
        return None
    if standard_alpha:
        return "lora"
    return "rslora" if math.isclose(alpha, STANDARD["alpha"] * math.sqrt(arm["rank"])) else None
