"""All checks of a machine for a preset: its device, and the parity, memory and speed of training steps.

A check that raises an error fails with one sentence, and the others go on. How work continues after a signal, a kill or
a full disk is not checked here: `lorabench run smoke` and the tests show it.
"""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, get_args

import torch

from lorabench.doctor import bench
from lorabench.doctor.record import Check, Record, judged
from lorabench.errors import UserError
from lorabench.models import bf16_products
from lorabench.planning.memory import title
from lorabench.planning.plan import Plan
from lorabench.store.layout import Layout
from lorabench.training.context import code_state
from lorabench.training.run import Machine, machine_of, machine_state
from lorabench.utils.gpus import GB, GPUS, LEAST_MEMORY, difference_from, none_seen


def examine(plan: Plan, layout: Layout, say: Callable[[Check], None]) -> Record:
    """Make all checks of this machine for a plan; `say` is called with each check when it is made."""
    began, date = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    preset, gpu, on_gpu = plan.preset, plan.preset.execution.gpu, torch.cuda.is_available()
    # Where a preset's GPU is lacking, only the device is checked.
    here = on_gpu or gpu is None
    machine = machine_of(plan) if here else Machine(torch.device("cpu"), preset.execution.max_batch_tokens)
    state = machine_state(machine.device)
    # What a step of each subject took: the peak bytes and the seconds.
    steps: dict[bench.Subject, tuple[float, float]] = {}
    done: list[Check] = []

    def make(name: str, check: Callable[..., Check], *arguments: Any) -> None:
        done.append(made(name, lambda: check(*arguments)))
        say(done[-1])

    def memory_of_step(subject: bench.Subject) -> Check:
        steps[subject] = bench.measure_step(preset, machine, subject)
        return bench.check_memory(preset, machine, subject, steps[subject][0])

    if not on_gpu and here:
        # Parity is checked in bf16 too, whatever the preset's precision.
        bf16_products.choose_faster()
    memory = torch.cuda.get_device_properties(machine.device).total_memory if on_gpu else None
    make("device", check_device, gpu, state["device"], memory)
    for subject in bench.training_subjects(plan) if here else []:
        for precision in get_args(bench.Precision):
            make(
                f"parity in {precision}: {title(subject.condition)}",
                bench.check_parity,
                preset,
                machine,
                subject,
                precision,
            )
        if on_gpu:
            name = f"parity at {bench.LONG:,} tokens: {title(subject.condition)}"
            make(name, bench.check_parity, preset, machine, subject, preset.protocol.precision, True)
        # The plan of a preset for CPUs says nothing about a GPU.
        if gpu is not None or not on_gpu:
            make(f"memory of a step: {title(subject.condition)}", memory_of_step, subject)
            seconds = steps[subject][1] if subject in steps else None
            make(f"speed of a step: {title(subject.condition)}", bench.check_speed, preset, subject, seconds)
    if not here:
        make("computing", lambda: Check(status="skipped", sentence="the preset is for a GPU, and there is none"))
    dense = {subject: seconds for subject, (_, seconds) in steps.items() if not subject.sizes.experts}
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
    """Compare the device that is here, by its name and the bytes of its memory if it is a GPU, with the preset's."""
    if gpu is None:
        here = f"this is {device}" if memory is None else f"its jobs will use the GPU that is here, {device}"
        return judged(True, f"the preset is for a CPU, and {here}")
    if memory is None:
        return judged(False, none_seen(gpu, torch.__version__, torch.version.cuda))
    difference = difference_from(gpu, device, memory)
    sentence = difference or f"this is the {gpu} that the preset names ({device})"
    return judged(difference is None, sentence, memory / GB, LEAST_MEMORY * GPUS[gpu].memory / GB, "GB")
