"""A running Slurm cluster for the tests that need it."""

from __future__ import annotations

import pytest

from .cluster import missing, started


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A Slurm cluster of one node with two GPUs; the tests are skipped where it cannot run."""
    if lacks := missing():
        pytest.skip(lacks)
    with started(tmp_path_factory.mktemp("slurm") / "etc") as cluster:
        yield cluster
