"""What `lorabench plan`, `status` and `doctor` print."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from lorabench.config.execution import Execution
from lorabench.planning.costs import Cost, minutes, per_experiment
from lorabench.planning.plan import Plan
from lorabench.planning.seconds import flops_per_second
from lorabench.store.progress import Status
from lorabench.utils import formats
from lorabench.utils.formats import print_table
from lorabench.utils.gpus import GB, GPUS

if TYPE_CHECKING:
    from lorabench.doctor.record import Check


def plan_table(plan: Plan, cores: int, price: float | None = None, notes: Sequence[str] = ()) -> None:
    """Print what each experiment of a plan costs.

    The columns are jobs, runs, tokens, FLOPs, and either minutes on a CPU or GPU-hours, memory, disk and money.

    Args:
        cores: CPU cores that the jobs share.
        price: the price of one GPU for an hour, in any currency.
        notes: sentences to print below the table: where the machine's speed was measured.
    """
    execution = plan.preset.execution
    rate = flops_per_second(execution) / 1e9
    if notes:
        given = "measured"
    else:
        given = "an assumption, see lorabench/utils/gpus.py" if execution.gflops is None else "execution.gflops"
    rows = per_experiment(plan)
    total = rows["total"]
    costs: dict[str, Callable[[Cost], str]] = {}
    if execution.gpu is None:
        at_once = max(1, cores // execution.threads)
        caption = [f"minutes at {formats.number(rate, 4)} GFLOP/s per job ({given}), {at_once} at a time"]
        costs["minutes"] = lambda row: _and_most(
            row,
            formats.number(minutes(row, at_once), 2),
            formats.number(minutes(row, at_once, most=True), 2),
        )
    else:
        caption = [
            f"{execution.gpu} of {GPUS[execution.gpu].memory / GB:.0f} GB, "
            f"at {formats.number(rate / 1e3, 4)} TFLOP/s ({given})",
            f"the longest job takes {formats.number(total.longest_hours)} hours; "
            f"{formats.number(total.gpu_hours / 24)} days on one GPU",
            f"while it runs, a job needs up to {formats.number(total.working_disk / GB, 2)} GB of disk in "
            "addition, for checkpoints and the weights of all its runs",
        ]
        costs["GPU-hours"] = lambda row: _and_most(
            row, formats.number(row.gpu_hours, 2), formats.number(row.most_gpu_hours, 2)
        )
        costs["GPUs"] = lambda row: f"1-{row.gpus}" if row.gpus > 1 else "1"
        costs["GB/GPU"] = lambda row: f"{row.memory / GB:.0f}"
        costs["disk GB"] = lambda row: formats.number(row.disk / GB, 2)
        if price is not None:
            costs["money"] = lambda row: formats.count(row.gpu_hours * price)
    if any(sweep.condition.rollouts for sweep in plan.sweeps):
        name = {"own": "this project's own sampler", "vllm": "the engine vLLM"}[execution.sampler]
        caption.append(f"responses of RL are drawn by {name} (execution.sampler); its speed is {_speed_of(execution)}")
    if total.most_runs > total.runs:
        caption.append("where sweeps find their LRs (`lrs: auto`): what is expected, and the most that is possible")

    def cells(name: str, row: Cost) -> list[str]:
        runs = _and_most(row, str(row.runs), str(row.most_runs)) if row.runs else ""
        amounts = [formats.amount(row.tokens), formats.number(row.flops / 1e15)]
        return [name, str(row.jobs), runs, *amounts, *(text(row) for text in costs.values())]

    columns = ("jobs", "runs", "tokens", "PFLOPs", *costs)
    texts = [cells(name, row) for name, row in rows.items()]
    title = plan.preset.description
    print_table(("experiment", *columns), texts, columns, title, (*caption, *notes), total=True)


def plan_json(plan: Plan, cores: int, price: float | None = None, notes: Sequence[str] = ()) -> str:
    """Return the numbers of `plan_table` as JSON, times in hours and sizes in bytes."""
    rows = {name: asdict(row) for name, row in per_experiment(plan).items()}
    for row in rows.values():
        # What a single job requests of a cluster says nothing of an experiment.
        for request in ("cpus", "mem_mb", "minutes", "saving_seconds"):
            del row[request]
        row["money"] = None if price is None else row["gpu_hours"] * price
    execution = plan.preset.execution
    machine = {
        "gpu": execution.gpu,
        "flops_per_s": flops_per_second(execution),
        "cores": cores,
        "sampler": execution.sampler,
    }
    return json.dumps({**machine, "notes": list(notes), "experiments": rows}, indent=2)


def _speed_of(execution: Execution) -> str:
    """Return where the speed of the sampler of RL comes from."""
    if execution.gpu is None:
        return "from the GFLOP/s above" if execution.sampler == "own" else "assumed to be that of the own sampler"
    return "assumed" if execution.sampler == "own" else "computed from the GPU's data sheet until it is measured"


def _and_most(row: Cost, expected: str, most: str) -> str:
    return f"{expected} (most {most})" if row.most_runs > row.runs else expected


def status_table(status: Status) -> None:
    """Print how many runs and jobs are done, where the jobs at work are, and from a minute on their silence.

    A job that was killed counts as at work until it is started again; its silence tells.
    """
    share = status.runs_done / max(1, status.runs_planned)
    print(
        f"{status.runs_done}/{status.runs_planned} runs ({share:.0%}), "
        f"{status.jobs_done}/{status.jobs_planned} jobs done"
    )
    for job in status.at_work:
        silence = f"; last sign of life {job['age_s'] / 60:.0f} minutes ago" if job["age_s"] >= 60 else ""
        print(
            f"  {job['label']}: run {job['run']}/{job['runs']}, "
            f"lr {job['lr']:g}, seed {job['seed']}, step {job['step']}/{job['steps']}{silence}"
        )
    if status.report is not None:
        print(f"  report: {status.report}")


def checks_table(checks: Iterable[Check]) -> None:
    """Print the checks of a machine, each with what was measured, what was planned, and a sentence."""
    rows = [
        (
            check.name,
            check.status,
            *("" if value is None else formats.number(value) for value in (check.value, check.planned)),
            check.unit,
            check.sentence,
        )
        for check in checks
    ]
    print_table(("check", "result", "measured", "planned", "unit", ""), rows, ("measured", "planned"))
