"""A training step within one process, without start-up; and the speed of the machine's matrix products.

The steps of this project are computed as in a run (`batch_gradient`). Every token is scored, and
there is no padding. At LR 0 a step does all its work and does not change the weights.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.speed.table import Row, say
from lorabench.config.fields import Method
from lorabench.config.inputs import GgufModel, ModelSpec, TinyModel
from lorabench.config.loading import load_preset
from lorabench.data.tokens import TokenizedSplit
from lorabench.models import bf16_products
from lorabench.models.base import converted_folder, load_model
from lorabench.models.counts import train_flops_per_token
from lorabench.models.lora import add_lora, use_fast_products
from lorabench.models.passes import trained_parameters
from lorabench.training.loss import batch_gradient
from lorabench.training.run import Machine
from lorabench.utils.exhaustion import keep_freed_memory

Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMOLLM2 = "smollm2-135m"
ALPHA, INCLUDE_UNEMBEDDING = 32.0, True
MAX_BATCH_TOKENS = 4096
"""`execution.max_batch_tokens` of presets."""
WARM_UP = 1

ARMS: dict[str, Method | Literal["peft"]] = {"PEFT": "peft", "LoRA": "lora", "FullFT": "fullft"}
"""The way of making a step by its name; the arm without this project comes first."""


@dataclass(frozen=True)
class Setting:
    """The model, rank, batch and precision within which arms are compared."""

    model: str = "llama-128"
    rank: int = 16
    batch: int = 8
    length: int = 128
    precision: Precision = "fp32"

    @property
    def case(self) -> str:
        """The description of the case in the table."""
        return f"{self.model}, r{self.rank}, {self.batch} x {self.length} tokens, {self.precision}"


SETTINGS = [
    Setting(),
    Setting(rank=1),
    *(Setting(rank=rank) for rank in (4, 64)),
    *(Setting(length=length) for length in (64, 256)),
    Setting(precision="bf16"),
    Setting(model="llama-64"),
    Setting(model="llama-64", length=64),
    # These take a few seconds per step on two cores.
    Setting(model=SMOLLM2, batch=1, length=64),
    Setting(model=SMOLLM2, batch=4, precision="bf16"),
    Setting(model=SMOLLM2, batch=16, length=127, precision="bf16"),
]
QUICK = [Setting(model="llama-64", batch=2, length=16)]

_SQUARE = 2048
"""Most rows and columns of the matrices whose product measures the machine's peak."""


def matmul_peak(dtype: torch.dtype) -> float:
    """Return the highest FLOP/s of the product of two square matrices, in about a second whatever the speed."""
    side, best, seconds, end = 128, 0.0, 0.0, time.perf_counter() + 1.0
    while time.perf_counter() < end:
        # Larger matrices are multiplied next only if a product took little of the time.
        if best and seconds < 0.06 and side < _SQUARE:
            side *= 2
        left, right = (torch.randn(side, side).to(dtype) for _ in range(2))
        started = time.perf_counter()
        left @ right
        seconds = time.perf_counter() - started
        best = max(best, 2 * side**3 / seconds)
    return best


def spec_of(model: str) -> ModelSpec:
    """Return the specification of a model by its name: that of the preset `smollm2`, or of a tiny base."""
    if model == SMOLLM2:
        return load_preset("smollm2").models[model]
    return TinyModel.model_validate({"kind": "tiny", "name": model})


def training_step(setting: Setting, method: Method | Literal["peft"]) -> tuple[Callable[[], None], int]:
    """Return a function that makes one optimizer step, and the step's FLOPs as the paper counts them."""
    model: Any = load_model(spec_of(setting.model))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (setting.batch, setting.length + 1), generator=generator)
    if method != "fullft":
        model = add_lora(model, setting.rank, "all", ALPHA, INCLUDE_UNEMBEDDING, seed=0)
    flops = setting.batch * setting.length * train_flops_per_token(model)
    if method == "peft":
        # PEFT is measured without this project's attention.
        model.set_attn_implementation("sdpa")
        return _peft_step(model, ids, setting.precision), flops
    if method != "fullft":
        use_fast_products(model)
    parameters = list(trained_parameters(model).values())
    optimizer = _adam(parameters)
    offsets = np.arange(setting.batch + 1) * (setting.length + 1)
    scored = np.ones(setting.batch * (setting.length + 1), bool)
    split, examples = TokenizedSplit(ids.flatten().numpy(), scored, offsets), np.arange(setting.batch)
    autocast = torch.bfloat16 if setting.precision == "bf16" else None
    machine = Machine(torch.device("cpu"), MAX_BATCH_TOKENS, autocast=autocast)

    def step() -> None:
        batch_gradient(model, split, examples, machine)
        torch.nn.utils.clip_grad_norm_(parameters, math.inf)
        optimizer.step()
        optimizer.zero_grad()

    return step, flops


def _peft_step(model: Any, ids: torch.Tensor, precision: Precision) -> Callable[[], None]:
    """Return a step of PEFT's model as its documentation shows it."""
    optimizer = _adam([parameter for parameter in model.parameters() if parameter.requires_grad])

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _adam(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)


def median_seconds(steps: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each step; steps take turns, so that changes of the machine's speed affect all."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + repeats):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure(settings: list[Setting], threads: int, repeats: int) -> Iterator[Row]:
    """Yield the machine's peaks, then a row for each arm of each setting whose model is on this machine."""
    torch.set_num_threads(threads)
    # Training processes do this too; PEFT's steps share the process and also gain by it.
    keep_freed_memory()
    bf16_products.choose_faster()
    peaks: dict[str, float] = {precision: matmul_peak(dtype) for precision, dtype in DTYPES.items()}
    for precision, speed in peaks.items():
        say(f"peak: matmul in {precision}: {speed / 1e9:.0f} GFLOP/s")
        case = f"matmul of up to {_SQUARE}, {precision}"
        yield Row("peak", case, "torch", threads, 1, 2 * _SQUARE**3 / speed, gflops=speed / 1e9)
    for setting in settings:
        spec = spec_of(setting.model)
        if isinstance(spec, GgufModel) and not (converted_folder(spec) / "model.safetensors").is_file():
            say(f"step: {setting.model} is not here and is left out; `lorabench step convert {setting.model}` gets it")
            continue
        made = {name: training_step(setting, arm) for name, arm in ARMS.items()}
        seconds = median_seconds({name: step for name, (step, _) in made.items()}, repeats)
        say(f"step: {setting.case}: {len(made)} arms")
        for name in ARMS:
            speed = made[name][1] / seconds[name]
            share = speed / peaks[setting.precision]
            yield Row("step", setting.case, name, threads, 1, seconds[name], gflops=speed / 1e9, share_of_peak=share)
