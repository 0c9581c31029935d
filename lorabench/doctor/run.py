"""All checks of a machine, in the order in which they are made.

A check that raises an error fails with one sentence, and the others go on.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lorabench.doctor import drawing, machine, parity, short_sweep, slice_speed, steps
from lorabench.doctor.bench import Bench, Step
from lorabench.doctor.record import FOLDER, Check, Record
from lorabench.doctor.subject import Subject, drawing_subject, on_this_device, training_subjects
from lorabench.doctor.verdict import skipped
from lorabench.errors import UserError
from lorabench.models import bf16_products
from lorabench.planning.plan import Plan
from lorabench.planning.resources import MB, job_resources
from lorabench.runs import Job
from lorabench.store.layout import Layout
from lorabench.training.provenance import code_state, machine_state
from lorabench.training.sweep import machine_of

Say = Callable[[Check], None]


class _Checks:
    """The checks so far; each is reported when it is made."""

    def __init__(self, say: Say) -> None:
        self.done: list[Check] = []
        self._say = say

    def make(self, name: str, check: Callable[..., Check | Sequence[Check]], *arguments: Any) -> None:
        """Make a check with these arguments; an error that it raises is its failure."""
        try:
            found = check(*arguments)
        except Exception as error:
            found = Check(name=name, status="fail", sentence=sentence_of(error))
        for one in [found] if isinstance(found, Check) else found:
            self.done.append(one)
            self._say(one)


def sentence_of(error: Exception) -> str:
    """Return an error as one sentence."""
    lines = str(error).strip().split("\n")
    if isinstance(error, UserError | short_sweep.SweepError):
        return lines[0]
    return f"the check raised {type(error).__name__}: {lines[0]}"


def examine(plan: Plan, layout: Layout, processes: int, say: Say) -> Record:
    """Make all checks of this machine for a plan.

    Args:
        processes: processes of the check of several processes, one per GPU; 1 leaves it out.
        say: is called with each check when it is made.
    """
    began, date = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    computing = machine_of(plan)
    on_gpu = computing.device.type == "cuda"
    if not on_gpu:
        # Parity is checked in bf16 too, whatever the preset's precision.
        bf16_products.choose_faster()
    state = machine_state(computing.device)
    checks = _Checks(say)
    FOLDER.mkdir(parents=True, exist_ok=True)
    # On the file system of the results, which jobs on other nodes see too.
    with tempfile.TemporaryDirectory(dir=FOLDER, prefix="work-", ignore_cleanup_errors=True) as folder:
        bench = Bench(plan, on_this_device(plan.preset, on_gpu), computing, Path(folder), processes)
        _check_machine(checks, bench, layout, state["device"])
        _check_parity(checks, bench)
        gflops = _check_steps(checks, bench)
        if plan.preset.execution.gpu is None:
            checks.make("speed of training", slice_speed.check_speed, plan, layout)
        layer_seconds = _check_drawing(checks, bench)
        _check_sweep(checks, bench)
    return Record(
        date=date,
        preset=layout.name,
        device=state["device"],
        gpu=plan.preset.execution.gpu,
        host=platform.node(),
        processes=processes,
        seconds=round(time.perf_counter() - began, 1),
        git_sha=code_state(layout.patches)["git_sha"],
        packages=state["packages"],
        gflops=gflops,
        layer_seconds=layer_seconds,
        checks=checks.done,
    )


def _check_machine(checks: _Checks, bench: Bench, layout: Layout, device: str) -> None:
    plan, gpu = bench.plan, bench.plan.preset.execution.gpu
    memory = torch.cuda.get_device_properties(bench.device).total_memory if bench.on_gpu else None
    checks.make("device", machine.check_device, gpu, device, memory)
    checks.make("software", machine.check_software, gpu)
    checks.make("kernels", machine.check_kernels, bench.device)
    checks.make("memory of the host", machine.check_host_memory, plan)
    checks.make("disk", machine.check_disk, plan, FOLDER)
    checks.make("models of the hub", machine.check_models, layout)
    checks.make("vLLM", machine.check_engine, plan, layout, bench.device)
    checks.make("files and locks", machine.check_files_and_locks, bench.folder)
    checks.make("time limit", machine.check_time_limit, plan)


def _check_parity(checks: _Checks, bench: Bench) -> None:
    for subject in training_subjects(bench.plan, bench.preset):
        for precision in ("fp32", "bf16"):
            name = f"parity in {precision}: {subject.title}"
            checks.make(name, parity.check_parity, bench, subject, precision)
            steps.free(bench.device)


def _check_steps(checks: _Checks, bench: Bench) -> float | None:
    """Check training steps; return the useful GFLOP/s of the dense models that are as wide as the preset's, if any."""
    speeds: list[steps.Speed] = []
    peaks: list[float] = []

    def product() -> Check:
        peaks.append(steps.matmul_peak(bench.autocast or torch.float32, bench.device))
        return steps.check_matmul(bench, peaks[0])

    checks.make("matrix product", product)
    subjects = training_subjects(bench.plan, bench.preset)
    for subject in subjects if peaks else []:

        def timed(subject: Subject = subject) -> list[Check]:
            step = Step(bench, subject)
            repeats = steps.check_repeats(step, subject)
            speed = steps.measure_step(bench, step, subject)
            if subject.wide and not subject.sizes.experts:
                speeds.append(speed)
            return [repeats, steps.check_speed(bench, subject, speed, peaks[0])]

        checks.make(f"speed of a step: {subject.title}", timed)
        steps.free(bench.device)
        checks.make(f"memory of a step: {subject.title}", steps.check_memory, bench, subject)
        steps.free(bench.device)
    if subjects and peaks:
        # FullFT comes first and has the largest checkpoint.
        largest = subjects[0]
        checks.make(f"checkpoint: {largest.title}", _check_checkpoint, bench, largest)
        steps.free(bench.device)
    seconds = sum(speed.seconds for speed in speeds)
    return sum(speed.flops for speed in speeds) / seconds / 1e9 if speeds else None


