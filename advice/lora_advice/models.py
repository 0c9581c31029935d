"""What is known of a base model without loading it: by its `config.json`, or by its name in a table of public facts.

`public_models.csv` has the sizes of models whose matrices are those of `Dimensions`, and width, depth and vocabulary of
others; the first pattern that a name contains counts.
"""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import Field
from safetensors import SafetensorError, safe_open

from lora_advice.errors import UserError
from lora_advice.foreign import Foreign, typed
from lora_advice.theory import EXPONENTS, FACTS

Kind = Literal["attention", "mlp", "experts", "router", "unembedding", "embedding"]

_MODULES: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("modules.yaml").read_text(encoding="utf-8"))

FUSED = {whole: frozenset(parts) for whole, parts in _MODULES["fused"].items()}
"""Layers that are one in some families, by their parts."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

PUBLIC = Path(__file__).with_name("public_models.csv")

SIZE = re.compile(r"(?<![a-z0-9.])(?:(?P<experts>\d{1,4})x)?(?P<size>\d{1,6}(?:\.\d{1,6})?)(?P<unit>[bm])(?![a-z0-9])")
_ACTIVE = re.compile(r"(?<![a-z0-9.])a(?P<size>\d{1,6}(?:\.\d{1,6})?)b(?![a-z0-9])")
# How far a size in a name may be from that of the model that the name matches, as in "DeepSeek-V3-11M".
SIZE_FACTOR = 1.5
_HUB_SECONDS = 2.0  # in which the hub must begin to answer
_Size = Annotated[int, Field(ge=1, le=1_000_000_000)]
_Count = Annotated[int, Field(ge=0, le=100_000)]


def module_kind(name: str) -> Kind | None:
    """Return the kind of a module by its name, with or without the path before it; None if the name does not say."""
    parts = name.removesuffix(".weight").split(".")
    ends = {parts[-1], ".".join(parts[-2:])}
    kind = next((kind for kind, names in _MODULES["kinds"].items() if not ends.isdisjoint(names)), None)
    return "experts" if kind == "mlp" and "experts" in parts else kind


class ModelConfig(Foreign):
    """What is read of a model's `config.json`; null is what it does not say. Real models stay far below the limits."""

    model_type: str | None = Field(None, pattern=r"^[\w.-]{1,100}$")
    hidden_size: _Size | None = None
    num_hidden_layers: int | None = Field(None, ge=1, le=1000)
    num_attention_heads: _Size | None = None
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    # Some families have a width for each layer.
    intermediate_size: _Size | list[_Size] | None = None
    moe_intermediate_size: _Size | None = None
    vocab_size: _Size | None = None
    max_position_embeddings: _Size | None = None
    num_experts: _Count | None = None
    num_local_experts: _Count | None = None
    n_routed_experts: _Count | None = None
    moe_num_experts: _Count | None = None
    num_experts_per_tok: _Count | None = None
    tie_word_embeddings: bool | None = None
    text_config: dict[str, object] | None = None

    @property
    def experts(self) -> int:
        """The number of experts of a layer, 0 of a dense model."""
        return self.num_experts or self.num_local_experts or self.n_routed_experts or self.moe_num_experts or 0


