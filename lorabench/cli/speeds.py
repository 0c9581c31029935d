"""The speed of a machine, by which `lorabench plan` states times; imports no torch.

Finished runs say most about a preset, then what `lorabench doctor` measured. Where nothing was measured, the preset's
`gflops` holds, or what lorabench/utils/gpus.py assumes of the GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from lorabench.config.loading import is_shipped, load_preset
from lorabench.config.preset import Preset
from lorabench.doctor.record import record_for
from lorabench.errors import UserError
from lorabench.planning.plan import Plan, make_plan
from lorabench.planning.seconds import flops_per_second, gpus_used, run_seconds
from lorabench.store.layout import Layout
from lorabench.utils.gpus import GPUS, is_called, processor

RESULTS = Path("results")


def on_gpu(preset: Preset, gpu: str) -> Preset:
    """Return the preset with another GPU, which must be known, and without its `gflops`, which hold for its own GPU."""
    if gpu not in GPUS:
        raise UserError(f"gpu {gpu!r} is not known; allowed: {', '.join(GPUS)}")
    return preset.with_execution(gpu=gpu, gflops=None)


def speed_of(plan: Plan, layout: Layout, folders: Sequence[Path]) -> tuple[float, str] | None:
    """Return the measured speed of the machine that a plan is for; `speed_of_runs` says what the folders are.

    It is the useful GFLOP/s of a job on a CPU or of one GPU, with a sentence that says where they were measured; None
    if nothing was measured.
    """
    if (measured := speed_of_runs(plan, folders)) is not None:
        return measured
    record = record_for(plan.preset.execution)
    # A CPU's speed depends on the width of the model, the precision and the threads, and so on the preset.
    if record is None or record.gflops is None or (plan.preset.execution.gpu is None and record.preset != layout.name):
        return None
    return record.gflops, record.sentence


def speed_of_runs(plan: Plan, folders: Sequence[Path]) -> tuple[float, str] | None:
    """Fit the cost model's speed to tables of finished runs, on the plan's device.

    The device is the preset's GPU. For a CPU preset it is this machine's processor, or with named folders of tables the
    processor of most of their runs. Without these all tables under results/ are read.

    Returns:
        The predicted FLOPs of all runs over their seconds, in GFLOP/s, and a sentence with the ratios of predicted to
        measured seconds; None if no folder is named and there is no suitable run under results/.

    Raises:
        UserError: the named folders have no finished run that a plan knows, on such a device.
    """
    tables = list(folders) or sorted({path.parent for path in RESULTS.glob("*/tables/runs.*")})
    if not tables:
        return None
    # Imported here, since a plan without measured runs starts faster without numpy and pyarrow.
    from lorabench.store.io import read_rows

    columns = ("run_id", "status", "device", "wall_s")
    runs = {row["run_id"]: row for folder in reversed(tables) for row in read_rows(folder, "runs", columns)}
    plans, gpu = [plan], plan.preset.execution.gpu
    # Folders (results/NAME/tables) are named for shipped presets, which are planned on the same GPU. Runs in another
    # precision tell nothing: on a CPU the speeds may be a hundred times apart.
    for name in dict.fromkeys(folder.resolve().parent.name for folder in tables):
        if is_shipped(name):
            preset = load_preset(name)
            alike = preset.protocol.precision == plan.preset.protocol.precision
            if alike and (preset.execution.gpu is None) == (gpu is None):
                plans.append(make_plan(on_gpu(preset, gpu) if gpu else preset))
    # Every run that a plan may contain, whichever LRs prove the best.
    sweeps = {run_id: (plan.preset, sweep) for plan in plans for sweep in plan.sweeps for run_id in sweep.run_ids}
    known = [row for run_id, row in runs.items() if run_id in sweeps]
    devices = [name for name, _ in Counter(row["device"] for row in known if row["device"]).most_common()]
    fitting = [name for name in devices if (is_called(gpu, name) if gpu else folders or name == processor())]
    # For each run the predicted FLOPs, the seconds that do not depend on the speed, and the measured seconds.
    work = []
    for row in known:
        if row["status"] == "done" and row["device"] in fitting[:1] and row["wall_s"]:
            planned, sweep = sweeps[row["run_id"]]
            computing, waiting = run_seconds(planned, sweep, gpus_used(planned, sweep))
            work.append((computing * flops_per_second(planned.execution), waiting, row["wall_s"]))
    if work:
        # The fixed seconds are an assumption, so they never count as more than half of a run's measured seconds.
        speed = sum(flops for flops, *_ in work) / sum(max(wall - waiting, wall / 2) for _, waiting, wall in work)
        ratios = [(flops / speed + waiting) / wall for flops, waiting, wall in work]
        return speed / 1e9, (
            f"measured on {len(work)} runs on {fitting[0]}: {speed / 1e9:,.3g} GFLOP/s; predicted over measured time, "
            f"median and range: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    if folders:
        raise UserError(f"{', '.join(map(str, folders))}: no finished run of this preset was made on {gpu or 'a CPU'}")
    return None
