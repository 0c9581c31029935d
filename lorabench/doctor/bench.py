"""What a device computes for a preset: training steps against a plain reference on the CPU, their speed and memory.

The models have random weights and the sizes of the plan's largest models, as a Llama, a Qwen3 or a mixture of experts
of Qwen3; a model of another family is computed as a Llama of the same size. A check that raises an error fails with one
sentence, and the others go on.
"""

from __future__ import annotations

import gc
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from lorabench.config.fields import CHANGES_BASE
from lorabench.config.preset import Preset
from lorabench.data.tokens import TokenizedSplit
from lorabench.doctor.record import Check, Record
from lorabench.errors import UserError
from lorabench.models import bf16_products
from lorabench.models.attention import attend_in_blocks
from lorabench.models.base import config_of
from lorabench.models.fused import fuse
from lorabench.models.lora import add_lora, hold_in_bf16, use_fast_products
from lorabench.models.passes import recompute_activations, trained_parameters
from lorabench.models.specs import Dimensions, dimensions
from lorabench.planning import flops
from lorabench.planning.memory import USABLE, decided, fits, step_memory, title
from lorabench.planning.plan import Plan
from lorabench.planning.roofline import arm_seconds
from lorabench.planning.seconds import flops_per_second
from lorabench.runs import Condition, Run, Sweep
from lorabench.store.layout import Layout
from lorabench.training.context import code_state
from lorabench.training.loss import batch_gradient
from lorabench.training.run import Machine, clip_gradient, machine_of, machine_state, make_optimizer
from lorabench.training.step_cost import growth
from lorabench.utils.gpus import GB, GPUS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The limits of the checks, each with its reason.
ERROR = {"fp32": 1e-4, "bf16": 0.05}
"""Largest relative error of a loss or a gradient, by precision. In fp32, sums in another order differ by 1e-6 to 1e-5
over the few layers that are compared; a wrong formula, or TF32 by accident, by 1e-3 and more. A number in bf16 has a
relative error of up to 0.4%, which a few layers forward and backward raise to 1 or 2%."""
MEMORY = {"cuda": (0.8, 1.08), "cpu": (0.75, 1.25)}
"""Least and largest peak of a step over the plan's, by type of device. In Llamas of 135M to 3B parameters the tensors
that live at once are 85% of the estimate, where activations are recomputed, to 104%. Kernels of a GPU need workspaces
as well; the plan keeps 8% for what it does not count. On a CPU it asks for a quarter more memory than it estimates."""

# The CPU computes the reference of parity, so a few layers and tokens have to do; the layers keep their sizes.
_LAYERS, _EXPERTS, _ROWS, _LENGTH = 2, 8, 2, 64
# A GPU is checked on a long sequence too: its loss is computed in pieces, and attention in many blocks.
LONG = 4096
# The standard deviation of the logits of random models, about that of trained ones. At the usual one, below 1, all
# tokens are nearly equally likely whatever the layers compute.
_SPREAD = 4.0
# Tokens of a step on a CPU: enough for the products of a large model to be as fast as in its runs.
_CPU_TOKENS = 512
# The least seconds of steps that are timed.
_SECONDS = 0.5
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Subject:
    """A condition's model and batch, as a check computes them."""

    condition: Condition
    sizes: Dimensions
    rows: int  # Sequences that go through the model at once.
    length: int  # Tokens of each sequence.
    recomputed: int  # The number of layers whose activations its training steps recompute.

    def planned_memory(self, preset: Preset) -> float:
        """Return the plan's estimate of the memory of a training step, in bytes."""
        preset, condition = preset.with_execution(activation_checkpointing=self.recomputed), self.condition
        arm, tokens = (condition.rank, condition.placement), self.rows * self.length
        return sum(step_memory(preset, self.sizes, *arm, tokens, self.length, method=condition.method))

    def flops(self, preset: Preset) -> float:
        """Return the FLOPs of a training step as the plan counts them."""
        condition, sizes = self.condition, self.sizes
        lora = flops.lora_parameters(preset, sizes, condition.rank, condition.placement)[1]
        # On average, a token attends to half of its sequence.
        attention = flops.attention_flops_per_token(sizes, self.length / 2)
        again = (2.0 * (sizes.active_linear + lora) + attention) * min(self.recomputed, sizes.layers) / sizes.layers
        linear = flops.linear_flops_per_token(sizes, None if condition.rank is None else lora)
        return self.rows * self.length * (linear + 3 * attention + again)

    def planned_seconds(self, preset: Preset) -> float:
        """Return the plan's seconds of a training step."""
        if preset.execution.gpu is None:
            return self.flops(preset) / flops_per_second(preset.execution)
        preset, tokens = preset.with_execution(activation_checkpointing=self.recomputed), self.rows * self.length
        arm = self.sizes, self.condition.rank, self.condition.placement
        each = arm_seconds(preset, *arm, tokens, self.length / 2, self.length / 2)
        work = tokens * (sum(each.trained.token) + sum(each.trained.scored)) + each.each_pass + each.each_step
        return work * preset.execution.gpu_time


