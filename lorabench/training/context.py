"""What the runs of a sweep share: files, machine and base model; and the record of what trained them."""

from __future__ import annotations

import gc
import hashlib
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorabench.config.fields import CHANGES_BASE, METHOD_NAMES
from lorabench.config.inputs import FactsDataset, curve_examples
from lorabench.errors import UserError
from lorabench.models.base import load_model, skeleton, weights_sha256
from lorabench.models.counts import base_parameters, train_flops_per_token
from lorabench.models.fused import fuse
from lorabench.models.lora import add_lora, hold_in_bf16, save_adapter, use_fast_products
from lorabench.models.passes import recompute_activations, trained_parameters
from lorabench.models.specs import dimensions
from lorabench.planning.memory import decided
from lorabench.planning.plan import Plan
from lorabench.runs import Run, Sweep
from lorabench.store.collect import write_entries
from lorabench.store.layout import Layout
from lorabench.store.run_folder import RunFolder
from lorabench.store.schemas import CURVES, RUN_TEST_LOSSES
from lorabench.training.checkpoint import Checkpoint
from lorabench.training.distributed import full_tensor
from lorabench.training.loss import check_plain_head
from lorabench.training.run import Machine, Outcome, machine_state
from lorabench.utils.files import atomic_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class SweepContext:
    """The plan, files and machine that the runs of one sweep share."""

    plan: Plan
    sweep: Sweep
    layout: Layout
    machine: Machine

    def checkpoint(self, run: Run) -> Checkpoint:
        """Return the checkpoint of a run."""
        path, machine = RunFolder(self.layout.runs, run.run_id).checkpoint, self.machine
        return Checkpoint(path, run.run_id, machine.checkpoint_seconds, machine.processes)

    @cached_property
    def recomputed_layers(self) -> tuple[int, int]:
        """The number of layers that the backward pass computes again, and of those that keep their activations."""
        preset = decided(self.plan.preset, self.sweep, self.machine.processes.count)
        layers = dimensions(preset.models[self.sweep.condition.model]).layers
        again = preset.execution.recomputed_layers(layers)
        return again, layers - again

    def provenance(self) -> dict[str, Any]:
        """Return the machine, code and model versions common to all runs of a job; trainers add hashes of the data."""
        return {
            **machine_state(self.machine.device),
            "processes": self.machine.processes.count,
            "bf16_products": self.machine.bf16_products,
            **code_state(self.layout.patches),
            "model_sha256": weights_sha256(self.layout.model(self.sweep.condition.model)),
            "hub_commits": self.layout.commits(self.sweep.condition),
        }

    def write(self, run: Run, model: Any, outcome: Outcome, environment: dict[str, Any]) -> None:
        """Write a finished run's record, curves and weights atomically. Every process must call this."""
        condition, preset, processes = run.condition, self.plan.preset, self.machine.processes
        rollouts, dataset = condition.rollouts, preset.sources[condition.dataset]
        config = model.config
        if self.machine.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.machine.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        record = {
            "run_id": run.run_id,
            "spec": {
                **asdict(condition),
                **({"group_size": rollouts.group_size, "max_new_tokens": rollouts.max_new_tokens} if rollouts else {}),
                "lr": run.lr,
                "seed": run.seed,
                "curve_examples": curve_examples(dataset),
                "protocol": preset.protocol.model_dump(),
            },
            "outcome": {
                **{key: value for key, value in asdict(outcome).items() if key not in ("curve", "test_losses")},
                "trainable_params": sum(parameter.numel() for parameter in trained_parameters(model).values()),
                "base_params": base_parameters(model),
                "family": config.model_type,
                "hidden_size": config.hidden_size,
                "entropy_bits": dataset.entropy_bits if isinstance(dataset, FactsDataset) else None,
                "train_flops": train_flops_per_token(model) * outcome.train_tokens,
                "peak_mem_bytes": int(processes.gather([peak]).max()),
            },
            "environment": environment,
        }
        keep = outcome.status != "diverged"
        state: dict[str, torch.Tensor] | None = None
        if keep and processes.count > 1:
            # Every process takes part in gathering; the first one keeps the tensors.
            whole = ((name, full_tensor(weight.detach())) for name, weight in trained_parameters(model).items())
            state = {name: weight.cpu() for name, weight in whole if processes.first}
        if processes.first:
            with RunFolder(self.layout.runs, run.run_id).finishing(record) as staging:
                staged = RunFolder(staging.parent, staging.name)
                write_entries(run.run_id, outcome.curve, CURVES, staged.curves)
                write_entries(run.run_id, outcome.test_losses, RUN_TEST_LOSSES, staged.test_losses)
                if keep:
                    if condition.method == "fullft":
                        model.save_pretrained(staged.weights, state_dict=state)
                    else:
                        save_adapter(model, staged.weights, state)
        processes.wait()


