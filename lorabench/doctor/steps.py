"""Training steps of the preset's largest conditions: whether they repeat, their speed, memory and checkpoints."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lorabench.doctor.bench import Bench, Step, gradients
from lorabench.doctor.limits import LARGE_PARAMETERS, MEMORY_ERROR, SHARE_OF_PEAK
from lorabench.doctor.record import Check
from lorabench.doctor.subject import Subject, planned_memory
from lorabench.doctor.verdict import at_least, at_most, measured, near, skipped
from lorabench.planning.flops import attention_flops_per_token, linear_flops_per_token
from lorabench.training.checkpoint import save_checkpoint
from lorabench.training.step_cost import growth
from lorabench.utils.formats import number
from lorabench.utils.gpus import GB, GPUS

_WARM_UP, _REPEATS = 2, 5
SQUARE = {"cpu": 2048, "cuda": 8192}
"""Most rows and columns of the matrices whose product measures a device's peak."""
_SMALLEST_SQUARE = 128
PEAK_SECONDS = 1.0
"""Seconds for which matrices are multiplied to measure a peak."""
# Larger matrices are multiplied next only if a product took less than this share of the time.
_SHARE_OF_SECONDS = 0.06


@dataclass(frozen=True)
class Speed:
    """The speed of a training step: FLOPs by the plan's formula, and seconds."""

    flops: float
    seconds: float

    @property
    def flops_per_second(self) -> float:
        """The useful FLOP/s."""
        return self.flops / self.seconds


def check_repeats(step: Step, subject: Subject) -> Check:
    """Compute one gradient twice and compare every bit."""
    loss, first = step.gradient(), {name: gradient.clone() for name, gradient in gradients(step.model).items()}
    step.optimizer.zero_grad()
    again, second = step.gradient(), gradients(step.model)
    largest = max(float((first[name] - second[name]).abs().max()) for name in first)
    step.optimizer.zero_grad()
    difference = max(largest, abs(loss - again))
    same = "the same step gave the same loss and gradient twice, bit for bit"
    other = f"the same step gave losses and gradients that differ by up to {difference:.1e}"
    return at_most(f"repeats: {subject.title}", difference, 0.0, "difference", other if difference else same)


def check_memory(bench: Bench, subject: Subject, planned: float | None = None) -> Check:
    """Compare the peak of two steps, model and optimizer included, with the plan's estimate.

    Args:
        planned: the estimate in bytes, by default the plan's.
    """
    expected = planned_memory(bench.preset, subject) if planned is None else planned

    def steps() -> None:
        step = Step(bench, subject)
        step()
        step()

    peak = growth(steps, bench.device)
    free(bench.device)
    name, shape = f"memory of a step: {subject.title}", f"{subject.rows} x {subject.length} tokens"
    sentence = f"a step on {shape} took {peak / expected:.2f} times the memory that the plan states"
    if bench.on_gpu and bench.preset.execution.gpu is None:
        # The plan of a preset for CPUs says nothing about a GPU.
        return measured(name, peak / GB, "GB", sentence, expected / GB)
    return near(name, peak / GB, expected / GB, MEMORY_ERROR[bench.device.type], "GB", sentence)


def measure_step(bench: Bench, step: Step, subject: Subject) -> Speed:
    """Return the median speed of a training step."""
    seconds = []
    for turn in range(_WARM_UP + _REPEATS):
        started = time.perf_counter()
        step()
        _wait(bench.device)
        if turn >= _WARM_UP:
            seconds.append(time.perf_counter() - started)
    return Speed(step_flops(bench, subject), statistics.median(seconds))