class Linear(NamedTuple):
    """Linear layers of one name: `number` of them in the model, with all experts."""

    kind: Kind
    d_in: int
    d_out: int
    number: int


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a decoder of the gated families of `modules.yaml`, dense or a mixture of experts."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # width of a dense MLP, or of an expert
    vocabulary: int
    tied: bool = False  # whether embedding and unembedding are one matrix
    experts: int = 0
    active_experts: int = 0

    @cached_property
    def linear(self) -> Mapping[str, Linear]:
        """All linear layers but the routers, by the last part of their name; experts are fused as in transformers 5."""
        d, ff, n = self.hidden, self.intermediate, self.layers
        queries, keys, mlp = self.heads * self.head_dim, self.kv_heads * self.head_dim, n * max(1, self.experts)
        kind: Kind = "experts" if self.experts else "mlp"
        layers = {
            "lm_head": Linear("unembedding", d, self.vocabulary, 1),
            "o_proj": Linear("attention", queries, d, n),
            "down_proj": Linear(kind, ff, d, mlp),
        }
        if self.family == "phi3":
            layers["qkv_proj"] = Linear("attention", d, queries + 2 * keys, n)
        else:
            layers["q_proj"] = Linear("attention", d, queries, n)
            layers |= {name: Linear("attention", d, keys, n) for name in ("k_proj", "v_proj")}
        if self.experts or self.family == "phi3":
            layers["gate_up_proj"] = Linear(kind, d, 2 * ff, mlp)
        else:
            layers |= {name: Linear("mlp", d, ff, n) for name in ("gate_proj", "up_proj")}
        return layers

    @cached_property
    def parameters(self) -> int:
        """The number of parameters of the whole model."""
        linear = sum(layer.number * layer.d_in * layer.d_out for layer in self.linear.values())
        routers = self.layers * self.hidden * self.experts
        embedding = 0 if self.tied else self.vocabulary * self.hidden
        norms = self.hidden * (2 * self.layers + 1)
        if self.family.startswith("qwen3"):
            norms += 2 * self.head_dim * self.layers  # of queries and keys
        return linear + routers + embedding + norms


@dataclass(frozen=True)
class ModelFacts:
    """A base model; null is what is not known."""

    name: str  # as the configuration names it
    family: str  # the `model_type` of transformers; of an estimate the beginning of one, or an empty string
    width: int  # the hidden size
    source: str  # where this is known from, for a reader
    parameters: int | None = None
    vocabulary: int | None = None
    max_length: int | None = None  # the longest sequence in tokens
    tied: bool | None = None  # whether embedding and unembedding are one matrix
    mixture: bool = False  # whether it is a mixture of experts
    experts: int | None = None
    active_experts: int | None = None
    width_error: float = 0.0  # the standard error of the logarithm of the width, of an estimate from the model's size
    sizes: Dimensions | None = None  # the sizes of all matrices

    @property
    def fused_experts(self) -> bool:
        """Whether transformers 5 holds the experts in 3-D parameters, which are no linear modules."""
        # Axolotl has copies of Llama 4 whose experts are modules again.
        return self.mixture and "linearized" not in self.name.lower()

    @property
    def linear(self) -> Mapping[str, Linear]:
        """The linear layers by the last part of their name; empty if the sizes are not known."""
        return {} if self.sizes is None else self.sizes.linear


def read_config(folder: Path) -> ModelConfig:
    """Return the configuration of the model in a folder, or raise UserError."""
    path = folder / "config.json"
    try:
        return typed(ModelConfig, path.read_bytes(), str(path))
    except FileNotFoundError:
        raise UserError(f"model folder {folder} has no config.json; a Hugging Face causal LM is needed there") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}") from error


@cache
def facts(name: str | None, folder: Path | None = None, hub: bool = False) -> ModelFacts | None:
    """Return what is known of a base model by its id or path, or by a `config.json` in a folder; None if nothing is.

    With `hub`, the hub is asked for a model of which nothing else but its name tells.
    """
    places = [] if name is None else [Path(name), *([folder / name] if folder else [])]
    for place in [*places, *([folder] if folder else [])]:
        # It may be the configuration of something else.
        with suppress(UserError):
            return facts_of_config(read_config(place), name or str(place))
    listed = None if name is None else _facts_of_name(name)
    if hub and name is not None and HUB_ID.fullmatch(name) and (listed is None or listed.width_error):
        with suppress(UserError):
            config = typed(ModelConfig, look_up(name, "config.json"), name)
            return facts_of_config(config, name, "its config.json on the hub")
    return listed


