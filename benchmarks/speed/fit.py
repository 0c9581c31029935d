"""How much faster final losses are fitted by means and contrasts of whole seeds than by runs.

    python -m benchmarks.speed.fit          # half a minute of CPU time

The sweep is made up, with five arms at five learning rates, each with eight seeds. Both fits are made in turns and give
the same numbers (tests/analysis/test_whole_seeds.py).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks.calibration.made import ArmDesign, Design
from benchmarks.calibration.run import Making, Task
from lorabench.analysis import mixed_fit
from lorabench.analysis.comparison import comparisons

TURNS = 3


def main() -> None:
    """Print the median seconds of both fits, and their ratio."""
    arm = ArmDesign(5, 1.47, 8, "every")
    making = Making(design=Design({("fullft", None, False): arm}, 144, 48))
    tables = making.tables(Task("placements", 0.0, 0, 2), 0)

    def seconds(rotations: Callable[[np.ndarray], list[np.ndarray]]) -> float:
        [comparison] = comparisons(tables.runs, tables.curves)
        with mock.patch.object(mixed_fit, "_rotations", rotations):
            start = time.perf_counter()
            comparison.fit.lowest  # noqa: B018
        return time.perf_counter() - start

    of_seeds, of_runs = mixed_fit._rotations, lambda runs: [np.eye(len(runs))[None]]
    turns = [(seconds(of_runs), seconds(of_seeds)) for _ in range(TURNS)]
    by_runs, by_seeds = (statistics.median(each) for each in zip(*turns, strict=True))
    print(
        f"{len(tables.runs)} runs: by runs {by_runs:.2f} s, by whole seeds {by_seeds:.2f} s: {by_runs / by_seeds:.1f}"
    )


if __name__ == "__main__":
    main()
