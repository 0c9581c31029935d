"""The GPUs for which cost can be estimated. Peaks are dense, without sparsity, from the vendors' data sheets.

`efficiency` is the share of the peak that the cost model assumes in training until runs are measured (`lorabench plan
--measured`): eager PyTorch with autocast of fp32 weights, not a tuned kernel. It is an assumption, not a measurement.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """A GPU: its peak FLOP/s of dense bf16 products with fp32 accumulation, and its memory in bytes and bytes/s."""

    peak_flops: float
    memory: float
    bandwidth: float
    efficiency: float = 0.35


GPUS = {
    # NVIDIA A100 data sheet (nvidia-a100-datasheet-us): 312 TFLOPS bf16; 40 GB, 1,555 GB/s; 80 GB SXM, 2,039 GB/s.
    "A100-40GB": Gpu(312e12, 40 * GB, 1555e9),
    "A100-80GB": Gpu(312e12, 80 * GB, 2039e9),
    # NVIDIA H100 data sheet, SXM: 1,979 TFLOPS bf16 with sparsity, so 989.5 dense; 80 GB, 3.35 TB/s.
    "H100-80GB": Gpu(989.5e12, 80 * GB, 3350e9),
    # NVIDIA H200 data sheet, SXM: compute as H100; 141 GB, 4.8 TB/s.
    "H200": Gpu(989.5e12, 141 * GB, 4800e9),
    # NVIDIA DGX B200 data sheet, of eight: 72 PFLOPS in FP8 with sparsity, so 2.25 each in dense bf16; 180 GB, 8 TB/s.
    "B200": Gpu(2250e12, 180 * GB, 8000e9, efficiency=0.3),
    # NVIDIA L40S data sheet: 733 TFLOPS bf16 with sparsity, 362 dense; 48 GB, 864 GB/s.
    "L40S": Gpu(362e12, 48 * GB, 864e9, efficiency=0.3),
    # NVIDIA A10 data sheet: 125 TFLOPS bf16 dense; 24 GB, 600 GB/s.
    "A10": Gpu(125e12, 24 * GB, 600e9),
    # NVIDIA Ada architecture paper, RTX 4090: 165.2 TFLOPS bf16 with fp32 accumulation, dense; 24 GB, 1,008 GB/s.
    "RTX-4090": Gpu(165.2e12, 24 * GB, 1008e9),
}


def is_called(gpu: str, device: str) -> bool:
    """Return whether torch's name of a device is that of a GPU in `GPUS`: `NVIDIA H100 80GB HBM3` is an H100-80GB."""
    return set(gpu.split("-")) <= set(re.split(r"[ -]", device))


def difference_from(gpu: str, device: str, memory: float) -> str | None:
    """Return a sentence about a GPU that is not the one of `GPUS` that a preset was planned for; None if it is.

    Args:
        gpu: the name in `GPUS`.
        device: torch's name of the GPU.
        memory: its bytes of memory without those that the driver keeps.
    """
    planned = GPUS[gpu].memory
    if is_called(gpu, device) and memory > 0.92 * planned:
        return None
    return (
        f"this job runs on an {device} of {memory / GB:.0f} GB, but execution.gpu is {gpu} of {planned / GB:.0f} GB: "
        "the plan's times do not hold, and its memory may not fit"
    )


def processor() -> str:
    """Return the name of this machine's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
