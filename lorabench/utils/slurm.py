"""The limits of a Slurm cluster, as its commands report them."""

from __future__ import annotations

import math
import re
import shutil
import subprocess

_LIMIT = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")


def partition_minutes(partitions: str) -> float | None:
    """Return the longest time in minutes that all partitions, separated by commas, give a job, as `sinfo` reports it.

    An empty text is the default partition; infinity stands for no limit, None for what `sinfo` does not say.
    """
    if not shutil.which("sinfo"):
        return None
    command = ["sinfo", "--noheader", "--format=%P|%l"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    limits = dict(line.strip().split("|", 1) for line in listed.stdout.splitlines() if "|" in line)
    # An asterisk marks the default partition.
    wanted = partitions.split(",") if partitions else [name for name in limits if name.endswith("*")]
    named, minutes = {name.removesuffix("*"): limit for name, limit in limits.items()}, []
    for name in wanted:
        limit = named.get(name.strip().removesuffix("*"), "")
        match = _LIMIT.fullmatch(limit)
        if limit != "infinite" and not match:
            return None
        # 2-00:00:00 are days, hours, minutes and seconds, 30:00 are minutes and seconds.
        parts = [int(part or 0) for part in match.groups()] if match else [math.inf, 0, 0, 0]
        minutes.append(24 * 60 * parts[0] + 60 * parts[1] + parts[2] + parts[3] / 60)
    return min(minutes, default=None)
