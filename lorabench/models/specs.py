"""A preset's model before it is loaded: what identifies it, and the sizes of its matrices, for the estimates of cost.

It imports no torch. The sizes come from the model's configuration: `architectures/NAME.json` holds those of the
presets' models. tests/models/test_big_models.py compares the counts with those of models on the meta device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorabench.config.fields import Placement
from lorabench.config.inputs import GgufModel, HubModel, ModelSpec, PathModel, TinyModel
from lorabench.errors import UserError
from lorabench.utils.files import digest

ARCHITECTURES = Path(__file__).parent / "architectures"
FUSED_FAMILIES = ("llama", "qwen3")
"""The families (`model_type`) whose layers `lorabench.models.fused` computes in fewer kernels on a GPU."""
SHIPPED = Path(__file__).parent / "shipped"
"""Folder of the tiny bases, which `workflow/scripts/tiny_bases.py` has pretrained."""

# A line break precedes each turn's text, so that a tokenizer can't merge the turn's first word with the text before it.
PLAIN = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].capitalize() + ':\n' }}{% endif %}"
    "{{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
"""The template `plain`: a heading above each turn, and the model's end token after each turn of the assistant."""


class ModelError(UserError):
    """A base model is missing, can't be loaded or is not the expected one; the message is a sentence that names it."""


def template_text(setting: str) -> str:
    """Return the template that a model's `chat_template` names: `plain`, or the path of a Jinja file."""
    return PLAIN if setting == "plain" else Path(setting).read_text(encoding="utf-8")


def shipped_folder(name: str) -> Path:
    """Return the folder of a shipped tiny base."""
    return SHIPPED / name


@cache
def model_id(spec: ModelSpec) -> str:
    """Return the hash of everything that determines a model's weights, tokenizer and chat template, without paths."""
    template = None if isinstance(spec, TinyModel) else spec.chat_template
    return weights_id(spec) if template is None else digest([weights_id(spec), template_text(template)], 8)


@cache
def weights_id(spec: ModelSpec) -> str:
    """Return the hash of everything that determines a model's weights and tokenizer."""
    match spec:
        case TinyModel():
            return digest(json.loads((shipped_folder(spec.name) / "recipe.json").read_text())["weights_sha256"], 8)
        case HubModel():
            return digest([spec.id, spec.revision], 8)
        case GgufModel():
            return digest(spec.sha256, 8)
        case PathModel():
            folder, mib, files = Path(spec.path), 1 << 20, []
            for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
                size = path.stat().st_size
                # The first and the last MiB suffice to distinguish trained weights.
                with path.open("rb") as file:
                    ends = file.read(mib)
                    file.seek(max(0, size - mib))
                    files.append([path.name, size, hashlib.sha256(ends + file.read(mib)).hexdigest()])
            return digest(files, 8)


@dataclass(frozen=True)
class Matrix:
    """Linear layers of the same part and size: `count` in the model, of which `active` are used for a token."""

    part: Literal["attn", "mlp", "experts", "router", "unembedding"]
    d_in: int
    d_out: int
    count: int
    active: int

    @property
    def parameters(self) -> int:
        """The number of parameters of all these layers."""
        return self.count * self.d_in * self.d_out


