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
from typing import Any, get_args

import torch

from lorabench.doctor import bench, engine
from lorabench.doctor.record import Check, Record, judged
from lorabench.errors import UserError
from lorabench.models import bf16_products
from lorabench.models.vllm_support import check_installed, check_two_processes, check_vllm, vllm_version
from lorabench.planning.costs import MB, evaluation_cost, job_cost, per_experiment
from lorabench.planning.engine import handover_space, uses_engine
from lorabench.planning.plan import Plan
from lorabench.runs import Sweep
from lorabench.store.layout import Layout
from lorabench.training.context import code_state
from lorabench.training.rl.engine import handover_folder
from lorabench.training.run import Machine, machine_of, machine_state
from lorabench.utils.gpus import GB, GPUS, LEAST_MEMORY, compute_modes, difference_from, none_seen


def examine(plan: Plan, layout: Layout, say: Callable[[Check], None]) -> Record:
    """Make all checks of this machine for a plan; `say` is called with each check when it is made."""
    began, date = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    preset, gpu, on_gpu = plan.preset, plan.preset.execution.gpu, torch.cuda.is_available()
    # A preset for a GPU has no machine where there is none, and only what needs no machine is checked.
    here = on_gpu or gpu is None
    machine = machine_of(plan) if here else Machine(torch.device("cpu"), preset.execution.max_batch_tokens)
    state = machine_state(machine.device)
    # What a step of each subject took: the peak bytes and the seconds; and what the engine did for each policy.
    steps: dict[bench.Subject, tuple[float, float]] = {}
    drawings: dict[Sweep, engine.Drawing] = {}
    done: list[Check] = []

    def make(name: str, check: Callable[..., Check], *arguments: Any) -> None:
        done.append(made(name, partial(check, *arguments)))
        say(done[-1])

    def memory_of_step(subject: bench.Subject) -> Check:
        steps[subject] = bench.measure_step(preset, machine, subject)
        return bench.check_memory(preset, machine, subject, steps[subject][0])

    def policy_of(sweep: Sweep) -> Check:
        drawings[sweep] = engine.measure_drawing(plan, layout, machine, sweep)
        return engine.check_policy(preset, drawings[sweep])

    if not on_gpu and here:
        # Parity is checked in bf16 too, whatever the preset's precision.
        bf16_products.choose_faster()
    subjects = bench.training_subjects(plan) if here else []
    memory = torch.cuda.get_device_properties(machine.device).total_memory if on_gpu else None
    make("device", check_device, gpu, state["device"], memory)
    make("memory of the host", check_host_memory, plan)
    make("disk", check_disk, plan)
    make("vLLM", check_engine, plan, layout, machine.device)
    installed = done[-1].status == "pass"
    if done[-1].status != "skipped":
        make("compute mode", check_compute_mode)
        make("shared memory", check_shared_memory, plan)
    for subject in subjects:
        for precision in get_args(bench.Precision):
            make(f"parity in {precision}: {subject.title}", bench.check_parity, preset, machine, subject, precision)
        if on_gpu:
            title = f"parity at {bench.LONG:,} tokens: {subject.title}"
            make(title, bench.check_parity, preset, machine, subject, preset.protocol.precision, True)
        # The plan of a preset for CPUs says nothing about a GPU.
        if gpu is not None or not on_gpu:
            make(f"memory of a step: {subject.title}", memory_of_step, subject)
        if gpu is not None:
            seconds = steps[subject][1] if subject in steps else None
            make(f"speed of a step: {subject.title}", bench.check_speed, preset, subject, seconds)
    for sweep in engine.policies(plan) if here and installed else []:
        title = bench.subject_of(plan, sweep).title
        make(f"policy in vLLM: {title}", policy_of, sweep)
        make(f"speed of vLLM: {title}", engine.check_drawing, preset, sweep.condition, drawings.get(sweep))
    if not here:
        sentence = "the preset is for a GPU, and there is none"
        make("computing", partial(Check, status="skipped", sentence=sentence))
    elif gpu is None:
        # The speed of a CPU is kept for `lorabench plan` in a file of its own.
        make("speed of training", check_cpu_speed, plan, layout)
    dense = {subject: step[1] for subject, step in steps.items() if gpu is not None and not subject.sizes.experts}
    flops = sum(subject.flops(preset) for subject in dense)
    return Record(
        date=date,
        preset=layout.name,
        device=state["device"],
        gpu=gpu,
        host=platform.node(),
        seconds=round(time.perf_counter() - began, 1),
        git_sha=code_state(layout.patches)["git_sha"],
        packages=state["packages"],
        gflops=flops / sum(dense.values()) / 1e9 if dense else None,
        checks=done,
    )


