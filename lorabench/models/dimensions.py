"""The sizes of a model's matrices, from its configuration alone: what the cost model counts with. No torch.

`architectures/NAME.json` holds the public configurations of the presets' models; a local folder and the tiny bases
bring their own. tests/models/test_big_models.py compares the counts with models on the meta device.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from lorabench.config import GgufModel, HubModel, ModelSpec, PathModel, TinyModel
from lorabench.models.placement import Placement
from lorabench.models.tiny import shipped

ARCHITECTURES = Path(__file__).parent / "architectures"

# A configuration is believed if it gives the preset's number of parameters, but for so much of it.
_AGREE = 0.02
# Where no configuration is known: the proportions of a Llama.
_GUESSED_VOCABULARY, _GUESSED_HEAD, _GUESSED_MLP = 128_000, 128, 3.5


@dataclass(frozen=True)
class Matrix:
    """Linear layers of one size: `count` in the model, `active` of them for each token."""

    part: Literal["attn", "mlp", "experts", "router", "unembedding"]
    d_in: int
    d_out: int
    count: int
    active: int

    @property
    def parameters(self) -> int:
        """Of all of them."""
        return self.count * self.d_in * self.d_out


def merges(rank: int, d_in: int, d_out: int) -> bool:
    """Whether LoRA's products by A and B are more than the gradient of the layer's weights.

    By tokens they are 3 r (d_in + d_out) in both passes, that is d_in d_out. Where they are more, and in fp32, LoRA is
    computed by merged weights (`lorabench.models.lora_lanes`).
    """
    return 3 * rank * (d_in + d_out) > d_in * d_out


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a decoder of the Llama and Qwen3 families, dense or a mixture of experts."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width of a dense MLP, or of one expert."""
    vocabulary: int
    tied: bool = False
    """Whether embedding and unembedding are one matrix."""
    query_key_norms: bool = False
    experts: int = 0
    active_experts: int = 0

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """All linear layers; experts as they are kept, gate and up as one matrix."""
        d, ff, n = self.hidden, self.intermediate, self.layers
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(d, queries, n), (d, keys, 2 * n), (queries, d, n)]
        found = [Matrix("attn", d_in, d_out, count, count) for d_in, d_out, count in attention]
        if self.experts:
            sizes = [(d, 2 * ff), (ff, d)]
            found += [Matrix("experts", *size, n * self.experts, n * self.active_experts) for size in sizes]
            found.append(Matrix("router", d, self.experts, n, n))
        else:
            found += [Matrix("mlp", d, ff, 2 * n, 2 * n), Matrix("mlp", ff, d, n, n)]
        return (*found, Matrix("unembedding", d, self.vocabulary, 1, 1))

    @cached_property
    def parameters(self) -> int:
        """Of the whole model."""
        embedding = 0 if self.tied else self.vocabulary * self.hidden
        norms = self.hidden * (2 * self.layers + 1) + (2 * self.head_dim * self.layers if self.query_key_norms else 0)
        return sum(matrix.parameters for matrix in self.matrices) + embedding + norms

    @cached_property
    def active_linear(self) -> int:
        """Parameters of the linear layers that a token goes through; a router does not count, as in the paper."""
        return sum(m.active * m.d_in * m.d_out for m in self.matrices if m.part != "router")

    @property
    def layer_parameters(self) -> int:
        """Of one decoder layer's linear layers."""
        return sum(m.parameters for m in self.matrices if m.part != "unembedding") // self.layers

    def lora(self, placement: Placement, rank: int, include_unembedding: bool) -> tuple[int, int]:
        """Parameters of LoRA, and those of them that a token goes through."""
        parts = _parts(placement, include_unembedding)
        total = active = 0
        for m in self.matrices:
            if m.part in parts:
                # As `lorabench.models.lora.expert_rank`: the total rank over the active experts.
                own = max(1, rank // self.active_experts) if m.part == "experts" else rank
                total += m.count * own * (m.d_in + m.d_out)
                active += m.active * own * (m.d_in + m.d_out)
        return total, active

    def carrying(self, placement: Placement, include_unembedding: bool) -> int:
        """Parameters of the linear layers that carry LoRA, experts left out."""
        parts = _parts(placement, include_unembedding) - {"experts"}
        return sum(m.parameters for m in self.matrices if m.part in parts)


def _parts(placement: Placement, include_unembedding: bool) -> set[str]:
    """What carries LoRA."""
    parts = {"attn": {"attn"}, "mlp": {"mlp", "experts"}, "all": {"attn", "mlp", "experts"}}[placement]
    return parts | {"unembedding"} if include_unembedding else parts


def of_config(config: dict[str, Any]) -> Dimensions:
    """The sizes that a Hugging Face configuration gives.

    Raises:
        KeyError: it is not of the families that this project knows.
    """
    experts = config.get("num_experts") or config.get("num_local_experts") or 0
    heads = config["num_attention_heads"]
    return Dimensions(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=config.get("moe_intermediate_size", config["intermediate_size"])
        if experts
        else config["intermediate_size"],
        vocabulary=config["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
        query_key_norms=config["model_type"].startswith("qwen3"),
        experts=experts,
        active_experts=config["num_experts_per_tok"] if experts else 0,
    )


def guessed(parameters: int, hidden: int) -> Dimensions:
    """Sizes of an unknown model: those of a Llama of that width with as many layers as make up the parameters."""
    heads = max(1, hidden // _GUESSED_HEAD)
    one = Dimensions(
        hidden=hidden,
        layers=1,
        heads=heads,
        kv_heads=max(1, heads // 4),
        head_dim=hidden // heads,
        intermediate=round(_GUESSED_MLP * hidden),
        # Of a small model the vocabulary is small too.
        vocabulary=min(_GUESSED_VOCABULARY, max(1, parameters // (4 * hidden))),
        tied=True,
    )
    layers = round((parameters - one.vocabulary * hidden) / one.layer_parameters)
    return replace(one, layers=max(1, layers))


@cache
def dimensions(model: ModelSpec) -> Dimensions:
    """The sizes of a preset's model."""
    match model:
        case TinyModel():
            return of_config(json.loads((shipped(model.name) / "config.json").read_text()))
        case PathModel():
            name, folder = "", Path(model.path)
            configs = [folder / "config.json"]
        case HubModel() | GgufModel():
            name = (model.id if isinstance(model, HubModel) else model.path).rpartition("/")[2].lower()
            configs = [path for path in sorted(ARCHITECTURES.glob("*.json")) if name.startswith(path.stem)]
    for path in configs:
        try:
            known = of_config(json.loads(path.read_text()))
        except KeyError:
            continue
        if abs(known.parameters / model.parameters - 1) <= _AGREE:
            return known
    return guessed(model.parameters, model.hidden_size)
