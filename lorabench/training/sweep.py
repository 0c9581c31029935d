"""The training of a sweep's runs, one after another: finished runs are skipped, unfinished ones go on from checkpoints.

The runs are trained in waves, which `lorabench.planning.walk` determines from the validation losses so far.
"""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lorabench.config.inputs import FactsDataset
from lorabench.errors import UserError
from lorabench.models import bf16_products
from lorabench.models.base import load_model, skeleton, weights_sha256
from lorabench.models.counts import base_parameters, train_flops_per_token
from lorabench.models.lora import add_lora
from lorabench.models.lora_products import use_fast_products
from lorabench.models.passes import recompute_activations, trained_parameters
from lorabench.planning.memory import decided
from lorabench.planning.plan import Plan
from lorabench.runs import Run, Sweep, best_lr, ending, next_runs, validation_loss
from lorabench.store.collect import sweep_rows, write_curves, write_test_losses
from lorabench.store.layout import Layout
from lorabench.store.progress import Progress
from lorabench.store.run_folder import RunFolder
from lorabench.training.checkpoint import Checkpoint, whole_weights
from lorabench.training.distributed import SINGLE_PROCESS, Processes
from lorabench.training.loss import check_plain_head
from lorabench.training.provenance import code_state, machine_state, peak_memory_bytes, reset_peak_memory
from lorabench.training.run import Machine, Outcome, fix_workspaces
from lorabench.utils import signals
from lorabench.utils.exhaustion import keep_freed_memory
from lorabench.utils.files import write_json
from lorabench.utils.gpus import difference_from

if TYPE_CHECKING:
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
        if execution.gpu is not None and processes.first:
            memory = torch.cuda.get_device_properties(device).total_memory
            difference = difference_from(execution.gpu, torch.cuda.get_device_name(device), memory)
            if difference is not None:
                logging.warning(difference)
        fix_workspaces()
        # Autocast passes over the products of experts, which would otherwise be computed in fp32 without tensor cores.
        # TF32 has more digits than the bf16 of all other layers.
        torch.backends.cuda.matmul.allow_tf32 = plan.preset.protocol.precision == "bf16"
    return Machine(
        device,
        execution.max_batch_tokens,
        execution.checkpoint_minutes * 60,
        max_cache_tokens=execution.max_cache_tokens,
        processes=processes,
        bf16_products=products,
    )


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

    def checkpoint(self, run: Run) -> Checkpoint:
        """Return the checkpoint of a run."""
        path, machine = self.folder(run).checkpoint, self.machine
        return Checkpoint(path, run.run_id, machine.checkpoint_seconds, machine.processes)

    def announce(self, number: int, run: Run, result: str = "") -> None:
        """Report that a run, the number-th of the sweep, starts, or its result."""
        if self.machine.processes.first:
            sweep = self.sweep
            of = f"/{sweep.n_runs}" if sweep.lattice is None else f" of at most {sweep.most_runs}"
            self.say(
                f"{sweep.condition.label} run {number}{of}: lr {run.lr:g}, seed {run.seed}{result and f': {result}'}"
            )

    def write(self, run: Run, model: torch.nn.Module, outcome: Outcome, environment: dict[str, Any]) -> None:
        """Write a finished run's record, curves and weights atomically. Every process must call this."""
        condition, preset, processes = run.condition, self.plan.preset, self.machine.processes
        config: Any = model.config
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
                "trainable_params": sum(parameter.numel() for parameter in trained_parameters(model).values()),
                "base_params": base_parameters(model),
                "family": config.model_type,
                "hidden_size": config.hidden_size,
                "entropy_bits": dataset.entropy_bits if isinstance(dataset, FactsDataset) else None,
                "train_flops": train_flops_per_token(model) * outcome.train_tokens,
                "peak_mem_bytes": int(processes.most(peak_memory_bytes(self.machine.device))),
            },
            "environment": environment,
        }
        keep = outcome.status != "diverged"
        # PEFT would else add a copy of an adapted unembedding to the adapter.
        options: dict[str, Any] = {"save_embedding_layers": False} if condition.method == "lora" else {}
        if keep and processes.sharded:
            options["state_dict"] = whole_weights(model, processes)
        if processes.first:
            with self.folder(run).finishing() as staging:
                staged = RunFolder(staging.parent, staging.name)
                write_curves(run.run_id, outcome.curve, staged.curves)
                write_test_losses(run.run_id, outcome.test_losses, staged.test_losses)
                if keep:
                    model.save_pretrained(staged.weights, **options)  # type: ignore[operator]
                write_json(record, staged.record)
        processes.wait()