def made(name: str, check: Callable[[], Check]) -> Check:
    """Make a check and give it a name; an error that it raises is its failure."""
    try:
        result = check()
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        prefix = "" if isinstance(error, UserError) else f"the check raised {type(error).__name__}: "
        result = judged(False, f"{prefix}{reason}")
    # Models that are no longer used leave the device.
    gc.collect()
    torch.cuda.empty_cache()
    return result.model_copy(update={"name": name})


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
        return judged(False, none_seen(gpu, torch.__version__, torch.version.cuda))
    difference = difference_from(gpu, device, memory)
    sentence = difference or f"this is the {gpu} that the preset names ({device})"
    return judged(difference is None, sentence, memory / GB, LEAST_MEMORY * GPUS[gpu].memory / GB, "GB")


def check_host_memory(plan: Plan) -> Check:
    """Compare the memory of this machine with what the plan's largest job requests."""
    requested = [job_cost(plan, job).mem_mb for job in plan.jobs]
    requested += [evaluation_cost(plan, job).mem_mb for job in plan.evaluations()]
    there, needed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), max(requested) * MB
    sentence = "the memory of this machine, and what the plan requests for its largest job"
    return judged(there >= needed, sentence, there / GB, needed / GB, "GB")


def check_disk(plan: Plan) -> Check:
    """Compare the free space of this folder's file system with what the plan keeps there."""
    cost, free = per_experiment(plan)["total"], shutil.disk_usage(".").free
    needed = cost.disk + cost.working_disk
    sentence = "the free space here, and what the plan keeps and its largest job needs in addition"
    return judged(free >= needed, sentence, free / GB, needed / GB, "GB")


def check_engine(plan: Plan, layout: Layout, device: torch.device) -> Check:
    """Say whether vLLM can draw from the policies of the preset's RL, as far as their models are there."""
    conditions = [sweep.condition for sweep in plan.sweeps if uses_engine(plan.preset, sweep.condition)]
    if not conditions:
        return Check(status="skipped", sentence="the project's own sampler draws, or the preset has no RL")
    check_installed()
    policies = {(condition.model, condition.rank, condition.placement) for condition in conditions}
    checked = 0
    for model, rank, placement in policies:
        fetched = layout.fetched_model(model)
        if fetched is None or fetched.is_file():
            check_vllm(layout.model(model), device, rank, placement, trains=True)
            checked += 1
    return judged(True, f"vLLM {vllm_version()} takes {checked} of the {len(policies)} policies of RL")


def check_compute_mode() -> Check:
    """Say whether a GPU takes two processes, the trainer and the engine; an error says that it does not."""
    modes = compute_modes()
    if not modes:
        return Check(status="skipped", sentence="nvidia-smi, which would tell, names no GPU")
    check_two_processes()
    return judged(True, f"the trainer and vLLM may both use a GPU (mode {', '.join(modes)})")


def check_shared_memory(plan: Plan) -> Check:
    """Compare the free space where a job hands its policy to the engine with the largest policy of the plan."""
    engines = [sweep.condition for sweep in plan.sweeps if uses_engine(plan.preset, sweep.condition)]
    needed = max(handover_space(plan.preset, condition) for condition in engines)
    # It raises an error if no folder has that much.
    folder = handover_folder(needed)
    sentence = f"the free space of {folder}, through which a job hands its policy to vLLM, and what the largest takes"
    return judged(True, sentence, shutil.disk_usage(folder).free / GB, needed / GB, "GB")


def check_cpu_speed(plan: Plan, layout: Layout) -> Check:
    """Measure the speed of a CPU on the preset's own width, to be compared with `execution.gflops`."""
    speed, planned = bench.measure_speed(plan, layout), plan.preset.execution.gflops
    if speed is None:
        return Check(status="skipped", sentence="jobs compute on the GPU that is here")
    return Check(status="measured", sentence=speed[1], value=speed[0], planned=planned, unit="GFLOP/s")
