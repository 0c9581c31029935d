"""The models that the checks compute: those of the plan's largest conditions, cut down where this device is small.

The models have random weights, so nothing is downloaded. They are built from their sizes as a Llama, a Qwen3 or a
mixture of experts of Qwen3; a model of another family is computed as a Llama of the same size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorabench.config.preset import Preset
from lorabench.errors import UserError
from lorabench.models.dimensions import Dimensions, dimensions
from lorabench.planning.flops import longest_sequence
from lorabench.planning.memory import USABLE, decided, gpus_needed, peak_bytes, step_memory
from lorabench.planning.plan import Plan
from lorabench.runs import Condition, Sweep
from lorabench.utils.gpus import GPUS

CPU_HIDDEN, CPU_HEAD, CPU_LAYERS, CPU_VOCABULARY, CPU_EXPERTS, CPU_ACTIVE = 256, 64, 3, 1024, 8, 2
"""The largest sizes of a model that is computed on a CPU. The tiny bases are within them."""
CPU_ROWS, CPU_LENGTH = 4, 128
"""The largest batch on a CPU: sequences, and tokens of each."""


@dataclass(frozen=True)
class Subject:
    """A condition's model and batch, as a check computes them."""

    condition: Condition
    sizes: Dimensions
    rows: int
    """Sequences that go through the model at once."""
    length: int
    """Tokens of each sequence."""
    recomputes: bool
    """Whether its training steps recompute activations."""
    wide: bool
    """Whether the layers have the sizes of the preset's model, so that a speed says something about that."""

    @property
    def title(self) -> str:
        """The method and the model, for names of checks."""
        condition = self.condition
        method = "FullFT" if condition.method == "fullft" else f"LoRA r{condition.rank} {condition.placement}"
        return f"{method}, {condition.model}{'' if self.wide else ' cut down'}"


def training_subjects(plan: Plan, preset: Preset) -> list[Subject]:
    """Return the subjects of training steps: FullFT, LoRA at the lowest and the highest rank, LoRA on experts.

    Each is that of the largest model that fits one GPU; where none does, of the largest with fewer layers.

    Args:
        plan: the plan.
        preset: the plan's preset as this device computes it (see `on_this_device`).
    """
    trained = [sweep for sweep in plan.sweeps if sweep.condition.task == "sft"] or list(plan.sweeps)
    dense = [sweep for sweep in trained if not _sizes(plan, sweep.condition).experts]
    sparse = [sweep for sweep in trained if _sizes(plan, sweep.condition).experts]
    full = [sweep for sweep in dense if sweep.condition.method == "fullft"]
    subjects = [subject_of(plan, preset, _largest(plan, full))] if full else []
    for of_kind, ends in ((dense, (min, max)), (sparse, (max,))):
        lora = [sweep for sweep in of_kind if sweep.condition.rank is not None]
        if lora:
            # The largest model may have one rank only, so the ranks are those of all models.
            ranks = [sweep.condition.rank or 0 for sweep in lora]
            largest = _largest(plan, lora)
            subjects += [subject_of(plan, preset, largest, rank) for rank in dict.fromkeys(end(ranks) for end in ends)]
    return subjects


def drawing_subject(plan: Plan, preset: Preset) -> Subject | None:
    """Return the subject of drawing responses: the largest model of RL that fits one GPU; None without RL."""
    drawn = [sweep for sweep in plan.sweeps if sweep.condition.rollouts is not None]
    lora = [sweep for sweep in drawn if sweep.condition.rank is not None]
    return subject_of(plan, preset, _largest(plan, lora or drawn)) if drawn else None


def subject_of(plan: Plan, preset: Preset, sweep: Sweep, rank: int | None = None) -> Subject:
    """Return the subject of a sweep's condition, with another rank if one is given, cut down as this device needs."""
    condition = sweep.condition if rank is None else replace(sweep.condition, rank=rank)
    again = decided(preset, sweep).execution.activation_checkpointing is True
    sizes = _sizes(plan, condition)
    longest = longest_sequence(plan.preset, condition)
    if preset.execution.gpu is None:
        small, length = narrowed(sizes), min(longest, CPU_LENGTH)
        rows = min(condition.batch_size, CPU_ROWS)
        return Subject(condition, small, rows, length, again, wide=replace(small, layers=sizes.layers) == sizes)
    part = max(longest, min(preset.execution.max_batch_tokens, condition.batch_size * longest))
    subject = Subject(condition, sizes, max(1, part // longest), longest, again, wide=True)
    available = USABLE * GPUS[preset.execution.gpu].memory
    while subject.sizes.layers > 1 and planned_memory(preset, subject) > available:
        subject = replace(subject, sizes=replace(subject.sizes, layers=subject.sizes.layers // 2))
    return subject


def planned_memory(preset: Preset, subject: Subject) -> float:
    """Return the plan's estimate of the memory of a subject's training step, in bytes."""
    condition = subject.condition
    tokens = subject.rows * subject.length
    execution = preset.execution.model_copy(update={"activation_checkpointing": subject.recomputes})
    preset = preset.model_copy(update={"execution": execution})
    step = step_memory(preset, subject.sizes, condition.rank, condition.placement, tokens, subject.length)
    return step.total


def narrowed(sizes: Dimensions) -> Dimensions:
    """Return the sizes of a model of the same architecture that two cores compute in a fraction of a second."""
    if sizes.hidden > CPU_HIDDEN:
        head = min(sizes.head_dim, CPU_HEAD)
        heads = CPU_HIDDEN // head
        # The heads that share keys must divide the number of heads.
        sharing = max(
            count for count in range(1, heads + 1) if heads % count == 0 and count <= sizes.heads // sizes.kv_heads
        )
        sizes = replace(
            sizes,
            hidden=CPU_HIDDEN,
            heads=heads,
            kv_heads=heads // sharing,
            head_dim=head,
            intermediate=max(32, round(sizes.intermediate / sizes.hidden * CPU_HIDDEN)),
        )
    return replace(
        sizes,
        layers=min(sizes.layers, CPU_LAYERS),
        vocabulary=min(sizes.vocabulary, CPU_VOCABULARY),
        experts=min(sizes.experts, CPU_EXPERTS),
        active_experts=min(sizes.active_experts, CPU_ACTIVE) if sizes.experts > CPU_EXPERTS else sizes.active_experts,
    )


def on_this_device(preset: Preset, on_gpu: bool) -> Preset:
    """Return the preset with the estimates of the device that is here, a GPU or a CPU."""
    execution = preset.execution
    if on_gpu or execution.gpu is None:
        return preset
    # A speed must be given for a CPU; no check uses it.
    update = {"gpu": None, "max_gpus": 1, "gflops": execution.gflops or 1.0}
    return preset.model_copy(update={"execution": execution.model_copy(update=update)})


def _sizes(plan: Plan, condition: Condition) -> Dimensions:
    return dimensions(plan.preset.models[condition.model])


def _largest(plan: Plan, sweeps: Sequence[Sweep]) -> Sweep:
    """Return the sweep of the largest model that fits one GPU, of these the one with the highest peak."""
    fitting = [sweep for sweep in sweeps if _fits_one(plan, sweep)] or sweeps
    return max(fitting, key=lambda sweep: (_sizes(plan, sweep.condition).parameters, peak_bytes(plan.preset, sweep, 1)))


def _fits_one(plan: Plan, sweep: Sweep) -> bool:
    try:
        return gpus_needed(plan.preset, sweep) <= 1
    except UserError:
        return False
