"""A user's model, described without loading it: from its configuration and the headers of its files, without torch."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from safetensors import SafetensorError, safe_open

from lorabench.config.inputs import HubModel, ModelSpec, PathModel, TinyModel
from lorabench.errors import UserError
from lorabench.models.specs import (
    ARCHITECTURES,
    Dimensions,
    ModelConfig,
    dimensions,
    dimensions_of_config,
    read_config,
    shipped_folder,
)
from lorabench.utils import formats
from lorabench.utils.hub import WantedRepository, look_up

TINY: tuple[str, ...] = get_args(TinyModel.model_fields["name"].annotation)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class UserModel:
    """A user's model."""

    name: str  # The name that the user gave: a folder, a file, a hub id or a shipped base.
    spec: ModelSpec  # The model as a preset names it.
    family: str  # The `model_type` of transformers.
    parameters: int
    max_length: int | None  # The longest sequence in tokens; None if the configuration does not say.

    @property
    def sizes(self) -> Dimensions:
        """The dimensions of the model's matrices."""
        return dimensions(self.spec)

    def lora_parameters(self, rank: int) -> int:
        """Return the number of parameters of LoRA with a rank on all layers and the unembedding."""
        return self.sizes.lora("all", rank, include_unembedding=True)[0]

    def __str__(self) -> str:
        size = f"{formats.parameters(self.parameters)} parameters, width {self.sizes.hidden}"
        return f"{self.name}: {self.family}, {size}"


def find_model(name: str) -> UserModel:
    """Return the model of a name: `tiny` or a shipped base, a folder, or an id of the Hugging Face hub.

    UserError says that there is no such model, or that its dimensions can't be read.
    """
    path = Path(name)
    spec: ModelSpec
    if name == "tiny" or name in TINY:
        spec = TinyModel.model_validate({"kind": "tiny"} | ({} if name == "tiny" else {"name": name}))
        config = read_config(shipped_folder(spec.name))
        parameters = json.loads((shipped_folder(spec.name) / "recipe.json").read_text())["parameters"]
    elif os.path.isdir(name):
        config = read_config(path)
        width = _width(config, str(path / "config.json"))
        parameters = 0
        for file in path.glob("*.safetensors"):
            try:
                with safe_open(file, "numpy") as tensors:
                    parameters += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} is not a safetensors file") from error
        if not parameters:
            raise UserError(f"model folder {name!r} has no weights in .safetensors files; no others are loaded")
        spec = PathModel(kind="path", path=name, parameters=parameters, hidden_size=width)
    elif HUB_ID.fullmatch(name):
        where = f"config.json of model {name!r}"
        # A model may also be a variant of a shipped configuration's, as is `llama-3.1-8b-instruct`.
        short, known = f"{name.rpartition('/')[2].lower()}-", sorted(ARCHITECTURES.glob("*.json"))
        shipped = [file for file in known if short.startswith(f"{file.stem}-")]
        repository = WantedRepository("model", name, "main")
        config = ModelConfig.of(shipped[-1].read_text() if shipped else look_up(repository, "config.json"), where)
        width = _width(config, where)
        try:
            parameters = dimensions_of_config(config).parameters
        except KeyError as error:
            raise UserError(f"{where} has no {error.args[0]}; download the model and give its folder") from error
        spec = HubModel(kind="hub", id=name, parameters=parameters, hidden_size=width)
    else:
        bases = ", ".join(("tiny", *TINY))
        raise UserError(f"model {name!r} is no folder, no hub id (owner/name) and none of {bases}")
    return UserModel(name, spec, config.model_type or "", parameters, config.max_position_embeddings)


def _width(config: ModelConfig, where: str) -> int:
    """Return the hidden size of a causal language model, which every model needs beside its family."""
    if config.model_type is None or config.hidden_size is None:
        lacking = "hidden_size" if config.model_type else "model_type"
        raise UserError(f"{where} has no {lacking}; a causal LM for text is needed")
    return config.hidden_size
