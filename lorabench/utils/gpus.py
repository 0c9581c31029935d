"""GPUs: those for which cost can be estimated, and those of this machine for jobs that no scheduler gives any.

Without a scheduler each job takes devices that no other job holds: it holds a lock file per device in the machine's
temporary folder, which the kernel releases when the process dies. The module does not import torch, which reads
CUDA_VISIBLE_DEVICES when it is first used.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from lorabench.errors import UserError

ON_CPU = "LORABENCH_ON_CPU"
"""With this variable in the environment, jobs of a preset for a GPU compute on a CPU, to try out a workflow."""

_POLL = 0.5

GB, _GIB = 1e9, float(1 << 30)


@dataclass(frozen=True)
class Gpu:
    """A GPU: its peak FLOP/s of dense bf16 products with fp32 accumulation, and its memory in bytes and bytes/s.

    The memory is the least that torch reports, of which the driver keeps a part. `products` is the FLOP/s that large
    bf16 products reach, and `streaming` the bytes/s at which a kernel reads and writes: shares of the peaks that are
    assumed until runs are measured. FlashAttention-4 is written for some.
    """

    peak_flops: float
    memory: float
    bandwidth: float
    share: float = 0.687
    flash_attention_4: bool = False

    @property
    def products(self) -> float:
        """FLOP/s of large bf16 products."""
        return self.share * self.peak_flops

    @property
    def streaming(self) -> float:
        """Bytes/s of a kernel that reads and writes; so 2.85e12 of an H100 and 4.1e12 of an H200."""
        return 0.853 * self.bandwidth


# Memory is what torch reports in public logs of errors; peaks and bandwidths are those of data sheets.
GPUS = {
    # NVIDIA A100 data sheet (nvidia-a100-datasheet-us): 312 TFLOPS bf16; with 40 GB 1,555 GB/s, with 80 GB SXM 2,039.
    "A100-40GB": Gpu(312e12, 39.3 * _GIB, 1555e9),
    "A100-80GB": Gpu(312e12, 79.1 * _GIB, 2039e9),
    # NVIDIA H100 data sheet, SXM: 1,979 TFLOPS bf16 with sparsity, so 989.5 dense; 3.35 TB/s.
    "H100-80GB": Gpu(989.5e12, 79.1 * _GIB, 3350e9, flash_attention_4=True),
    # NVIDIA H200 data sheet, SXM: compute as H100; 4.8 TB/s.
    "H200": Gpu(989.5e12, 139.7 * _GIB, 4800e9, flash_attention_4=True),
    # NVIDIA DGX B200 data sheet, of eight: 72 PFLOPS in FP8 with sparsity, so 2.25 each in dense bf16; 8 TB/s.
    "B200": Gpu(2250e12, 178.3 * _GIB, 8000e9, share=0.6, flash_attention_4=True),
    # NVIDIA L40S data sheet: 733 TFLOPS bf16 with sparsity, 362 dense; 864 GB/s.
    "L40S": Gpu(362e12, 44.3 * _GIB, 864e9, share=0.6),
    # NVIDIA A10 data sheet: 125 TFLOPS bf16 dense; 600 GB/s.
    "A10": Gpu(125e12, 21.9 * _GIB, 600e9),
    # NVIDIA Ada architecture paper, RTX 4090: 165.2 TFLOPS bf16 with fp32 accumulation, dense; 1,008 GB/s.
    "RTX-4090": Gpu(165.2e12, 23.5 * _GIB, 1008e9),
}


def is_called(gpu: str, device: str) -> bool:
    """Return whether torch's name of a device is that of a GPU in `GPUS`: `NVIDIA H100 80GB HBM3` is an H100-80GB."""
    return set(gpu.split("-")) <= set(re.split(r"[ -]", device))


def difference_from(gpu: str, device: str, memory: float) -> str | None:
    """Return a sentence about a GPU that is not the one of `GPUS` that a preset was planned for; None if it is.

    Given are the name in `GPUS`, torch's name of the device, and its bytes without those that the driver keeps.
    """
    planned = GPUS[gpu].memory
    # Versions of the driver keep parts of the memory that differ a little.
    if is_called(gpu, device) and memory >= 0.98 * planned:
        return None
    return (
        f"this is an {device} of {memory / GB:.0f} GB, but execution.gpu is {gpu} of {planned / GB:.0f} GB: the plan's "
        "times do not hold, and its memory may not fit"
    )


def none_seen(gpu: str, torch: str, cuda: str | None) -> str:
    """Return a sentence about a machine on which torch, built for a version of CUDA or none, sees no GPU of `GPUS`."""
    built = f"for CUDA {cuda}" if cuda else "built without CUDA"
    return (
        f"execution.gpu is {gpu}, and torch {torch}, {built}, sees no GPU on this machine ({processor()}); to compute "
        "on a CPU, set gpu to null and gflops to its speed in the preset's execution"
    )


def processor() -> str:
    """Return the name of this machine's CPU."""
    try:
        name = re.search(r"^model name.*?: *(.*\S)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return platform.processor() or platform.machine()
    return name[1] if name else platform.machine()


def visible_devices() -> list[str]:
    """Return the numbers or UUIDs of the GPUs in CUDA_VISIBLE_DEVICES, or of all that a working `nvidia-smi` lists."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        if not shutil.which("nvidia-smi"):
            return []
        command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        listed = subprocess.run(command, capture_output=True, text=True, check=False)
        return [line.strip() for line in listed.stdout.splitlines()] if listed.returncode == 0 else []
    # CUDA ignores all names after one that is not valid; users write -1 for no GPU.
    return list(takewhile(lambda name: name and name[0] != "-", (name.strip() for name in chosen.split(","))))


@contextmanager
def own_devices(count: int, say: Callable[[str], None]) -> Iterator[None]:
    """Within the context, CUDA_VISIBLE_DEVICES names `count` GPUs that no other job on this machine holds.

    Nothing changes where no GPU is visible, and where Slurm has assigned a job its GPUs; UserError says that fewer are
    visible. `say` is called with one line if this process has to wait for other jobs. Torch, which is not imported yet,
    will take a GPU's memory in segments that grow, unless the user has set its allocator: batches of many lengths and a
    cache that grows otherwise leave gaps between blocks that no tensor fits in.
    """
    # All versions of torch read the older name first.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    devices, slurm_job = visible_devices(), os.environ.get("SLURM_JOB_ID")
    if not devices or (slurm_job and len(devices) <= count):
        yield
        return
    if len(devices) < count:
        raise UserError(f"this job needs {count} GPUs; this machine shows {len(devices)} ({', '.join(devices)})")
    # Within each allocation of Slurm, devices may be numbered from 0.
    scope = f"{os.getuid()}-{slurm_job}" if slurm_job else str(os.getuid())
    folder = Path(tempfile.gettempdir()) / f"lorabench-gpus-{scope}"
    folder.mkdir(exist_ok=True)
    announced = False
    while True:
        # Two jobs that each hold a part of what they need would wait for each other forever, so each gives it back.
        with ExitStack() as locks:
            held: list[str] = []
            for device in devices:
                # The file stays, since a job that is about to lock it would else hold a file without a name.
                file = locks.enter_context((folder / f"{device}.lock").open("w"))
                with suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    held.append(device)
                if len(held) == count:
                    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(held)
                    yield
                    return
        if not announced:
            say(f"waits for {count} of the GPUs {', '.join(devices)}, which other jobs hold")
            announced = True
        time.sleep(_POLL)