def _check_checkpoint(bench: Bench, subject: Subject) -> Check:
    """Write a checkpoint; on a GPU the plan says how much memory of the host the job of the condition requests."""
    requested = None
    if bench.on_gpu:
        jobs = [Job((sweep,)) for sweep in bench.plan.sweeps if sweep.condition == subject.condition]
        requested = max((job_resources(bench.plan, job).mem_mb * MB for job in jobs), default=None)
    return steps.check_checkpoint(bench, subject, requested)


def _check_drawing(checks: _Checks, bench: Bench) -> float | None:
    """Check the sampler; return the seconds of a layer for each token on a GPU, if they were measured."""
    subject = drawing_subject(bench.plan, bench.preset)
    if subject is None:
        checks.make("drawing", skipped, "drawing", "the preset has no reinforcement learning")
        return None
    checks.make(f"sampler in fp32: {subject.condition.model}", parity.check_sampler, bench, subject)
    steps.free(bench.device)
    drawn: list[drawing.Drawing] = []

    def timed() -> Check:
        drawn.append(drawing.draw(bench, subject))
        return drawing.check_drawing(bench, subject, drawn[0])

    checks.make(f"speed of drawing: {subject.title}", timed)
    steps.free(bench.device)
    return drawn[0].layer_seconds if drawn and bench.on_gpu else None


def _check_sweep(checks: _Checks, bench: Bench) -> None:
    preset, processes = bench.preset, bench.processes
    rows: list[dict[str, Any]] = []
    fresh = _prepared(checks, bench)
    if fresh is None:
        return

    def end_to_end() -> Check:
        began = time.perf_counter()
        rows.extend(short_sweep.train(fresh.copy("whole")))
        return short_sweep.judge_sweep(rows, time.perf_counter() - began)

    checks.make("sweep end to end", end_to_end)
    checks.make("resume", short_sweep.check_resume, fresh, rows)
    names = "several processes", "SIGTERM to all processes"
    if processes == 1:
        most = bench.plan.preset.execution.max_gpus
        advice = f"; the preset uses up to {most} GPUs for a job" if most > 1 else ""
        for name in names:
            checks.make(name, skipped, name, f"this needs --processes above 1{advice}")
        return
    precision = preset.protocol.precision
    checks.make(names[0], short_sweep.check_processes, fresh, rows, processes, precision)
    checks.make(names[1], short_sweep.check_processes_stop, fresh, processes)


def _prepared(checks: _Checks, bench: Bench) -> short_sweep.Place | None:
    """Return the short sweep with its data; None if they can't be made, which is a failure."""
    places: list[short_sweep.Place] = []

    def prepare() -> list[Check]:
        places.append(short_sweep.prepare(bench.folder / "fresh", bench.preset))
        return []

    checks.make("data of the short sweep", prepare)
    return places[0] if places else None
