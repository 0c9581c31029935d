"""A job: the sweeps that one process, or several together, trains one after another; and what their runs share.

The runs of a sweep are trained in waves, which `lorabench.runs.next_runs` determines from the validation losses so far.
Finished runs are skipped, and unfinished ones go on from their checkpoints.
"""

from __future__ import annotations

import gc
import hashlib
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorabench.config.inputs import FactsDataset
from lorabench.errors import UserError
from lorabench.models.base import load_model, skeleton, weights_sha256
from lorabench.models.counts import base_parameters, train_flops_per_token
from lorabench.models.lora import add_lora, use_fast_products
from lorabench.models.passes import recompute_activations, trained_parameters
from lorabench.planning.memory import decided
from lorabench.planning.plan import Plan
from lorabench.runs import Job, Run, Sweep, best_lr, ending, next_runs, validation_loss
from lorabench.store.collect import sweep_rows, write_entries, write_job
from lorabench.store.layout import Layout
from lorabench.store.progress import Progress
from lorabench.store.run_folder import RunFolder
from lorabench.training.checkpoint import Checkpoint, whole_weights
from lorabench.training.distributed import SINGLE_PROCESS, Processes
from lorabench.training.loss import check_plain_head
from lorabench.training.run import Machine, Outcome, machine_of, machine_state
from lorabench.utils import signals
from lorabench.utils.exhaustion import memory_for
from lorabench.utils.files import atomic_path, write_json
from lorabench.utils.lock import locked

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

    def folder(self, run: Run) -> RunFolder:
        """Return the folder of a run."""
        return RunFolder(self.layout.runs, run.run_id)

    def checkpoint(self, run: Run) -> Checkpoint:
        """Return the checkpoint of a run."""
        path, machine = self.folder(run).checkpoint, self.machine
        return Checkpoint(path, run.run_id, machine.checkpoint_seconds, machine.processes)

    def recomputes(self) -> bool:
        """Return whether the backward pass computes each layer again."""
        return decided(self.plan.preset, self.sweep).execution.activation_checkpointing is True

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

    def write(self, run: Run, model: torch.nn.Module, outcome: Outcome, environment: dict[str, Any]) -> None:
        """Write a finished run's record, curves and weights atomically. Every process must call this."""
        condition, preset, processes = run.condition, self.plan.preset, self.machine.processes
        rollouts, dataset = condition.rollouts, preset.sources[condition.dataset]
        config: Any = model.config
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
                "peak_mem_bytes": int(processes.most(peak)),
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
                write_entries(run.run_id, map(vars, outcome.curve), "curves", staged.curves)
                write_entries(run.run_id, map(vars, outcome.test_losses), "test_losses", staged.test_losses)
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
            if context.recomputes():
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
            yield processes.shard(model if run.condition.method == "fullft" else with_adapter(model, context, run))
            return
        adapted = with_adapter(model, context, run)
        # With activation checkpointing memory is short, so no second copy of the base in bf16 is kept.
        use_fast_products(adapted, keep_cast=not context.recomputes())
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


def now() -> str:
    """Return the time in UTC, for a run's record."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def code_state(patches: Path) -> dict[str, str | None]:
    """Return the code's git commit and, if the tree is dirty, the hash of its diff, saved in `patches/<hash>.patch`.

    Both are null for an installed wheel, even if the environment lies inside a repository of the user's own.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()).resolve() != _REPOSITORY.resolve():
            return {"git_sha": None, "git_dirty_patch": None}
        sha = git("rev-parse", "HEAD").strip()
        # Other tracked files, such as figures, do not affect a run.
        diff = git("diff", "HEAD", "--", "lorabench", "workflow", "Snakefile")
    except (OSError, subprocess.SubprocessError):
        return {"git_sha": None, "git_dirty_patch": None}
    patch = hashlib.sha256(diff.encode()).hexdigest()[:16] if diff else None
    path = patches / f"{patch}.patch"
    if diff and not path.exists():
        with atomic_path(path) as partial:
            partial.write_text(diff)
    return {"git_sha": sha, "git_dirty_patch": patch}


Trainer = Callable[[SweepContext, Run, Callable[[int], None]], None]
"""A trainer: trains a run, calls the function after each step with the number of finished steps, and writes the run."""


