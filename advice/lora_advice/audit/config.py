"""One training run as a user's file states it, whatever the framework: readers make it, checks read it.

What is found of runs is said by a text of `texts.yaml`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from lora_advice.finding import Finding
from lora_advice.variants import Variant

Task = Literal["sft", "rl", "preference", "pretraining"]
Method = Literal["lora", "fullft"]
# Optimizers whose LR is that of Adam, by what their names hold, and those that only sound like it.
_ADAM, _NO_ADAM = "adam", ("mini", "schedule", "galore", "apollo", "muon", "adamax")
METHODS: dict[Method, str] = {"lora": "LoRA", "fullft": "full fine-tuning"}


@dataclass(frozen=True)
class TrainingConfig:
    """A training run; null is what the file does not say. Nothing is guessed."""

    path: str  # the file as the user named it, or the path below the folder that the user named
    format: str  # the format it was read as, such as `axolotl`
    name: str = ""  # which run of the file this is, where it has several, such as `line 12`
    task: Task | None = None
    method: Method | None = None
    model: str | None = None  # the id on the hub or the path of the base model
    bits: int | None = None  # bits of a quantized base, 4 or 8 (QLoRA)
    rounded: bool = False  # whether full fine-tuning holds its weights in bf16 alone, so that each step is rounded
    lr: float | None = None
    schedule: str | None = None  # the framework's own word, such as `cosine`
    optimizer: str | None = None  # the framework's own word, such as `adamw_torch`
    micro_batch: int | None = None  # examples (in RL, responses) per device at once
    accumulation: int | None = None
    devices: int | None = None
    group_size: int | None = None  # responses to each prompt, in RL
    global_batch: int | None = None  # examples (in RL, prompts) per step, where it is stated in place of micro-batches
    steps: float | None = None
    epochs: float | None = None
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    rslora: bool = False
    dora: bool = False
    lr_ratio: float | None = None  # the learning rate of B over that of A in LoRA+, where `lr` is that of A
    variant: str | None = None  # an other variant or initialization, by its name in PEFT, such as `pissa`
    unsloth: bool = False  # whether unsloth loads the model, which makes the fused layers of Phi-3 separate ones
    targets: tuple[str, ...] | None = None  # modules with LoRA; `("all-linear",)` for all but the unembedding
    target_parameters: tuple[str, ...] = ()  # names of parameters with LoRA that are no modules, such as fused experts
    saved_modules: tuple[str, ...] = ()  # modules that are trained whole beside LoRA
    lines: Mapping[str, int] = field(default_factory=dict)  # lines (from 1) where fields are said, by field
    findings: tuple[Finding, ...] = ()  # what the reader alone can see, such as a learning rate that YAML reads as text

    def line(self, *names: str) -> int | None:
        """Return the line of the first of some fields that the file says."""
        return next((self.lines[name] for name in names if name in self.lines), None)

    @property
    def batch_size(self) -> int | None:
        """Examples (in RL, responses) per step; a number of devices that is not said counts as 1."""
        if self.global_batch is not None:
            return self.global_batch * (self.group_size or 1)
        if self.micro_batch is not None:
            return self.micro_batch * (self.accumulation or 1) * (self.devices or 1)
        return None

    @property
    def per_device(self) -> bool:
        """Whether the batch size is that of a device, of which the file does not say how many there are."""
        return self.devices is None and self.global_batch is None and self.micro_batch is not None

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The variants of LoRA that the run combines, of those whose best learning rate is known here."""
        if self.method != "lora":
            return ()
        # `pissa_niter_4` is PiSSA with an approximate decomposition.
        start = (self.variant or "").lower().partition("_niter_")[0]
        used: dict[Variant, bool] = {
            "rslora": self.rslora and self.rank != 1,  # at rank 1 it is LoRA
            "lora_plus": (self.lr_ratio or 0.0) > 0 and self.lr_ratio != 1,
            "dora": self.dora,
            "pissa": start == "pissa",
            "olora": start == "olora",
            "qlora": self.bits == 4,
        }
        return tuple(variant for variant, is_used in used.items() if is_used)

    @property
    def alpha_factor(self) -> float:
        """The factor by which alpha counts more than in LoRA: the root of the rank in rsLoRA, `lr_ratio` in LoRA+."""
        root = math.sqrt(max(1, self.rank or 1)) if "rslora" in self.variants else 1.0
        return root * (self.lr_ratio or 1.0) if "lora_plus" in self.variants else root

    @property
    def adam(self) -> bool:
        """Whether the optimizer is Adam, or one whose learning rate is Adam's; one that is not said is."""
        optimizer = (self.optimizer or _ADAM).lower()
        return _ADAM in optimizer and not any(word in optimizer for word in _NO_ADAM)

    @property
    def where(self) -> str:
        """The file, and which run of it."""
        return f"{self.path} ({self.name})" if self.name else self.path


_TEXTS: dict[str, dict[str, str]] = yaml.safe_load(Path(__file__).with_name("texts.yaml").read_text("utf-8"))


def say(name: str, line: int | None = None, /, **values: Any) -> Finding:
    """Return the finding of a text with values filled in; `level` among them takes the place of its own."""
    text = _TEXTS[name]
    filled = {field: text[field].format(**values) for field in ("message", "source", "sure")}
    return Finding(text["code"], values.get("level", text["level"]), line=line, **filled)
