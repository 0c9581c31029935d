"""Many short jobs under a limit of the jobs in the queue."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from lorabench.store.layout import Layout

from ..workflow.checkout import adapt_profile
from .cluster import until
from .submitting import adapted_clone, workflow

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

PRESET = Path(__file__).parent / "many.yaml"
LIMIT = 3


def test_many_short_jobs_stay_below_the_limit_of_jobs(cluster, tmp_path):
    checkout = adapted_clone(tmp_path, PRESET)
    adapt_profile(checkout, "\njobs: 100\n", f"\njobs: {LIMIT}\n")
    layout = Layout.of(str(checkout / PRESET.name))
    datasets = list(layout.preset.datasets)
    targets = [layout.tokens("tiny", dataset) for dataset in datasets]
    before, most, ended = len(cluster.jobs()), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.2):
            most = max(most, len(cluster("squeue", "--noheader").splitlines()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with workflow(cluster, checkout, *map(str, targets), preset=PRESET.name) as output:
            until(output, "the end of the workflow", 600)
    finally:
        ended.set()
        watcher.join()
    jobs = cluster.jobs()[before:]
    assert len(jobs) == 2 * len(datasets), "each dataset is made by one job and tokenized by another"
    assert {job["JobState"] for job in jobs} == {"COMPLETED"}
    assert 1 < most <= LIMIT
    assert all((checkout / target).is_file() for target in targets)