class Base:
    """The base model of a job's sweeps: loaded once for LoRA, and again after runs that change it or are sharded."""

    def __init__(self) -> None:
        self._model: PreTrainedModel | None = None

    def untrained(self, context: SweepContext) -> PreTrainedModel:
        """Return the base model; if it will be sharded, only the first process has weights, on its CPU."""
        processes = context.machine.processes
        if self._model is None:
            spec = context.layout.model(context.sweep.condition.model)
            # An unused sharded model is kept alive by reference cycles, and is as large as the model loaded now.
            gc.collect()
            self._model = load_model(spec) if processes.first else skeleton(spec)
            check_plain_head(self._model)
            if context.machine.device.type == "cuda" and context.plan.preset.execution.fused_kernels:
                fuse(self._model)
            recomputed, keeping = context.recomputed_layers
            if recomputed:
                recompute_activations(self._model, keeping)
        if processes.count == 1:
            frozen = context.sweep.condition.method not in ("fullft", *CHANGES_BASE)
            if frozen and context.machine.autocast == torch.bfloat16:
                hold_in_bf16(self._model)
            else:
                # A sweep of LoRA may have used it before.
                self._model.float()
            self._model.to(context.machine.device)
        return self._model

    def sharded(self, context: SweepContext) -> PreTrainedModel:
        """Return the base model, sharded over the processes if there are several; it can then only be evaluated."""
        model = self.untrained(context)
        if context.machine.processes.count > 1:
            self._model = None
        return context.machine.processes.shard(model)

    @contextmanager
    def trainable(self, context: SweepContext, run: Run) -> Iterator[torch.nn.Module]:
        """Provide the model of a run: the base model itself, or with a new adapter, sharded if there are processes."""
        model, processes, method = self.untrained(context), context.machine.processes, run.condition.method
        if processes.count > 1 and method not in ("fullft", "lora"):
            name = METHOD_NAMES[method]
            raise UserError(f"{name} needs whole layers where it starts: --processes = {processes.count}; allowed: 1")
        adapted: Any = model if method == "fullft" else with_adapter(model, context, run)
        if method == "fullft" or processes.count > 1:
            self._model = None
            yield processes.shard(adapted)
            return
        # Where activations are recomputed, memory is short, so no second copy of the base in bf16 is kept.
        use_fast_products(adapted, keep_cast=not context.recomputed_layers[0])
        try:
            yield adapted
        finally:
            if method in CHANGES_BASE:
                self._model = None
            else:
                self._model = adapted.unload()
                self._model.requires_grad_(True)


def with_adapter(model: PreTrainedModel, context: SweepContext, run: Run) -> Any:
    """Return a base model with the new adapter of a run."""
    condition, head = run.condition, context.plan.preset.protocol.include_unembedding
    sizes: tuple[Any, Any, Any] = condition.rank, condition.placement, condition.alpha
    return add_lora(model, *sizes, head, run.seed, condition.init_a or 1.0, condition.method)


def code_state(patches: Path) -> dict[str, str | None]:
    """Return the code's git commit and, if the tree is dirty, the hash of its diff, saved in `patches/<hash>.patch`.

    Both are null for an installed wheel, even if the environment lies inside a repository of the user's own.
    """

    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", *arguments], cwd=_REPOSITORY, capture_output=True, check=True, timeout=30).stdout

    unknown: dict[str, str | None] = {"git_sha": None, "git_dirty_patch": None}
    if not (_REPOSITORY / ".git").exists():
        return unknown
    try:
        sha = git("rev-parse", "HEAD").decode().strip()
        # Other tracked files, such as figures, do not affect a run.
        diff = git("diff", "HEAD", "--", "lorabench", "workflow")
    except (OSError, subprocess.SubprocessError):
        return unknown
    patch = hashlib.sha256(diff).hexdigest()[:16] if diff else None
    path = patches / f"{patch}.patch"
    if diff and not path.exists():
        with atomic_path(path) as partial:
            partial.write_bytes(diff)
    return {"git_sha": sha, "git_dirty_patch": patch}
