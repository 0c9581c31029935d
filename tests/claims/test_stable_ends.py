"""The ends of intervals are continuous in the data: tiny changes of published runs hardly move them."""

import numpy as np
import pandas as pd
import pytest

from lorabench.claims.judge import judge_claims
from lorabench.cli.common import plan_and_layout
from lorabench.store.tables import Tables
from saved_runs import saved_tables

from ..conftest import REPOSITORY

LOSSES = ("final_valid_nll", "final_test_nll", "first_epoch_nats")
SHARES = ("final_valid_reward", "final_reward", "best_reward", "base_reward")


def changed(tables: Tables) -> Tables:
    """Return tables in which each loss and accuracy is larger or smaller by one in a million."""
    random = np.random.default_rng(0)

    def moved(values: pd.Series) -> pd.Series:
        return values.astype(float) * (1 + 1e-6 * random.choice([-1.0, 1.0], len(values)))

    runs = tables.runs.assign(**{name: moved(tables.runs[name]) for name in LOSSES})
    runs = runs.assign(**{name: moved(tables.runs[name]).clip(upper=1.0) for name in SHARES})
    moving = tables.curves["metric"].isin(["nll", "accuracy", "reward"])
    values = tables.curves["value"].astype(float)
    curves = tables.curves.assign(value=values.where(~moving, moved(values).where(values < 1.0, values)))
    test_losses = tables.test_losses.assign(loss=moved(tables.test_losses["loss"]))
    return Tables(runs, curves, test_losses=test_losses)


@pytest.mark.long
@pytest.mark.parametrize(("preset", "ends"), [("lr_ratio", 10), ("laptop_more", 6)])
def test_a_change_of_losses_by_one_in_a_million_moves_no_end_by_half_a_percent(preset, ends, monkeypatch):
    """The accuracies of `laptop_more` are often equal at several LRs, between which only rounding could choose."""
    monkeypatch.chdir(REPOSITORY)
    plan, layout = plan_and_layout(preset)
    tables = Tables.of({name: table.to_pandas() for name, table in saved_tables(plan, layout).items()})
    by = {"margins": plan.preset.margins, "predictions": plan.preset.predictions}
    before, after = (judge_claims(each, **by).set_index("claim_id") for each in (tables, changed(tables)))
    width = before["ci_high"] - before["ci_low"]
    width = width[np.isfinite(width) & (width > 0)]
    assert len(width) >= ends
    for end in ("ci_low", "ci_high"):
        share = ((after[end] - before[end]).abs() / width)[width.index]
        assert share.max() < 0.005, share.sort_values().tail()
    assert (before["verdict"] == after["verdict"]).all()
