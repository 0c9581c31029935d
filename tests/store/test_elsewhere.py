"""Tables from elsewhere are judged with what they have: margins, seed noise and losses may come from another place."""

import math
from dataclasses import replace

import pandas as pd
import pytest

from lorabench.analysis.finding import Finding
from lorabench.analysis.loss_fit import BORROWED_DOF, Noise
from lorabench.analysis.optima import pooled_noise
from lorabench.claims.judge import CLAIMS, judge_claims
from lorabench.claims.scope import every_dataset
from lorabench.config.loading import read_margins
from lorabench.errors import UserError
from lorabench.store.tables import Tables, with_stand_ins

from ..handmade import sft

# The base's loss is 5 nats in the curves, so that 2% of the gain to FullFT is about 0.06 nats.
LRS = (1e-3, 2e-3, 4e-3)
LORA_OFFSETS, FULLFT_OFFSETS = (0.0, 0.004, -0.002, 0.001), (0.001, 0.003, -0.004, 0.0)


def equal_losses(comparison) -> Finding:
    return comparison.equal_losses(comparison.highest, comparison.fullft)


[B1] = (claim for claim in CLAIMS if claim.id == "B1")
CLAIM = replace(B1, experiments=("rank",), judge=equal_losses, over=every_dataset)


def world(seeds: int = 4, **columns) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return runs and curves of FullFT and of LoRA of rank 16, which is worse by 0.01 nats."""
    return sft.tables(
        [
            sft.arm(optimum=2e-3, floor=2.0, lrs=LRS, offsets=FULLFT_OFFSETS[:seeds], **columns),
            sft.arm(16, optimum=2e-3, floor=2.01, lrs=LRS, offsets=LORA_OFFSETS[:seeds], **columns),
        ]
    )


def judged(runs: pd.DataFrame, curves: pd.DataFrame, **options) -> pd.Series:
    return judge_claims(Tables(with_stand_ins(runs), curves), [CLAIM], **options).iloc[0]


def test_a_row_says_whose_margins_it_was_judged_by(tmp_path):
    by_default = judged(*world())
    assert by_default["verdict"] == "confirmed"
    assert by_default["margin_rule"].startswith("default margins: 2% of the gain from the base to FullFT")
    (tmp_path / "mine.yaml").write_text("margins:\n  loss: 0.001\n  reward: 0.1\n  lr_factor: 1.6\n")
    own = judged(*world(), margins=read_margins(tmp_path / "mine.yaml"))
    assert own["verdict"] == "contradicted"
    assert own["margin_rule"].startswith("0.1% of the gain from the base to FullFT")
    assert own["margin_high"] == pytest.approx(by_default["margin_high"] / 20)
    (tmp_path / "mine.yaml").write_text("loss: 0.02\nreward: 0.1\n")
    with pytest.raises(UserError, match=r"mine\.yaml: margins\.lr_factor: missing$"):
        read_margins(tmp_path / "mine.yaml")


def test_one_seed_takes_its_noise_from_a_named_source():
    alone = judged(*world(seeds=1))
    assert alone["verdict"] == "inconclusive"
    noise = Noise(0.004, 4, "repeats of a published run")
    row = judged(*world(seeds=1), noise=noise)
    assert row["verdict"] == "confirmed"
    assert "seed noise from repeats of a published run" in row["reason"]
    assert row["ci_high"] > row["estimate"] > row["ci_low"]
    # With seeds of their own, runs are judged by them.
    assert "seed noise from" not in judged(*world(), noise=noise)["reason"]


def test_noise_of_other_tables_is_pooled_over_their_comparisons():
    instruct, worked = world(), world(dataset="worked")
    runs = pd.concat([instruct[0], worked[0]])
    noise = pooled_noise(runs, "there")
    # In each comparison, what is left after the seeds' shared effect: half of the difference of the two arms.
    differences = [lora - fullft for lora, fullft in zip(LORA_OFFSETS, FULLFT_OFFSETS, strict=True)]
    assert noise.sigma == pytest.approx(pd.Series(differences).std() / math.sqrt(2), rel=0.5)
    assert noise.source == f"there (SD {noise.sigma:.4f} nats, 6 degrees of freedom, 2 comparisons)"
    # Noise differs from comparison to comparison, so it is known less well for other runs.
    assert noise.dof == BORROWED_DOF
    with pytest.raises(UserError, match="there: no comparison has repeated seeds"):
        pooled_noise(world(seeds=1)[0], "there")


def test_means_of_seeds_are_judged_with_their_own_deviation():
    runs, curves = world(seeds=1)
    row = judged(runs.assign(n_seeds=5, final_test_nll_sd=0.004), curves)
    assert row["verdict"] == "confirmed"
    assert "5 seeds" in row["reason"]
    assert "seed noise from the standard deviations in the table" in row["reason"]
    without = judged(runs.assign(n_seeds=5), curves)
    assert without["verdict"] == "inconclusive"
    assert "means of several seeds need final_test_nll_sd" in without["reason"]


ONE_SET = "one evaluation set: the LR was picked on the loss that is reported"


def test_another_loss_stands_in_for_one_that_a_table_lacks():
    runs, curves = world()
    lacking = runs.rename(columns={"final_test_nll": "final_train_nll"}).drop(columns="final_valid_nll")
    row, whole = judged(lacking, curves), judged(runs, curves)
    stands_in = "the training loss stands in for the test loss, which the table lacks"
    assert row["reason"].endswith(f"; {stands_in}; {ONE_SET}")
    assert row["verdict"] == "confirmed"
    assert row["estimate"] == pytest.approx(whole["estimate"])
    assert ONE_SET not in whole["reason"]
