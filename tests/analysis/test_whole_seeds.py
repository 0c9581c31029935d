"""Seeds that have runs of the same arms and LRs are fitted by their means and contrasts, which changes no number."""

import numpy as np
import pandas as pd
import pytest

from lorabench.analysis import mixed_fit
from lorabench.analysis.fit_rows import arm_grid, counted_rows, run_array
from lorabench.analysis.mixed_fit import fit_mixed


def rows(seeds):
    """Return the runs of three arms at four LRs with some seeds, of which the last lacks an LR of one arm."""
    random, parts = np.random.default_rng(1), {}
    for number, label in enumerate(("FullFT", "LoRA r4", "LoRA r64")):
        lr, seed = (each.ravel() for each in np.meshgrid([1e-3, 1.5e-3, 2.2e-3], range(seeds)))
        kept = ~((seed == seeds - 1) & (lr > 2e-3) & (number == 1))
        x, level = np.log(lr / 1.6e-3) - 0.1 * number, 0.02 * np.random.default_rng(2).normal(size=seeds)
        runs = pd.DataFrame(
            {"run_id": [f"{label}{i}" for i in range(len(x))], "lr": lr, "seed": seed, "status": "done"}
        )
        losses = 1 + 0.05 * x**2 + level[seed] + 0.01 * random.normal(size=len(x))
        runs["validation_loss"] = runs["test_loss"] = losses
        parts[label] = run_array(runs[kept])
    return counted_rows(parts, {label: arm_grid(runs) for label, runs in parts.items()})


@pytest.mark.parametrize("known", [None, (0.01, 6)])
@pytest.mark.parametrize("seeds", [2, 4])
def test_a_fit_by_means_and_contrasts_of_whole_seeds_is_that_by_runs(monkeypatch, seeds, known):
    counted, combinations = rows(seeds), mixed_fit._combinations
    # Some of the combinations of sizes will do.
    monkeypatch.setattr(mixed_fit, "_combinations", lambda labels: [each[::50] for each in combinations(labels)])
    fitted = fit_mixed(counted, known)
    assert [len(seeds_of) for seeds_of in mixed_fit._rotations(counted.runs)] == ([1] if seeds == 2 else [1, 2])
    monkeypatch.setattr(mixed_fit, "_rotations", lambda runs: [np.eye(len(runs))[None]])
    by_runs = fit_mixed(counted, known)
    assert fitted.dof == by_runs.dof
    for name in ("coefficients", "weights", "sizes", "sigma", "hat", "noise"):
        assert getattr(fitted, name) == pytest.approx(getattr(by_runs, name), rel=1e-7, abs=1e-9), name
    for name in ("roots", "known_roots"):
        one, other = (root @ root.swapaxes(1, 2) for root in (getattr(fitted, name), getattr(by_runs, name)))
        assert one == pytest.approx(other, rel=1e-6, abs=1e-12), name
