"""What the checks of one machine share, and models with random weights and training steps to compute on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lorabench.config.preset import Preset
from lorabench.data.tokens import TokenizedSplit
from lorabench.doctor.subject import Subject
from lorabench.models.attention import attend_in_blocks
from lorabench.models.base import config_of
from lorabench.models.dimensions import Dimensions
from lorabench.models.lora import add_lora
from lorabench.models.lora_products import use_fast_products
from lorabench.models.passes import recompute_activations, trained_parameters
from lorabench.planning.plan import Plan
from lorabench.runs import Condition, Run
from lorabench.training.run import Machine, clip_gradient, make_optimizer
from lorabench.training.sft import batch_gradient

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Bench:
    """The plan of a preset and the machine on which its models are computed."""

    plan: Plan
    preset: Preset
    """The plan's preset as this device computes it."""
    machine: Machine
    folder: Path
    """A folder for files of the checks, on the file system of the results."""
    processes: int = 1

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self.machine.device

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def autocast(self) -> torch.dtype | None:
        """The autocast type of the preset's precision."""
        return self.machine.autocast(self.preset.protocol)


def random_model(sizes: Dimensions, device: torch.device, plain: bool = False) -> PreTrainedModel:
    """Return a model of these sizes with random weights, in fp32 and in training mode.

    Args:
        plain: compute attention and experts by transformers' eager functions, which say what is right, in place of
            those that runs use.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    if plain:
        options = {"attn_implementation": "eager"} | ({"experts_implementation": "eager"} if sizes.experts else {})
    torch.manual_seed(0)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config_of(sizes, 1 << 17), dtype=torch.float32, **options
        )
    if not plain:
        attend_in_blocks(model)
    return model.train()


def with_method(model: PreTrainedModel, condition: Condition, preset: Preset) -> Any:
    """Return the model with the condition's LoRA, whose B is not zero so that A has a gradient; FullFT changes nothing.

    Two models of the same sizes get the same LoRA.
    """
    if condition.rank is None:
        return model
    assert condition.placement
    assert condition.alpha
    head = preset.protocol.include_unembedding
    adapted: Any = add_lora(model, condition.rank, condition.placement, condition.alpha, head, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return adapted


def prepared(model: Any, condition: Condition, keep_cast: bool = True) -> Any:
    """Return the model, which computes LoRA as runs do."""
    if condition.rank is not None:
        use_fast_products(model, keep_cast)
    return model


def random_split(rows: int, length: int, vocabulary: int) -> TokenizedSplit:
    """Return sequences of `length` tokens and a target after each, random and all scored."""
    ids = np.random.default_rng(0).integers(vocabulary, size=rows * (length + 1))
    return TokenizedSplit(ids, np.ones(len(ids), np.bool_), np.arange(rows + 1) * (length + 1))


class Step:
    """A training step of one run on a subject, as a sweep computes it.

    At LR 0 it does all its work and does not change the weights.
    """

    def __init__(self, bench: Bench, subject: Subject) -> None:
        condition, preset, again = subject.condition, bench.preset, subject.recomputes
        model = random_model(subject.sizes, bench.device)
        if again:
            recompute_activations(model)
        self.model = prepared(with_method(model, condition, preset), condition, keep_cast=not again)
        self.parameters, self._protocol = trained_parameters(self.model), preset.protocol
        self.optimizer = make_optimizer(self.parameters, Run(condition, 0.0, 0), preset.protocol)
        self._split = random_split(subject.rows, subject.length, subject.sizes.vocabulary)
        # The whole batch goes through the model at once, as in the plan's estimate.
        self._machine = replace(bench.machine, max_batch_tokens=subject.rows * (subject.length + 1))
        self._examples, self._autocast = np.arange(subject.rows), bench.autocast

    def gradient(self) -> float:
        """Compute the gradient and return the loss, in nats per token."""
        return batch_gradient(self.model, self._split, self._examples, self._machine, self._autocast)[0]

    def __call__(self) -> None:
        """Make one optimizer step."""
        self.gradient()
        clip_gradient(self.parameters.values(), self._protocol.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients of a model's trained weights, not copies, by their names."""
    by_name = {}
    for name, parameter in trained_parameters(model).items():
        assert parameter.grad is not None
        by_name[name] = parameter.grad
    return by_name
