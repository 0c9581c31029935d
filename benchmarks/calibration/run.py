"""Run a calibration: draw worlds, judge them, and count how often each verdict falls."""

from __future__ import annotations

import math
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from benchmarks.calibration.made import Design, MadeRl
from benchmarks.calibration.noise import NoiseLevels
from benchmarks.calibration.rl import make_rl_tables
from benchmarks.calibration.truths import COVERED, EFFECTS, SCENES, Covered
from benchmarks.calibration.worlds import make_tables
from lorabench.claims.judge import CLAIMS, judge_claims
from lorabench.errors import UserError

VERDICTS = ("confirmed", "contradicted", "inconclusive", "setting not met", "not tested")

CHUNK = 25
"""The number of worlds that a process makes at a time."""

COLUMNS = [
    "claim_id",
    "kind",
    "what",
    "effect",
    "truth",
    "n_worlds",
    *(verdict.replace(" ", "_") for verdict in VERDICTS),
    "wrong",
    "wrong_low",
    "wrong_high",
    "power",
]
"""The columns of the table: shares of worlds with each verdict, the share with a wrong one (at the margin of an
equality the larger of the two shares) with its 95% interval, and the share with the right one."""


@dataclass(frozen=True)
class Task:
    """Some worlds of one scene and effect."""

    scene: str
    effect: int
    first: int
    """The number of the first world."""
    n: int


def worlds_of(
    task: Task, claim_ids: Sequence[str], noise: NoiseLevels, seed: int, design: Design | None = None
) -> Counter[tuple[str, str]]:
    """Draw and judge the worlds of a task; return how often each claim got each verdict.

    Args:
        task: the worlds.
        claim_ids: the claims to judge.
        noise: the noise of the worlds.
        seed: the seed of all random numbers.
        design: the LRs, seeds and examples of the sweeps; without it those of the scene.
    """
    claims = [claim for claim in CLAIMS if claim.id in claim_ids]
    counts: Counter[tuple[str, str]] = Counter()
    # Small tables of text are faster as Python's own strings.
    with pd.option_context("mode.string_storage", "python"):
        for number in range(task.first, task.first + task.n):
            # Every world has a generator of its own, so the results depend neither on the processes nor on the claims.
            random = np.random.default_rng([seed, zlib.crc32(task.scene.encode()), task.effect, number])
            made = SCENES[task.scene](task.effect, noise, random)
            if isinstance(made, MadeRl):
                tables = make_rl_tables(made, noise, random, design)
            else:
                tables = make_tables(made, noise, random, design)
            judged = judge_claims(tables, claims)
            counts.update(zip(judged["claim_id"], judged["verdict"], strict=True))
    return counts


def calibrate(
    worlds: int = 500,
    claim_ids: Sequence[str] = (),
    processes: int = 1,
    noise: NoiseLevels | None = None,
    seed: int = 0,
    kept: Path | None = None,
) -> pd.DataFrame:
    """Judge made-up worlds and count the verdicts.

    Args:
        worlds: the number of worlds for each claim and size of the effect.
        claim_ids: the claims; by default all that calibration covers.
        processes: the number of processes.
        noise: the noise of the worlds.
        seed: the seed of all random numbers.
        kept: a file that keeps the counts of finished parts, with which an interrupted calibration goes on.

    Returns:
        A row for each claim and effect, with the columns COLUMNS.

    Raises:
        UserError: calibration does not cover a claim.
    """
    noise = noise or NoiseLevels()
    known = {covered.claim_id: covered for covered in COVERED}
    if unknown := [claim_id for claim_id in claim_ids if claim_id not in known]:
        raise UserError(f"calibration does not cover {', '.join(unknown)}; allowed: {', '.join(known)}")
    covered = [known[claim_id] for claim_id in claim_ids] or list(COVERED)
    by_scene: dict[str, list[str]] = {}
    for claim in covered:
        by_scene.setdefault(claim.scene, []).append(claim.claim_id)
    tasks = [
        Task(scene, effect, first, min(CHUNK, worlds - first))
        for scene in by_scene
        for effect in EFFECTS
        for first in range(0, worlds, CHUNK)
    ]
    counts: dict[tuple[str, int], Counter[str]] = {}
    for task, task_counts in _counted(tasks, by_scene, noise, seed, processes, kept):
        for (claim_id, verdict), number in task_counts.items():
            counts.setdefault((claim_id, task.effect), Counter())[verdict] += number
    rows = [_row(claim, effect, counts[claim.claim_id, effect]) for claim in covered for effect in EFFECTS]
    return pd.DataFrame(rows, columns=COLUMNS)


def _counted(
    tasks: Sequence[Task],
    by_scene: dict[str, list[str]],
    noise: NoiseLevels,
    seed: int,
    processes: int,
    kept: Path | None,
) -> Iterator[tuple[Task, Counter[tuple[str, str]]]]:
    """Yield the counts of each task, from the file of finished parts where it has them, and report progress."""
    names = {task: f"{seed};{noise};{task};{' '.join(by_scene[task.scene])}" for task in tasks}
    finished = _read(kept)
    left = [task for task in tasks if names[task] not in finished]
    yield from ((task, finished[names[task]]) for task in tasks if names[task] in finished)
    total, done = sum(task.n for task in left), 0
    with ProcessPoolExecutor(processes) if processes > 1 else nullcontext() as pool:
        apply = pool.map if pool else map
        claims = [by_scene[task.scene] for task in left]
        for task, counts in zip(left, apply(worlds_of, left, claims, repeat(noise), repeat(seed)), strict=True):
            done += task.n
            print(f"calibrate: {done} of {total} worlds ({task.scene}, {task.effect} margins)", file=sys.stderr)
            if kept is not None:
                lines = [f"{names[task]}\t{claim}\t{verdict}\t{n}\n" for (claim, verdict), n in counts.items()]
                with kept.open("a", encoding="utf-8") as file:
                    file.write("".join([*lines, f"{names[task]}\t\t\t0\n"]))
            yield task, counts


def _read(kept: Path | None) -> dict[str, Counter[tuple[str, str]]]:
    """Return the counts that are kept by the name of their task; a part without its last line was interrupted."""
    by_task: dict[str, Counter[tuple[str, str]]] = {}
    whole = set()
    for line in kept.read_text(encoding="utf-8").splitlines() if kept is not None and kept.is_file() else []:
        name, claim, verdict, number = line.split("\t")
        if claim:
            by_task.setdefault(name, Counter())[claim, verdict] = int(number)
        else:
            whole.add(name)
    return {name: counts for name, counts in by_task.items() if name in whole}


def _row(covered: Covered, effect: int, counts: Counter[str]) -> dict[str, object]:
    n = counts.total()
    wrong = max(counts[verdict] for verdict in covered.wrong(effect))
    interval = binomtest(wrong, n).proportion_ci(0.95, "exact")
    right = covered.right(effect)
    shares = {verdict.replace(" ", "_"): counts[verdict] / n for verdict in VERDICTS}
    return {
        "claim_id": covered.claim_id,
        "kind": covered.kind,
        "what": covered.effect,
        "effect": effect,
        "truth": covered.truth(effect),
        "n_worlds": n,
        **shares,
        "wrong": wrong / n,
        "wrong_low": interval.low,
        "wrong_high": interval.high,
        "power": math.nan if right is None else counts[right] / n,
    }
