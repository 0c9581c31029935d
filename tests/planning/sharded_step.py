"""The peak memory of a training step of one of several processes that share a model; run by torchrun.

Prints the largest sum of the bytes of all tensors that are alive at an operation: weights, moments, gradients and
activations. FSDP frees the storage of gathered weights and keeps the tensor, so sizes are read at each operation.
"""

from __future__ import annotations

import sys
import weakref

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorabench.config.inputs import TinyModel
from lorabench.models.base import load_model
from lorabench.models.lora import add_lora
from lorabench.models.passes import recompute_activations
from lorabench.training.distributed import join, leave
from lorabench.training.loss import Batch, add_gradient


class Alive(TorchDispatchMode):
    """Tracks the bytes of the storages that are alive."""

    def __init__(self, held):
        super().__init__()
        self.peak, self._storages = 0, {}
        self._see(held)

    def _see(self, tree):
        for leaf in tree_leaves(tree):
            if isinstance(leaf, torch.Tensor):
                storage = (leaf.to_local() if isinstance(leaf, DTensor) else leaf).untyped_storage()
                self._storages.setdefault(storage._cdata, weakref.ref(storage))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self._see((args, kwargs, out))
        alive = {key: storage for key, reference in self._storages.items() if (storage := reference()) is not None}
        self._storages = {key: self._storages[key] for key in alive}
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive.values()))
        return out


def main(name: str, rank: int, recomputed: int, bf16: bool, batch: int, length: int, pieces: int) -> None:
    processes = join()
    model = load_model(TinyModel(kind="tiny", name=name))
    if rank:
        model = add_lora(model, rank, "all", 32, True, seed=0)
    if recomputed:
        recompute_activations(model, model.config.num_hidden_layers - recomputed)
    sharded = processes.shard(model)
    inputs, targets = torch.randint(sharded.config.vocab_size, (2, batch, length))
    optimizer = torch.optim.AdamW([p for p in sharded.parameters() if p.requires_grad], lr=0.0, foreach=False)

    def step() -> None:
        for _ in range(2):
            # A batch has several parts, and the gradients of one wait for the next.
            cast = torch.bfloat16 if bf16 else None
            add_gradient(sharded, Batch(inputs, targets), 2 * targets.numel(), cast, pieces)
        optimizer.step()
        optimizer.zero_grad()

    step()
    with Alive([list(sharded.parameters()), [list(state.values()) for state in optimizer.state.values()]]) as alive:
        step()
    if processes.first:
        print(f"peak {alive.peak}")
    leave(processes)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
