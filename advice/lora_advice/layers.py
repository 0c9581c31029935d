"""Which layers of a language model are attention, MLP, experts, routers and embeddings, by the names of their modules.

Frameworks name layers differently, and a name that is attention in one family and MLP in another is not listed.
"""

from __future__ import annotations

from typing import Literal

Kind = Literal["attention", "mlp", "experts", "router", "unembedding", "embedding"]

NAMES: dict[Kind, tuple[str, ...]] = {
    "attention": (
        *("q_proj", "k_proj", "v_proj", "o_proj", "output_proj", "qkv_proj", "query_key_value", "Wqkv", "c_attn"),
        *("linear_qkv", "linear_proj", "wq", "wk", "wv", "wo", "out_proj", "self_attention.dense", "self_attn.dense"),
        # DeepSeek's latent attention.
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
        # The linear attention of Qwen3-Next and of Qwen3.5.
        *("in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "linear_attn.out_proj"),
    ),
    "mlp": (
        *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "w1", "w2", "w3", "c_fc"),
        *("dense_h_to_4h", "dense_4h_to_h", "linear_fc1", "linear_fc2", "ffn_up", "ffn_down"),
    ),
    "router": ("gate", "router", "shared_expert_gate"),
    "unembedding": ("lm_head", "embed_out", "output_layer"),
    "embedding": ("embed_tokens", "wte", "tok_embeddings", "word_embeddings", "embed_in"),
}
"""The last one or two parts of the names of modules, by kind; those of the MLP are experts below `experts`."""

FUSED = {"qkv_proj": frozenset({"q_proj", "k_proj", "v_proj"}), "gate_up_proj": frozenset({"gate_proj", "up_proj"})}
"""Layers that are one in some families, by their parts."""


def module_kind(name: str) -> Kind | None:
    """Return the kind of a module by its name, with or without the path before it; None if the name does not say."""
    parts = name.removesuffix(".weight").split(".")
    ends = {parts[-1], ".".join(parts[-2:])}
    kind = next((kind for kind, names in NAMES.items() if not ends.isdisjoint(names)), None)
    return "experts" if kind == "mlp" and "experts" in parts else kind