def facts_of_config(config: ModelConfig, name: str, source: str = "its config.json") -> ModelFacts:
    """Return the facts in a Hugging Face configuration, or raise UserError if it has no model type or no width."""
    text, family = typed(ModelConfig, config.text_config, name) if config.text_config else config, config.model_type
    if family is None or text.hidden_size is None:
        raise UserError(f"the configuration of {name} has no model_type or no hidden_size")
    # Gemma ties them where its configuration does not say.
    ties = (config.tie_word_embeddings, text.tie_word_embeddings, family.startswith("gemma"))
    tied = next(tie for tie in ties if tie is not None)
    layers, heads, intermediate = text.num_hidden_layers, text.num_attention_heads, text.intermediate_size
    experts, active, sizes = text.num_experts or text.num_local_experts or 0, text.num_experts_per_tok or 0, None
    complete = family in _MODULES["gated"] and (active or not experts)
    if complete and layers and heads and isinstance(intermediate, int) and text.vocab_size:
        sizes = Dimensions(
            family=family,
            hidden=text.hidden_size,
            layers=layers,
            heads=heads,
            kv_heads=text.num_key_value_heads or heads,
            head_dim=text.head_dim or text.hidden_size // heads,
            intermediate=(text.moe_intermediate_size or intermediate) if experts else intermediate,
            vocabulary=text.vocab_size,
            tied=tied,
            experts=experts,
            active_experts=active if experts else 0,
        )
    return ModelFacts(
        name,
        family,
        text.hidden_size,
        source,
        parameters=sizes.parameters if sizes else None,
        vocabulary=text.vocab_size,
        max_length=text.max_position_embeddings,
        tied=tied,
        mixture=text.experts > 0,
        experts=text.experts,
        active_experts=active,
        sizes=sizes,
    )


def _facts_of_name(name: str) -> ModelFacts | None:
    short = [part for part in re.split(r"[/\\]", name) if part not in ("", ".")][-1:]
    if not short:
        return None
    words = re.sub(r"[._]", "-", short[0].lower())
    for pattern, known in public_models():
        if match := pattern.search(words):
            # A size that the name states outside of the match may contradict the model.
            outside = f"{words[: match.start()]}-{words[match.end() :]}"
            ratios = [_size(stated) / (known.parameters or math.inf) for stated in SIZE.finditer(outside)]
            if all(1 / SIZE_FACTOR < ratio < SIZE_FACTOR for ratio in ratios):
                return replace(known, name=name)
    return _estimate(name, short[0].lower())


def _size(match: re.Match[str]) -> float:
    size = float(match["size"]) * (1e9 if match["unit"] == "b" else 1e6)
    return size * int(match["experts"] or 1)


@cache
def public_models() -> tuple[tuple[re.Pattern[str], ModelFacts], ...]:
    """Return the models of `public_models.csv`, each by the pattern that names of it contain, and as one such name."""
    models = []
    with PUBLIC.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            family, tied = row["family"], row["tied"] == "yes"
            numbers = {key: int(value) for key, value in row.items() if value.isdecimal() and key != "billions"}
            width, max_length = numbers.pop("width"), numbers.pop("max_length", None)
            sizes = Dimensions(family, width, tied=tied, **numbers) if "heads" in numbers else None
            counts = {key: numbers[key] for key in ("vocabulary", "experts", "active_experts")}
            # Without what a name may lack, and with the first of several words that it may have.
            name = re.sub(r"\(\?![^)]*\)|\([^)]*\)\?|[?$]", "", row["pattern"])
            model = ModelFacts(
                re.sub(r"\(([^|]*)[^)]*\)", r"\1", name).partition("|")[0],
                family,
                width,
                "public facts of this model",
                parameters=round(float(row["billions"]) * 1e9),
                max_length=max_length,
                tied=tied,
                mixture=numbers["experts"] > 0,
                sizes=sizes,
                **counts,
            )
            models.append((re.compile(rf"(?<![a-z0-9])(?:{row['pattern']})(?![a-z0-9])"), model))
    return tuple(models)


