"""What is known of a model before it is loaded: from its configuration and the headers of its files. No torch."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from lorabench.config import GgufModel, HubModel, ModelSpec, PathModel, TinyModel
from lorabench.errors import UserError
from lorabench.models.dimensions import ARCHITECTURES, Dimensions, dimensions, of_config
from lorabench.models.tiny import shipped
from lorabench.records import file_sha256
from lorabench.utils import formats

TINY: tuple[str, ...] = get_args(TinyModel.model_fields["name"].annotation)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# A safetensors header that claims to be longer than this is none.
_MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True)
class Model:
    """A model that a user named."""

    name: str
    """As the user wrote it."""
    spec: ModelSpec
    """For a preset."""
    family: str
    """`model_type` to transformers."""
    parameters: int
    max_length: int | None
    """Longest sequence in tokens; None if its configuration does not say."""

    @property
    def sizes(self) -> Dimensions:
        """Of its matrices."""
        return dimensions(self.spec)

    def lora_parameters(self, rank: int) -> int:
        """Parameters of LoRA of that rank on all layers and the unembedding."""
        return self.sizes.lora("all", rank, include_unembedding=True)[0]

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.family}, {formats.parameters(self.parameters)} parameters, width {self.sizes.hidden}"
        )


def find_model(name: str) -> Model:
    """The model of that name: `tiny` or a shipped base, a folder, a GGUF file, or an id of the Hugging Face hub.

    Raises:
        UserError: there is no such model, or its sizes can't be read.
    """
    if name == "tiny" or name in TINY:
        return _tiny(name)
    path = Path(name)
    if path.suffix == ".gguf":
        return _gguf(name)
    if path.is_dir():
        return _folder(name)
    if HUB_ID.fullmatch(name):
        return _hub(name)
    known = ", ".join(("tiny", *TINY))
    raise UserError(f"model {name!r} is no folder, no .gguf file, no hub id (owner/name) and none of {known}")


def _tiny(name: str) -> Model:
    spec = TinyModel.model_validate({"kind": "tiny"} | ({} if name == "tiny" else {"name": name}))
    config = json.loads((shipped(spec.name) / "config.json").read_text())
    parameters = json.loads((shipped(spec.name) / "recipe.json").read_text())["parameters"]
    return Model(name, spec, config["model_type"], parameters, config["max_position_embeddings"])


def _folder(name: str) -> Model:
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise UserError(f"model folder {name!r} has no config.json; a Hugging Face causal LM is needed there")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"model folder {name!r} has no .safetensors file; pickled weights are not loaded")
    config = _config(folder / "config.json", name)
    parameters = sum(_elements(file) for file in files)
    spec = PathModel(kind="path", path=name, parameters=parameters, hidden_size=config["hidden_size"])
    return Model(name, spec, config["model_type"], parameters, config.get("max_position_embeddings"))


def _elements(file: Path) -> int:
    """Numbers in a safetensors file, by its header: its length in 8 bytes, then JSON with the shape of each tensor."""
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        header = opened.read(min(length, _MAX_HEADER_BYTES))
    try:
        tensors = json.loads(header)
        return sum(_product(tensor["shape"]) for name, tensor in tensors.items() if name != "__metadata__")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is no safetensors file") from error


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _hub(name: str) -> Model:
    """From the configuration that is shipped for models of that name, else from the hub."""
    short = name.rpartition("/")[2].lower()
    shipped_configs = [path for path in sorted(ARCHITECTURES.glob("*.json")) if _is_of(short, path.stem)]
    config = _config(shipped_configs[-1] if shipped_configs else _from_hub(name), name)
    try:
        parameters = of_config(config).parameters
    except KeyError as error:
        raise UserError(
            f"model {name!r} is of the family {config['model_type']!r}, whose configuration has no {error.args[0]}; "
            "download it and give its folder"
        ) from error
    spec = HubModel(kind="hub", id=name, parameters=parameters, hidden_size=config["hidden_size"])
    return Model(name, spec, config["model_type"], parameters, config.get("max_position_embeddings"))


def _is_of(name: str, architecture: str) -> bool:
    """Whether a model is that one or a variant of it: `llama-3.1-8b-instruct` of `llama-3.1-8b`."""
    return name == architecture or name.startswith(f"{architecture}-")


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"model {name!r}: its config.json can't be had from the hub ({reason}); download the model and give its "
            "folder"
        ) from error


def _gguf(name: str) -> Model:
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
    return Model(name, spec, family, parameters, length)


def _config(path: Path, name: str) -> dict[str, Any]:
    """A configuration with the two entries that everything else needs."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"config.json of model {name!r} is no JSON: {error}") from error
    for key, kind in (("model_type", str), ("hidden_size", int)):
        if not isinstance(config, dict) or not isinstance(config.get(key), kind):
            raise UserError(f"config.json of model {name!r} has no {key}; a causal LM for text is needed")
    return dict(config)
