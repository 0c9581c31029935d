"""The costs of a plan as `lorabench plan` prints them: a table, or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from lorabench.planning.costs import Cost, path_hours, per_experiment
from lorabench.planning.memory import gpus_needed, title
from lorabench.planning.plan import Plan
from lorabench.planning.seconds import flops_per_second
from lorabench.runs import Job
from lorabench.utils.formats import amount, count, number, print_table
from lorabench.utils.gpus import GB, GPUS


def plan_table(plan: Plan, cores: int, price: float | None = None, notes: Sequence[str] = ()) -> None:
    """Print what each experiment of a plan costs.

    The columns are jobs, runs, tokens, FLOPs, and either minutes on a CPU, whose `cores` the jobs share, or GPU-hours,
    the hours of the critical path, memory, disk, and money by the price of one GPU for an hour. Notes below the table
    say where the machine's speed was measured.
    """
    execution, rows = plan.preset.execution, per_experiment(plan)
    longest = _longest(plan) if execution.gpu else []
    at_once = max(1, cores // execution.threads)
    columns = ["experiment", "jobs", "runs", "tokens", "PFLOPs"]
    if execution.gpu is None:
        columns.append("minutes")
    else:
        columns += ["GPU-hours", "path hours", "GPUs", "GB/GPU", "disk GB", *([] if price is None else ["money"])]
    table = []
    for name, row in rows.items():
        runs = _and_most(row, str(row.runs), str(row.most_runs)) if row.runs else ""
        cells = [name, str(row.jobs), runs, amount(row.tokens), number(row.flops / 1e15)]
        if execution.gpu is None:
            minutes = 60 / min(at_once, row.jobs)
            cells.append(_and_most(row, *(number(minutes * time, 2) for time in (row.job_hours, row.most_job_hours))))
        else:
            cells.append(_and_most(row, *(number(hours, 2) for hours in (row.gpu_hours, row.most_gpu_hours))))
            cells += [number(_least_hours(name, row, longest), 2), f"1-{row.gpus}" if row.gpus > 1 else "1"]
            cells += [f"{row.memory / GB:.0f}", number(row.disk / GB, 2)]
            cells += [] if price is None else [count(row.gpu_hours * price)]
        table.append(cells)
    caption = _caption(plan, rows["total"], at_once, longest, measured=bool(notes))
    print_table(columns, table, columns[1:], plan.preset.description, (*caption, *notes), total=True)


def _longest(plan: Plan) -> list[tuple[float, Job]]:
    """Return the path hours of each training job, and the job; the longest, which is the critical path, first."""
    return sorted(((path_hours(plan, job), job) for job in plan.jobs), key=lambda path: -path[0])


def _least_hours(name: str, row: Cost, longest: Sequence[tuple[float, Job]]) -> float:
    """Return the hours of the longest path of an experiment, or of all (`total`)."""
    hours = (hours for hours, job in longest if name == "total" or name in job.experiments)
    # No training job belongs to the experiment `compute` and to evaluations.
    return next(hours, row.longest_job_hours)


def _and_most(row: Cost, expected: str, most: str) -> str:
    return f"{expected} (most {most})" if row.most_runs > row.runs else expected


def _caption(plan: Plan, total: Cost, at_once: int, longest: Sequence[tuple[float, Job]], measured: bool) -> list[str]:
    """Return the sentences on how the costs were estimated, on the longest path and job, and on divided jobs."""
    execution = plan.preset.execution
    rate, gpu = flops_per_second(execution), execution.gpu
    assumed = "an assumption, see lorabench/utils/gpus.py" if execution.gflops is None else "execution.gflops"
    speed = "measured" if measured else assumed
    if gpu is None:
        caption = [f"minutes at {number(rate / 1e9, 4)} GFLOP/s per job ({speed}), {at_once} at a time"]
    else:
        path = ""
        if longest:
            hours, job = longest[0]
            first, *others = job.sweeps
            what = title(first.condition) + (f" and {len(others)} more" if others else "")
            waves = f" in {len(first.expected_waves())} waves" if plan.is_split(job) else ""
            path = f" ({number(hours / 24, 2)} days), {what}: {number(hours, 2)} to train {job.n_runs} runs{waves}"
        caption = [
            f"{gpu} of {GPUS[gpu].memory / GB:.0f} GB, at {number(rate / 1e12, 4)} TFLOP/s ({speed})",
            f"{number(total.gpu_hours / 24)} days on one GPU; however many there are, it takes the hours of "
            f"the critical path{path}",
            f"while it runs, a job needs up to {number(total.working_disk / GB, 2)} GB of disk in "
            "addition, for checkpoints and the weights of all its runs",
        ]
    longest_job, limit = (number(hours, 3) for hours in (total.longest_job_hours, execution.job_hours))
    if divided := [job.n_runs for job in plan.jobs if plan.is_split(job)]:
        caption.append(
            f"the longest job takes {longest_job} hours; {len(divided)} jobs would take longer than {limit} hours "
            f"(execution.job_hours), so each of their {sum(divided):,} runs is a job of its own"
        )
    elif gpu is not None:
        caption.append(f"the longest job takes {longest_job} hours")
    if more := sum(gpus > gpus_needed(plan.preset, sweep) for sweep, gpus in plan.gpus.items()):
        caption.append(
            f"the jobs of {more} sweeps use more GPUs than it takes to hold them, to keep to execution.job_hours and "
            "execution.path_hours"
        )
    if any(sweep.condition.rollouts for sweep in plan.sweeps):
        sampler, source = {
            ("own", False): ("this project's own sampler", "from the GFLOP/s above"),
            ("vllm", False): ("the engine vLLM", "assumed to be that of the own sampler"),
            ("own", True): ("this project's own sampler", "assumed"),
            ("vllm", True): ("the engine vLLM", "computed from the GPU's data sheet until it is measured"),
        }[execution.sampler, gpu is not None]
        caption.append(f"responses of RL are drawn by {sampler} (execution.sampler); its speed is {source}")
    if total.most_runs > total.runs:
        caption.append("where sweeps find their LRs (`lrs: auto`): what is expected, and the most that is possible")
    return caption


def plan_json(plan: Plan, cores: int, price: float | None = None, notes: Sequence[str] = ()) -> str:
    """Return the numbers of `plan_table` as JSON, times in hours and sizes in bytes."""
    costs, longest = per_experiment(plan), _longest(plan)
    rows = {name: asdict(row) | {"path_hours": _least_hours(name, row, longest)} for name, row in costs.items()}
    for row in rows.values():
        # What a single job requests of a cluster says nothing of an experiment.
        for request in ("cpus", "mem_mb", "minutes", "saving_seconds"):
            del row[request]
        row["money"] = None if price is None else row["gpu_hours"] * price
    execution = plan.preset.execution
    machine: dict[str, object] = {"gpu": execution.gpu, "flops_per_s": flops_per_second(execution), "cores": cores}
    machine |= {"sampler": execution.sampler, "notes": list(notes)}
    return json.dumps(machine | {"experiments": rows}, indent=2)
