"""Further runs are those that a plan does not have yet: seeds, learning rates, or all runs on a larger test split."""

from __future__ import annotations

import pytest

from lorabench.config.preset import Preset
from lorabench.errors import UserError
from lorabench.planning.further import More, further
from lorabench.planning.plan import make_plan


@pytest.fixture
def plan(raw_preset):
    raw_preset["datasets"]["facts"] = {"kind": "facts", "facts": 16}
    rank = raw_preset["experiments"]["rank"][0]
    raw_preset["experiments"]["early"] = [rank | {"ranks": {"all": [8]}, "seeds": 3, "repeat": "every"}]
    return make_plan(Preset.model_validate(raw_preset))


def sweep_of(plan, rank):
    return next(sweep for sweep in plan.sweeps if sweep.condition.rank == rank)


def test_seeds_and_lrs_come_to_those_that_are_there(plan):
    four = sweep_of(plan, 4)
    extra = further(plan, {four.sweep_id: More(5, frozenset({1e-2, 3e-2}))}, {})
    # It has two seeds at the best of three LRs, 1e-2 among them.
    [sweep] = extra.sweeps
    assert (sweep.condition, sweep.lrs, sweep.n_runs) == (four.condition, (3e-2,), 1 + 3)
    assert further(plan, {four.sweep_id: More(2, frozenset({1.002e-3}))}, {}).sweeps == ()
    # Three seeds at three LRs are nine runs, of which the grid has three and its best LR one more.
    [sweep] = further(plan, {four.sweep_id: More(3, seeds_around=3)}, {}).sweeps
    assert (sweep.lrs, sweep.n_runs) == ((), 9 - 4)
    # FullFT has three seeds at each of its LRs.
    assert further(plan, {sweep_of(plan, None).sweep_id: More(seeds_around=3)}, {}).sweeps == ()


def test_an_arm_with_seeds_at_every_lr_keeps_them_at_every_lr(plan):
    eight = sweep_of(plan, 8)
    [sweep] = further(plan, {eight.sweep_id: More(4, frozenset({3e-2}))}, {}).sweeps
    cells = {(run.lr, run.seed) for run in sweep.grid()}
    assert cells == {(lr, 3) for lr in eight.lrs} | {(3e-2, seed) for seed in range(4)}
    assert sweep.n_runs == len(cells)
    assert not cells & {(run.lr, run.seed) for run in eight.grid()}


def test_a_larger_test_split_trains_all_runs_again_on_other_data(plan):
    four = sweep_of(plan, 4)
    extra = further(plan, {four.sweep_id: More(5, frozenset({3e-2}))}, {"instruct": 12})
    assert extra.preset.datasets["instruct"].test == 12
    runs = {sweep.condition.rank: sweep.n_runs for sweep in plan.sweeps}
    assert {sweep.condition.rank: sweep.n_runs for sweep in extra.sweeps} == runs | {4: runs[4] + 3 + 1}
    assert not {id_ for sweep in extra.sweeps for id_ in sweep.run_ids} & {
        id_ for sweep in plan.sweeps for id_ in sweep.run_ids
    }
    # The split has eight examples already.
    assert further(plan, {}, {"instruct": 8}).sweeps == ()
    with pytest.raises(UserError, match="the size of the test split of 'facts' follows from its training data"):
        further(plan, {}, {"facts": 12})


def test_a_sweep_that_finds_its_lrs_has_further_seeds_at_three(raw_preset):
    raw_preset["experiments"]["rank"][0] |= {"lrs": "auto", "ranks": {"all": [4]}, "seeds": 2}
    plan = make_plan(Preset.model_validate(raw_preset))
    four = sweep_of(plan, 4)
    for more in (More(4), More(seeds_around=4)):
        [sweep] = further(plan, {four.sweep_id: more}, {}).sweeps
        assert sweep.n_runs == 3 * 2
    [again] = (s for s in further(plan, {four.sweep_id: More(4)}, {"instruct": 12}).sweeps if s.condition.rank == 4)
    assert (again.seeds, again.lattice, again.lrs) == (4, four.lattice, four.lrs)