def _estimate(name: str, words: str) -> ModelFacts | None:
    """Return the facts that the size in a name allows: the number of parameters, and an estimate of the width."""
    stated = SIZE.search(words)
    if stated is None:
        return None
    active, total = _ACTIVE.search(words), _size(stated)
    # The width of a mixture goes with the parameters that a token passes, of which at least a part is known.
    passed = float(active["size"]) * 1e9 if active else total / max(1, int(stated["experts"] or 1))
    if not passed > 0:
        return None
    # The width of known dense models by their number of parameters, both as logarithms.
    dense = [model for _, model in public_models() if not model.mixture and model.parameters]
    x = [math.log(model.parameters or 1) for model in dense]
    y = [math.log(model.width) for model in dense]
    slope, intercept = statistics.linear_regression(x, y)
    error = statistics.stdev(b - intercept - slope * a for a, b in zip(x, y, strict=True))
    return ModelFacts(
        name,
        next((lineage for lineage in EXPONENTS if lineage in words), ""),
        round(math.exp(intercept + slope * math.log(passed))),
        "the size in its name",
        parameters=round(total),
        mixture=bool(active or stated["experts"]),
        width_error=error,
    )


@cache
def shipped_bases() -> Mapping[str, Mapping[str, Any]]:
    """Return the suite's tiny bases by name: other `names`, the `config`, and what runs record of the `weights`."""
    bases: dict[str, dict[str, Any]] = json.loads((FACTS / "bases.json").read_text())
    return bases


def shipped_base(name: str) -> Mapping[str, Any] | None:
    """Return the shipped base of a name."""
    return next((base for key, base in shipped_bases().items() if name in (key, *base["names"])), None)


def find_model(
    name: str | None,
    hub: bool = False,
    width: int | None = None,
    parameters: float | None = None,
    family: str | None = None,
) -> ModelFacts:
    """Return what is known of the model of a name, or what is said of it; raises UserError if its width is not known.

    With `hub`, the hub is asked for a model that is not known here. With all of width, number of parameters and family
    (its `model_type`) these count, and the name may be None.
    """
    if width and parameters and family:
        return ModelFacts(name or "given by its sizes", family, width, "your choice", parameters=round(parameters))
    if name is None or width or parameters or family:
        raise UserError("give the name or the folder of a model, or all of --width, --params and --family")
    if base := shipped_base(name):
        return model_of_config(base["config"], name)
    folder = Path(name)
    if folder.is_dir():
        model, counted = facts_of_config(read_config(folder), name), 0
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, "numpy") as tensors:
                    shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} is not a safetensors file") from error
            counted += sum(map(math.prod, shapes))
        return replace(model, parameters=counted or model.parameters)
    known = facts(name)
    if known is not None and not known.width_error:
        return known
    if hub:
        return facts_of_config(typed(ModelConfig, look_up(name, "config.json"), f"config.json of model {name!r}"), name)
    names = [model.name for _, model in public_models()]
    close = f" (close: {', '.join(near)})" if (near := get_close_matches(Path(name).name.lower(), names)) else ""
    raise UserError(
        f"model {name!r} is not known here{close}: give its folder, --hub to look it up there, or, to recommend and "
        "convert, --width, --params and --family"
    )


def model_of_config(config: Mapping[str, Any], name: str = "") -> ModelFacts:
    """Return what is known of a model by the content of its `config.json` alone, or raise UserError."""
    shown = name or str(config.get("_name_or_path") or "of this configuration")
    return facts_of_config(typed(ModelConfig, dict(config), f"config.json of model {shown!r}"), shown)


def look_up(name: str, file: str) -> str:
    """Return the text of a small file of a model, from the hub or its cache; raises UserError if that does not work."""
    try:
        from huggingface_hub import constants, hf_hub_download
    except ImportError as error:
        raise UserError(f"model {name} needs the hub: pip install 'lora-advice[hub]'") from error
    try:
        return Path(hf_hub_download(name, file, etag_timeout=_HUB_SECONDS)).read_text(encoding="utf-8")
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"model {name} can't be fetched from {constants.ENDPOINT}: {reason}") from error


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
