"""Grouping of sweeps into jobs, so that the time to start a job is a small share of it. Does not import torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from lorabench.config.preset import Preset
from lorabench.planning.memory import gpus_needed
from lorabench.planning.seconds import start_seconds, sweep_seconds
from lorabench.runs import Sweep

START_SHARE = 0.05
"""Share of a job's time that its start may take."""


def group_sweeps(preset: Preset, sweeps: Sequence[Sweep]) -> list[tuple[Sweep, ...]]:
    """Group sweeps into jobs, the longest job first and in each job the longest sweep first.

    The sweeps of a job have the same model, dataset, kind of training, number of GPUs and experiments, so that a figure
    trains no more than it needs. A job grows until its start is a small share of it, but never beyond the longest
    sweep: with any number of cores the last core then finishes no later than that sweep would make it.

    Returns:
        The sweeps of each job; every sweep is in exactly one.

    Raises:
        UserError: a sweep fits on no number of GPUs that the preset allows.
    """
    groups: dict[tuple[object, ...], list[tuple[float, Sweep]]] = defaultdict(list)
    for sweep in sweeps:
        condition, gpus = sweep.condition, gpus_needed(preset, sweep)
        seconds = sweep_seconds(preset, sweep, gpus)
        key = (condition.model, condition.dataset, condition.task, sweep.experiments, gpus)
        groups[key].append((seconds, sweep))
    longest = max((seconds for group in groups.values() for seconds, _ in group), default=0.0)
    jobs = []
    for group in groups.values():
        start = start_seconds(preset, group[0][1].condition)
        # Where even the longest sweep is shorter than a start, a job as long as a start is enough.
        enough = min(start / START_SHARE, max(start, longest))
        jobs += _divided(group, enough, max(longest, 1.5 * start))
    return [tuple(sweep for _, sweep in job) for job in sorted(jobs, key=lambda job: -_seconds(job))]


def _divided(group: Iterable[tuple[float, Sweep]], enough: float, most: float) -> list[list[tuple[float, Sweep]]]:
    """Divide timed sweeps into jobs of about `enough` seconds each and at most `most`; a longer sweep is a job by
    itself."""
    longest_first = sorted(group, key=lambda timed: -timed[0])
    alone = [[timed] for timed in longest_first if timed[0] >= enough]
    short = longest_first[len(alone) :]
    count = max(1, round(_seconds(short) / enough))
    while max(map(_seconds, jobs := _spread(short, count))) > most:
        count += 1
    return alone + [job for job in jobs if job]


def _spread(longest_first: Iterable[tuple[float, Sweep]], count: int) -> list[list[tuple[float, Sweep]]]:
    """Spread timed sweeps over `count` jobs, each sweep into the job that is the shortest so far."""
    jobs: list[list[tuple[float, Sweep]]] = [[] for _ in range(count)]
    for timed in longest_first:
        min(jobs, key=_seconds).append(timed)
    return jobs


def _seconds(job: Iterable[tuple[float, Sweep]]) -> float:
    return sum(seconds for seconds, _ in job)
