"""Training of one run by several processes, one per GPU: their start, communication, and the sharding of the model.

Each process computes its share of a batch; losses, gradients and norms are summed over all processes, so that the
numbers equal those of one process up to the order of additions. A single process runs the same code.

Accelerate's FSDP2 shards the model: each process keeps a part of every parameter, of its gradient and of its optimizer
state, in fp32. A layer's parameters are gathered while it is computed, under the same autocast as on one GPU.

Torch's elastic launcher starts the processes, each with the same command. A failure of one ends all of them; a
`UserError` is passed to the launching process, which shows it once.
"""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import MethodType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lorabench.errors import UserError
from lorabench.models.lora import tie_beneath
from lorabench.utils.signals import GRACE, Stopped

T = TypeVar("T")
M = TypeVar("M", bound=torch.nn.Module)

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """The processes of a job from the point of view of one of them; the default is a single process on the CPU."""

    rank: int = 0
    count: int = 1
    device: torch.device = _CPU

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and reports progress."""
        return self.rank == 0

    def gather(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Gather equally many numbers from every process; all receive (processes, values) in double precision."""
        numbers = np.asarray(values, np.float64)
        if self.count == 1:
            return numbers[None]
        own = torch.from_numpy(numbers).to(self.device)
        everyone = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(everyone, own)
        return torch.stack(everyone).cpu().numpy()

    def gather_objects(self, own: T) -> list[T]:
        """Gather an object from every process; all receive those of all processes, by rank."""
        everyone: list[Any] = [own] * self.count
        if self.count > 1:
            dist.all_gather_object(everyone, own)
        return everyone

    def any(self, happened: bool) -> bool:
        """Return whether `happened` is true in any process, so that all processes decide alike."""
        return bool(self.gather([happened]).any())

    def wait(self) -> None:
        """Wait until all processes have called this method."""
        self.gather([0.0])

    def share(self, lengths: np.ndarray) -> np.ndarray:
        """Return the indices of this process's sequences, dealt by length so that all have similar work."""
        return np.argsort(lengths, kind="stable")[self.rank :: self.count]

    def even(self, parts: Iterable[T], nothing: T) -> list[T]:
        """Pad this process's parts with `nothing`: all processes must make equally many passes through the model."""
        own = list(parts)
        return own + [nothing] * (int(self.gather([len(own)]).max()) - len(own))

    def shard(self, model: M) -> M:
        """Shard a model that has its weights in the first process, on its CPU; without sharding return it unchanged."""
        if self.count == 1:
            return model
        from accelerate import Accelerator
        from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
        from peft import PeftModel

        accelerator = Accelerator(cpu=self.device.type == "cpu")
        # The plugin is set by hand since accelerate itself shards on GPUs only. It has no mixed-precision policy:
        # parameters are gathered in fp32, and autocast works as on one GPU.
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            reshard_after_forward=True,
            cpu_ram_efficient_loading=True,
        )
        if isinstance(model, PeftModel):
            tie_beneath(model)
        sharded: M = fsdp2_prepare_model(accelerator, model)
        sharded.enter = MethodType(lambda model, function, *inputs: function(model, *inputs), sharded)  # type: ignore[assignment]
        register_fsdp_forward_method(sharded, "enter")
        for module in sharded.modules():
            if isinstance(module, FSDPModule):
                # Gradients are summed, not averaged: the loss is already divided by the tokens of all processes.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        # The cache would hold a bf16 copy of every layer's weights until the end of the pass.
        torch.set_autocast_cache_enabled(False)
        return sharded


SINGLE_PROCESS = Processes()
"""A single process on the CPU."""


def launch(count: int, arguments: Sequence[str]) -> None:
    """Run `python ARGUMENTS` in `count` processes and wait for their end.

    After a signal the processes get SIGTERM and have an hour to save their state, however many signals follow; then
    this raises Stopped. UserError says that there are fewer GPUs, or what a process raised; SystemExit that a process
    failed otherwise.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    gpus = torch.cuda.device_count()
    if 0 < gpus < count:
        raise UserError(f"--processes = {count}: this machine shows {gpus} GPUs; at most one process each")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # Thread pools read this before any setting of ours, and accelerate warns if it is not set.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        # The workflow restarts a failed job, which then goes on from its checkpoints.
        max_restarts=0,
        # The launcher's own handler raises at each signal and so would give up waiting for the processes.
        signals_to_handle="SIGHUP,SIGQUIT",
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        # A process that only lost the connection to the one that failed leaves no message.
        left = [failure.error_file_data["message"] for failure in error.failures.values()]
        message = next((message["message"] for message in left if isinstance(message, dict)), None)
        if message is None:
            _, failure = error.get_first_failure()
            sys.exit(f"lorabench: process {failure.local_rank} of {count} ended with exit code {failure.exitcode}")
        raise UserError(message.partition(": ")[2]) from error
    except SignalException as error:
        raise Stopped(error.sigval) from error


@contextmanager
def errors_to_launcher() -> Iterator[None]:
    """Within the context, pass a UserError to the launching process, if there is one, and exit quietly on Stopped."""
    try:
        yield
    except (Stopped, UserError) as error:
        if not dist.is_torchelastic_launched():
            raise
        if isinstance(error, Stopped):
            sys.exit(error.exit_status)
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
        sys.exit(2)


def join() -> Processes:
    """Join the process group of the processes that were started with this one."""
    from accelerate import PartialState

    # The other processes wait while the first reads a large model, perhaps from a slow disk.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=1))
    return Processes(state.process_index, state.num_processes, torch.device(state.device))


def leave(processes: Processes) -> None:
    """Leave the process group."""
    if processes.count > 1:
        dist.destroy_process_group()


def call_as_forward(model: torch.nn.Module, function: Callable[..., T], *inputs: Any) -> T:
    """Call `function(model, *inputs)` as a forward pass of the model, in which FSDP gathers sharded parameters."""
    if not isinstance(model, FSDPModule):
        return function(model, *inputs)
    result: T = model.enter(function, *inputs)  # type: ignore[operator]
    if not torch.is_grad_enabled():
        # FSDP keeps the last layers gathered for a backward pass, which does not follow here.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    return result


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the full tensor in every process, gathered if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor, all of it if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