def merging_is_cheaper(rank: int, d_in: int, d_out: int) -> bool:
    """Return whether LoRA's products, 3 r (d_in + d_out) per token, cost more than the gradient of the weights.

    Then LoRA is computed in fp32 with merged weights (`lorabench.models.lora`).
    """
    return 3 * rank * (d_in + d_out) > d_in * d_out


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a decoder of the Llama and Qwen3 families, dense or a mixture of experts."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # Width of a dense MLP, or of an expert.
    vocabulary: int
    tied: bool = False  # Whether embedding and unembedding are one matrix.
    query_key_norms: bool = False
    experts: int = 0
    active_experts: int = 0
    in_bf16: bool = False  # Whether the model's files hold its weights in bf16.
    fusible: bool = True  # Whether `lorabench.models.fused` knows its layers.

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """All linear layers; of an expert, gate and up are one matrix, as in the implementation."""
        d, ff, n = self.hidden, self.intermediate, self.layers
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        matrices = [
            Matrix("attn", d, queries, n, n),
            Matrix("attn", d, keys, 2 * n, 2 * n),
            Matrix("attn", queries, d, n, n),
        ]
        if self.experts:
            counts = n * self.experts, n * self.active_experts
            matrices += [Matrix("experts", d, 2 * ff, *counts), Matrix("experts", ff, d, *counts)]
            matrices.append(Matrix("router", d, self.experts, n, n))
        else:
            matrices += [Matrix("mlp", d, ff, 2 * n, 2 * n), Matrix("mlp", ff, d, n, n)]
        return (*matrices, Matrix("unembedding", d, self.vocabulary, 1, 1))

    @cached_property
    def parameters(self) -> int:
        """The number of parameters of the whole model."""
        embedding = 0 if self.tied else self.vocabulary * self.hidden
        norms = self.hidden * (2 * self.layers + 1) + (2 * self.head_dim * self.layers if self.query_key_norms else 0)
        return sum(matrix.parameters for matrix in self.matrices) + embedding + norms

    @cached_property
    def active_linear(self) -> int:
        """The number of parameters of the linear layers that a token passes; routers do not count, as in the paper."""
        return sum(m.active * m.d_in * m.d_out for m in self.matrices if m.part != "router")

    @property
    def layer_parameters(self) -> int:
        """The number of parameters of the linear layers of one decoder layer."""
        return sum(m.parameters for m in self.matrices if m.part != "unembedding") // self.layers

    def lora(
        self, placement: Placement, rank: int, include_unembedding: bool, part: str | None = None
    ) -> tuple[int, int]:
        """Return the number of LoRA's parameters, in all layers or in one part, and of those that a token passes."""
        total = active = 0
        for m in self.adapted(placement, include_unembedding):
            if part in (None, m.part):
                # As in `lorabench.models.lora`, the total rank is divided by the active experts.
                own = max(1, rank // self.active_experts) if m.part == "experts" else rank
                total += m.count * own * (m.d_in + m.d_out)
                active += m.active * own * (m.d_in + m.d_out)
        return total, active

    def adapted(self, placement: Placement, include_unembedding: bool) -> list[Matrix]:
        """Return the linear layers with LoRA."""
        parts = {"attn": {"attn"}, "mlp": {"mlp", "experts"}, "all": {"attn", "mlp", "experts"}}[placement]
        parts |= {"unembedding"} if include_unembedding else set()
        return [matrix for matrix in self.matrices if matrix.part in parts]


_Size = Annotated[int, Field(ge=1, le=10**9)]


class ModelConfig(BaseModel):
    """What is read of a model's `config.json`; null is what it does not say."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    model_type: str | None = None
    hidden_size: _Size | None = None
    num_hidden_layers: _Size | None = None
    num_attention_heads: _Size | None = None
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    # Some families have a width for each layer.
    intermediate_size: _Size | list[_Size] | None = None
    moe_intermediate_size: _Size | None = None
    vocab_size: _Size | None = None
    max_position_embeddings: _Size | None = None
    num_experts: int | None = None
    num_local_experts: int | None = None
    num_experts_per_tok: int | None = None
    tie_word_embeddings: bool | None = None
    dtype: Any = None
    torch_dtype: Any = None

    @classmethod
    def of(cls, content: bytes | str | Mapping[str, Any], where: str) -> Self:
        """Return the configuration in JSON or an object; ModelError, beginning with `where`, if invalid."""
        try:
            if isinstance(content, Mapping):
                return cls.model_validate(content)
            return cls.model_validate_json(content)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            key = f"{problem['loc'][0]}: " if problem["loc"] else ""
            raise ModelError(f"{where}: {key}{problem['msg'][0].lower()}{problem['msg'][1:]}") from None


def read_config(folder: Path) -> ModelConfig:
    """Return the configuration of the model in a folder; ModelError says that it is missing or not valid."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"model folder {folder} has no config.json; a Hugging Face causal LM is needed there")
    return ModelConfig.of(path.read_bytes(), str(path))


@cache
def architectures() -> dict[str, ModelConfig]:
    """Return the public configurations in `architectures/` by name."""
    return {path.stem: ModelConfig.of(path.read_bytes(), str(path)) for path in sorted(ARCHITECTURES.glob("*.json"))}


def dimensions_of_config(config: ModelConfig) -> Dimensions:
    """Return the sizes in a Hugging Face configuration; KeyError names what one of an unknown family lacks."""
    experts = config.num_experts or config.num_local_experts or 0
    keys = ["hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers", "vocab_size"]
    sizes = {key: getattr(config, key) for key in [*keys, *(["num_experts_per_tok"] if experts else [])]}
    for key, size in sizes.items():
        if not isinstance(size, int):
            raise KeyError(key)
    hidden, heads, intermediate, layers, vocabulary, *active = sizes.values()
    return Dimensions(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=config.num_key_value_heads or heads,
        head_dim=config.head_dim or hidden // heads,
        intermediate=(config.moe_intermediate_size or intermediate) if experts else intermediate,
        vocabulary=vocabulary,
        tied=config.tie_word_embeddings or False,
        query_key_norms=(config.model_type or "").startswith("qwen3"),
        experts=experts,
        active_experts=active[0] if experts else 0,
        in_bf16=(config.dtype or config.torch_dtype) == "bfloat16",
        fusible=config.model_type in FUSED_FAMILIES,
    )


@cache
def dimensions(model: ModelSpec) -> Dimensions:
    """Return the sizes of a preset's model: from a configuration with as many parameters within 2%, else guessed."""
    match model:
        case TinyModel():
            return dimensions_of_config(read_config(shipped_folder(model.name)))
        case PathModel():
            configs = [read_config(Path(model.path))]
        case HubModel() | GgufModel():
            name = (model.id if isinstance(model, HubModel) else model.path).rpartition("/")[2].lower()
            configs = [config for start, config in architectures().items() if name.startswith(start)]
    for config in configs:
        with suppress(KeyError):
            known = dimensions_of_config(config)
            if abs(known.parameters / model.parameters - 1) <= 0.02:
                # A dequantized file has weights that bf16 would round.
                return replace(known, in_bf16=known.in_bf16 and not isinstance(model, GgufModel))
    # The sizes of a Llama of this width. A small model has a small vocabulary too.
    parameters, hidden = model.parameters, model.hidden_size
    heads, vocabulary = max(1, hidden // 128), min(128_000, max(1, parameters // (4 * hidden)))
    kv_heads, head_dim, intermediate = max(1, heads // 4), hidden // heads, round(3.5 * hidden)
    one_layer = Dimensions(hidden, 1, heads, kv_heads, head_dim, intermediate, vocabulary, tied=True)
    layers = round((parameters - vocabulary * hidden) / one_layer.layer_parameters)
    return replace(one_layer, layers=max(1, layers))


MAX_BLOCK_QUERIES = 80
"""Queries of the largest block. Values from 48 to 128 take about the same time."""


def blocks(length: int) -> list[slice]:
    """Return the blocks of a row with `length` queries, whose sizes differ by at most one."""
    count = -(-length // MAX_BLOCK_QUERIES)
    ends = [length * number // count for number in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def blocks_pay(length: int, bf16: bool) -> bool:
    """Return whether blocks take less time than PyTorch's kernel, and little memory, in rows of `length` tokens.

    In fp32 PyTorch's kernel was measured to be as fast in rows of up to 128 tokens. The memory of the probabilities
    grows with the square of the length.
    """
    return (1 if bf16 else 128) < length <= 512


def kept_shares(length: int, bf16: bool) -> float:
    """Return the mean number of attention probabilities that are kept per query and head for the backward pass."""
    if not blocks_pay(length, bf16):
        return 0.0
    return sum((block.stop - block.start) * block.stop for block in blocks(length)) / length  # type: ignore[no-any-return]
