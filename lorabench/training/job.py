"""A job: the sweeps, or the run of a long sweep, that one process, or several together, train one after another.

The runs of a sweep are trained in waves (`lorabench.runs.next_runs`). Finished runs are skipped, and unfinished ones go
on from their checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path

import pyarrow as pa
import torch

from lorabench.errors import UserError
from lorabench.planning.plan import Plan
from lorabench.runs import Job, Run, Sweep
from lorabench.store.io import write_table
from lorabench.store.layout import Layout
from lorabench.store.progress import Progress
from lorabench.store.run_folder import RunFolder
from lorabench.store.waves import end_sweep, run_without_weights, waves
from lorabench.training.context import SweepContext
from lorabench.training.distributed import SINGLE_PROCESS, Processes
from lorabench.training.run import machine_of
from lorabench.utils import signals
from lorabench.utils.exhaustion import memory_for
from lorabench.utils.lock import locked

Trainer = Callable[[SweepContext, Run, Callable[[int], None]], None]
"""A trainer: trains a run, calls the function after each step with the number of finished steps, and writes the run."""


def run_job(
    plan: Plan,
    job: Job,
    layout: Layout,
    say: Callable[[str], None],
    processes: Processes = SINGLE_PROCESS,
    run_id: str | None = None,
) -> None:
    """Train all runs of a job and write its parquet file, or train the run with an id and write no such file.

    Every process calls this; `say` reports a line of progress in the first one. After a signal it raises Stopped, and
    finished runs and checkpoints are kept. UserError says that memory or disk space ran out, that the run is not in the
    sweep's next wave, or that a finished run was made with another commit of a Hugging Face repository.
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
            with memory_for(sweep.condition.label, lower):
                train_sweep(plan, sweep, layout, train, say, processes, run_id)
            if processes.first and run_id is None:
                tables.append(end_sweep(plan, sweep, layout, say))
    if tables:
        write_table(pa.concat_tables(tables), layout.job(job))


def train_sweep(
    plan: Plan,
    sweep: Sweep,
    layout: Layout,
    train: Trainer,
    say: Callable[[str], None],
    processes: Processes = SINGLE_PROCESS,
    run_id: str | None = None,
) -> None:
    """Train all runs of a sweep, or the run with an id; a run is locked while it is trained."""
    progress = Progress(layout, sweep)
    context = SweepContext(plan, sweep, layout, machine_of(plan, processes))
    device, label = context.machine.device, sweep.condition.label

    def finish(number: int, run: Run, for_weights: bool = False) -> None:
        """Train a run unless it is finished, with `for_weights` unless its weights are there, and say how it ended."""
        folder = RunFolder(layout.runs, run.run_id)
        of = f"/{sweep.n_runs}" if sweep.lattice is None else f" of at most {sweep.most_runs}"
        title = f"{label} run {number}{of}: lr {run.lr:g}, seed {run.seed}"
        with locked(layout.lock(run), title, say) if processes.first else nullcontext():
            if processes.first:
                folder.tidy()
                if for_weights and not folder.weights.exists():
                    folder.discard()
            processes.wait()
            if not folder.done():
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
                layout.progress(run).unlink(missing_ok=True)
        if processes.first:
            outcome = folder.read_record()["outcome"]
            if outcome["status"] == "diverged":
                result = f"diverged at step {outcome['diverged_at']}"
            elif "final_reward" in outcome:
                result = f"accuracy {outcome['base_reward']:.3f} -> {outcome['final_reward']:.3f} ({outcome['status']})"
            else:
                result = f"test {outcome['final_test_nll']:.4f} nats"
            say(f"{title}: {result}")

    numbers: dict[str, int] = {}
    for wave in waves(sweep, layout):
        for run in wave:
            numbers[run.run_id] = len(numbers) + 1
            if run_id in (None, run.run_id):
                finish(numbers[run.run_id], run)
        if run_id in numbers:
            return
    if run_id is not None:
        raise UserError(f"run {run_id!r} is not one of sweep {sweep.sweep_id}; has the preset changed since?")
    if best := run_without_weights(plan, sweep, layout):
        finish(numbers[best.run_id], best, for_weights=True)
