"""All checks of a machine for a preset: device, memory, disk, the engine of RL, parity, and training steps.

A check that raises an error fails with one sentence, and the others go on. How work continues after a signal, a kill or
a full disk is not checked here: `lorabench run smoke` and the tests show it.
"""

from __future__ import annotations

import gc
import os
import platform
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import get_args

import torch

from lorabench.doctor import bench
from lorabench.doctor.record import Check, Record, judged, measured, skipped
from lorabench.errors import UserError
from lorabench.models import bf16_products
from lorabench.models.vllm_support import check_installed, check_vllm, vllm_version
from lorabench.planning.bill import total
from lorabench.planning.engine import uses_engine
from lorabench.planning.plan import Plan
from lorabench.planning.resources import MB, evaluation_resources, job_resources
from lorabench.store.layout import Layout
from lorabench.training.job import code_state
from lorabench.training.run import Machine, machine_of, machine_state
from lorabench.utils.gpus import GB, GPUS, is_called

USABLE_MEMORY = 0.92
"""Least memory of a GPU as a share of the data sheet's: the driver and error correction take a part."""

Say = Callable[[Check], None]


class Checks:
    """The checks so far; each is reported when it is made."""

    def __init__(self, say: Say) -> None:
        self.done: list[Check] = []
        self._say = say

    def make(self, name: str, check: Callable[[], Check]) -> None:
        """Make a check and give it a name; an error that it raises is its failure."""
        try:
            result = check()
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            prefix = "" if isinstance(error, UserError) else f"the check raised {type(error).__name__}: "
            result = judged(False, f"{prefix}{reason}")
        self.done.append(result.model_copy(update={"name": name}))
        self._say(self.done[-1])
        # Models that are no longer used leave the device.
        gc.collect()
        torch.cuda.empty_cache()


def examine(plan: Plan, layout: Layout, say: Say) -> Record:
    """Make all checks of this machine for a plan.

    Args:
        say: is called with each check when it is made.
    """
    began, date = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    machine, gpu, checks = machine_of(plan), plan.preset.execution.gpu, Checks(say)
    on_gpu = machine.device.type == "cuda"
    state = machine_state(machine.device)
    memory = torch.cuda.get_device_properties(machine.device).total_memory if on_gpu else None
    checks.make("device", lambda: check_device(gpu, state["device"], memory))
    checks.make("memory of the host", lambda: check_host_memory(plan))
    checks.make("disk", lambda: check_disk(plan))
    checks.make("vLLM", lambda: check_engine(plan, layout, machine.device))
    gflops = None
    if gpu is None or on_gpu:
        gflops = _check_computing(checks, plan, layout, machine)
    else:
        checks.make("computing", lambda: skipped("the preset is for a GPU, and there is none"))
    return Record(
        date=date,
        preset=layout.name,
        device=state["device"],
        gpu=gpu,
        host=platform.node(),
        seconds=round(time.perf_counter() - began, 1),
        git_sha=code_state(layout.patches)["git_sha"],
        packages=state["packages"],
        gflops=gflops,
        checks=checks.done,
    )


def _check_computing(checks: Checks, plan: Plan, layout: Layout, machine: Machine) -> float | None:
    """Check what the device computes; return the GFLOP/s of dense models' steps on a GPU that the preset names.

    The speed of a CPU is kept for `lorabench plan` in a file of its own.
    """
    preset, on_cpu = plan.preset, machine.device.type == "cpu"
    if on_cpu:
        # Parity is checked in bf16 too, whatever the preset's precision.
        bf16_products.choose_faster()
    timed: list[tuple[float, float]] = []

    def speed(subject: bench.Subject) -> Check:
        check, flops, seconds = bench.check_speed(preset, machine, subject)
        if not subject.sizes.experts:
            timed.append((flops, seconds))
        return check

    def cpu_speed() -> Check:
        kept = bench.measure_speed(plan, layout)
        if kept is None:
            return skipped("jobs compute on the GPU that is here")
        return measured(kept.gflops, "GFLOP/s", kept.sentence, preset.execution.gflops)

    for subject in bench.training_subjects(plan):
        for precision in get_args(bench.Precision):
            name = f"parity in {precision}: {subject.title}"
            checks.make(name, partial(bench.check_parity, preset, machine, subject, precision))
        # The plan of a preset for CPUs says nothing about a GPU.
        if preset.execution.gpu is not None or on_cpu:
            checks.make(f"memory of a step: {subject.title}", partial(bench.check_memory, preset, machine, subject))
        if preset.execution.gpu is not None:
            checks.make(f"speed of a step: {subject.title}", partial(speed, subject))
    if preset.execution.gpu is None:
        checks.make("speed of training", cpu_speed)
    return sum(flops for flops, _ in timed) / sum(seconds for _, seconds in timed) / 1e9 if timed else None


def check_device(gpu: str | None, device: str, memory: float | None) -> Check:
    """Compare the device that is here with the one that the preset names.

    Args:
        gpu: `execution.gpu` of the preset, None for a CPU.
        device: torch's name of the GPU, or the name of the processor.
        memory: bytes of the GPU; None if there is none.
    """
    if gpu is None:
        here = f"this is {device}" if memory is None else f"its jobs will use the GPU that is here, {device}"
        return judged(True, f"the preset is for a CPU, and {here}")
    if memory is None:
        return judged(False, f"the preset names {gpu}, but torch sees no GPU on this machine, {device}")
    if not is_called(gpu, device):
        sentence = f"the preset names {gpu}, but this is {device}: set execution.gpu, or the estimates do not hold"
        return judged(False, sentence)
    least = USABLE_MEMORY * GPUS[gpu].memory
    sentence = f"this is the {gpu} that the preset names ({device})"
    return measured(memory / GB, "GB", sentence, least / GB, memory >= least)


def check_host_memory(plan: Plan) -> Check:
    """Compare the memory of this machine with what the plan's largest job requests."""
    requested = [job_resources(plan, job).mem_mb for job in plan.jobs]
    requested += [evaluation_resources(plan, job).mem_mb for job in plan.evaluations()]
    there, needed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), max(requested) * MB
    sentence = "the memory of this machine, and what the plan requests for its largest job"
    return measured(there / GB, "GB", sentence, needed / GB, there >= needed)


def check_disk(plan: Plan) -> Check:
    """Compare the free space of this folder's file system with what the plan keeps there."""
    bill, free = total(plan), shutil.disk_usage(".").free
    needed = bill.disk + bill.working_disk
    sentence = "the free space here, and what the plan keeps and its largest job needs in addition"
    return measured(free / GB, "GB", sentence, needed / GB, free >= needed)


def check_engine(plan: Plan, layout: Layout, device: torch.device) -> Check:
    """Say whether vLLM can draw from the policies of the preset's RL, as far as their models are there."""
    conditions = [sweep.condition for sweep in plan.sweeps if uses_engine(plan.preset, sweep.condition)]
    if not conditions:
        return skipped("the project's own sampler draws, or the preset has no RL")
    check_installed()
    policies = {(condition.model, condition.rank, condition.placement) for condition in conditions}
    checked = 0
    for model, rank, placement in policies:
        fetched = layout.fetched_model(model)
        if fetched is None or fetched.is_file():
            check_vllm(layout.model(model), device, rank, placement, trains=True)
            checked += 1
    return judged(True, f"vLLM {vllm_version()} takes {checked} of the {len(policies)} policies of RL")
