"""The costs of a plan as `lorabench plan` prints them, by the speed of the machine where it was measured; no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from statistics import median

from lorabench.config.fields import METHOD_NAMES
from lorabench.doctor.record import record_for
from lorabench.planning.costs import Cost, path_hours, per_experiment
from lorabench.planning.memory import title
from lorabench.planning.plan import Plan
from lorabench.planning.seconds import flops_per_second, run_seconds, training_of
from lorabench.runs import Job
from lorabench.store.layout import Layout
from lorabench.utils.formats import amount, count, number, print_table
from lorabench.utils.gpus import GB, GPUS, is_called, processor


def measured_speed(plan: Plan, layout: Layout) -> tuple[dict[str, float], str] | None:
    """Return the speed of the machine that a plan is for, by the preset's finished runs or by `lorabench doctor`.

    It is a setting of `execution`: of a CPU `gflops`, the FLOPs of the cost model for all runs on this machine's
    processor over their seconds; of the preset's GPU `gpu_time`. A sentence says where they were measured. None is
    returned where nothing was measured.
    """
    preset, gpu = plan.preset, plan.preset.execution.gpu
    unit = 1 / preset.execution.gpu_time if gpu else flops_per_second(preset.execution) / 1e9
    # For each run the predicted work, the seconds that do not depend on the speed, and the measured seconds.
    work: list[tuple[float, float, float]] = []
    devices: set[str] = set()
    if list(layout.tables().glob("runs.*")):
        # Imported here, since a plan without measured runs starts faster without numpy and pyarrow.
        from lorabench.store.io import read_rows

        sweeps = {run_id: sweep for sweep in plan.sweeps for run_id in sweep.run_ids}
        for row in read_rows(layout.tables(), "runs", ("run_id", "status", "device", "wall_s")):
            sweep, device = sweeps.get(row["run_id"]), row["device"] or ""
            here = is_called(gpu, device) if gpu else device == processor()
            if sweep and here and row["status"] == "done" and row["wall_s"]:
                computing, waiting = run_seconds(preset, sweep, plan.gpus[sweep])
                work.append((computing * unit, waiting, row["wall_s"]))
                devices.add(device)
    if work:
        # The fixed seconds are an assumption, so they never count as more than half of a run's measured seconds.
        speed = sum(amount for amount, *_ in work) / sum(max(wall - waiting, wall / 2) for _, waiting, wall in work)
        ratios = [(amount / speed + waiting) / wall for amount, waiting, wall in work]
        setting, text = _speed(gpu, speed)
        return setting, (
            f"measured on {len(work)} runs on {', '.join(sorted(devices))}: {text}; predicted over "
            f"measured time, median and range: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    record = record_for(preset.execution)
    # A CPU's speed depends on the width of the model, the precision and the threads, and so on the preset.
    if record is None or (gpu is None and record.preset != layout.name):
        return None
    if gpu and record.gpu_time is not None:
        return {"gpu_time": record.gpu_time}, record.sentence
    return None if gpu or record.gflops is None else ({"gflops": record.gflops}, record.sentence)


def _speed(gpu: str | None, speed: float) -> tuple[dict[str, float], str]:
    """Return a setting of `execution` for a speed in GFLOP/s, or of a GPU in units of its roofline's, and its text."""
    if gpu is None:
        return {"gflops": speed}, f"{speed:,.3g} GFLOP/s"
    return {"gpu_time": 1 / speed}, f"{1 / speed:.2f} times the seconds by the roofline"


