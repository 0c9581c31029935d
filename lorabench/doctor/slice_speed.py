"""The speed of training on this machine's CPU, measured in about a second on a slice of a preset's model."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from datetime import UTC, datetime

from lorabench.doctor.bench import Bench, Step
from lorabench.doctor.record import Check, Speed
from lorabench.doctor.steps import step_flops
from lorabench.doctor.subject import Subject
from lorabench.doctor.verdict import measured, skipped
from lorabench.models.dimensions import dimensions
from lorabench.planning.flops import longest_sequence, run_tokens
from lorabench.planning.memory import decided
from lorabench.planning.plan import Plan
from lorabench.store.layout import Layout
from lorabench.training.sweep import machine_of
from lorabench.utils.files import write_json
from lorabench.utils.gpus import processor

SECONDS = 0.5
"""Seconds for which steps are timed, after a first one; at least one step is."""

_LAYERS = 2
# Tokens of a step: enough for the products of a large model to be as fast as in its runs.
_TOKENS = 512


def slice_of(plan: Plan) -> Subject:
    """Return the subject of the measurement: the condition on which the plan spends most tokens, with two layers.

    The vocabulary is cut in proportion to the layers, so that each kind of work keeps its share.
    """
    preset = plan.preset
    sweep = max(plan.sweeps, key=lambda sweep: sweep.n_runs * run_tokens(preset, sweep.condition).trained)
    condition, sizes = sweep.condition, dimensions(preset.models[sweep.condition.model])
    layers = min(_LAYERS, sizes.layers)
    sliced = replace(sizes, layers=layers, vocabulary=max(1, sizes.vocabulary * layers // sizes.layers))
    length = min(_TOKENS, longest_sequence(preset, condition))
    rows = max(1, min(condition.batch_size, _TOKENS // length))
    again = decided(preset, sweep).execution.activation_checkpointing is True
    return Subject(condition, sliced, rows, length, again, wide=True)


def measure_speed(plan: Plan, layout: Layout) -> Speed | None:
    """Measure the useful FLOP/s of a training step on the CPU, and keep the number for later plans.

    Returns:
        None if there is a GPU, on which jobs compute even where their preset is for a CPU.
    """
    machine = machine_of(plan)
    if machine.device.type != "cpu":
        return None
    bench, subject = Bench(plan, plan.preset, machine, layout.root), slice_of(plan)
    step = Step(bench, subject)
    step()
    seconds: list[float] = []
    while sum(seconds) < SECONDS:
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    speed = Speed(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        device=processor(),
        threads=plan.preset.execution.threads,
        bf16_products=machine.bf16_products,
        gflops=step_flops(bench, subject) / statistics.median(seconds) / 1e9,
    )
    write_json(speed.model_dump(), layout.speed)
    return speed


def check_speed(plan: Plan, layout: Layout) -> Check:
    """Measure the speed of training, which `lorabench plan` takes from then on, beside that of the preset."""
    name = "speed of training"
    speed = measure_speed(plan, layout)
    if speed is None:
        return skipped(name, "jobs compute on the GPU that is here")
    return measured(name, speed.gflops, "GFLOP/s", speed.sentence, plan.preset.execution.gflops)
