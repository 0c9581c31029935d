"""The recipe, from tables whose answer is known."""

from typing import Any

import pandas as pd
import pytest

from lorabench.analysis.comparison import Judging
from lorabench.claims.recipe import measured_recipe
from lorabench.config.margins import Margins

from ..handmade import make_sweep, runs_table

LRS = [3e-4, 5.5e-4, 1e-3, 1.7e-3, 3e-3, 5.5e-3, 1e-2, 1.7e-2, 3e-2]


def sft(*ranks: int | None, **changes: Any) -> list[dict[str, Any]]:
    """Make sweeps with a lowest loss of 2.55 nats, LoRA's 0.3 / rank more; the noise is 0.012, optima 1e-3 and 3e-3."""
    return [row for rank in ranks for row in make_sweep(rank, seeds=12, **{"lrs": LRS} | changes)]


def shifted(rows: list[dict[str, Any]], by: float) -> list[dict[str, Any]]:
    """Return the rows with the losses of both splits shifted."""
    losses = ("final_valid_nll", "final_test_nll")
    return [row | {name: row[name] + by for name in losses if row[name] is not None} for row in rows]


def only(rows: list[dict[str, Any]]):
    """Return the only recommendation from some rows."""
    [recommendation] = measured_recipe(runs_table(rows))
    return recommendation


def test_lora_matches_from_some_rank_up():
    recommendation = only(sft(None, 1, 64, 256))
    assert [choice.answer for choice in recommendation.lora] == ["no", "yes", "yes"]
    assert recommendation.answer == "yes"
    assert recommendation.use.rank == 64
    assert recommendation.use.gap.estimate == pytest.approx(0.3 / 64, abs=0.012)
    # The tables here do not know the loss of the base.
    assert recommendation.margin.value == pytest.approx(0.01 * recommendation.fullft.loss)
    none = only(sft(None, 1, 4))
    # The lowest loss, not the lowest rank.
    assert (none.answer, none.use.rank) == ("no", 4)


def test_a_rank_is_not_recommended_if_a_higher_one_is_better_by_the_margin():
    # Rank 1 is as good as full fine-tuning within a margin of 0.1, and rank 64 better than both.
    runs = runs_table(sft(None, 1) + shifted(sft(64), -0.4))
    curves = pd.DataFrame({"run_id": runs["run_id"], "step": 0, "split": "validation", "metric": "nll", "value": 20.0})
    judging = Judging(Margins(loss=0.02, final_loss=0.9, reward=0.1, lr_factor=1.6))
    [recommendation] = measured_recipe(runs, curves, judging)
    assert [choice.answer for choice in recommendation.lora] == ["yes", "yes"]
    assert recommendation.use.rank == 64


def test_each_batch_size_has_its_answer():
    rows = [row | {"run_id": row["run_id"] + "-4", "batch_size": 4} for row in sft(None, 64)]
    worse = sft(None) + shifted(sft(64), 0.3)
    rows += [row | {"run_id": row["run_id"] + "-64", "batch_size": 64} for row in worse]
    recipe = measured_recipe(runs_table(rows))
    assert [(each.setting["batch_size"], each.answer) for each in recipe] == [(4, "yes"), (64, "no")]


def test_without_two_tuned_methods_there_is_no_answer():
    for rows in (sft(None), sft(64), sft(None, 64, lrs=[1e-3, 3e-3])):
        assert measured_recipe(runs_table(rows)) == []
