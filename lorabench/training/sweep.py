"""The training of a sweep's runs: finished runs are skipped, and unfinished ones go on from their checkpoints.

The runs are trained in waves, which `lorabench.planning.walk` determines from the validation losses so far.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lorabench.config.datasets import FactsDataset
from lorabench.config.execution import Execution
from lorabench.errors import UserError
from lorabench.models import bf16_products
from lorabench.models.base import load_model, skeleton, weights_sha256
from lorabench.models.lanes.full import lane_state
from lorabench.models.lanes.lora import stack_lora
from lorabench.models.lanes.shelf import Stack
from lorabench.models.lora import add_adapter, add_lora
from lorabench.models.size import Sizes
from lorabench.models.transformers_names import recompute_activations
from lorabench.planning.lane_count import deal, lane_count
from lorabench.planning.memory import decided
from lorabench.planning.plan import Plan
from lorabench.runs import Run, Sweep, best_lr, ending, next_runs, validation_loss
from lorabench.store.collect import sweep_rows, write_curves, write_test_losses
from lorabench.store.layout import Layout
from lorabench.store.progress import Progress
from lorabench.store.run_folder import RunFolder
from lorabench.training.checkpoint import whole_weights
from lorabench.training.determinism import fix_workspaces
from lorabench.training.distributed import SINGLE_PROCESS, Processes
from lorabench.training.lane_checkpoints import LaneCheckpoints, groups_at_same_position
from lorabench.training.provenance import code_state, machine_state, peak_memory_bytes, reset_peak_memory
from lorabench.training.run import Machine, Outcome
from lorabench.utils import signals
from lorabench.utils.exhaustion import keep_freed_memory
from lorabench.utils.files import write_json
from lorabench.utils.gpus import difference_from

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def machine_of(plan: Plan, processes: Processes = SINGLE_PROCESS) -> Machine:
    """Return the machine of this process: a GPU if there is one, else the CPU with the preset's number of threads."""
    execution = plan.preset.execution
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if processes.count == 1 else processes.device
    products: bf16_products.Products | None = None
    if device.type == "cpu":
        torch.set_num_threads(max(1, execution.threads // processes.count))
        keep_freed_memory()
        if plan.preset.protocol.precision == "bf16":
            products = bf16_products.choose_faster()
    else:
        _warn_of_other_gpu(execution, device, processes)
        fix_workspaces()
        # Autocast passes over the products of experts, which would otherwise be computed in fp32 without tensor cores.
        # TF32 has more digits than the bf16 of all other layers.
        torch.backends.cuda.matmul.allow_tf32 = plan.preset.protocol.precision == "bf16"
    return Machine(
        device,
        execution.max_batch_tokens,
        execution.checkpoint_minutes * 60,
        max_cache_tokens=execution.max_cache_tokens,
        packing=execution.packing,
        processes=processes,
        bf16_products=products,
    )


def _warn_of_other_gpu(execution: Execution, device: torch.device, processes: Processes) -> None:
    if execution.gpu is not None and processes.first:
        memory = torch.cuda.get_device_properties(device).total_memory
        difference = difference_from(execution.gpu, torch.cuda.get_device_name(device), memory)
        if difference is not None:
            logging.warning(difference)


RunGroup = dict[str, tuple[int, Run]]
"""Runs that are trained together, by run_id, each with its number in the sweep."""


@dataclass(frozen=True)
class SweepContext:
    """The plan, files, machine and progress that the runs of one sweep share."""

    plan: Plan
    sweep: Sweep
    layout: Layout
    machine: Machine
    progress: Progress
    say: Callable[[str], None]

    def folder(self, run: Run) -> RunFolder:
        """Return the folder of a run."""
        return RunFolder(self.layout.runs, run.run_id)

    def unfinished(self, runs: Iterable[tuple[int, Run]]) -> list[tuple[int, Run]]:
        """Return the runs that are not finished, with their numbers in the sweep."""
        return [(number, run) for number, run in runs if not self.folder(run).done()]

    def load(self) -> PreTrainedModel:
        """Load the base model; if it will be sharded, only the first process loads weights, on its CPU."""
        spec, processes = self.layout.model(self.sweep.condition.model), self.machine.processes
        # An unused sharded model is kept alive by reference cycles, and is as large as the model loaded now.
        gc.collect()
        if processes.sharded:
            model = load_model(spec) if processes.first else skeleton(spec)
        else:
            model = load_model(spec).to(self.machine.device)
        if self._recomputes:
            recompute_activations(model)
        return model

    def with_lora(self, model: PreTrainedModel, runs: Sequence[Run]) -> PeftModel:
        """Return the model with an adapter for each run, named by its run_id."""
        condition = self.sweep.condition
        assert condition.rank
        assert condition.placement
        assert condition.alpha
        head = self.plan.preset.protocol.include_unembedding
        init_a = condition.init_a or 1.0
        first, *others = runs
        adapted = add_lora(
            model, condition.rank, condition.placement, condition.alpha, head, first.seed, init_a, first.run_id
        )
        for run in others:
            add_adapter(adapted, run.run_id, run.seed, init_a)
        return adapted

    def stacked(self, model: PeftModel, runs: Sequence[Run]) -> Stack:
        """Return the stack of a model that has the runs' adapters."""
        # With activation checkpointing memory is short, so no second copy of the base in bf16 is kept.
        return stack_lora(model, [run.run_id for run in runs], keep_cast=not self._recomputes)

    @property
    def _recomputes(self) -> bool:
        return decided(self.plan.preset, self.sweep).execution.activation_checkpointing is True

    def ticker(self, number: int, run: Run) -> Callable[[int], None]:
        """Return the function that a run calls after each step; only the first process reports progress."""
        return partial(self.progress.tick, number, run) if self.machine.processes.first else lambda step: None

    def begin(self) -> None:
        """Begin to train a group of runs, unless a signal has asked the job to end.

        Raises:
            Stopped: a signal has.
        """
        if self.machine.processes.any(signals.requested()):
            signals.raise_stopped()
        reset_peak_memory(self.machine.device)

    def announce(self, number: int, run: Run, result: str | None = None) -> None:
        """Report that a run starts, or its result."""
        end = "" if result is None else f": {result}"
        if self.machine.processes.first:
            sweep = self.sweep
            of = f"/{sweep.n_runs}" if sweep.lattice is None else f" of at most {sweep.most_runs}"
            self.say(f"run {number}{of}: lr {run.lr:g}, seed {run.seed}{end}")

    def unfinished_groups(self, runs: list[tuple[int, Run]]) -> list[RunGroup]:
        """Group the unfinished ones of some runs, given with their numbers, by the lanes that train them together."""
        machine = self.machine
        gpus = machine.processes.count if machine.device.type == "cuda" else 0
        size = 1 if machine.processes.sharded else lane_count(self.plan.preset, self.sweep, gpus)
        groups, numbers = [], {run: number for number, run in runs}
        # Groups are formed before finished runs are left out, so that a resumed run has the same runs beside it.
        for dealt_runs in deal(self.plan.preset, numbers, size):
            unfinished = self.unfinished((numbers[run], run) for run in dealt_runs)
            group = {run.run_id: (number, run) for number, run in unfinished}
            if group:
                paths = {run_id: self.folder(run).checkpoint for run_id, (_, run) in group.items()}
                groups += [
                    {run_id: group[run_id] for run_id in ids}
                    for ids in groups_at_same_position(paths, machine.processes)
                ]
        return groups

    def checkpoints(self, runs: Iterable[Run]) -> LaneCheckpoints:
        """Return the checkpoints of runs that are trained together."""
        paths = {run.run_id: self.folder(run).checkpoint for run in runs}
        return LaneCheckpoints(paths, self.machine.checkpoint_seconds, self.machine.processes)

    def write(self, run: Run, outcome: Outcome, stack: Stack, sizes: Sizes, environment: dict[str, Any]) -> None:
        """Write a finished run's record, curves and weights atomically. Every process must call this."""
        condition, preset, processes = run.condition, self.plan.preset, self.machine.processes
        config: Any = stack.model.config
        dataset = preset.sources[condition.dataset]
        rollouts = condition.rollouts
        record = {
            "run_id": run.run_id,
            "spec": {
                **asdict(condition),
                **({"group_size": rollouts.group_size, "max_new_tokens": rollouts.max_new_tokens} if rollouts else {}),
                "lr": run.lr,
                "seed": run.seed,
                "protocol": preset.protocol.model_dump(),
            },
            "outcome": {
                **{key: value for key, value in asdict(outcome).items() if key not in ("curve", "test_losses")},
                "trainable_params": stack.lanes[run.run_id].size,
                "base_params": sizes.base_parameters,
                "family": config.model_type,
                "hidden_size": config.hidden_size,
                "entropy_bits": dataset.entropy_bits if isinstance(dataset, FactsDataset) else None,
                "train_flops": sizes.train_flops_per_token * outcome.train_tokens,
                "peak_mem_bytes": int(processes.most(peak_memory_bytes(self.machine.device))),
            },
            "environment": environment,
        }
        keep = outcome.status != "diverged"
        weights = whole_weights(stack.model, processes) if keep and processes.sharded else None
        if processes.first:
            with self.folder(run).finishing() as staging:
                staged = RunFolder(staging.parent, staging.name)
                write_curves(run.run_id, outcome.curve, staged.curves)
                write_test_losses(run.run_id, outcome.test_losses, staged.test_losses)
                if keep:
                    _save_weights(stack, run, staged, weights)
                write_json(record, staged.record)
        processes.wait()


Trainer = Callable[[SweepContext, list[tuple[int, Run]]], None]
"""A trainer: trains the unfinished ones of some runs, given with their number in the sweep, and writes each."""


def run_sweep(
    plan: Plan,
    sweep: Sweep,
    layout: Layout,
    train: Trainer,
    say: Callable[[str], None],
    processes: Processes = SINGLE_PROCESS,
) -> list[dict[str, Any]]:
    """Train all runs of a sweep.

    Args:
        train: trains some runs, and keeps the model and data that the sweeps of a job share.
        say: reports one line of progress; called in the first process only.
        processes: the processes that train the sweep together; each calls this function.

    Returns:
        The rows of the sweep's runs (see `lorabench.store.collect.sweep_rows`) in the first process, else nothing.

    Raises:
        UserError: a finished run was made with another commit of a Hugging Face repository than is fetched now.
    """
    progress = Progress(layout.progress(sweep), sweep)
    context = SweepContext(plan, sweep, layout, machine_of(plan, processes), progress, say)

    def finish(runs: list[tuple[int, Run]]) -> None:
        _check_commits(context, [run for _, run in runs if context.folder(run).done()])
        train(context, runs)
        for number, run in runs:
            context.announce(number, run, _result(context.folder(run).read_record()["outcome"]))

    waves: list[list[tuple[int, Run]]] = []
    losses: dict[tuple[float, int], float] = {}
    while wave := next_runs(sweep, losses):
        if processes.first:
            for run in wave:
                context.folder(run).tidy()
        processes.wait()
        waves.append(list(enumerate(wave, len(losses) + 1)))
        finish(waves[-1])
        losses |= {(run.lr, run.seed): validation_loss(context.folder(run).read_record()) for run in wave}
    best = best_lr(sweep, losses)
    if sweep.lattice is not None and processes.first:
        say(ending(sweep, losses))
    # An earlier plan with other LRs may have had another best LR and deleted these weights: train the run again. The
    # weights of a restored run were left behind, and only an evaluation needs them.
    evaluated = any(job.sweep == sweep for job in plan.evaluations())
    chosen = None if best is None else context.folder(Run(sweep.condition, best, 0))
    if chosen and not chosen.weights.exists() and (evaluated or not chosen.restored.exists()):
        processes.wait()
        if processes.first:
            chosen.record.unlink()
        processes.wait()
        finish(next(wave for wave in waves if any((run.lr, run.seed) == (best, 0) for _, run in wave)))
    if not processes.first:
        return []
    runs = [run for wave in waves for _, run in wave]
    if plan.preset.execution.keep_weights == "best":
        for run in runs:
            if run.lr != best:
                shutil.rmtree(context.folder(run).weights, ignore_errors=True)
    progress.close()
    return sweep_rows([context.folder(run) for run in runs], sweep)


def _check_commits(context: SweepContext, finished: list[Run]) -> None:
    """Raise UserError if a finished run used another commit of a Hugging Face repository than is fetched now."""
    now = context.layout.commits(context.sweep.condition)
    for run in finished:
        then = context.folder(run).read_record()["environment"].get("hub_commits", {})
        for name in (name for name in now if now[name] != then.get(name)):
            raise UserError(
                f"run {run.run_id} was made with {name} at commit {then.get(name)}, but {now[name]} is fetched now: "
                f"write the former into the file of {name} in {context.layout.pins} and fetch again, or delete "
                f"{context.folder(run).final} to train the run again"
            )


def provenance(context: SweepContext) -> dict[str, Any]:
    """Return the machine, code and model versions common to all runs of a job; trainers add the hashes of the data."""
    condition, processes = context.sweep.condition, context.machine.processes
    return {
        **machine_state(context.machine.device),
        "processes": processes.count,
        "sharding": processes.sharding if processes.count > 1 else None,
        "bf16_products": context.machine.bf16_products,
        **code_state(context.layout.patches),
        "model_sha256": weights_sha256(context.layout.model(condition.model)),
        "hub_commits": context.layout.commits(condition),
    }


def now() -> str:
    """Return the time in UTC, for a run's record."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _result(outcome: dict[str, Any]) -> str:
    if outcome["status"] == "diverged":
        return f"diverged at step {outcome['diverged_at']}"
    if "final_reward" in outcome:
        reward = f"accuracy {outcome['base_reward']:.3f} -> {outcome['final_reward']:.3f}"
        return f"{reward}; stopped, no response was ever right" if outcome["status"] == "unrewarded" else reward
    return f"test {outcome['final_test_nll']:.4f} nats"


def _save_weights(stack: Stack, run: Run, folder: RunFolder, weights: dict[str, torch.Tensor] | None) -> None:
    """Save a run's adapter or whole model; `weights` are the gathered weights of a sharded model."""
    model: Any = stack.model
    if run.condition.method == "fullft":
        if stack.shelf is not None:
            weights = lane_state(model, stack.lanes[run.run_id])
        model.save_pretrained(folder.weights, state_dict=weights)
        return
    # Only the adapter is saved: PEFT would add a copy of an adapted unembedding, and makes a folder for each adapter.
    adapter = run.run_id
    model.save_pretrained(folder.weights, save_embedding_layers=False, selected_adapters=[adapter], state_dict=weights)
    for path in (folder.weights / adapter).iterdir():
        os.replace(path, folder.weights / path.name)
    (folder.weights / adapter).rmdir()
