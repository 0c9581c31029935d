"""What is known of the base model that a configuration names, without its weights, the hub or torch.

The sources, in this order: `config.json` in the model's folder or beside the file; the catalogue in
`lorabench/models/architectures`; `public_models.csv`, with sizes that the model cards and torchtune's model builders
state; if the user allows it, the model's `config.json` on the hub; and the size in the model's name, from which the
width is estimated.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from lorabench.audit.config import TrainingConfig
from lorabench.errors import UserError
from lorabench.models.specs import Dimensions, ModelConfig, architectures, dimensions_of_config, read_config
from lorabench.utils.foreign import typed
from lorabench.utils.hub import WantedRepository, look_up

Kind = Literal["attention", "mlp", "experts", "router", "unembedding", "embedding"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

PUBLIC = Path(__file__).with_name("public_models.csv")

KINDS: dict[Kind, tuple[str, ...]] = {
    "attention": (
        *("q_proj", "k_proj", "v_proj", "o_proj", "output_proj", "qkv_proj", "query_key_value", "Wqkv", "c_attn"),
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "in_proj_qkv", "linear_qkv", "linear_proj"),
        *("wq", "wk", "wv", "wo", "out_proj", "self_attention.dense", "self_attn.dense"),
    ),
    "mlp": (
        *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "w1", "w2", "w3", "c_fc"),
        *("dense_h_to_4h", "dense_4h_to_h", "linear_fc1", "linear_fc2", "ffn_up", "ffn_down"),
    ),
    "unembedding": ("lm_head", "embed_out", "output_layer"),
    "embedding": ("embed_tokens", "wte", "tok_embeddings", "word_embeddings", "embed_in"),
}
"""Last parts of the names of modules, by kind, without names that are attention in one family and MLP in another."""

GATED = frozenset(
    [
        *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "olmo2", "olmoe", "gemma", "gemma2"),
        *("gemma3_text", "phi3", "smollm3", "stablelm", "gpt_oss"),
    ]
)
"""Families whose matrices `Dimensions` describes: a gated MLP, no shared experts, and no layers of other kinds."""

UNFUSED = frozenset({"nllb_moe", "switch_transformers"})
"""The families whose experts are modules of their own in transformers 5; all others hold them in 3-D parameters."""

_SIZE = re.compile(r"(?<![a-z0-9.])(?:(?P<experts>\d{1,4})x)?(?P<size>\d{1,6}(?:\.\d{1,6})?)(?P<unit>[bm])(?![a-z0-9])")
_ACTIVE = re.compile(r"(?<![a-z0-9.])a(?P<size>\d{1,6}(?:\.\d{1,6})?)b(?![a-z0-9])")
# How far a size in a name may be from that of the model that the name matches, as in "DeepSeek-V3-11M".
_SIZE_FACTOR = 1.5
# The families that the law of learning rates tells apart.
_LINEAGES = ("llama", "qwen")


class Linear(NamedTuple):
    """Linear layers of one name: `number` of them in the model, with all experts."""

    kind: Kind
    d_in: int
    d_out: int
    number: int


@dataclass(frozen=True)
class ModelFacts:
    """A base model; null is what is not known."""

    name: str
    """As the configuration names it."""
    family: str
    """The `model_type` of transformers; of an estimate the beginning of one, or an empty string."""
    width: int
    """The hidden size."""
    source: str
    """Where this is known from, for a reader."""
    parameters: int | None = None
    layers: int | None = None
    vocabulary: int | None = None
    tied: bool | None = None
    """Whether embedding and unembedding are one matrix."""
    mixture: bool = False
    """Whether it is a mixture of experts."""
    experts: int | None = None
    active_experts: int | None = None
    width_error: float = 0.0
    """The standard error of the logarithm of the width, of an estimate from the model's size."""
    sizes: Dimensions | None = None
    """The sizes of all matrices."""

    @property
    def fused_experts(self) -> bool:
        """Whether transformers 5 holds the experts in 3-D parameters, which are no linear modules."""
        # Axolotl has copies of Llama 4 whose experts are modules again.
        return self.mixture and self.family not in UNFUSED and "linearized" not in self.name.lower()

    @cached_property
    def linear(self) -> Mapping[str, Linear]:
        """The linear layers by the last part of their name; empty if the sizes are not known."""
        return {} if self.sizes is None else _linear(self.family, self.sizes)