class Base:
    """The base model of a job's sweeps.

    It is loaded once for LoRA, which does not change it, and again after each full fine-tuning. A model that is sharded
    is loaded again for each run, since LoRA must be added before.
    """

    def __init__(self) -> None:
        self._model: PreTrainedModel | None = None

    def untrained(self, context: SweepContext) -> PreTrainedModel:
        """Return the base model; if it will be sharded, only the first process has weights, on its CPU."""
        if self._model is None:
            spec, processes = context.layout.model(context.sweep.condition.model), context.machine.processes
            # An unused sharded model is kept alive by reference cycles, and is as large as the model loaded now.
            gc.collect()
            if processes.sharded:
                self._model = load_model(spec) if processes.first else skeleton(spec)
            else:
                self._model = load_model(spec).to(context.machine.device)
            check_plain_head(self._model)
            if _recomputes(context):
                recompute_activations(self._model)
        return self._model

    def sharded(self, context: SweepContext) -> PreTrainedModel:
        """Return the base model, sharded over the processes if there are several; it can then only be evaluated."""
        model = self.untrained(context)
        if context.machine.processes.sharded:
            self._model = None
        return context.machine.processes.shard(model)

    @contextmanager
    def trainable(self, context: SweepContext, run: Run) -> Iterator[torch.nn.Module]:
        """Provide the model of a run: the base model itself, or with a new adapter, sharded if there are processes."""
        model, processes = self.untrained(context), context.machine.processes
        if run.condition.method == "fullft" or processes.sharded:
            self._model = None
        if run.condition.method == "fullft":
            yield processes.shard(model)
            return
        adapted = with_adapter(model, context, run)
        if processes.sharded:
            yield processes.shard(adapted)
            return
        # With activation checkpointing memory is short, so no second copy of the base in bf16 is kept.
        use_fast_products(adapted, keep_cast=not _recomputes(context))
        try:
            yield adapted
        finally:
            self._model = adapted.unload()
            self._model.requires_grad_(True)


def with_adapter(model: PreTrainedModel, context: SweepContext, run: Run) -> Any:
    """Return a base model with the new adapter of a run."""
    condition = run.condition
    assert condition.rank
    assert condition.placement
    assert condition.alpha
    head = context.plan.preset.protocol.include_unembedding
    init_a = condition.init_a or 1.0
    return add_lora(model, condition.rank, condition.placement, condition.alpha, head, run.seed, init_a)


def _recomputes(context: SweepContext) -> bool:
    return decided(context.plan.preset, context.sweep).execution.activation_checkpointing is True


Trainer = Callable[[SweepContext, Run, Callable[[int], None]], None]
"""A trainer: trains a run, calls the function after each step with the number of finished steps, and writes the run."""


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
        train: trains a run, and keeps the model and data that the sweeps of a job share.
        say: reports one line of progress; called in the first process only.
        processes: the processes that train the sweep together; each calls this function.

    Returns:
        The rows of the sweep's runs (see `lorabench.store.collect.sweep_rows`) in the first process, else nothing.

    Raises:
        UserError: a finished run was made with another commit of a Hugging Face repository than is fetched now.
        Stopped: a signal asked the job to end; finished runs and checkpoints are kept.
    """
    progress = Progress(layout.progress(sweep), sweep)
    context = SweepContext(plan, sweep, layout, machine_of(plan, processes), progress, say)

    def finish(number: int, run: Run) -> None:
        if not context.folder(run).done():
            if processes.any(signals.requested()):
                signals.raise_stopped()
            reset_peak_memory(context.machine.device)
            context.announce(number, run)
            train(context, run, partial(progress.tick, number, run) if processes.first else lambda step: None)
        context.announce(number, run, _result(context.folder(run).read_record()["outcome"]))

    numbers: dict[Run, int] = {}
    losses: dict[tuple[float, int], float] = {}
    while wave := next_runs(sweep, losses):
        if processes.first:
            for run in wave:
                context.folder(run).tidy()
        processes.wait()
        _check_commits(context, [run for run in wave if context.folder(run).done()])
        for run in wave:
            numbers[run] = len(numbers) + 1
            finish(numbers[run], run)
        losses |= {(run.lr, run.seed): validation_loss(context.folder(run).read_record()) for run in wave}
    best = best_lr(sweep, losses)
    if sweep.lattice is not None and processes.first:
        say(f"{sweep.condition.label} {ending(sweep, losses)}")
    # An earlier plan with other LRs may have had another best LR and deleted these weights: train the run again. The
    # weights of a restored run were left behind, and only an evaluation needs them.
    evaluated = any(job.sweep == sweep for job in plan.evaluations())
    chosen = next((run for run in numbers if (run.lr, run.seed) == (best, 0)), None)
    folder = None if chosen is None else context.folder(chosen)
    if chosen and folder and not folder.weights.exists() and (evaluated or not folder.restored.exists()):
        processes.wait()
        if processes.first:
            folder.record.unlink()
        processes.wait()
        finish(numbers[chosen], chosen)
    if not processes.first:
        return []
    if plan.preset.execution.keep_weights == "best":
        for run in numbers:
            if run.lr != best:
                shutil.rmtree(context.folder(run).weights, ignore_errors=True)
    progress.close()
    return sweep_rows([context.folder(run) for run in numbers], sweep)


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
