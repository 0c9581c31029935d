"""What `lorabench plan` and `lorabench status` print."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lorabench import cost
from lorabench.plan import Plan
from lorabench.progress import Status


def plan_table(plan: Plan, cores: int) -> None:
    """Per experiment: jobs, runs, tokens and estimated minutes; shared runs count once in the total."""
    execution = plan.preset.execution
    at_once = cost.jobs_at_once(plan, cores)
    table = Table(
        title=plan.preset.description,
        title_justify="left",
        caption=f"minutes at {cost.speed(execution) / 1e9:,g} GFLOP/s per job (execution.gflops), {at_once} at a time",
        caption_justify="left",
    )
    table.add_column("experiment")
    for column in ("jobs", "runs", "tokens", "PFLOPs", "minutes"):
        table.add_column(column, justify="right")
    rows = [(name, cost.estimate(plan, plan.of(name), cores)) for name in plan.preset.experiments.trained()]
    every = cost.estimate(plan, list(plan.sweeps), cores)
    if plan.preset.evaluation:
        evaluation = cost.evaluation(plan, cores)
        rows.append(("evaluation", evaluation))
        every = every.plus(evaluation)
    for name, work in [*rows, ("total", every)]:
        if name == "total":
            table.add_section()
        table.add_row(
            name,
            str(work.sweeps),
            str(work.runs) if work.runs else "",
            f"{work.tokens / 1e6:.1f} M",
            f"{work.flops / 1e15:.3g}",
            f"{work.minutes:.0f}" if work.minutes >= 2 else f"{work.minutes:.1f}",
        )
    Console().print(table)


def status_table(status: Status) -> None:
    """How far the work is, what is running, and what has gone silent."""
    console = Console()
    share = status.runs_done / max(1, status.runs_planned)
    console.print(
        f"{status.runs_done}/{status.runs_planned} runs ({share:.0%}), "
        f"{status.sweeps_done}/{status.sweeps_planned} sweeps done"
    )
    for word, jobs in (("running", status.running), ("silent ", status.silent)):
        for job in jobs:
            console.print(
                f"  {word} {job['label']}: run {job['run']}/{job['runs']}, "
                f"lr {job['lr']:g}, seed {job['seed']}, step {job['step']}/{job['steps']}"
            )
    if status.report is not None:
        console.print(f"  report: {status.report}")
