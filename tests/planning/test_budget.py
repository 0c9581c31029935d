"""A preset is reduced to a budget of hours by leaving out whole experiments in a fixed order."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from lorabench.config.fields import PresetError
from lorabench.config.loading import load_preset
from lorabench.planning import bill
from lorabench.planning.budget import (
    CORE_CLAIMS_BY_EXPERIMENT,
    reduce_to_budget,
    split_budget,
    steps_in_order,
    with_budget,
)
from lorabench.planning.plan import make_plan
from lorabench.store.layout import Layout


def hours(preset):
    total = bill.total(make_plan(preset))
    return total.gpu_hours or total.job_hours


def test_a_budget_with_room_leaves_everything():
    core = load_preset("core")
    kept, dropped = reduce_to_budget(core, hours(core))
    assert (kept, dropped) == (core, [])


def test_what_a_budget_leaves_out_is_known():
    core = load_preset("core")
    steps = [step.what for step in steps_in_order(make_plan(core))]
    # No core claim needs DeepMath, the dearest; MATH goes before GSM8K, which tests the same.
    assert steps[:3] == ["rl_deepmath", "lr_law", "placement_small"]
    assert steps.index("rl_math") < steps.index("rank") < steps.index("rl_gsm8k")
    kept, dropped = reduce_to_budget(core, 400)
    assert [text.split(": ")[1].split(",")[0] for text in dropped] == ["rl_deepmath", "lr_law"]
    assert kept.limits == [*core.limits, *dropped]
    assert kept.evaluation.experiments == ["rank", "rl_gsm8k", "rl_math"]
    assert not {"rl_deepmath", "lr_law"} & set(kept.experiments.chosen())


def test_of_several_models_the_dearest_goes():
    paper = load_preset("paper")
    steps = [step.what for step in steps_in_order(make_plan(paper))]
    assert steps.index("rank on llama-3-1-8b-base") < steps.index("rank")
    assert "rank on llama-3-2-1b-base" not in steps
    # A core claim on placement is about a dense model.
    assert steps.index("placement on qwen3-30b-a3b-base") < steps.index("placement")
    assert "placement on llama-3-1-8b-base" not in steps
    kept, _ = reduce_to_budget(paper, 5000)
    assert {model for block in kept.experiments.rank for model in block.models} == {"llama-3-2-1b-base"}


def test_a_budget_too_small_for_anything_is_an_error():
    with pytest.raises(PresetError, match=r"a budget of 0\.1 GPU-hours is less than the .* of the last experiment"):
        reduce_to_budget(load_preset("core"), 0.1)


@pytest.mark.parametrize("name", [pytest.param("core", marks=pytest.mark.slow), "laptop"])
def test_a_larger_budget_keeps_what_a_smaller_one_keeps(name):
    preset = load_preset(name)
    total = hours(preset)
    kept = []
    for share in (0.05, 0.15, 0.35, 0.6, 0.9):
        try:
            reduced, _ = reduce_to_budget(preset, share * total)
        except PresetError:
            continue
        plan = make_plan(reduced)
        bill_of_all = bill.total(plan)
        assert (bill_of_all.gpu_hours or bill_of_all.job_hours) <= share * total
        kept.append({sweep.condition for sweep in plan.sweeps})
        # Blocks stay whole: what had full fine-tuning still has it, on the same grid.
        for experiment, blocks in reduced.experiments.trained().items():
            before = {json.dumps(b.lrs.model_dump()): b for b in preset.experiments.trained()[experiment]}
            assert all(json.dumps(block.lrs.model_dump()) in before for block in blocks)
    assert len(kept) >= 3
    assert all(smaller <= larger for smaller, larger in pairwise(kept))
    assert len({len(conditions) for conditions in kept}) > 1


def test_budgets_keep_the_names_of_sweeps_and_folders():
    assert split_budget("paper@500") == ("paper", 500)
    assert split_budget("mine@home.yaml") == ("mine@home.yaml", None)
    assert with_budget("paper@500", 20) == "paper@20"
    for wrong in ("much", -1, "nan"):
        with pytest.raises(PresetError, match="a number of hours above 0"):
            with_budget("paper", wrong)
    layout = Layout.of("core@500")
    assert layout.root == Layout.of("core").root
    everything = {sweep.sweep_id for sweep in make_plan(Layout.of("core").preset).sweeps}
    assert {sweep.sweep_id for sweep in make_plan(layout.preset).sweeps} < everything
    assert layout.dropped


def test_core_claims_are_tested_by_those_experiments():
    from lorabench.claims.catalog import CLAIMS, CORE

    experiments = {claim.id: claim.experiments for claim in CLAIMS}
    for experiment, claims in CORE_CLAIMS_BY_EXPERIMENT.items():
        assert all(experiment in experiments[claim] for claim in claims), experiment
    assert set().union(*CORE_CLAIMS_BY_EXPERIMENT.values()) == set(CORE)
