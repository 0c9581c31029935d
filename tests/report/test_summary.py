"""The numbers of the report's tables, from tables made by hand."""

from __future__ import annotations

import pytest

from lorabench.analysis.comparison import Judging
from lorabench.config.margins import DEFAULT_MARGINS
from lorabench.report.summary import experiment

from ..handmade.sft import arm, tables


def test_the_best_lr_of_a_row_is_that_of_its_loss():
    # Validation prefers 1e-3, the mean of validation and test, which centres the fit, 3e-4.
    runs, _ = tables([arm(lrs=(1e-4, 3e-4, 1e-3, 3e-3), optimum=3e-4, offsets=(0.0,))])
    runs["experiments"] = [["rank"]] * len(runs)
    runs.loc[runs["lr"] == 1e-3, "final_valid_nll"] = runs["final_valid_nll"].min() - 1e-3
    summary = experiment("rank", runs, Judging(DEFAULT_MARGINS))
    assert summary is not None
    (row,) = summary["arms"]
    (loss,) = runs.loc[runs["lr"] == row["lr_best"], "final_test_nll"]
    assert row["lr_best"] == 1e-3
    assert row["best_mean"] == pytest.approx(loss)
