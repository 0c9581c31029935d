"""What is shipped and published of learning rates follows from the sources; predicted regrets hold."""

import json
import math

import pandas as pd
import pytest
from lora_advice.audit.regret import LrEvidence, Place
from lora_advice.theory import FACTS

from advice.benchmarks.audit_regret import (
    CLASSES,
    PAGE,
    alarms,
    curvatures,
    evidence,
    held_beyond,
    held_to,
    inside,
    measured_runs,
    page_rows,
    rounded,
)
from advice.benchmarks.lr_left_out import by_source, compared, left_out
from lorabench.sources.lr_optima import known_optima
from lorabench.sources.source import read_sources, source_folders
from lorabench.store.published import evidence_folders

from ..conftest import REPOSITORY

EVIDENCE = REPOSITORY / "paper_figures/published/evidence"


@pytest.fixture(scope="module")
def published():
    return read_sources(source_folders()), evidence_folders(REPOSITORY)


@pytest.fixture(scope="module")
def runs(published):
    return measured_runs(*published)


@pytest.fixture(scope="module")
def optima(published):
    return known_optima(*published)


@pytest.mark.slow
def test_what_is_shipped_follows_from_the_sources(optima, runs):
    table = curvatures(runs)
    committed = pd.read_csv(EVIDENCE / "lr_curvatures.csv")
    pd.testing.assert_frame_equal(rounded(table), committed, rtol=1e-3)
    made, shipped = evidence(optima, table), json.loads((FACTS / "lr_evidence.json").read_text())
    assert made.keys() == shipped.keys()
    assert all(made[name] == shipped[name] for name in made.keys() - {"optima", "curvatures"})
    place = Place("llama", 4096.0, "lora", False, 32.0, 1000.0)
    for other in (place, place._replace(method="fullft"), place._replace(rl=True), place._replace(family="gemma")):
        ours, theirs = (LrEvidence(known).verdict(math.log(1e-5), other) for known in (made, shipped))
        for name in ("recommended", "share", "loss"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-3)


@pytest.mark.slow
def test_measured_regrets_of_one_arm_by_hand(runs):
    # Full fine-tuning at batch size 128 of one source: the lowest of five losses, and the base's loss of 0.5518.
    arm = runs[(runs["source"] == "nhckdvrl") & (runs["method"] == "fullft") & (runs["batch_size"] == 128)]
    assert arm["loss"].round(4).tolist() == [0.497, 0.4895, 0.4885, 0.5072, 0.5587]
    assert arm["regret"].tolist() == pytest.approx([0.0085, 0.001, 0.0, 0.0187, 0.0702], abs=1e-4)
    assert arm["share"].iloc[3] == pytest.approx(0.0187 / (0.5518 - 0.4885), rel=0.01)
    assert arm["margins"].iloc[3] == pytest.approx(arm["share"].iloc[3] / 0.02)
    assert not arm["lost"].any()


@pytest.mark.slow
def test_the_committed_calibration_follows_from_the_sources(optima, runs):
    rows = held_to(runs, optima)
    for name, table in (("inside", inside(rows)), ("alarms", alarms(rows))):
        committed = pd.read_csv(EVIDENCE / f"lr_regret_{name}.csv")
        pd.testing.assert_frame_equal(rounded(table), committed, rtol=1e-3, check_dtype=False)


@pytest.mark.slow
def test_the_committed_errors_of_rules_follow_from_the_sources(optima):
    committed = pd.read_csv(EVIDENCE / "lr_left_out_summary.csv")
    pd.testing.assert_frame_equal(compared(by_source(left_out(optima))), committed, rtol=1e-3)
    # LoRA stands for high ranks with a trained A.
    own = [known for known in optima if (known.source, known.method, known.rl) == ("lorabench", "lora", False)]
    assert own
    assert all(known.rank >= 16 and 1e-4 < known.lr < 1e-2 for known in own)


@pytest.mark.slow
def test_extrapolated_intervals_hold_in_what_was_measured(optima, runs):
    rows = held_beyond(runs, optima)
    harmless = rows[rows["margins"] < 1]["level"].value_counts()
    assert (len(rows), harmless.get("error", 0), harmless.get("warning", 0)) == (523, 0, 2)
    assert (rows.groupby("beyond")[["share_inside", "loss_inside"]].mean() >= 0.95).all(axis=None)


def test_the_page_has_the_committed_alarms():
    table = pd.read_csv(EVIDENCE / "lr_regret_alarms.csv")
    page = (REPOSITORY / PAGE).read_text()
    assert "\n".join(page_rows(table)) in page
    counts = table.groupby("level")[list(CLASSES)].sum()
    assert f"So no error and {counts.iloc[:, 0]['warning'] / counts.loc['warning'].sum():.0%} of the warnings" in page
    costly = counts.iloc[:, 2]
    assert f"{1 - costly['note'] / costly.sum():.0%} of the runs that had lost\nmore than five margins" in page


def test_intervals_hold_and_errors_are_no_false_alarms():
    held = pd.read_csv(EVIDENCE / "lr_regret_inside.csv").set_index(["task", "source"])
    both = held.loc[[("sft", math.nan), ("rl", math.nan)], ["share_inside", "loss_inside"]]
    assert (both >= 0.95).all(axis=None)
    counts = pd.read_csv(EVIDENCE / "lr_regret_alarms.csv").groupby("level").sum(numeric_only=True)
    assert counts.loc["error", "below 1 margin"] == 0
    assert counts.loc["warning", "below 1 margin"] < 0.1 * counts["below 1 margin"].sum()
