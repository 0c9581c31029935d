"""Run a calibration: draw worlds, judge them, and count how often each verdict falls."""

from __future__ import annotations

import math
import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from benchmarks.calibration.made import Design, Made, MadeRl, as_designed
from benchmarks.calibration.noise import NoiseLevels
from benchmarks.calibration.rl import make_rl_tables
from benchmarks.calibration.traits import Traits, with_traits
from benchmarks.calibration.truths import AGAINST, COVERED, EFFECTS, SMALL, Covered, scene_of
from benchmarks.calibration.worlds import make_tables
from lorabench.claims.judge import CLAIMS, findings
from lorabench.errors import UserError
from lorabench.store.tables import Tables

_COUNTED = {
    "confirmed": ("confirmed",),
    "right_sign": (SMALL,),
    "inconclusive": ("inconclusive",),
    "contradicted": AGAINST,
    "setting_not_met": ("setting not met",),
    "not_tested": ("not tested",),
}
"""The verdicts that each column counts."""

CHUNK = 26
"""The number of worlds that a process makes at a time, an even one."""

COLUMNS = ["claim_id", "kind", "what", "effect", "truth", "n_worlds", *_COUNTED]
COLUMNS += ["wrong", "wrong_low", "wrong_high", "power", "decided_wrong"]
"""The columns of the table: shares of worlds with each verdict, the share with a wrong one (at the margin of an
equality the larger of the two shares) with its 95% interval, the share with a right one, and how many of the decided
verdicts are wrong."""

AGAIN_COLUMNS = ["claim_id", "p_low", "p_high", "n_worlds", "predicted", "same"]
"""The columns of the table of twins: the worlds in which the stated probability that a verdict falls again is from
p_low to p_high, their number, the mean of that probability, and the share of them whose twin has the same verdict."""

_STEP = 0.05
"""The width of the classes in which probabilities are counted."""


class Seen(NamedTuple):
    """What is counted of a world: a claim's verdict in it, and what its twin says."""

    claim_id: str
    verdict: str
    p_again: int
    """The stated probability that the verdict falls again, in whole steps of _STEP; -1 if none is stated."""
    same: bool
    """Whether the twin has the same verdict."""


@dataclass(frozen=True)
class Task:
    """Some worlds of one scene and effect."""

    scene: str
    effect: float
    first: int
    """The number of the first world, an even one."""
    n: int


