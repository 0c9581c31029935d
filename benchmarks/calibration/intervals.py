"""How often the 95% intervals of fits hold the truth, in made-up sweeps whose seeds do what those of real sweeps do,
and worse. The errors are those from seeds: test examples add nothing."""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from benchmarks.calibration.made import MadeSweep
from benchmarks.calibration.noise import NoiseLevels
from benchmarks.calibration.scenes import FULLFT, RUN, TEN, an_optimum, lora, made_arm
from benchmarks.calibration.seeds import SeedNoise
from benchmarks.calibration.traits import PLAIN, Traits, with_traits
from benchmarks.calibration.worlds import GRID_STEP, make_tables
from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import comparisons

_MEASURED = SeedNoise(common=0.008, walk=0.012, arm=0.001, fullft=0.0025, run=0.002)
"""The sizes in the sweeps of the model of 135 million parameters."""

_SHAPES = replace(PLAIN, curvatures=1.5, asymmetry=0.15)

KINDS: Mapping[str, tuple[SeedNoise, Traits]] = {
    "measured": (_MEASURED, _SHAPES),
    "tiny models": (SeedNoise(), _SHAPES),
    "shares all": (replace(_MEASURED, fullft=0.0, share=1.0), _SHAPES),
    "shares most": (replace(_MEASURED, share=0.88), _SHAPES),
    # The level of full fine-tuning is as far from that of LoRA as if it had one of its own.
    "shares nothing": (replace(_MEASURED, fullft=0.008 * math.sqrt(2), share=0.0), _SHAPES),
    "twice the growth": (replace(_MEASURED, growth=1.5), _SHAPES),
    "curvatures differ": (_MEASURED, replace(_SHAPES, curvatures=3.0)),
    # In long runs of tiny models, curvatures of arms differ by a factor of 5 and their noise by a factor of 3.
    "noise follows curvature": (replace(_MEASURED, steepness=0.7), replace(_SHAPES, curvatures=3.0)),
    "asymmetries differ": (_MEASURED, replace(_SHAPES, asymmetry=0.6)),
    "cliff at high LR": (_MEASURED, replace(_SHAPES, cliff=2.0)),
    "none of it": (SeedNoise(0.008, 0.0, 0.0, 0.0, 0.002, 1.0, 0.0), _SHAPES),
}
"""By kind of world, what its seeds do, and what its curves have that a fit does not know."""

_PAIRS = {
    "B1": ("LoRA r256", "FullFT", "optima"),
    "B2": ("LoRA r256", "FullFT", "minima"),
    "B3": ("LoRA r256", "LoRA r16", "optima"),
    "E1": ("LoRA r64 attn", "LoRA r64 mlp", "minima"),
    "E2": ("LoRA r256", "LoRA r64 mlp", "minima"),
}
"""By claim, the two arms that it compares, and whether by their optimal LRs or by their lowest losses."""

COLUMNS = ["kind", "claim_id", "n_worlds", "holds_in_all", "n_judged", "holds", "holds_error", "half_width"]
COLUMNS += ["rms_error", "mean_error"]
"""The columns of the table: the number of worlds and the share of them whose interval holds the truth; and of those in
which nothing is against a verdict, such as an optimum at the end of its LRs, their number, that share with its binomial
standard error, the median half width of the intervals, and the root mean square and the mean of the errors; of ratios
of optimal LRs in natural logarithms, of losses in nats per token."""


def a_sweep(random: np.random.Generator) -> MadeSweep:
    """Return a sweep of FullFT and four LoRA arms with three seeds at the three LRs around the best one; their LRs lie
    on one lattice, where the optima of LoRA lie about ten times as high as that of FullFT."""
    optimum, arms = an_optimum(random), []
    columns = [FULLFT, lora(256), lora(16), lora(64, "mlp"), lora(64, "attn")]
    for own, higher, nats in zip(columns, (0, TEN, TEN, TEN - 0.1, TEN + 0.1), (0, 2, 2, 3, 15), strict=True):
        at = optimum + higher + 0.1 * random.standard_normal()
        lrs = np.exp(optimum + math.log(GRID_STEP) * (round((at - optimum) / math.log(GRID_STEP)) + np.arange(-2, 3)))
        arms.append(replace(made_arm(own, at, NoiseLevels.loss + nats / 1000, random), lrs=lrs))
    return MadeSweep(arms, RUN, test_examples=2)


def errors_of(kind: str, number: int, seed: int = 0) -> pd.DataFrame:
    """Make and fit a world of a kind, and return for each claim the error of its number and the ends of its interval
    without the truth."""
    random = np.random.default_rng([seed, zlib.crc32(kind.encode()), number])
    seeds, traits = KINDS[kind]
    curvature = NoiseLevels.curvature if kind == "tiny models" else 0.035
    noise = NoiseLevels(curvature, 0.1 + 0.2 * random.standard_normal(), seeds, 0.0, 0.0, 0.0)
    [sweep] = with_traits([a_sweep(random)], traits, random)
    tables = make_tables([sweep], noise, random)
    [comparison] = comparisons(tables.runs, tables.curves)
    made = {arm_label(arm.columns): arm for arm in sweep.arms}
    arms, rows = {arm_label(arm): arm for arm in comparison.arms}, []
    for claim_id, (label, other, of) in _PAIRS.items():
        name = "optimum" if of == "optima" else "minimum"
        truth, gap = getattr(made[label], name) - getattr(made[other], name), comparison.fit.gap(label, other, of)
        is_judged = not comparison.problems([arms[label], arms[other]], resolved=of == "optima")
        rows.append((kind, claim_id, is_judged, gap.value - truth, *(end - truth for end in gap.interval())))
    return pd.DataFrame(rows, columns=["kind", "claim_id", "is_judged", "error", "low", "high"])


def interval_shares(kinds: Iterable[str], worlds: int, processes: int, seed: int = 0) -> pd.DataFrame:
    """Return the table of intervals: a row for each kind of world and claim, with the columns COLUMNS."""
    rows = []
    with ProcessPoolExecutor(processes) as pool:
        for kind in kinds:
            of_worlds = pool.map(partial(errors_of, kind, seed=seed), range(worlds), chunksize=5)
            for claim_id, found in pd.concat(of_worlds).groupby("claim_id"):
                holds, judged = found["low"].le(0) & found["high"].ge(0), found[found["is_judged"]]
                share, n, error = float(holds[found["is_judged"]].mean()), len(judged), judged["error"]
                about = worlds, float(holds.mean()), n, share, math.sqrt(share * (1 - share) / n)
                half = float((judged["high"] - judged["low"]).median() / 2)
                rows.append((kind, claim_id, *about, half, math.sqrt(float((error**2).mean())), float(error.mean())))
                print("intervals:", *rows[-1], file=sys.stderr)
    return pd.DataFrame(rows, columns=COLUMNS).round(6)
