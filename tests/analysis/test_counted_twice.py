"""The error from test examples leaves out what single examples do to single runs, which is in the error from seeds."""

from __future__ import annotations

import numpy as np
import pytest

from lorabench.analysis.example_losses import without_run_noise

N = 400


def test_only_what_all_runs_of_an_arm_share_is_left():
    random = np.random.default_rng(0)
    design = np.kron(np.eye(2), np.ones((6, 1)))  # the means of two arms of six runs
    hat = np.linalg.pinv(design)
    of_arm, of_run = random.normal(0, 0.1, (2, N)), random.normal(0, 0.3, (12, N))
    influences = design @ of_arm + of_run
    counts = random.multinomial(N, np.full(N, 1 / N), 4000)
    draws = (counts - 1) @ influences.T @ hat.T / N
    # The runs' own parts have twice the variance of the arms' when they are averaged over six runs.
    assert draws.std() == pytest.approx(np.sqrt(0.1**2 + 0.3**2 / 6) / np.sqrt(N), rel=0.1)
    left = without_run_noise(draws, influences, design, hat, np.eye(12))
    assert left.std() == pytest.approx(0.1 / np.sqrt(N), rel=0.15)
    assert np.corrcoef(left[:, 0], draws[:, 0])[0, 1] > 0.95


def test_without_noise_of_runs_nothing_changes():
    random = np.random.default_rng(1)
    design = np.kron(np.eye(2), np.ones((3, 1)))
    hat = np.linalg.pinv(design)
    influences = design @ random.normal(0, 0.1, (2, N))
    draws = random.normal(0, 0.01, (1000, 2))
    np.testing.assert_allclose(without_run_noise(draws, influences, design, hat, np.eye(6)), draws, atol=1e-6)
