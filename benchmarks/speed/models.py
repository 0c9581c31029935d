"""The models that are measured, and the number formats they are trained in."""

from __future__ import annotations

from typing import Any, Literal

import torch

from lorabench.config.inputs import GgufModel, ModelSpec, TinyModel
from lorabench.config.loading import load_preset
from lorabench.models.base import converted_folder, load_model

Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

SMOLLM2 = "smollm2-135m"


def spec_of(model: str) -> ModelSpec:
    """Return the specification of a model by its name: that of the preset `smollm2`, or of a tiny base."""
    if model == SMOLLM2:
        return load_preset("smollm2").models[model]
    return TinyModel.model_validate({"kind": "tiny", "name": model})


def is_there(model: str) -> bool:
    """Return whether a model's files are on this machine."""
    spec = spec_of(model)
    return not isinstance(spec, GgufModel) or (converted_folder(spec) / "model.safetensors").is_file()


def loaded(model: str) -> Any:
    """Load a model by its name, with fp32 weights."""
    return load_model(spec_of(model))
