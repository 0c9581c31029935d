"""Each trait breaks the assumption that it names, and no other."""

import math

import numpy as np
import pytest

from benchmarks.calibration.noise import NoiseLevels
from benchmarks.calibration.run import Making, Task
from benchmarks.calibration.scenes import ranks
from benchmarks.calibration.traits import NAMES, Traits, with_traits
from benchmarks.calibration.worlds import excess_loss

NOISE = NoiseLevels()
TASK = Task("ranks", 1.0, 0, 2)


def made(name):
    """Return the arms of worlds with a trait."""
    sweeps = []
    for number in range(40):
        random = np.random.default_rng(number)
        sweeps += with_traits(ranks(0, NOISE, random), Traits.only((name,)), random)
    return [arm for sweep in sweeps for arm in sweep.arms]


def place(arm):
    """Return where the optimum of an arm lies in its grid: 0 at the lowest LR, and the number of LRs less 1."""
    return (arm.optimum - math.log(arm.lrs[0])) / math.log(arm.lrs[1] / arm.lrs[0])


def test_a_trait_alone_breaks_one_assumption():
    arms = {name: made(name) for name in NAMES if name != "plain"}
    curvatures = [arm.curvature for arm in arms["curvatures"]]
    assert 1 / 3 <= min(curvatures) < 0.4
    assert 2.5 < max(curvatures) <= 3
    assert {arm.curvature for name in NAMES if name != "curvatures" for arm in arms[name]} == {1.0}
    cliffs = [arm.cliff for arm in arms["cliff"]]
    assert 1 <= min(cliffs) < 1.1
    assert 2.9 < max(cliffs) <= 3
    assert {arm.cliff for arm in arms["edge"]} == {math.inf}
    nearest = min(arms["cliff"], key=lambda arm: arm.cliff)
    cliff, plain = (excess_loss(np.array([0.9, 1.3]), arm, NOISE) for arm in (nearest, arms["edge"][0]))
    assert cliff[0] == plain[0]
    assert cliff[1] > 2 * plain[1]
    skewed = max(arms["asymmetry"], key=lambda arm: arm.skew)
    below, above = excess_loss(np.array([-1.0, 1.0]), skewed, NOISE)
    assert above > 3 * below > 0
    assert 0 < max(arm.lag for arm in arms["lag"]) <= 0.005
    assert not any(arm.lag for arm in arms["groups"])
    # An optimum near the edge of its grid is one step inside at most.
    places = {name: [place(arm) for arm in arms[name] if len(arm.lrs) == 5] for name in ("edge", "lag")}
    assert 1 <= min(places["edge"]) < 1.2
    assert 2.8 < max(places["edge"]) <= 3
    assert all(1.5 <= inside <= 2.5 for inside in places["lag"])


def test_twins_share_their_truth_and_not_their_luck():
    first, twin, other = (Making().tables(TASK, number) for number in (4, 5, 6))
    lrs = [set(tables.runs.loc[tables.runs["method"] == "fullft", "lr"]) for tables in (first, twin, other)]
    assert lrs[0] & lrs[1]
    assert not lrs[0] & lrs[2]
    assert not np.isclose(first.runs["final_test_nll"].iloc[0], twin.runs["final_test_nll"].iloc[0])
    assert first.test_losses["tokens"].iloc[:20].tolist() != twin.test_losses["tokens"].iloc[:20].tolist()
    again = Making().tables(TASK, 4)
    assert again.runs["final_test_nll"].tolist() == pytest.approx(first.runs["final_test_nll"].tolist())