def check_speed(bench: Bench, subject: Subject, speed: Speed, peak: float) -> Check:
    """Compare the speed of a step with that of a large matrix product in the same precision, both in FLOP/s."""
    share = speed.flops_per_second / peak
    name, tokens = f"speed of a step: {subject.title}", subject.rows * subject.length
    sentence = (
        f"a step took {speed.seconds:.3g} s: {tokens / speed.seconds:,.0f} tokens/s and "
        f"{number(speed.flops_per_second / 1e9)} GFLOP/s"
    )
    if bench.on_gpu and not subject.sizes.experts and subject.sizes.parameters >= LARGE_PARAMETERS:
        return at_least(name, share, SHARE_OF_PEAK, "share of peak", sentence)
    return measured(name, share, "share of peak", sentence)


def step_flops(bench: Bench, subject: Subject) -> float:
    """Return the FLOPs of a step as the plan counts them."""
    condition, sizes = subject.condition, subject.sizes
    lora = None
    if condition.rank is not None and condition.placement is not None:
        lora = sizes.lora(condition.placement, condition.rank, bench.preset.protocol.include_unembedding)[1]
    # A token attends to half of its sequence in the mean.
    attention = attention_flops_per_token(sizes, subject.length / 2)
    forward = 2.0 * (sizes.active_linear + (lora or 0)) + attention
    again = forward if subject.recomputes else 0.0
    return subject.rows * subject.length * (linear_flops_per_token(sizes, lora) + 3 * attention + again)


def check_matmul(bench: Bench, flops_per_second: float) -> Check:
    """Report the speed of a large matrix product beside that of the GPU's data sheet."""
    gpu, side = bench.preset.execution.gpu, SQUARE[bench.device.type]
    stated = GPUS[gpu].peak_flops / 1e9 if gpu is not None and bench.autocast is not None else None
    precision = bench.preset.protocol.precision
    way = " computed in fp32 and rounded" if bench.machine.bf16_products == "fp32" else ""
    sentence = f"the product of two matrices of up to {side} rows and columns in {precision}{way}"
    return measured("matrix product", flops_per_second / 1e9, "GFLOP/s", sentence, stated)


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Return the highest FLOP/s of the product of two square matrices, in about PEAK_SECONDS whatever the speed."""
    side, best, end = _SMALLEST_SQUARE, 0.0, time.perf_counter() + PEAK_SECONDS
    seconds = 0.0
    while time.perf_counter() < end:
        if seconds < _SHARE_OF_SECONDS * PEAK_SECONDS and side < SQUARE[device.type] and best:
            side *= 2
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        _wait(device)
        started = time.perf_counter()
        left @ right
        _wait(device)
        seconds = time.perf_counter() - started
        best = max(best, 2 * side**3 / seconds)
    return best


def check_checkpoint(bench: Bench, subject: Subject, requested: float | None) -> Check:
    """Write a checkpoint after a step, and compare the memory of the host that this takes with the plan.

    Args:
        requested: the bytes of the host's memory that the plan requests for the job on a GPU. There is no limit on a
            CPU, where a step takes more memory than a checkpoint.
    """
    name = f"checkpoint: {subject.title}"
    step = Step(bench, subject)
    step()
    reset = _reset_host_peak()
    if not reset:
        return skipped(name, "this system does not let a process reset its peak memory (/proc/self/clear_refs)")
    before, started = _host_bytes("VmRSS"), time.perf_counter()
    path = bench.folder / "checkpoint.safetensors"
    save_checkpoint(path, "step", step.parameters, step.optimizer, {"step": 1})
    seconds, peak, size = time.perf_counter() - started, _host_bytes("VmHWM"), path.stat().st_size
    path.unlink()
    sentence = (
        f"a checkpoint of {number(size / GB)} GB was written in {seconds:.2g} s; the process took "
        f"{number((peak - before) / GB)} GB more for it, {number(peak / GB)} in all"
    )
    if requested is None:
        return measured(name, (peak - before) / GB, "GB", sentence)
    return at_most(name, peak / GB, requested / GB, "GB", sentence)


def free(device: torch.device) -> None:
    """Free the memory of models that are no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_host_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _host_bytes(field: str) -> int:
    """Return a number of bytes that the system reports of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
