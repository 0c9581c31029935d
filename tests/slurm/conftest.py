"""A running Slurm cluster for the tests that need it."""

import pytest

from lorabench.utils.gpus import ON_CPU

from .cluster import missing, started


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A Slurm cluster of one node with two GPUs that torch does not see; the tests are skipped where it cannot run."""
    if lacks := missing():
        pytest.skip(lacks)
    with pytest.MonkeyPatch.context() as patch, started(tmp_path_factory.mktemp("slurm") / "etc") as cluster:
        patch.setenv(ON_CPU, "1")
        yield cluster
