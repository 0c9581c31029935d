"""A job: the sweeps that one process, or several together, trains one after another.

The runs of a sweep are trained in waves, which `lorabench.runs.next_runs` determines from the validation losses so far.
Finished runs are skipped, and unfinished ones go on from their checkpoints.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from lorabench.errors import UserError
from lorabench.planning.plan import Plan
from lorabench.runs import Job, Run, Sweep, best_lr, ending, next_runs, validation_loss
from lorabench.store.collect import sweep_table
from lorabench.store.io import write_table
from lorabench.store.layout import Layout
from lorabench.store.progress import Progress
from lorabench.training.context import SweepContext
from lorabench.training.distributed import SINGLE_PROCESS, Processes
from lorabench.training.run import machine_of
from lorabench.utils import signals
from lorabench.utils.exhaustion import memory_for
from lorabench.utils.lock import locked

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
    tables: list[pa.Table] = []
    with trainer as train:
        for sweep in job.sweeps:
            label = sweep.condition.label
            lock = locked(layout.lock(sweep), label, say) if processes.first else nullcontext()
            with lock, memory_for(label, lower):
                processes.wait()
                tables += run_sweep(plan, sweep, layout, train, say, processes)
    if processes.first:
        write_table(pa.concat_tables(tables), layout.job(job))


def run_sweep(
    plan: Plan, sweep: Sweep, layout: Layout, train: Trainer, say: Callable[[str], None], processes: Processes
) -> list[pa.Table]:
    """Train all runs of a sweep; return the table of them (see `sweep_table`) in the first process, else nothing."""
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
    for run in (run for run in numbers if (run.lr, run.seed) == (best, sweep.seeds.first)):
        folder = context.folder(run)
        if not folder.weights.exists() and (evaluated or not folder.restored.exists()):
            processes.wait()
            if processes.first:
                folder.discard()
            processes.wait()
            finish(numbers[run], run)
    if not processes.first:
        return []
    if plan.preset.execution.keep_weights == "best":
        for run in numbers:
            if run.lr != best:
                shutil.rmtree(context.folder(run).weights, ignore_errors=True)
    progress.path.unlink(missing_ok=True)
    return [sweep_table([context.folder(run) for run in numbers], sweep)]


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
        when = {"unrewarded": "ever right", "collapsed": "right any more"}.get(outcome["status"])
        return f"{reward}; stopped, no response was {when}" if when else reward
    return f"test {outcome['final_test_nll']:.4f} nats"
