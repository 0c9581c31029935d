"""Run a calibration: draw worlds, judge them, and count how often each verdict falls."""

from __future__ import annotations

import math
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import betaincinv

from benchmarks.calibration.noise import NoiseLevels
from benchmarks.calibration.truths import COVERED, EFFECTS, SCENES, Covered
from lorabench.claims.catalog import CLAIMS
from lorabench.claims.judge import judge_claims
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


def worlds_of(task: Task, claim_ids: Sequence[str], noise: NoiseLevels, seed: int) -> Counter[tuple[str, str]]:
    """Draw and judge the worlds of a task; return how often each claim got each verdict."""
    claims = [claim for claim in CLAIMS if claim.id in claim_ids]
    counts: Counter[tuple[str, str]] = Counter()
    # Small tables of text are faster as Python's own strings.
    with pd.option_context("mode.string_storage", "python"):
        for number in range(task.first, task.first + task.n):
            # Every world has a generator of its own, so the results depend neither on the processes nor on the claims.
            random = np.random.default_rng([seed, zlib.crc32(task.scene.encode()), task.effect, number])
            judged = judge_claims(SCENES[task.scene](task.effect, noise, random), claims)
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
    for of_claim in covered:
        by_scene.setdefault(of_claim.scene, []).append(of_claim.claim_id)
    tasks = [
        Task(scene, effect, first, min(CHUNK, worlds - first))
        for scene in by_scene
        for effect in EFFECTS
        for first in range(0, worlds, CHUNK)
    ]
    counts: dict[tuple[str, int], Counter[str]] = {}
    for task, of_task in _counted(tasks, by_scene, noise, seed, processes, kept):
        for (claim_id, verdict), number in of_task.items():
            counts.setdefault((claim_id, task.effect), Counter())[verdict] += number
    rows = [_row(of_claim, effect, counts[of_claim.claim_id, effect]) for of_claim in covered for effect in EFFECTS]
    return pd.DataFrame(rows, columns=COLUMNS)


def _counted(
    tasks: Sequence[Task],
    by_scene: dict[str, list[str]],
    noise: NoiseLevels,
    seed: int,
    processes: int,
    kept: Path | None,
) -> Iterator[tuple[Task, Counter[tuple[str, str]]]]:
    """Yield the counts of each task, from the file of finished parts where it has them."""
    names = {task: f"{seed};{noise};{task};{' '.join(by_scene[task.scene])}" for task in tasks}
    finished = _read(kept)
    for task in tasks:
        if names[task] in finished:
            yield task, finished[names[task]]
    left = [task for task in tasks if names[task] not in finished]
    claims = [by_scene[task.scene] for task in left]
    every_noise, seeds = [noise] * len(left), [seed] * len(left)
    if processes > 1:
        with ProcessPoolExecutor(processes) as pool:
            yield from _reported(left, pool.map(worlds_of, left, claims, every_noise, seeds), names, kept)
    else:
        yield from _reported(left, map(worlds_of, left, claims, every_noise, seeds), names, kept)


def _reported(
    tasks: Sequence[Task],
    results: Iterator[Counter[tuple[str, str]]],
    names: dict[Task, str],
    kept: Path | None,
) -> Iterator[tuple[Task, Counter[tuple[str, str]]]]:
    """Yield the counts of each task, keep them, and report progress."""
    total, done = sum(task.n for task in tasks), 0
    for task, counts in zip(tasks, results, strict=True):
        done += task.n
        print(f"calibrate: {done} of {total} worlds ({task.scene}, {task.effect} margins)", file=sys.stderr)
        if kept is not None:
            with kept.open("a", encoding="utf-8") as file:
                lines = [f"{names[task]}\t{claim}\t{verdict}\t{n}\n" for (claim, verdict), n in counts.items()]
                file.write("".join([*lines, f"{names[task]}\t\t\t0\n"]))
        yield task, counts


def _read(kept: Path | None) -> dict[str, Counter[tuple[str, str]]]:
    """Return the counts that are kept by the name of their task; a part without its last line was interrupted."""
    found: dict[str, Counter[tuple[str, str]]] = {}
    whole = set()
    for line in kept.read_text(encoding="utf-8").splitlines() if kept is not None and kept.is_file() else []:
        name, claim, verdict, number = line.split("\t")
        if claim:
            found.setdefault(name, Counter())[claim, verdict] = int(number)
        else:
            whole.add(name)
    return {name: counts for name, counts in found.items() if name in whole}


def binomial_interval(count: int, n: int) -> tuple[float, float]:
    """Return the 95% interval of Clopper and Pearson of a share."""
    low = float(betaincinv(count, n - count + 1, 0.025)) if count else 0.0
    high = float(betaincinv(count + 1, n - count, 0.975)) if count < n else 1.0
    return low, high


def _row(covered: Covered, effect: int, counts: Counter[str]) -> dict[str, object]:
    n = counts.total()
    wrong = max(counts[verdict] for verdict in covered.wrong(effect))
    low, high = binomial_interval(wrong, n)
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
        "wrong_low": low,
        "wrong_high": high,
        "power": math.nan if right is None else counts[right] / n,
    }
