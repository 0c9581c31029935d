"""The limits of a Slurm cluster, as its commands report them."""

from __future__ import annotations

import math
import re
import shutil
import subprocess

_LIMIT = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")


def partition_minutes(partitions: str) -> float | None:
    """Return the longest time in minutes that every one of some partitions gives a job, as `sinfo` reports it.

    Args:
        partitions: names, separated by commas; empty for the default partition.

    Returns:
        Infinity where no partition has a limit; None where `sinfo` does not say.
    """
    if not shutil.which("sinfo"):
        return None
    command = ["sinfo", "--noheader", "--format=%P|%l"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    limits = {name: limit for name, _, limit in (line.strip().partition("|") for line in listed.stdout.splitlines())}
    # An asterisk marks the default partition.
    wanted = partitions.split(",") if partitions else [name for name in limits if name.endswith("*")]
    named = {name.removesuffix("*"): minutes_of(limit) for name, limit in limits.items()}
    minutes = [named.get(name.strip().removesuffix("*")) for name in wanted]
    known = [limit for limit in minutes if limit is not None]
    return min(known) if known and len(known) == len(minutes) else None


def minutes_of(limit: str) -> float | None:
    """Return a limit as `sinfo` writes it (`infinite`, `2-00:00:00`, `30:00`) in minutes; None for any other text."""
    if limit == "infinite":
        return math.inf
    match = _LIMIT.fullmatch(limit)
    if not match:
        return None
    days, hours, minutes, seconds = (int(number or 0) for number in match.groups())
    return 24 * 60 * days + 60 * hours + minutes + seconds / 60
