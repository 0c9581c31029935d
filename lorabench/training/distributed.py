"""Several processes, one per GPU, that train one run together: what they exchange, and how a model lies on them.

Each computes its share of a batch; losses, gradients and norms are summed over all, so that the numbers are those of
one process but for the order of additions. One process alone runs the same code and exchanges nothing.

`fsdp` shards a model by accelerate's FSDP2: each process keeps a part of every parameter, its gradient and its
optimizer state, in fp32, and the parameters of a layer come together in fp32 while it is computed, under the same
autocast as on one GPU. `ddp` keeps the whole model in each process and sums gradients once per step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from lorabench.config import Sharding

if TYPE_CHECKING:
    from peft import PeftModel

T = TypeVar("T")
M = TypeVar("M", bound=torch.nn.Module)

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """The processes of a job as one of them sees them; by default it is alone."""

    rank: int = 0
    count: int = 1
    sharding: Sharding = "fsdp"
    device: torch.device = _CPU

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether a model's parameters are spread over the processes."""
        return self.count > 1 and self.sharding == "fsdp"

    def gather(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """As many numbers of every process, (processes, values) in double precision; the same in each."""
        numbers = np.asarray(values, np.float64)
        if self.count == 1:
            return numbers[None]
        own = torch.from_numpy(numbers).to(self.device)
        everyone = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(everyone, own)
        return torch.stack(everyone).cpu().numpy()

    def total(self, value: float) -> float:
        """The sum over processes."""
        return float(self.gather([value]).sum())

    def most(self, value: float) -> float:
        """The largest of all processes."""
        return float(self.gather([value]).max())

    def any(self, happened: bool) -> bool:
        """Whether it happened in any process, so that all decide alike."""
        return bool(self.gather([happened]).any())

    def wait(self) -> None:
        """Until all are here."""
        self.gather([0.0])

    def share(self, lengths: np.ndarray) -> np.ndarray:
        """Positions of the sequences that this process computes, ordered by length, so that all have as much to do."""
        return np.argsort(lengths, kind="stable")[self.rank :: self.count]

    def owners(self, lengths: np.ndarray) -> np.ndarray:
        """The process in whose share each sequence is, (sequences,)."""
        ranks = np.empty(len(lengths), np.int64)
        ranks[np.argsort(lengths, kind="stable")] = np.arange(len(lengths)) % self.count
        return ranks

    def even(self, parts: Iterable[T], nothing: T) -> list[T]:
        """This process's parts, filled up with `nothing` to as many as any has: all must compute together."""
        own = list(parts)
        return own + [nothing] * (int(self.most(len(own))) - len(own))

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum gradients over the processes; those of a sharded model are as soon as they are computed."""
        if self.count > 1 and not self.sharded:
            for parameter in parameters:
                dist.all_reduce(parameter.grad)

    def shard(self, model: M) -> M:
        """Spread a model over the processes, from the CPU of the first; unchanged where nothing is sharded.

        Args:
            model: in the first process with its weights, in the others without (`lorabench.models.base.skeleton`).
        """
        if not self.sharded:
            return model
        from accelerate import Accelerator
        from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
        from peft import PeftModel

        accelerator = Accelerator(cpu=self.device.type == "cpu")
        # Set by hand, as accelerate itself shards on GPUs alone. No policy of precision: parameters come together in
        # fp32, and autocast does what it does on one GPU.
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            reshard_after_forward=True,
            cpu_ram_efficient_loading=True,
        )
        if isinstance(model, PeftModel):
            _tie_beneath(model)
        sharded: M = fsdp2_prepare_model(accelerator, model)
        sharded.enter = MethodType(_call, sharded)  # type: ignore[assignment]
        register_fsdp_forward_method(sharded, "enter")
        for module in sharded.modules():
            if isinstance(module, FSDPModule):
                # A sum, not a mean: the loss is divided by the tokens of all processes.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        # It would hold a copy of every layer's weights in bf16 until the end of the pass.
        torch.set_autocast_cache_enabled(False)
        return sharded


ALONE = Processes()


def join(sharding: Sharding) -> Processes:
    """Join the processes that were started with this one (see `launch.py`)."""
    from accelerate import PartialState

    # The others wait while the first reads a large model from a slow disk.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=1))
    return Processes(state.process_index, state.num_processes, sharding, torch.device(state.device))


def leave(processes: Processes) -> None:
    """The work is done in all processes."""
    if processes.count > 1:
        dist.destroy_process_group()


def enter(model: torch.nn.Module, function: Callable[..., T], *inputs: Any) -> T:
    """`function(model, *inputs)` as a forward pass of the model, in which a sharded one's parameters come together."""
    if not isinstance(model, FSDPModule):
        return function(model, *inputs)
    entered: T = model.enter(function, *inputs)  # type: ignore[operator]
    if not torch.is_grad_enabled():
        # The last layers stay together for a backward pass, which does not come.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    return entered


def _tie_beneath(model: PeftModel) -> None:
    """Tell transformers, which ties weights anew once they are sharded, where PEFT put an adapted layer's weight."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base: Any = model.get_base_model()
    for name, source in list(base.all_tied_weights_keys.items()):
        layer, _, weight = name.rpartition(".")
        if isinstance(base.get_submodule(layer), BaseTunerLayer):
            del base.all_tied_weights_keys[name]
            base.all_tied_weights_keys[f"{layer}.base_layer.{weight}"] = source
    model.tie_weights = partial(base.tie_weights, recompute_mapping=False)


def _call(model: torch.nn.Module, function: Callable[..., T], *inputs: Any) -> T:
    return function(model, *inputs)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be sharded, put together in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that may be sharded along its first dimension."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, or this process's part of it, where `like` lies."""
    if isinstance(like, DTensor):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return tensor.to(like.device)
