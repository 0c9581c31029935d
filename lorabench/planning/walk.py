"""Which runs a sweep trains next, given the validation losses so far. No torch is imported.

A sweep is trained in waves; the runs of a wave are known when it starts. The first wave is the grid. In a sweep of
fixed LRs, the second one is the other seeds at the best LR, see `best_lr`. A sweep with `lrs: auto` walks:

1. Until the lowest loss has a higher one on both sides, no more than a step of the lattice away, the lattice's next LR
   is trained on each side that lacks one. A run that diverged counts as higher, and a finer LR is tried before it.
   Equal lowest losses must be enclosed together, and in RL all LRs whose reward is good: accuracies on few problems
   are noisy and their peaks flat, so that a reward that is a little lower on both sides encloses nothing.
2. The next seeds, `Sweep.seeds_around` with the first, are trained at the three LRs around the lowest loss. If its mean
   over the seeds is lowest at another LR than the middle one, the seeds go on to that LR's neighbours.
3. All other seeds are trained at the LR with the lowest mean.

A sweep stops when it has tried the lattice's largest number of LRs. Everything follows from the losses alone, so that a
resumed sweep walks the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from statistics import fmean

from lorabench.runs import AROUND, GOOD, Run, Sweep
from lorabench.utils import formats
from lorabench.utils.lattice import Lattice

Losses = Mapping[tuple[float, int], float]
"""The final validation losses of finished runs by LR and seed: infinite if a run diverged, and in RL minus the
reward."""


def next_runs(sweep: Sweep, losses: Losses) -> list[Run]:
    """Return the next wave of a sweep's runs; empty when the sweep is finished.

    Args:
        sweep: the sweep.
        losses: the losses of the runs of all earlier waves.
    """
    wave = [run for run in sweep.grid() if (run.lr, run.seed) not in losses]
    if wave:
        return wave
    if sweep.lattice is None:
        best = best_lr(sweep, losses)
        return [] if best is None else _missing(sweep, [best], losses, sweep.seeds)
    first = _first_seed(losses)
    room = _room(sweep, sweep.lattice, first)
    started = any(seed and (lr, seed) not in sweep.repeated for lr, seed in losses)
    if not started:
        wave = [Run(sweep.condition, lr, 0) for lr in _unexplored(sweep, sweep.lattice, first)[:room]]
    if wave or not any(map(math.isfinite, first.values())):
        return wave
    # Other experiments may have trained all seeds at some LRs, so that the means already know better.
    for scores in ([] if started else [first]) + [_means(sweep, losses) or first]:
        around = _around(sweep.lattice, first, _middle_of_lowest(scores), room)
        wave = _missing(sweep, around, losses, sweep.seeds_around)
        if wave:
            return wave
    return _missing(sweep, [_middle_of_lowest(_means(sweep, losses) or first)], losses, sweep.seeds)


def finished_losses(sweep: Sweep, loss_of: Callable[[Run], float]) -> dict[tuple[float, int], float]:
    """Return the losses of all runs of a finished sweep, in the order of its waves.

    Args:
        sweep: the sweep.
        loss_of: returns a run's final validation loss, see `Losses`.
    """
    losses: dict[tuple[float, int], float] = {}
    while wave := next_runs(sweep, losses):
        losses |= {(run.lr, run.seed): loss_of(run) for run in wave}
    return losses


def best_lr(sweep: Sweep, losses: Losses) -> float | None:
    """Return the best LR by the validation losses; None if every run diverged.

    In a sweep of fixed LRs it is the LR with the lowest mean loss over the seeds that have all LRs of the first, the
    lowest of equally good ones. With a lattice it is the LR with the lowest mean loss over the seeds that all three LRs
    around it have, the middle of equally good ones.
    """
    if sweep.lattice is None:
        # `repeated` may hold LRs of the first seed that are not in the grid.
        first = _first_seed(losses)
        finished = {lr: loss for lr, loss in first.items() if math.isfinite(loss)}
        seeds = {seed for _, seed in losses if all(math.isfinite(losses.get((lr, seed), math.inf)) for lr in finished)}
        means = [(fmean(losses[lr, seed] for seed in seeds), lr) for lr in finished]
        return min(means)[1] if means else None
    scores = {lr: mean for lr, mean in _means(sweep, losses).items() if math.isfinite(mean)}
    return _middle_of_lowest(scores) if scores else None


def ending(sweep: Sweep, losses: Losses) -> str:
    """Describe in words how the walk of a finished sweep with a lattice ended."""
    first, best = _first_seed(losses), best_lr(sweep, losses)
    if best is None:
        return f"all {len(first)} LRs diverged"
    scores = first | _means(sweep, losses)
    sides = {
        "lower": any(lr < best and score > scores[best] for lr, score in scores.items()),
        "higher": any(lr > best and score > scores[best] for lr, score in scores.items()),
    }
    at = f"{len(first)} LRs, the lowest loss at lr {formats.lr(best, 3)}"
    is_open = [side for side, closed in sides.items() if not closed]
    return f"stopped at {at}, with no higher loss at a {' or '.join(is_open)} LR" if is_open else f"bracketed by {at}"


def _first_seed(losses: Losses) -> dict[float, float]:
    """Return the losses of the first seed by LR, ascending."""
    return {lr: loss for (lr, seed), loss in sorted(losses.items()) if seed == 0}


def _means(sweep: Sweep, losses: Losses) -> dict[float, float]:
    """Return the mean losses at the LRs that have the seeds of those around the best, ascending."""
    seeds = range(sweep.seeds_around)
    complete = [lr for lr in _first_seed(losses) if all((lr, seed) in losses for seed in seeds)]
    return {lr: fmean(losses[lr, seed] for seed in seeds) for lr in complete}


def _room(sweep: Sweep, lattice: Lattice, first: Mapping[float, float]) -> int:
    """Return the number of LRs that the sweep may still add."""
    return max(0, lattice.further - (len(first) - len(sweep.lrs)))


def _middle_of_lowest(scores: Mapping[float, float]) -> float:
    """Return the middle of the LRs with the lowest score; where all scores are infinite, the lowest LR."""
    lowest = min(scores.values())
    equal = sorted(lr for lr, score in scores.items() if score == lowest)
    return equal[(len(equal) - 1) // 2 if math.isfinite(scores[equal[0]]) else 0]


def _unexplored(sweep: Sweep, lattice: Lattice, first: Mapping[float, float]) -> list[float]:
    """Return the LRs to train on the sides on which no higher loss bounds the best; all lower if all diverged."""
    lowest = min(first.values())
    if math.isinf(lowest):
        return [lattice.next_to(min(first), -1)]
    # In RL the losses are minus the rewards.
    highest = GOOD * lowest if sweep.condition.task == "rl" else lowest
    enclosed = [lr for lr, loss in first.items() if loss <= highest]
    ends = ((enclosed[0], -1), (enclosed[-1], 1))
    return [lr for end, side in ends if (lr := _unexplored_beside(lattice, first, end, side)) is not None]


def _unexplored_beside(lattice: Lattice, first: Mapping[float, float], lr: float, side: int) -> float | None:
    neighbour = _neighbour(lattice, first, lr, side)
    if neighbour is None:
        return lattice.next_to(lr, side)
    return lattice.between(lr, neighbour) if math.isinf(first[neighbour]) else None


def _neighbour(lattice: Lattice, lrs: Iterable[float], lr: float, side: int) -> float | None:
    """Return the next LR above (`side` 1) or below (-1) an LR among others, if it is within reach."""
    beyond = [other for other in lrs if side * (other - lr) > 0 and lattice.within_reach(lr, other)]
    return min(beyond, key=lambda other: abs(other - lr), default=None)


def _around(lattice: Lattice, first: Mapping[float, float], centre: float, room: int) -> list[float]:
    """Return the three LRs around a centre, ascending, the centre among them.

    Where the runs on one side diverged, the third is a finer LR on the other side. Without room for another LR it is
    the next but one there.
    """
    chosen = [centre]
    for side in (-1, 1):
        neighbour = _neighbour(lattice, first, centre, side)
        if neighbour is None and len([lr for lr in chosen if lr not in first]) < room:
            chosen.append(lattice.next_to(centre, side))
        elif neighbour is not None and math.isfinite(first[neighbour]):
            chosen.append(neighbour)
    if len(chosen) == AROUND - 1 and all(lr in first for lr in chosen) and room:
        finer = lattice.between(*chosen)
        chosen += [] if finer is None else [finer]
    others = [lr for lr, loss in first.items() if math.isfinite(loss) and lr not in chosen]
    nearest = sorted(others, key=lambda lr: abs(math.log(lr / centre)))
    return sorted(chosen + nearest[: AROUND - len(chosen)])


def _missing(sweep: Sweep, lrs: Iterable[float], losses: Losses, seeds: int) -> list[Run]:
    """Return the runs of so many seeds at some LRs that are not finished, seed by seed."""
    cells = [(lr, seed) for seed in range(seeds) for lr in lrs]
    return [Run(sweep.condition, lr, seed) for lr, seed in cells if (lr, seed) not in losses]
