"""Time limits as `sinfo` writes them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lorabench.utils.slurm import minutes_of, partition_minutes


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [
        ("infinite", math.inf),
        ("2-00:00:00", 2880),
        ("1-12", 2160),
        ("12:30:00", 750),
        ("30:00", 30),
        ("90", 90),
        ("n/a", None),
    ],
)
def test_every_form_of_a_limit(limit, minutes):
    assert minutes_of(limit) == minutes


def test_the_limit_of_a_partition(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert partition_minutes("") is None, "without Slurm"
    sinfo = tmp_path / "sinfo"
    sinfo.write_text("#!/bin/sh\necho 'cpu*|1:00:00'; echo 'gpu|1-00:00:00'; echo 'long|infinite'\n")
    sinfo.chmod(0o755)
    assert [partition_minutes(names) for names in ("", "gpu", "long", "gpu,long")] == [60, 1440, math.inf, 1440]
    assert partition_minutes("gpu,elsewhere") is None