def plan_table(plan: Plan, price: float | None = None, measured: str | None = None) -> None:
    """Print what each experiment of a plan costs.

    The columns are jobs, runs, tokens, FLOPs, and either minutes on a CPU, whose cores the jobs share, or GPU-hours,
    the hours of the critical path, memory, disk, and money by the price of one GPU for an hour. A last sentence says
    where the machine's speed was `measured`.
    """
    execution, rows = plan.preset.execution, per_experiment(plan)
    # The longest path, which is the critical one, is the first.
    paths = sorted(((path_hours(plan, job), job) for job in plan.jobs), key=lambda path: -path[0])
    at_once = max(1, (os.cpu_count() or 1) // execution.threads)
    columns = ["experiment", "jobs", "runs", "tokens", "PFLOPs"]
    if execution.gpu is None:
        columns.append("minutes")
    else:
        columns += ["GPU-hours", "path hours", "GPUs", "GB/GPU", "disk GB", *([] if price is None else ["money"])]
    table = []
    for name, row in rows.items():

        def and_most(expected: str, most: str, row: Cost = row) -> str:
            return f"{expected} (most {most})" if row.most_runs > row.runs else expected

        runs = and_most(str(row.runs), str(row.most_runs)) if row.runs else ""
        cells = [name, str(row.jobs), runs, amount(row.tokens), number(row.flops / 1e15)]
        if execution.gpu is None:
            minutes = 60 / min(at_once, row.jobs)
            cells.append(and_most(number(minutes * row.job_hours, 2), number(minutes * row.most_job_hours, 2)))
        else:
            # No training job belongs to the experiment `compute` and to evaluations.
            ours = (hours for hours, job in paths if name == "total" or name in job.experiments)
            cells.append(and_most(number(row.gpu_hours, 2), number(row.most_gpu_hours, 2)))
            cells += [number(next(ours, row.longest_job_hours), 2), f"1-{row.gpus}" if row.gpus > 1 else "1"]
            cells += [f"{row.memory / GB:.0f}", number(row.disk / GB, 2)]
            cells += [] if price is None else [count(row.gpu_hours * price)]
        table.append(cells)
    caption = _caption(plan, rows["total"], at_once, paths, "measured" if measured else "execution.gflops")
    caption += [measured] if measured else []
    print_table(columns, table, columns[1:], plan.preset.description, caption, total=True)
    if execution.gpu is not None:
        training_table(plan)


def training_table(plan: Plan) -> None:
    """Print what training on a token takes, of the largest sweep of each model by LoRA and by full fine-tuning."""
    columns = ["training of", "method", "of the peak", "products", "elementwise", "attention", "launches"]
    rows: dict[tuple[str, bool], list[str]] = {}
    # The sweep with the most FLOPs comes first.
    for sweep in plan.sweeps:
        condition = sweep.condition
        training = training_of(plan.preset, sweep, plan.gpus[sweep])
        cells = [number(1e6 * seconds, 2) for seconds in (*training.kernels, training.launches)]
        method = METHOD_NAMES[condition.method] + (f" r{condition.rank}" if condition.rank else "")
        rows.setdefault(
            (condition.model, condition.rank is None), [condition.model, method, f"{training.share:.0%}", *cells]
        )
    caption = ["microseconds for each trained token, without padding; launches: what the GPU waits for them"]
    print_table(columns, [rows[key] for key in sorted(rows)], columns[2:], "", caption)


def _caption(plan: Plan, total: Cost, at_once: int, paths: Sequence[tuple[float, Job]], speed: str) -> list[str]:
    """Return the sentences on how the costs were estimated, on the longest path and job, and on divided jobs."""
    execution = plan.preset.execution
    gpu = execution.gpu
    longest_job, limit = (number(hours, 3) for hours in (total.longest_job_hours, execution.job_hours))
    if gpu is None:
        caption = [f"minutes at {number(execution.gflops or 0, 4)} GFLOP/s per job ({speed}), {at_once} at a time"]
    else:
        path = ""
        if paths:
            hours, job = paths[0]
            first, *others = job.sweeps
            what = title(first.condition) + (f" and {len(others)} more" if others else "")
            waves = f" in {len(first.expected_waves())} waves" if plan.is_split(job) else ""
            path = f" ({number(hours / 24, 2)} days), {what}: {number(hours, 2)} to train {job.n_runs} runs{waves}"
        caption = [
            f"{gpu} of {GPUS[gpu].memory / GB:.0f} GB; products at {number(GPUS[gpu].products / 1e12)} TFLOP/s, bytes "
            f"read and written at {number(GPUS[gpu].streaming / 1e12)} TB/s (lorabench/utils/gpus.py), and "
            f"{number(execution.gpu_time)} times the seconds (execution.gpu_time)",
            f"{number(total.gpu_hours / 24)} days on one GPU; however many there are, it takes the hours of "
            f"the critical path{path}",
            f"while it runs, a job needs up to {number(total.working_disk / GB, 2)} GB of disk in "
            "addition, for checkpoints and the weights of all its runs",
            f"the longest job takes {longest_job} hours",
        ]
    if divided := [job.n_runs for job in plan.jobs if plan.is_split(job)]:
        caption.append(
            f"{len(divided)} jobs would take longer than {limit} hours (execution.job_hours), so each of their "
            f"{sum(divided):,} runs is a job of its own"
        )
    if any(sweep.condition.rollouts for sweep in plan.sweeps):
        sampler = "the engine vLLM" if execution.sampler == "vllm" else "this project's own sampler"
        caption.append(f"responses of RL are drawn by {sampler} (execution.sampler), whose speed is an estimate")
    if total.most_runs > total.runs:
        caption.append("where sweeps find their LRs (`lrs: auto`): what is expected, and the most that is possible")
    return caption
