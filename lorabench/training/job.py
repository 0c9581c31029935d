"""A job: the sweeps that one process, or several together, trains one after another."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lorabench.planning.plan import Plan
from lorabench.runs import Job
from lorabench.store.collect import write_job
from lorabench.store.layout import Layout
from lorabench.training.distributed import SINGLE_PROCESS, Processes
from lorabench.training.sweep import Trainer, run_sweep
from lorabench.utils.exhaustion import memory_for
from lorabench.utils.lock import locked


def run_job(
    plan: Plan, job: Job, layout: Layout, say: Callable[[str], None], processes: Processes = SINGLE_PROCESS
) -> None:
    """Train all runs of a job and write its parquet file; each sweep is locked while it is trained.

    Args:
        say: reports one line of progress; called in the first process only.
        processes: the processes that train the job together; each calls this function.

    Raises:
        UserError: memory or disk space ran out, or a sweep is locked by a process that shows no sign of life.
        Stopped: a signal asked the job to end; finished runs and checkpoints are kept.
    """
    # The trainer keeps the model, data and graders of the job's sweeps until the end. It is imported here since each
    # trainer imports libraries that the other does not need.
    trainer: AbstractContextManager[Trainer]
    is_rl = job.sweeps[0].condition.task == "rl"
    if is_rl:
        from lorabench.training.rl.trainer import RlTrainer

        trainer = RlTrainer()
    else:
        from lorabench.training.sft import SftTrainer

        trainer = nullcontext(SftTrainer())
    execution = plan.preset.execution
    lower = f"lower execution.max_batch_tokens (now {execution.max_batch_tokens})"
    lower += f" or max_cache_tokens ({execution.max_cache_tokens})" if is_rl else ""
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
