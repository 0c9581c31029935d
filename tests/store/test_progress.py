"""The number of finished runs is right whatever comes and goes."""

import os
import shutil

from lorabench.planning.plan import make_plan
from lorabench.store.layout import Layout
from lorabench.store.progress import COUNTED_EVERY, finished_runs, recently_finished
from lorabench.store.run_folder import RunFolder


def test_runs_are_counted_as_they_come_and_go(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layout = Layout.of("lr_noise")
    plan = make_plan(layout.preset)
    number = sum(job.n_runs for job in plan.jobs)
    first, second = ([run for sweep in job.sweeps for run in sweep.grid()] for job in plan.jobs[:2])
    (layout.runs / f"{first[0].run_id}.partial").mkdir(parents=True)
    (layout.runs / "another").mkdir()
    # A run in progress and a run of another plan are none of its finished runs.
    assert finished_runs(plan, layout) == (0, number, 0)
    for run in (*first, *second[:3]):
        with RunFolder(layout.runs, run.run_id).finishing({}):
            pass
    assert finished_runs(plan, layout) == (len(first) + 3, number, 0)
    layout.jobs.mkdir()
    layout.job(plan.jobs[0]).touch()
    assert finished_runs(plan, layout) == (plan.jobs[0].n_runs + 3, number, 1)
    # Runs of a finished job may be deleted, others are then trained again.
    shutil.rmtree(layout.runs / first[0].run_id)
    RunFolder(layout.runs, second[1].run_id).discard()
    assert finished_runs(plan, layout) == (plan.jobs[0].n_runs + 2, number, 1)


def test_jobs_share_a_count_for_some_seconds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layout = Layout.of("smoke")
    plan = make_plan(layout.preset)
    number = sum(job.n_runs for job in plan.jobs)
    counts = []
    monkeypatch.setattr(
        "lorabench.store.progress.finished_runs", lambda *given: counts.append(1) or finished_runs(*given)
    )
    # A job that can't write the file counts by itself.
    layout.root.mkdir(parents=True)
    layout.count.mkdir()
    assert recently_finished(plan, layout) == f"0/{number}"
    layout.count.rmdir()
    assert [recently_finished(plan, layout) for _ in range(3)] == 3 * [f"0/{number}"]
    run = plan.sweeps[0].grid()[0]
    with RunFolder(layout.runs, run.run_id).finishing({}):
        pass
    assert recently_finished(plan, layout) == f"0/{number}"
    assert len(counts) == 2
    # A file that is old, or whose node has a clock that is ahead, holds no longer.
    written = layout.count.stat().st_mtime
    for moved in (-COUNTED_EVERY, 60):
        os.utime(layout.count, (written, written + moved))
        assert recently_finished(plan, layout) == f"1/{number}"
    assert len(counts) == 4
    assert finished_runs(plan, layout)[0] == 1
