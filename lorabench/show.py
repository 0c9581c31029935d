"""What `lorabench plan` and `lorabench status` print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorabench import bill, cost
from lorabench.gpus import GB, GPUS
from lorabench.plan import Plan
from lorabench.progress import Status
from lorabench.utils import formats


def plan_table(plan: Plan, cores: int, price: float | None = None, notes: Sequence[str] = ()) -> None:
    """Per experiment: jobs, runs, how many of them are trained together, tokens, FLOPs, and minutes on a CPU or
    GPU-hours, memory, disk and money.

    Args:
        price: of an hour of one GPU.
        notes: sentences below the table.
    """
    execution = plan.preset.execution
    rate = cost.speed(execution) / 1e9
    given = "execution.gflops" if execution.gflops is not None else "an assumption, see lorabench/gpus.py"
    rows = bill.per_experiment(plan)
    last: dict[str, Callable[[bill.Bill], str]] = {}
    if execution.gpu is None:
        at_once = bill.jobs_at_once(plan.preset, cores)
        caption = [f"minutes at {formats.number(rate, 4)} GFLOP/s per job ({given}), {at_once} at a time"]
        last["minutes"] = lambda one: formats.number(bill.minutes(plan, one, cores), 2)
    else:
        every = rows["total"]
        caption = [
            f"{execution.gpu} of {GPUS[execution.gpu].memory / GB:.0f} GB, "
            f"at {formats.number(rate / 1e3, 4)} TFLOP/s ({given})",
            f"the longest job takes {formats.number(every.longest_hours)} hours; "
            f"{formats.number(every.gpu_hours / 24)} days on one GPU",
        ]
        last["GPU-hours"] = lambda one: formats.number(one.gpu_hours, 2)
        last["GPUs"] = lambda one: _up_to(one.gpus)
        last["GB/GPU"] = lambda one: f"{one.memory / GB:.0f}"
        last["disk GB"] = lambda one: formats.number(one.disk / GB, 2)
        if price is not None:
            last["money"] = lambda one: formats.count(one.gpu_hours * price)
    table = Table(
        title=Text(plan.preset.description),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("experiment")
    for column in ("jobs", "runs", "lanes", "tokens", "PFLOPs", *last):
        table.add_column(column, justify="right")
    for name, one in rows.items():
        if name == "total":
            table.add_section()
        runs = [str(one.runs), _up_to(one.lanes)] if one.runs else ["", ""]
        counted = [*runs, formats.amount(one.tokens), formats.number(one.flops / 1e15)]
        table.add_row(name, str(one.jobs), *counted, *(shown(one) for shown in last.values()))
    # Where there is no terminal, none is too narrow.
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for sentence in (*caption, *notes):
        console.print(sentence, highlight=False, soft_wrap=True)


def plan_json(plan: Plan, cores: int, price: float | None = None, notes: Sequence[str] = ()) -> str:
    """The numbers of `plan_table`, in hours and bytes."""
    rows = {name: asdict(one) for name, one in bill.per_experiment(plan).items()}
    for row in rows.values():
        row["money"] = None if price is None else row["gpu_hours"] * price
    every = {"gpu": plan.preset.execution.gpu, "flops_per_s": cost.speed(plan.preset.execution), "cores": cores}
    return json.dumps({**every, "notes": list(notes), "experiments": rows}, indent=2)


def _up_to(most: int) -> str:
    return f"1-{most}" if most > 1 else "1"


def _silence(word: str, job: dict[str, Any]) -> str:
    """How long a job has been silent: killed, or stopped and not taken up again."""
    if word == "running" or job["silent_s"] is None:
        return ""
    if job["silent_s"] < 0:
        return f"; last sign of life {-job['silent_s'] / 60:.0f} minutes ahead of this file system's clock"
    return f"; last sign of life {job['silent_s'] / 60:.0f} minutes ago"


def status_table(status: Status) -> None:
    """How far the work is, what is running, and what has gone silent."""
    console = Console()
    share = status.runs_done / max(1, status.runs_planned)
    console.print(
        f"{status.runs_done}/{status.runs_planned} runs ({formats.percent(share)}), "
        f"{status.jobs_done}/{status.jobs_planned} jobs done"
    )
    for word, jobs in (("running", status.running), ("silent ", status.silent)):
        for job in jobs:
            console.print(
                f"  {word} {job['label']}: run {job['run']}/{job['runs']}, "
                f"lr {formats.lr(job['lr'])}, seed {job['seed']}, "
                f"step {job['step']}/{job['steps']}{_silence(word, job)}"
            )
    if status.report is not None:
        console.print(f"  report: {status.report}")
