"""A cluster with an accounting database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lorabench.store.layout import Layout

from .cluster import Cluster, missing, started, until
from .submitting import adapted_clone, workflow

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

PRESET = Path(__file__).parent / "many.yaml"


@pytest.fixture
def accounting(tmp_path_factory) -> Iterator[Cluster]:
    """A Slurm cluster with accounting; the test is skipped where it cannot run."""
    if lacks := missing(accounting=True):
        pytest.skip(lacks)
    with started(tmp_path_factory.mktemp("accounting") / "etc", accounting=True) as cluster:
        yield cluster


def states(cluster: Cluster) -> list[tuple[str, str]]:
    """Return the id and the state of each job in the accounting database, in the order of their submission."""
    lines = cluster("sacct", "--allocations", "--noheader", "--parsable2", "--format=JobID,State").splitlines()
    return [(number, state) for number, state in (line.split("|") for line in lines)]


def test_a_cancelled_job_is_tried_again_and_accounted_for(accounting, tmp_path):
    """With sacct as its source of states, Snakemake's plugin would wait for the cancelled job forever."""
    checkout = adapted_clone(tmp_path, PRESET)
    target = checkout / Layout.of(str(checkout / PRESET.name)).tokens("tiny", "a")
    with workflow(accounting, checkout, str(target.relative_to(checkout)), preset=PRESET.name) as output:
        until(lambda: states(accounting), "a job", 120)
        first = states(accounting)[0][0]
        accounting("scancel", first)
        until(output, "the end of the workflow", 300)
    # A job that was cancelled has its user in the state.
    assert [state.split()[0] for _, state in states(accounting)] == ["CANCELLED", "COMPLETED", "COMPLETED"]
    assert target.is_file()
    (peak,) = accounting(
        "sacct", "--noheader", "--parsable2", "--format=MaxRSS", f"--jobs={states(accounting)[-1][0]}.batch"
    ).splitlines()
    assert peak
