"""A preset changes after some runs, clocks differ, and Snakemake itself is killed."""

import os
import re
import signal
import time

import pytest

from lorabench.store.io import read_table

from ..conftest import REPOSITORY
from ..workflow.checkout import snakemake, started
from .conftest import Place

TABLES = "results/mine/tables/runs.parquet"


@pytest.fixture
def done(unbroken, tmp_path) -> Place:
    return unbroken.copy(tmp_path)


def records(place: Place) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in place.folder.glob("results/mine/runs/*/record.json")}


def collected(place: Place):
    """Return the table `runs` of the present plan, collected again."""
    place.run("step", "collect", *(str(place.layout.job(job)) for job in place.plan.jobs), "--out", "tables")
    return read_table(place.folder / "tables", "runs")


@pytest.mark.slow
def test_a_longer_grid_trains_only_new_runs(done, unbroken):
    before = records(done)
    old = done.layout.job(done.job("sft"))
    done.change(lambda raw: raw["experiments"]["rank"][0]["lrs"].update(lora=[1e-3, 3e-3, 1e-2]))
    done.train("sft")
    after = records(done)
    wanted = {run.run_id for run in done.sweep("sft").grid()}
    assert before.items() <= after.items(), "what was finished is kept as it was"
    assert wanted <= after.keys()
    assert len(after.keys() - before.keys()) in (1, 2), "the new LR, and its second seed if it is the best"
    assert done.layout.job(done.job("sft")) != old
    runs = collected(done)
    assert wanted == set(runs.run_id[(runs.task == "sft") & (runs.seed == 0)])
    # A file of the old plan is refused where a preset is given.
    assert "is not in the plan" in done.run("step", "collect", str(old), "--out", "tables", status=2)
    kept = {row["run_id"]: row for row in unbroken.numbers("sft")}
    assert all(row == kept[row["run_id"]] for row in done.numbers("sft") if row["run_id"] in kept)


OPTIONS = ("--snakefile", str(REPOSITORY / "workflow/Snakefile"), "--cores", "1", "--config", "preset=mine.yaml")


def planned(place: Place) -> set[str]:
    output = snakemake(place.folder, TABLES, "--dry-run", "--quiet", "rules", *OPTIONS)
    return {rule for rule, count in re.findall(r"^(\w+)\s+(\d+)$", output, re.MULTILINE)} - {"total"}


@pytest.mark.slow
def test_clocks_that_differ_by_hours_make_no_job_run_again(done):
    """Files of one node are hours older or newer than those of another."""
    now = time.time()
    for folder, offset in (("data", 5 * 3600), ("tokens", -5 * 3600), ("jobs", 0)):
        for path in done.folder.glob(f"results/mine/{folder}/*"):
            os.utime(path, (now + offset, now + offset))
    assert planned(done) == {"tables"}, "which has not been made yet"


@pytest.mark.slow
def test_snakemake_goes_on_when_it_was_interrupted(place, unbroken):
    process, deadline = started(place.folder, TABLES, *OPTIONS), time.monotonic() + 300
    while not place.checkpoint("sft", 1).exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # Ctrl-C in a terminal goes to all processes of the group: the job saves, and Snakemake takes its lock away.
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    output = (place.folder / "printed").read_text()
    assert "stopped by SIGINT; what was done is kept" in output
    assert "Traceback" not in output
    assert "goes on after step" in snakemake(place.folder, TABLES, *OPTIONS)
    for task in ("sft", "rl"):
        assert place.numbers(task) == unbroken.numbers(task)
    assert planned(place) == set()

    # Snakemake now has the metadata of the runs: after a change that needs no training it plans none.
    place.change(lambda raw: raw["experiments"].update(placement=raw["experiments"]["rank"]))
    assert planned(place) == {"tables"}
