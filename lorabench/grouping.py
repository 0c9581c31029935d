"""Which sweeps a job trains together, so that starting it is paid once for work that is worth it. No torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lorabench import cost
from lorabench.config import Preset
from lorabench.memory import gpus_needed

if TYPE_CHECKING:
    from lorabench.plan import Sweep

START_SHARE = 0.05
"""Share of a job's time that its start may take."""


def grouped(preset: Preset, sweeps: Sequence[Sweep]) -> list[tuple[Sweep, ...]]:
    """The sweeps of each job, of jobs and within them the longest first; each sweep is in one.

    Together are sweeps of one model, dataset and kind of training, on as many GPUs, that the same experiments ask for:
    a figure trains no more than it needs. A job grows until its start is a small share of it, but not beyond the
    longest sweep, so that with any number of cores the last of them waits no longer than it would for that sweep.

    Raises:
        UserError: a sweep fits on no number of GPUs that the preset allows.
    """
    together: dict[tuple[object, ...], list[tuple[float, Sweep]]] = defaultdict(list)
    for sweep in sweeps:
        condition, gpus = sweep.condition, gpus_needed(preset, sweep)
        seconds = cost.sweep_seconds(preset, sweep, gpus)
        key = (condition.model, condition.dataset, condition.task, sweep.experiments, gpus)
        together[key].append((seconds, sweep))
    start = cost.start_seconds(preset)
    longest = max((seconds for group in together.values() for seconds, _ in group), default=0.0)
    # Where even the longest sweep is shorter than a start, as long as that.
    enough = min(start / START_SHARE, max(start, longest))
    jobs = [job for group in together.values() for job in _divided(group, enough, max(longest, 1.5 * start))]
    return [tuple(sweep for _, sweep in job) for job in sorted(jobs, key=lambda job: -_seconds(job))]


def _divided(group: Iterable[tuple[float, Sweep]], enough: float, most: float) -> list[list[tuple[float, Sweep]]]:
    """Jobs of about as many seconds as are enough, all alike, none above the most; a sweep that takes as long stays
    alone."""
    longest_first = sorted(group, key=lambda one: -one[0])
    alone = [[one] for one in longest_first if one[0] >= enough]
    short = longest_first[len(alone) :]
    count = max(1, round(_seconds(short) / enough))
    while max(map(_seconds, jobs := _spread(short, count))) > most:
        count += 1
    return alone + [job for job in jobs if job]


def _spread(longest_first: Iterable[tuple[float, Sweep]], count: int) -> list[list[tuple[float, Sweep]]]:
    """So many jobs, each sweep in the shortest so far."""
    jobs: list[list[tuple[float, Sweep]]] = [[] for _ in range(count)]
    for one in longest_first:
        min(jobs, key=_seconds).append(one)
    return jobs


def _seconds(job: Iterable[tuple[float, Sweep]]) -> float:
    return sum(seconds for seconds, _ in job)