def training_subjects(plan: Plan) -> list[Subject]:
    """Return the subjects of training steps: FullFT, LoRA at the highest rank, and LoRA on experts if there are any.

    Each is that of the largest model that fits one GPU; where none does, of the largest with fewer layers.
    """
    preset = plan.preset

    def fits_and_size(sweep: Sweep) -> tuple[bool, int, int]:
        alone = preset.execution.gpu is None or fits(decided(preset, sweep), sweep, 1)
        return alone, dimensions(preset.models[sweep.condition.model]).parameters, sweep.condition.rank or 0

    groups: dict[tuple[bool, bool], list[Sweep]] = {}
    for sweep in [sweep for sweep in plan.sweeps if sweep.condition.task == "sft"] or plan.sweeps:
        experts = dimensions(preset.models[sweep.condition.model]).experts > 0
        groups.setdefault((experts, sweep.condition.rank is not None), []).append(sweep)
    kinds, subjects = ((False, False), (False, True), (True, True)), list[Subject]()
    for sweep in (max(groups[kind], key=fits_and_size) for kind in kinds if kind in groups):
        condition, gpu = sweep.condition, preset.execution.gpu
        sizes, length = dimensions(preset.models[condition.model]), flops.longest_sequence(preset, condition)
        recomputed = decided(preset, sweep).execution.recomputed_layers(sizes.layers)
        # A batch on a CPU is small.
        length = length if gpu else min(length, _CPU_TOKENS)
        rows = min(condition.batch_size, (preset.execution.max_batch_tokens if gpu else _CPU_TOKENS) // length)
        subject = Subject(condition, sizes, max(1, rows), length, recomputed)
        while gpu and subject.sizes.layers > 1 and subject.planned_memory(preset) > USABLE * GPUS[gpu].memory:
            subject = replace(subject, sizes=replace(subject.sizes, layers=subject.sizes.layers // 2))
        subjects.append(subject)
    return subjects


def random_model(
    sizes: Dimensions,
    condition: Condition,
    preset: Preset,
    device: torch.device,
    plain: bool = False,
    recomputed: int = 0,
) -> Any:
    """Return a model of these sizes with random weights in fp32, with the condition's LoRA, whose B is not zero.

    Two models of the same sizes get the same LoRA. A `plain` one computes attention and experts by transformers' eager
    functions and LoRA by PEFT's forward pass, which say what is right. If activations of layers are recomputed, no
    second copy of the base in bf16 is kept, as in training.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"attn_implementation": "eager"} if plain else {}
    if plain and sizes.experts:
        options["experts_implementation"] = "eager"
    torch.manual_seed(0)
    with device:
        config = config_of(sizes, context=1 << 17)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    model.train()
    with torch.no_grad():
        # A state before the unembedding has the length of this norm's weight, and is independent of the unembedding.
        norm: Any = model.get_submodule("model.norm")
        norm.weight.fill_(_SPREAD / (model.config.initializer_range * sizes.hidden**0.5))
        if sizes.in_bf16:
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
    if not plain:
        attend_in_blocks(model)
        if device.type == "cuda" and preset.execution.fused_kernels:
            fuse(model)
    if recomputed:
        recompute_activations(model, max(0, sizes.layers - recomputed))
    if condition.rank is None:
        return model
    if preset.protocol.precision == "bf16" and not plain and condition.method not in CHANGES_BASE:
        hold_in_bf16(model)
    assert condition.placement
    assert condition.alpha
    arm = condition.rank, condition.placement, condition.alpha, preset.protocol.include_unembedding
    adapted: Any = add_lora(model, *arm, seed=0, method=condition.method)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    if not plain:
        use_fast_products(adapted, keep_cast=not recomputed)
    return adapted


def random_split(rows: int, length: int, vocabulary: int) -> TokenizedSplit:
    """Return sequences of `length` tokens and a target after each, random and all scored."""
    ids = np.random.default_rng(0).integers(vocabulary, size=rows * (length + 1))
    return TokenizedSplit(ids, np.ones(len(ids), np.bool_), np.arange(rows + 1) * (length + 1))


def check_parity(preset: Preset, machine: Machine, subject: Subject, precision: Precision, long: bool = False) -> Check:
    """Compare loss and gradient of a training step on this device with plain transformers and PEFT on the CPU.

    A long step is one of a single sequence of `LONG` tokens, which recomputes all activations. The error of the
    gradient is the norm of the difference over the norm of the reference's gradient.
    """
    condition, sizes, (rows, length) = subject.condition, subject.sizes, (1, LONG) if long else (_ROWS, _LENGTH)
    sizes = replace(sizes, layers=min(sizes.layers, _LAYERS), experts=min(sizes.experts, _EXPERTS))
    if sizes.experts:
        # In bf16 all experts are active: rounding would otherwise send some tokens to other experts than in fp32, which
        # is no error and changes the gradient by more than rounding does.
        fewer = min(sizes.active_experts, sizes.experts // 2)
        sizes = replace(sizes, active_experts=sizes.experts if precision == "bf16" else fewer)
    protocol = preset.protocol.model_copy(update={"precision": precision})
    preset = preset.model_copy(update={"protocol": protocol})
    reference = random_model(sizes, condition, preset, torch.device("cpu"), plain=True)
    model = random_model(sizes, condition, preset, machine.device, recomputed=sizes.layers if long else 0)
    model.load_state_dict(reference.state_dict())
    split = random_split(rows, length, sizes.vocabulary)
    ids = torch.from_numpy(split.ids).view(rows, length + 1)
    logits = reference(input_ids=ids[:, :-1], use_cache=False).logits
    expected_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    expected_loss.backward()
    torch.backends.cuda.matmul.allow_tf32 = precision == "bf16"
    autocast = torch.bfloat16 if precision == "bf16" else None
    machine = replace(machine, max_batch_tokens=len(split.ids), autocast=autocast)
    loss, difference, square = batch_gradient(model, split, np.arange(rows), machine)[0], 0.0, 0.0
    weights: Any = trained_parameters(model)
    expected: Any = trained_parameters(reference)
    for name, other in expected.items():
        difference += float((weights[name].grad.cpu().double() - other.grad.double()).square().sum())
        square += float(other.grad.double().square().sum())
    loss_error, gradient_error = abs(loss / expected_loss.item() - 1), (difference / square) ** 0.5
    # A number that is not finite must not be hidden by the other one.
    worst, limit = float(np.maximum(loss_error, gradient_error)), ERROR[precision]
    sentence = (
        f"from plain transformers and PEFT in fp32 on the CPU, the loss differs by {loss_error:.1e} and the gradient "
        f"by {gradient_error:.1e}"
    )
    value = worst if math.isfinite(worst) else None
    status: Literal["pass", "fail"] = "pass" if worst <= limit else "fail"
    return Check(status=status, sentence=sentence, value=value, planned=limit, unit="relative error")


def measure_step(preset: Preset, machine: Machine, subject: Subject) -> tuple[float, float]:
    """Measure training steps of one run at LR 0, where a step does all its work and does not change the weights.

    Returned are the peak memory of the first two steps in bytes, model and optimizer included, and the median seconds
    of the steps after them, over half a second of steps or at least one.
    """

    def train() -> Iterator[None]:
        split = random_split(subject.rows, subject.length, subject.sizes.vocabulary)
        # The whole batch goes through the model in one pass, as in the plan's estimate.
        whole = replace(machine, max_batch_tokens=len(split.ids))
        model = random_model(subject.sizes, subject.condition, preset, machine.device, recomputed=subject.recomputed)
        parameters = trained_parameters(model)
        optimizer = make_optimizer(parameters, Run(subject.condition, 0.0, 0), preset.protocol)
        while True:
            batch_gradient(model, split, np.arange(subject.rows), whole)
            clip_gradient(parameters.values(), preset.protocol.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            if machine.device.type == "cuda":
                torch.cuda.synchronize(machine.device)
            yield

    torch.backends.cuda.matmul.allow_tf32 = preset.protocol.precision == "bf16"
    steps, seconds = train(), list[float]()

    def first_steps() -> None:
        next(steps)
        next(steps)

    peak = growth(first_steps, machine.device)
    while sum(seconds) < _SECONDS:
        started = time.perf_counter()
        next(steps)
        seconds.append(time.perf_counter() - started)
    return peak, statistics.median(seconds)


def check_memory(preset: Preset, machine: Machine, subject: Subject, peak: float) -> Check:
    """Compare the peak memory of a training step in bytes with the plan's estimate."""
    expected, batch = subject.planned_memory(preset), f"{subject.rows} x {subject.length} tokens"
    sentence = f"a step on {batch} took {peak / expected:.2f} times the memory that the plan states"
    least, most = MEMORY[machine.device.type]
    status: Literal["pass", "fail"] = "pass" if least * expected <= peak <= most * expected else "fail"
    return Check(status=status, sentence=sentence, value=peak / GB, planned=expected / GB, unit="GB")


def examine(plan: Plan, layout: Layout, say: Callable[[Check], None]) -> Record:
    """Make all checks of this machine for a plan; `say` is called with each check when it is made.

    UserError says that the preset's GPU is lacking.
    """
    began, date = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    preset, machine = plan.preset, machine_of(plan)
    state, on_gpu = machine_state(machine.device), machine.device.type == "cuda"
    if not on_gpu:
        # Parity is checked in bf16 too, whatever the preset's precision.
        bf16_products.choose_faster()
    seconds: dict[Subject, float] = {}
    checks: list[Check] = []

    def make(name: str, check: Callable[[], Check]) -> None:
        try:
            made = check()
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            prefix = "" if isinstance(error, UserError) else f"the check raised {type(error).__name__}: "
            made = Check(status="fail", sentence=f"{prefix}{reason}")
        # Models that are no longer used leave the device.
        gc.collect()
        torch.cuda.empty_cache()
        checks.append(made.model_copy(update={"name": name}))
        say(checks[-1])

    def memory_of(subject: Subject) -> Check:
        peak, seconds[subject] = measure_step(preset, machine, subject)
        return check_memory(preset, machine, subject, peak)

    def speed_of(subject: Subject) -> Check:
        if subject not in seconds:
            return Check(status="skipped", sentence="the step failed")
        rate, tokens = subject.flops(preset) / seconds[subject], subject.rows * subject.length
        sentence = f"a step took {seconds[subject]:.3g} s: {tokens / seconds[subject]:,.0f} tokens/s"
        if preset.execution.gpu is not None:
            sentence += (
                f", {rate / GPUS[preset.execution.gpu].peak_flops:.0%} of the data sheet's FLOP/s, with attention by "
                f"{torch.nn.attention.current_flash_attention_impl() or 'FA2'}"
            )
        planned = subject.flops(preset) / subject.planned_seconds(preset) / 1e9
        return Check(status="measured", sentence=sentence, value=rate / 1e9, planned=planned, unit="GFLOP/s")

    for subject in training_subjects(plan):
        for precision in get_args(Precision):
            long = on_gpu and precision == preset.protocol.precision
            name = f"parity in {precision}{f' at {LONG:,} tokens' if long else ''}: {title(subject.condition)}"
            make(name, partial(check_parity, preset, machine, subject, precision, long))
        # The plan of a preset for CPUs says nothing about a GPU.
        if preset.execution.gpu is not None or not on_gpu:
            make(f"memory of a step: {title(subject.condition)}", partial(memory_of, subject))
            make(f"speed of a step: {title(subject.condition)}", partial(speed_of, subject))
    dense = [subject for subject in seconds if not subject.sizes.experts]
    speed = sum(subject.flops(preset) for subject in dense) / sum(seconds[subject] for subject in dense) if dense else 0
    planned = sum(subject.planned_seconds(preset) for subject in dense) / preset.execution.gpu_time
    return Record(
        date=date,
        preset=layout.name,
        device=state["device"],
        gpu=preset.execution.gpu,
        host=platform.node(),
        seconds=round(time.perf_counter() - began, 1),
        git_sha=code_state(layout.patches)["git_sha"],
        packages=state["packages"],
        gflops=speed / 1e9 or None,
        gpu_time=sum(seconds[subject] for subject in dense) / planned if dense and on_gpu else None,
        checks=checks,
    )