def run_job(
    plan: Plan, job: Job, layout: Layout, say: Callable[[str], None], processes: Processes = SINGLE_PROCESS
) -> None:
    """Train all runs of a job and write its parquet file; each sweep is locked while it is trained.

    Args:
        say: reports one line of progress; called in the first process only.
        processes: the processes that train the job together; each calls this function.

    Raises:
        UserError: memory or disk space ran out, a sweep is locked by a process that shows no sign of life, or a
            finished run was made with another commit of a Hugging Face repository than is fetched now.
        Stopped: a signal asked the job to end; finished runs and checkpoints are kept.
    """
    # The trainer keeps the model, data and graders of the job's sweeps until the end. It is imported here since each
    # trainer imports libraries that the other does not need.
    trainer: AbstractContextManager[Trainer]
    execution = plan.preset.execution
    lower = f"lower execution.max_batch_tokens (now {execution.max_batch_tokens})"
    if job.sweeps[0].condition.task == "rl":
        from lorabench.training.rl.trainer import RlTrainer

        trainer = RlTrainer()
        lower += f" or max_cache_tokens ({execution.max_cache_tokens})"
    else:
        from lorabench.training.sft import SftTrainer

        trainer = nullcontext(SftTrainer())
    rows: list[dict[str, Any]] = []
    with trainer as train:
        for sweep in job.sweeps:
            label = sweep.condition.label
            lock = locked(layout.lock(sweep), label, say) if processes.first else nullcontext()
            with lock, memory_for(label, lower):
                processes.wait()
                rows += run_sweep(plan, sweep, layout, train, say, processes)
    if processes.first:
        write_job(rows, layout.job(job))


def run_sweep(
    plan: Plan, sweep: Sweep, layout: Layout, train: Trainer, say: Callable[[str], None], processes: Processes
) -> list[dict[str, Any]]:
    """Train all runs of a sweep; return their rows (see `sweep_rows`) in the first process, else nothing."""
    progress = Progress(layout.progress(sweep), sweep)
    context = SweepContext(plan, sweep, layout, machine_of(plan, processes))
    device, label = context.machine.device, sweep.condition.label

    def finish(number: int, run: Run) -> None:
        """Train a run unless it is finished, and say how it ended."""
        of = f"/{sweep.n_runs}" if sweep.lattice is None else f" of at most {sweep.most_runs}"
        title = f"{label} run {number}{of}: lr {run.lr:g}, seed {run.seed}"
        if not context.folder(run).done():
            if processes.any(signals.requested()):
                signals.raise_stopped()
            # The peak memory so far is forgotten, so that runs of one process report their own.
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            else:
                # Where the system does not allow this, the peak stays that of all runs so far.
                with suppress(OSError):
                    Path("/proc/self/clear_refs").write_text("5")
            if processes.first:
                say(title)
            train(context, run, partial(progress.tick, number, run) if processes.first else lambda step: None)
        if processes.first:
            say(f"{title}: {_result(context.folder(run).read_record()['outcome'])}")

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
        say(f"{label} {ending(sweep, losses)}")
    # An earlier plan with other LRs may have had another best LR and deleted these weights: train the run again. The
    # weights of a restored run were left behind, and only an evaluation needs them.
    evaluated = any(job.sweep == sweep for job in plan.evaluations())
    for run in (run for run in numbers if (run.lr, run.seed) == (best, 0)):
        folder = context.folder(run)
        if not folder.weights.exists() and (evaluated or not folder.restored.exists()):
            processes.wait()
            if processes.first:
                folder.record.unlink()
            processes.wait()
            finish(numbers[run], run)
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
    fetched = context.layout.commits(context.sweep.condition)
    for run in finished:
        used = context.folder(run).read_record()["environment"].get("hub_commits", {})
        for name in (name for name in fetched if fetched[name] != used.get(name)):
            raise UserError(
                f"run {run.run_id} was made with {name} at commit {used.get(name)}, but {fetched[name]} is fetched "
                f"now: write the former into the file of {name} in {context.layout.pins} and fetch again, or delete "
                f"{context.folder(run).final} to train the run again"
            )


def _result(outcome: dict[str, Any]) -> str:
    if outcome["status"] == "diverged":
        return f"diverged at step {outcome['diverged_at']}"
    if "final_reward" in outcome:
        reward = f"accuracy {outcome['base_reward']:.3f} -> {outcome['final_reward']:.3f}"
        return f"{reward}; stopped, no response was ever right" if outcome["status"] == "unrewarded" else reward
    return f"test {outcome['final_test_nll']:.4f} nats"
