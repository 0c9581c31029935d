"""A job: the sweeps that one process, or several together, train one after another."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

from lorabench.exhausted import memory_for
from lorabench.lanes import lanes_of
from lorabench.lock import locked
from lorabench.tables import write_job
from lorabench.training.distributed import ALONE, Processes
from lorabench.training.sweep import Train, run_sweep

if TYPE_CHECKING:
    from lorabench.config import Preset
    from lorabench.layout import Layout
    from lorabench.plan import Job, Plan, Sweep


def run_job(plan: Plan, job: Job, layout: Layout, say: Callable[[str], None], processes: Processes = ALONE) -> None:
    """Train all runs of a job and write its parquet. No other process works on the runs of a sweep meanwhile.

    Args:
        say: takes one line of progress for a person; called in the first process only.
        processes: those that do this together; each calls this function.

    Raises:
        UserError: memory or disk space ran out, or a sweep's runs are locked by a process that gives no sign of life.
        Stopped: it was asked to end; what was done is kept.
    """
    rows: list[dict[str, Any]] = []
    with _trainer(job.sweeps[0].condition.task) as train:
        for sweep in job.sweeps:
            label, lower = sweep.condition.label, f"lower execution.{_to_lower(plan.preset, sweep, processes.count)}"
            lock = locked(layout.lock(sweep), label, say) if processes.first else nullcontext()
            with lock, memory_for(label, lower):
                processes.wait()
                rows += run_sweep(plan, sweep, layout, train, _about(label, say), processes)
    if processes.first:
        write_job(rows, layout.job(job))


def _trainer(task: Literal["sft", "rl"]) -> AbstractContextManager[Train]:
    """What trains the runs of a job, and keeps what its sweeps have in common until its end."""
    # Each brings its own libraries: SFT needs no graders, RL no token caches.
    if task == "sft":
        from lorabench.training.sft_job import SftTrainer

        return nullcontext(SftTrainer())
    from lorabench.training.rl.job import RlTrainer

    return RlTrainer()


def _about(label: str, say: Callable[[str], None]) -> Callable[[str], None]:
    return lambda line: say(f"{label} {line}")


def _to_lower(preset: Preset, sweep: Sweep, processes: int) -> str:
    """What takes less memory in a sweep when it is lower, and how high it is: settings of `execution`."""
    execution, lanes = preset.execution, lanes_of(preset, sweep, processes)
    found = [f"max_batch_tokens (now {execution.max_batch_tokens})"]
    if sweep.condition.task == "rl":
        found.append(f"max_cache_tokens ({execution.max_cache_tokens})")
    if lanes > 1:
        found.append(f"lanes ({lanes})")
    return " or ".join(filter(None, [", ".join(found[:-1]), found[-1]]))