def module_kind(name: str) -> Kind | None:
    """Return the kind of a module by its name, with or without the path before it; None if the name does not say."""
    parts = name.removesuffix(".weight").split(".")
    last, last_two = parts[-1], ".".join(parts[-2:])
    if last in ("gate", "router"):
        return "router"
    kind = next((kind for kind, names in KINDS.items() if last in names or last_two in names), None)
    return "experts" if kind == "mlp" and any(part == "experts" for part in parts) else kind


def facts(config: TrainingConfig, folder: Path | None = None, hub: bool = False) -> ModelFacts | None:
    """Return what is known of a configuration's base model; None if nothing is.

    Args:
        config: the configuration.
        folder: the folder of the file, in which a `config.json` is looked for and from which a path may start.
        hub: whether the hub is asked for a model of which nothing else but its name tells.
    """
    return _facts(config.model, folder, hub)


@cache
def _facts(name: str | None, folder: Path | None, hub: bool) -> ModelFacts | None:
    places = [] if name is None else [Path(name), *([folder / name] if folder else [])]
    for place in [*places, *([folder] if folder else [])]:
        # It may be the configuration of something else.
        with suppress(UserError):
            return _facts_of_config(read_config(place), name or str(place))
    listed = None if name is None else _facts_of_name(name)
    if hub and name is not None and _HUB_ID.fullmatch(name) and (listed is None or listed.width_error):
        with suppress(UserError):
            text = look_up(WantedRepository("model", name, "main"), "config.json")
            return _facts_of_config(typed(ModelConfig, text, name), name, "its config.json on the hub")
    return listed


def _facts_of_config(config: ModelConfig, name: str, source: str = "its config.json") -> ModelFacts:
    """Return the facts in a Hugging Face configuration.

    Raises:
        UserError: it has no model type or no width, or its part about text is not valid.
    """
    text, family = typed(ModelConfig, config.text_config, name) if config.text_config else config, config.model_type
    if family is None or text.hidden_size is None:
        raise UserError(f"the configuration of {name} has no model_type or no hidden_size")
    sizes, gemma = None, family.startswith("gemma")
    if family in GATED:
        with suppress(KeyError):
            sizes = dimensions_of_config(text)
            sizes = replace(sizes, tied=gemma if text.tie_word_embeddings is None else text.tie_word_embeddings)
    said = (config.tie_word_embeddings, text.tie_word_embeddings, gemma)
    return ModelFacts(
        name,
        family,
        text.hidden_size,
        source,
        parameters=sizes.parameters if sizes else None,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        tied=next(tied for tied in said if tied is not None),
        mixture=text.experts > 0,
        experts=text.experts,
        active_experts=text.num_experts_per_tok or 0,
        sizes=sizes,
    )


def _facts_of_name(name: str) -> ModelFacts | None:
    short = [part for part in re.split(r"[/\\]", name) if part not in ("", ".")][-1:]
    if not short:
        return None
    words = short[0].lower()
    for pattern, known in _known_models():
        match = pattern.search(_normal(words))
        if match and _same_size(_normal(words), match, known):
            return replace(known, name=name)
    return _estimate(name, words)


def _normal(words: str) -> str:
    return re.sub(r"[._]", "-", words)


def _same_size(words: str, match: re.Match[str], known: ModelFacts) -> bool:
    """Return whether no size that a name states outside of the match contradicts the model."""
    outside = f"{words[: match.start()]}-{words[match.end() :]}"
    sizes = [_size(found) / (known.parameters or math.inf) for found in _SIZE.finditer(outside)]
    return all(1 / _SIZE_FACTOR < ratio < _SIZE_FACTOR for ratio in sizes)


def _size(match: re.Match[str]) -> float:
    size = float(match["size"]) * (1e9 if match["unit"] == "b" else 1e6)
    return size * int(match["experts"] or 1)


