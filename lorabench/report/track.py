"""Finished runs as runs of trackio, a local tracker of experiments that is no dependency."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

from lorabench.errors import UserError
from lorabench.planning.plan import Plan
from lorabench.store.layout import Layout
from lorabench.store.run_folder import RunFolder

_FINAL = ("final_valid_nll", "final_test_nll", "final_valid_reward", "final_reward")


def track(plan: Plan, layout: Layout) -> tuple[str, int, int]:
    """Log each finished run of a plan that trackio does not have yet, with its curves and its final losses or rewards.

    Returns:
        The name of trackio's project, the number of runs that were logged, and of those that were there already.

    Raises:
        UserError: trackio is not installed, or the files of a run are damaged.
    """
    try:
        import trackio
    except ImportError as error:
        raise UserError("trackio is not installed; install it with: pip install trackio") from error
    project = f"lorabench-{layout.name.replace('@', '-from-seed-')}"
    try:
        present = {run.name for run in trackio.Api().runs(project)}
    except ValueError:
        # The project does not exist yet.
        present = set()
    logged = already = 0
    # A run may belong to several sweeps.
    runs = {run.run_id: run for sweep in plan.sweeps for run in sweep.possible_runs()}
    for run_id, run in runs.items():
        folder, label = RunFolder(layout.runs, run_id), run.condition.label
        # Conditions of one label may differ in what it does not say.
        name = f"{label} lr {run.lr:g} seed {run.seed} {run_id}"
        if name in present:
            already += 1
        elif folder.done():
            record = folder.read_record()
            # Trackio says on several lines what it does with every run.
            with redirect_stdout(io.StringIO()):
                tracked = trackio.init(
                    project,
                    name=name,
                    group=label,
                    config={"run_id": run_id, **record["spec"]},
                    embed=False,
                    auto_log_gpu=False,
                    auto_log_cpu=False,
                )
                for step, values in _points(folder, record["outcome"]).items():
                    tracked.log(values, step=step)
                tracked.finish()
            logged += 1
    return project, logged, already


def _points(folder: RunFolder, outcome: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    """Return what is logged at each step: the finite values of curves by split and metric, and at last the outcome."""
    points: dict[int, dict[str, float]] = defaultdict(dict)
    for point in folder.read_nested()["curve"][0].as_py():
        if point["value"] is not None:
            points[point["step"]][f"{point['split']}/{point['metric']}"] = point["value"]
    points[max(points)] |= {name: outcome[name] for name in _FINAL if outcome.get(name) is not None}
    return points
