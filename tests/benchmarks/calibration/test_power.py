"""The power of a plan is counted in worlds with the plan's own seeds, learning rates and examples."""

from dataclasses import replace

import pytest

from benchmarks.calibration.made import ArmDesign, Design
from benchmarks.calibration.noise import NoiseLevels
from benchmarks.calibration.power import design_of, power_of_plan
from benchmarks.calibration.run import Making, Task
from benchmarks.calibration.seeds import SeedNoise
from benchmarks.calibration.traits import Traits
from lorabench.config.loading import load_preset
from lorabench.errors import UserError
from lorabench.planning.plan import make_plan
from lorabench.runs import Racing


def test_the_design_is_that_of_the_sweeps_and_a_claim_without_runs_is_named():
    design = design_of(make_plan(load_preset("core")), "B2")
    step = pytest.approx(2.154, abs=0.01)
    assert design.arms["lora", "all", False] == ArmDesign(5, step, 3, "around", 3, Racing(0.05, 3))
    assert (design.test_examples, design.validation_examples) == (1024, 256)
    assert design.arms["fullft", None, False].seeds == 5
    smollm2 = make_plan(load_preset("smollm2"))
    assert design_of(smollm2, "B10") is None
    with pytest.raises(UserError, match="calibration does not cover B10 in this preset"):
        power_of_plan(smollm2, 1, ["B10"])


def test_worlds_have_the_design_and_without_one_that_of_the_scene():
    few = ArmDesign(4, 2.0, 2, "around")
    design = Design({("fullft", None, False): ArmDesign(7, 2.0, 4, "every"), ("lora", "all", False): few}, 11, 5)
    task = Task("ranks", 0.0, 0, 2)
    tables = Making(design=design).tables(task, 0)
    runs = tables.runs
    assert runs.loc[runs["method"] == "fullft", "lr"].value_counts().tolist() == [4] * 7
    assert runs.loc[runs["rank"] == 64, "seed"].nunique() == 2
    assert tables.test_losses["example"].nunique() == 11
    # By little noise, each neighbour of the best LR is given up after two seeds.
    racing = replace(few, seeds=5, racing=Racing(0.05, 2))
    seeds = SeedNoise(common=0.0, walk=0.0, arm=0.0, fullft=0.0, run=1e-4)
    quiet = replace(NoiseLevels(), seeds=seeds, example_run=0.0)
    raced = Making(quiet, Traits.only(()), design=replace(design, arms={("lora", "all", False): racing}))
    seeds = raced.tables(task, 0).runs.groupby(["rank", "lr"], dropna=False)["seed"].nunique()
    assert sorted(seeds.loc[64])[-3:] == [2, 2, 5]
    assert Making().tables(task, 0).runs["seed"].nunique() == 6
