"""The model that a user names: a folder, an id of the hub, or a base that the suite ships; known without loading it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora_advice.errors import UserError
from lora_advice.foreign import typed
from lora_advice.hub import look_up
from lora_advice.models import HUB_ID, Dimensions, ModelConfig, ModelFacts, facts, facts_of_config, read_config
from lora_advice.theory import FACTS


@cache
def shipped_bases() -> Mapping[str, Mapping[str, Any]]:
    """Return the suite's tiny bases by name: other `names`, the `config`, and what runs record of the `weights`."""
    bases: dict[str, dict[str, Any]] = json.loads((FACTS / "bases.json").read_text())
    return bases


def shipped_base(name: str) -> Mapping[str, Any] | None:
    """Return the shipped base of a name."""
    return next((base for key, base in shipped_bases().items() if name in (key, *base["names"])), None)


def find_model(name: str) -> ModelFacts:
    """Return what is known of the model of a name; raises UserError if there is no such model, or no width is known."""
    if base := shipped_base(name):
        return model_of_config(base["config"], name)
    folder = Path(name)
    if folder.is_dir():
        model, parameters = facts_of_config(read_config(folder), name), 0
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, "numpy") as tensors:
                    shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} is not a safetensors file") from error
            parameters += sum(map(math.prod, shapes))
        return replace(model, parameters=parameters or model.parameters)
    if folder.suffix == ".gguf":
        raise UserError(f"model {name!r} is a GGUF file: name the folder or hub id of the model it was made from")
    known = facts(name)
    if known is not None and not known.width_error:
        return known
    if not HUB_ID.fullmatch(name):
        raise UserError(f"model {name!r} is no folder, no hub id (owner/name) and no base that the suite ships")
    try:
        text = look_up(name, "config.json")
    except UserError as error:
        raise UserError(f"{error}; the path of a local folder with the model works without the hub") from error
    return facts_of_config(typed(ModelConfig, text, f"config.json of model {name!r}"), name)


def model_of_config(config: Mapping[str, Any], name: str = "") -> ModelFacts:
    """Return what is known of a model by the content of its `config.json` alone, or raise UserError."""
    shown = name or str(config.get("_name_or_path") or "of this configuration")
    return facts_of_config(typed(ModelConfig, dict(config), f"config.json of model {shown!r}"), shown)


def lora_parameters(model: ModelFacts, rank: int) -> int:
    """Return the number of parameters of LoRA with a rank on all layers and the unembedding.

    In a mixture of experts the rank is divided by the active experts, and each matrix of an expert has its own LoRA. A
    model whose sizes are not known counts as a Llama of its parameters and width; without these it is a UserError.
    """
    sizes = model.sizes
    if sizes is None:
        if not model.parameters:
            raise UserError(
                f"model {model.name!r} of the family {model.family!r} has sizes that are not known here; give the "
                "folder with its files"
            )
        hidden, heads = model.width, max(1, model.width // 128)
        # A small model has a small vocabulary too.
        vocabulary = min(128_000, max(1, model.parameters // (4 * hidden)))
        kv_heads, head_dim, intermediate = max(1, heads // 4), hidden // heads, round(3.5 * hidden)
        llama = Dimensions("llama", hidden, 1, heads, kv_heads, head_dim, intermediate, vocabulary, tied=True)
        layer = sum(linear.d_in * linear.d_out for linear in llama.linear.values() if linear.kind != "unembedding")
        sizes = replace(llama, layers=max(1, round((model.parameters - vocabulary * hidden) / layer)))
    expert_rank = max(1, rank // sizes.active_experts) if sizes.experts else rank
    return sum(
        layer.number * (expert_rank if layer.kind == "experts" else rank) * (layer.d_in + layer.d_out)
        for layer in sizes.linear.values()
    )
