"""A user's model, described without loading it: from its configuration and the headers of its files, without torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError, safe_open

from lorabench.config.inputs import GgufModel, HubModel, ModelSpec, PathModel, TinyModel
from lorabench.errors import UserError
from lorabench.models.base import model_location
from lorabench.models.specs import ARCHITECTURES, Dimensions, dimensions, dimensions_of_config, shipped_folder
from lorabench.utils import formats
from lorabench.utils.files import file_sha256
from lorabench.utils.hub import WantedRepository, look_up

TINY: tuple[str, ...] = get_args(TinyModel.model_fields["name"].annotation)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class UserModel:
    """A user's model."""

    name: str
    """The name that the user gave: a folder, a file, a hub id or a shipped base."""
    spec: ModelSpec
    """The model as a preset names it."""
    family: str
    """The `model_type` of transformers."""
    parameters: int
    """The number of parameters."""
    max_length: int | None
    """The longest sequence in tokens; None if the configuration does not say."""

    @property
    def sizes(self) -> Dimensions:
        """The dimensions of the model's matrices."""
        return dimensions(self.spec)

    def lora_parameters(self, rank: int) -> int:
        """Return the number of parameters of LoRA with a rank on all layers and the unembedding."""
        return self.sizes.lora("all", rank, include_unembedding=True)[0]

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.family}, {formats.parameters(self.parameters)} parameters, width {self.sizes.hidden}"
        )


def find_model(name: str) -> UserModel:
    """Return the model of a name: `tiny` or a shipped base, a folder, a GGUF file, or an id of the Hugging Face hub.

    Raises:
        UserError: there is no such model, or its dimensions can't be read.
    """
    path = Path(name)
    if name == "tiny" or name in TINY:
        tiny = TinyModel.model_validate({"kind": "tiny"} | ({} if name == "tiny" else {"name": name}))
        config, recipe = (
            json.loads((shipped_folder(tiny.name) / f"{file}.json").read_text()) for file in ("config", "recipe")
        )
        return UserModel(name, tiny, config["model_type"], recipe["parameters"], config["max_position_embeddings"])
    if path.suffix == ".gguf":
        return _gguf(name)
    spec: ModelSpec
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model folder {name!r} has no config.json; a Hugging Face causal LM is needed there")
        if not any(path.glob("*.safetensors")):
            raise UserError(f"model folder {name!r} has no .safetensors file; pickled weights are not loaded")
        config = _config((path / "config.json").read_bytes(), name)
        parameters = 0
        for file in path.glob("*.safetensors"):
            try:
                with safe_open(file, "numpy") as tensors:
                    names = tensors.keys()
                    parameters += sum(math.prod(tensors.get_slice(tensor).get_shape()) for tensor in names)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} is not a safetensors file") from error
        spec = PathModel(kind="path", path=name, parameters=parameters, hidden_size=config["hidden_size"])
    elif HUB_ID.fullmatch(name):
        config, parameters = _hub(name)
        spec = HubModel(kind="hub", id=name, parameters=parameters, hidden_size=config["hidden_size"])
    else:
        known = ", ".join(("tiny", *TINY))
        raise UserError(f"model {name!r} is no folder, no .gguf file, no hub id (owner/name) and none of {known}")
    return UserModel(name, spec, config["model_type"], parameters, config.get("max_position_embeddings"))


def model_of_config(config: Mapping[str, Any], folder: Path) -> UserModel:
    """Return the model of a configuration alone, as transformers writes it; it is written into a folder.

    Raises:
        UserError: the configuration is not that of a causal language model of a known family.
    """
    text = json.dumps(dict(config))
    name = str(config.get("_name_or_path") or "of this configuration")
    checked = _config(text, name)
    parameters = _sizes(checked, name).parameters
    (folder / "config.json").write_text(text)
    spec = PathModel(kind="path", path=str(folder), parameters=parameters, hidden_size=checked["hidden_size"])
    return UserModel(name, spec, checked["model_type"], parameters, checked.get("max_position_embeddings"))


def model_config(model: UserModel) -> dict[str, Any] | None:
    """Return the configuration of a model as transformers writes it; None of a GGUF file, which has none."""
    match model.spec:
        case GgufModel():
            return None
        case HubModel():
            return _hub_config(model.name)
        case _:
            return _config((Path(model_location(model.spec)) / "config.json").read_bytes(), model.name)


def _hub_config(name: str) -> dict[str, Any]:
    """Return the configuration of a model of the hub, by a shipped configuration of its name."""
    short = name.rpartition("/")[2].lower()
    # A model may also be a variant of a shipped one, as is `llama-3.1-8b-instruct`.
    shipped = [path for path in sorted(ARCHITECTURES.glob("*.json")) if f"{short}-".startswith(f"{path.stem}-")]
    try:
        text = shipped[-1].read_text() if shipped else look_up(WantedRepository("model", name, "main"), "config.json")
    except UserError as error:
        raise UserError(f"{error}; the path of a local folder with the model works without the hub") from error
    return _config(text, name)


def _hub(name: str) -> tuple[dict[str, Any], int]:
    """Return configuration and number of parameters of a model of the hub."""
    config = _hub_config(name)
    return config, _sizes(config, name).parameters


def _sizes(config: dict[str, Any], name: str) -> Dimensions:
    try:
        return dimensions_of_config(config)
    except KeyError as error:
        raise UserError(
            f"model {name!r} is of the family {config['model_type']!r}, whose configuration has no {error.args[0]}; "
            "download it and give its folder"
        ) from error


def _gguf(name: str) -> UserModel:
    from gguf import GGUFReader

    path = Path(name)
    if not path.is_file():
        raise UserError(f"GGUF file {name!r} does not exist")
    try:
        reader = GGUFReader(path)
        family = str(reader.fields["general.architecture"].contents())
        hidden, length = (
            int(reader.fields[f"{family}.{key}"].contents()) for key in ("embedding_length", "context_length")
        )
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise UserError(f"{path} can't be read as GGUF: {error}") from error
    parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    spec = GgufModel(kind="gguf", path=name, sha256=file_sha256(path), parameters=parameters, hidden_size=hidden)
    return UserModel(name, spec, family, parameters, length)


def _config(text: str | bytes, name: str) -> dict[str, Any]:
    """Parse a configuration and check the two entries that every model needs."""
    try:
        config = json.loads(text)
    except ValueError as error:
        raise UserError(f"config.json of model {name!r} is not JSON: {error}") from error
    for key, kind in (("model_type", str), ("hidden_size", int)):
        if not isinstance(config, dict) or not isinstance(config.get(key), kind):
            raise UserError(f"config.json of model {name!r} has no {key}; a causal LM for text is needed")
    return dict(config)