@cache
def _known_models() -> tuple[tuple[re.Pattern[str], ModelFacts], ...]:
    """Return the models of the catalogue and of the table, by a pattern that their names contain."""
    known = []
    for name, config in architectures().items():
        pattern = re.sub(r"(?<=[a-z])-(?=\d)", "-?", _normal(name))
        known.append((pattern, _facts_of_config(config, name, "lorabench's catalogue")))
    known += list(public_models())
    return tuple((re.compile(rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])"), model) for pattern, model in known)


def public_models() -> Iterator[tuple[str, ModelFacts]]:
    """Yield the models of `public_models.csv` with the pattern of their names."""
    with PUBLIC.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            numbers = {key: int(row[key]) for key in ("width", "layers", "vocabulary", "experts", "active_experts")}
            tied, family = row["tied"] == "yes", row["family"]
            sizes = None
            if row["heads"]:
                sizes = Dimensions(
                    hidden=numbers["width"],
                    layers=numbers["layers"],
                    heads=int(row["heads"]),
                    kv_heads=int(row["kv_heads"]),
                    head_dim=int(row["head_dim"]),
                    intermediate=int(row["intermediate"]),
                    vocabulary=numbers["vocabulary"],
                    tied=tied,
                    query_key_norms=family.startswith("qwen3"),
                    experts=numbers["experts"],
                    active_experts=numbers["active_experts"],
                )
            parameters = round(float(row["billions"]) * 1e9)
            mixture = numbers["experts"] > 0
            about = {"source": "public facts of this model", "parameters": parameters, "sizes": sizes}
            yield row["pattern"], ModelFacts("", family, tied=tied, mixture=mixture, **numbers, **about)  # type: ignore[arg-type]


def _estimate(name: str, words: str) -> ModelFacts | None:
    """Return the facts that the size in a name allows: the number of parameters, and an estimate of the width."""
    stated = _SIZE.search(words)
    if stated is None:
        return None
    active, total = _ACTIVE.search(words), _size(stated)
    # The width of a mixture goes with the parameters that a token passes, of which at least a part is known.
    passed = float(active["size"]) * 1e9 if active else total / max(1, int(stated["experts"] or 1))
    if not passed > 0:
        return None
    slope, intercept, error = _width_by_size()
    return ModelFacts(
        name,
        next((lineage for lineage in _LINEAGES if lineage in words), ""),
        round(math.exp(intercept + slope * math.log(passed))),
        "the size in its name",
        parameters=round(total),
        mixture=bool(active or stated["experts"]),
        width_error=error,
    )


@cache
def _width_by_size() -> tuple[float, float, float]:
    """Fit the width of known dense models to their number of parameters, both as logarithms.

    Returns:
        Slope, intercept and the standard deviation of the residuals.
    """
    dense = [model for _, model in _known_models() if not model.mixture and model.parameters]
    x = [math.log(model.parameters or 1) for model in dense]
    y = [math.log(model.width) for model in dense]
    slope, intercept = statistics.linear_regression(x, y)
    residuals = [b - intercept - slope * a for a, b in zip(x, y, strict=True)]
    return slope, intercept, statistics.stdev(residuals)


def _linear(family: str, sizes: Dimensions) -> dict[str, Linear]:
    d, ff, n = sizes.hidden, sizes.intermediate, sizes.layers
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    layers: dict[str, Linear] = {"lm_head": Linear("unembedding", d, sizes.vocabulary, 1)}
    layers["o_proj"] = Linear("attention", queries, d, n)
    if family == "phi3":
        layers["qkv_proj"] = Linear("attention", d, queries + 2 * keys, n)
        layers["gate_up_proj"] = Linear("mlp", d, 2 * ff, n)
        layers["down_proj"] = Linear("mlp", ff, d, n)
        return layers
    layers["q_proj"] = Linear("attention", d, queries, n)
    layers |= {name: Linear("attention", d, keys, n) for name in ("k_proj", "v_proj")}
    if sizes.experts:
        layers["gate_up_proj"] = Linear("experts", d, 2 * ff, n * sizes.experts)
        layers["down_proj"] = Linear("experts", ff, d, n * sizes.experts)
        return layers
    layers |= {name: Linear("mlp", d, ff, n) for name in ("gate_proj", "up_proj")}
    layers["down_proj"] = Linear("mlp", ff, d, n)
    return layers
