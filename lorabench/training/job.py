"""A job: the sweeps that one process, or several together, trains one after another."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from lorabench.config.preset import Preset
from lorabench.planning.plan import Plan
from lorabench.runs import Job, Sweep
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
        UserError: memory or disk space ran out, or the file system grants no locks.
        Stopped: a signal asked the job to end; finished runs and checkpoints are kept.
    """
    rows: list[dict[str, Any]] = []
    with _trainer(job.sweeps[0].condition.task) as train:
        for sweep in job.sweeps:
            label, lower = sweep.condition.label, f"lower execution.{_to_lower(plan.preset, sweep)}"
            lock = locked(layout.lock(sweep), label, say) if processes.first else nullcontext()
            with lock, memory_for(label, lower):
                processes.wait()
                rows += run_sweep(plan, sweep, layout, train, _prefixed(label, say), processes)
    if processes.first:
        write_job(rows, layout.job(job))


def _trainer(task: Literal["sft", "rl"]) -> AbstractContextManager[Trainer]:
    """Return the trainer of a job, which keeps the model, data and graders of the job's sweeps until the end."""
    # Imported here since each trainer imports libraries that the other does not need.
    if task == "sft":
        from lorabench.training.sft import SftTrainer

        return nullcontext(SftTrainer())
    from lorabench.training.rl.trainer import RlTrainer

    return RlTrainer()


def _prefixed(label: str, say: Callable[[str], None]) -> Callable[[str], None]:
    return lambda line: say(f"{label} {line}")


def _to_lower(preset: Preset, sweep: Sweep) -> str:
    """Name the settings of `execution` that reduce a sweep's memory when lowered, with their present values."""
    execution = preset.execution
    cache = f" or max_cache_tokens ({execution.max_cache_tokens})" if sweep.condition.task == "rl" else ""
    return f"max_batch_tokens (now {execution.max_batch_tokens}){cache}"
