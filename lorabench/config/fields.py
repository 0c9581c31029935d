"""Types of fields that the sections of a preset share."""

from __future__ import annotations

from collections.abc import Callable
from os.path import isfile, join
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

# A model's and a dataset's name are parts of one file's name.
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,49}$")]

# The limits are far beyond what is of use. They keep estimates from overflowing, and loops from running for hours.
Positive = Annotated[int, Field(ge=1, le=10**14)]
NotNegative = Annotated[int, Field(ge=0, le=10**14)]
Few = Annotated[int, Field(ge=1, le=1_000)]
Several = Annotated[int, Field(ge=2, le=1_000)]
PositiveFloat = Annotated[float, Field(ge=1e-20, le=1e20)]
Rank = Annotated[int, Field(ge=1, le=2**16)]
BatchSize = Annotated[int, Field(ge=1, le=2**20)]
LearningRate = Annotated[float, Field(ge=1e-12, le=1e3)]

SamplerName = Literal["own", "vllm"]

Placement = Literal["attn", "mlp", "all"]
"""The paper's placements of LoRA."""

Method = Literal["fullft", "lora", "dora", "pissa", "olora", "qlora"]
"""What is trained: all weights, or an adapter of PEFT's. rsLoRA and LoRA+ are `lora` with another alpha or LR of B."""

FROM_WEIGHTS: tuple[Method, ...] = ("pissa", "olora")
"""Methods whose adapter starts with a part of the base's weights, which is taken out of them."""

CHANGES_BASE: tuple[Method, ...] = (*FROM_WEIGHTS, "qlora")
"""Methods that change the base's weights before training."""

Variant = Literal["lora", "rslora", "lora_plus", "dora", "pissa", "olora", "qlora"]
"""The variants of LoRA that a block of an experiment can compare (studies/variants/README.md)."""

VARIANT_NAMES: dict[Variant, str] = {
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "lora_plus": "LoRA+",
    "dora": "DoRA",
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "qlora": "QLoRA",
}

METHOD_NAMES: dict[str, str] = {"fullft": "FullFT"} | {
    name: VARIANT_NAMES[name] for name in ("lora", "dora", "pissa", "olora", "qlora")
}

LORA_PLUS_RATIO = 16.0
"""LR of B over LR of A in LoRA+, by its authors' recommendation."""

_ATTENTION = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"),
    # DeepSeek's latent attention.
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    # The linear attention of Qwen3-Next and of Qwen3.5.
    *("in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "linear_attn.out_proj"),
)
_MLP = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")

SUFFIXES: dict[Placement, tuple[str, ...]] = {"attn": _ATTENTION, "mlp": _MLP, "all": _ATTENTION + _MLP}
"""The ends of the names of layers that each placement has in the known families of decoders, experts included."""

ROUTERS = ("gate", "router", "shared_expert_gate")
"""The last parts of the names of layers that choose or weigh experts, which carry no LoRA."""


def placement_of(name: str) -> Placement | None:
    """Return whether a layer is of attention or of the MLP, judging by the path in its full name; None for neither."""
    path = name.lower().rpartition(".")[0]
    if "attn" in path or "attention" in path:
        return "attn"
    return "mlp" if any(word in path for word in ("mlp", "feed_forward", "ffn")) else None


FileFormat = Literal[
    "messages",
    "conversations",
    "prompt/completion",
    "prompt/response",
    "instruction/output",
    "question/answer",
    "text",
]
"""The columns of a dataset file, whose rows are chats, pairs of a prompt and its answer, or plain texts."""


class Strict(BaseModel):
    """A part of a preset: it refuses unknown keys, silent conversions, infinity and NaN, and it is immutable."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def _checked(holds: Callable[[str], bool], message: str) -> AfterValidator:
    """Return a validator of a text, which stands for `{!r}` in the message that says that it is wrong."""

    def validate(value: str) -> str:
        if not holds(value):
            raise ValueError(message.format(value))
        return value

    return AfterValidator(validate)


ChatTemplate = Annotated[
    str,
    _checked(lambda v: v == "plain" or isfile(v), "{!r} is no file; allowed: plain, or the path of a Jinja file"),
]
DataFile = Annotated[str, _checked(isfile, "data file {!r} does not exist")]
ModelFolder = Annotated[
    str,
    _checked(
        lambda v: isfile(join(v, "config.json")),
        "model folder {!r} has no config.json; a Hugging Face causal LM is needed there",
    ),
]
