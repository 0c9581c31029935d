from __future__ import annotations

import pandas as pd

from lorabench.analysis.arms import with_losses

from ..handmade.sft import arm, tables


def test_losses_of_supervised_runs_are_their_final_nlls():
    runs, _ = tables([arm(optimum=3e-4)])
    assert with_losses(runs)["validation_loss"].equals(runs["final_valid_nll"])
    assert with_losses(runs)["test_loss"].equals(runs["final_test_nll"])


def test_losses_that_runs_already_have_are_kept():
    runs, _ = tables([arm(optimum=3e-4)])
    runs = runs.assign(validation_loss=0.25, test_loss=0.5)
    pd.testing.assert_frame_equal(with_losses(runs), runs)


def test_an_empty_table_has_no_losses():
    assert with_losses(pd.DataFrame()).columns.empty