@dataclass(frozen=True)
class Making:
    """How worlds are made."""

    noise: NoiseLevels = field(default_factory=NoiseLevels)
    traits: Traits = field(default_factory=Traits)
    seed: int = 0
    """The seed of all random numbers."""
    design: Design | None = None
    """The LRs, seeds and examples of the sweeps; without it those of the scene."""

    def tables(self, task: Task, number: int) -> Tables:
        """Draw the tables of a world.

        Worlds come in pairs of twins, an even number and the next one. Twins share their truth and their LRs, and have
        seeds and test examples of their own.
        """
        # Every world has generators of its own, so the results depend neither on the processes nor on the claims.
        of_pair = [self.seed, zlib.crc32(task.scene.encode()), round(10 * task.effect), number // 2]
        truth, luck = np.random.default_rng(of_pair), np.random.default_rng([*of_pair, number % 2])
        made = scene_of(task.scene)(task.effect, self.noise, truth)
        if isinstance(made, MadeRl):
            [sweep] = self._finished([made], truth)
            return make_rl_tables(sweep, self.noise, luck)
        return make_tables(self._finished(made, truth), self.noise, luck)

    def _finished(self, sweeps: Sequence[Made], random: np.random.Generator) -> list[Made]:
        """Give sweeps their design and their traits."""
        if self.design is not None:
            sweeps = [as_designed(self.design, sweep, random) for sweep in sweeps]
        return with_traits(sweeps, self.traits, random)


def worlds_of(task: Task, claim_ids: Sequence[str], making: Making) -> Counter[Seen]:
    """Draw and judge the worlds of a task; return how often each claim got each verdict."""
    claims = [claim for claim in CLAIMS if claim.id in claim_ids]
    counts: Counter[Seen] = Counter()
    # Small tables of text are faster as Python's own strings.
    with pd.option_context("mode.string_storage", "python"):
        for number in range(task.first, task.first + task.n, 2):
            pair = [
                [judged for _, judged, _ in findings(making.tables(task, twin), claims)]
                for twin in (number, number + 1)
            ]
            for judged, other in (pair, reversed(pair)):
                for claim, own, again in zip(claims, judged, other, strict=True):
                    p = own.p_again
                    step = -1 if p is None else min(int(p / _STEP), round(1 / _STEP) - 1)
                    counts[Seen(claim.id, own.verdict, step, own.verdict == again.verdict)] += 1
    return counts


Counts = dict[tuple[str, float], Counter[Seen]]
"""By claim and effect, what was seen in its worlds."""


def counted(
    worlds: int = 500, claim_ids: Sequence[str] = (), processes: int = 1, making: Making | None = None
) -> Counts:
    """Judge made-up worlds, an even number for each claim and size of the effect, and count the verdicts.

    Without `claim_ids` all claims are judged that calibration covers.

    Raises:
        UserError: calibration does not cover a claim.
    """
    known = {claim.claim_id: claim for claim in COVERED}
    if unknown := [claim_id for claim_id in claim_ids if claim_id not in known]:
        raise UserError(f"calibration does not cover {', '.join(unknown)}; allowed: {', '.join(known)}")
    by_scene: dict[str, list[str]] = {}
    for claim_id in claim_ids or known:
        by_scene.setdefault(known[claim_id].scene, []).append(claim_id)
    of_scenes = [(scene, claims, making or Making()) for scene, claims in by_scene.items()]
    return counted_on(of_scenes, worlds, processes)


def counted_on(scenes: Sequence[tuple[str, Sequence[str], Making]], worlds: int, processes: int) -> Counts:
    """Judge made-up worlds of scenes, each with its claims and how its worlds are made, and report progress."""
    worlds += worlds % 2
    tasks = [
        (Task(scene, effect, first, min(CHUNK, worlds - first)), claims, making)
        for first in range(0, worlds, CHUNK)
        for scene, claims, making in scenes
        for effect in EFFECTS
    ]
    total, done = sum(task.n for task, _, _ in tasks), 0
    counts: Counts = {}
    with ProcessPoolExecutor(processes) if processes > 1 else nullcontext() as pool:
        apply = pool.map if pool else map
        for (task, _, _), task_counts in zip(tasks, apply(worlds_of, *zip(*tasks, strict=True)), strict=True):
            done += task.n
            print(f"calibrate: {done} of {total} worlds ({task.scene}, {task.effect:g} margins)", file=sys.stderr)
            for seen, number in task_counts.items():
                counts.setdefault((seen.claim_id, task.effect), Counter())[seen] += number
    return counts


def shares(counts: Counts) -> pd.DataFrame:
    """Return the table of verdicts: a row for each claim and effect, with the columns COLUMNS."""
    judged = [(claim, effect) for claim in COVERED for effect in EFFECTS if (claim.claim_id, effect) in counts]
    rows = [_row(claim, effect, counts[claim.claim_id, effect]) for claim, effect in judged]
    return pd.DataFrame(rows, columns=COLUMNS)


def _row(claim: Covered, effect: float, counts: Counter[Seen]) -> dict[str, object]:
    verdicts: Counter[str] = Counter()
    for seen, number in counts.items():
        verdicts[seen.verdict] += number
    n = verdicts.total()

    def share(names: Sequence[str]) -> float:
        return sum(verdicts[name] for name in names) / n

    wrong = max(share(names) for names in claim.wrong(effect))
    interval = binomtest(round(wrong * n), n).proportion_ci(0.95, "exact")
    right = claim.right(effect)
    return {
        "claim_id": claim.claim_id,
        "kind": claim.kind,
        "what": claim.effect,
        "effect": effect,
        "truth": claim.truth(effect),
        "n_worlds": n,
        **{column: share(names) for column, names in _COUNTED.items()},
        "wrong": wrong,
        "wrong_low": interval.low,
        "wrong_high": interval.high,
        "power": share(right) if right else math.nan,
        "decided_wrong": wrong / decided if (decided := share(("confirmed", SMALL, *AGAINST))) else math.nan,
    }


AGAIN_ENDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
"""The ends of the classes of probabilities in the table of twins."""


def twins(counts: Counts) -> pd.DataFrame:
    """Return the table of twins for all claims together and for each: columns AGAIN_COLUMNS, without empty classes."""
    stated = [
        (seen.claim_id, (seen.p_again + 0.5) * _STEP, seen.same, number)
        for of_claim in counts.values()
        for seen, number in of_claim.items()
        if seen.p_again >= 0
    ]
    rows = []
    for claim_id, (low, high) in product(["all", *(claim.claim_id for claim in COVERED)], pairwise(AGAIN_ENDS)):
        chosen = [seen[1:] for seen in stated if claim_id in ("all", seen[0]) and low <= seen[1] < high]
        if n := sum(number for _, _, number in chosen):
            predicted, same = (sum(seen[part] * seen[2] for seen in chosen) / n for part in (0, 1))
            rows.append((claim_id, low, high, n, predicted, same))
    return pd.DataFrame(rows, columns=AGAIN_COLUMNS)
