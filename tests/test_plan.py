"""The plan: run ids are stable and specific, shared runs appear once, and it is fast and light."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabench.config import Preset, load_preset
from lorabench.errors import UserError
from lorabench.models.tiny import SHIPPED
from lorabench.plan import Condition, Run, Sweep, make_plan, merge_sweeps


def planned(raw):
    return make_plan(Preset.model_validate(raw))


def run_ids(plan):
    return {row["run_id"] for row in plan.rows() if row["run_id"]}


def test_counts(raw_preset):
    plan = planned(raw_preset)
    # FullFT: 2 LRs and 1 repeat; two ranks: 3 LRs and 1 repeat each.
    assert len(plan.sweeps) == 3
    assert sum(sweep.n_runs for sweep in plan.sweeps) == 3 + 4 + 4
    assert len(plan.rows()) == 11
    assert len(run_ids(plan)) == 8
    assert all(sweep.condition.steps == 16 for sweep in plan.sweeps)


def test_run_id_of_known_content_never_changes():
    # Results on disk are found by these ids; see PROTOCOL_VERSION before changing an expected value.
    condition = Condition("sft", "m", "d", "lora", 8, "all", 32.0, 16, 100, identity="abc")
    assert Run(condition, 1e-3, 0).run_id == "04020fedf807"


def test_ids_do_not_depend_on_names_or_order(raw_preset):
    renamed = copy.deepcopy(raw_preset)
    renamed["models"] = {"other": renamed["models"]["tiny"]}
    renamed["experiments"]["rank"]["models"] = ["other"]
    renamed["experiments"]["rank"]["ranks"] = [4, 1]
    assert run_ids(planned(raw_preset)) == run_ids(planned(renamed))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("protocol",), {"alpha": 16.0}),
        (("protocol",), {"eps": 1e-7}),
        (("protocol",), {"precision": "bf16"}),
        (("datasets", "instruct", "seed"), 1),
        (("datasets", "instruct", "max_chars"), 200),
        (("experiments", "rank", "epochs"), 2.0),
    ],
)
def test_what_changes_a_result_changes_the_id(raw_preset, where, value):
    changed = copy.deepcopy(raw_preset)
    *parents, last = where
    inner = changed
    for key in parents:
        inner = inner[key]
    inner[last] = value
    lora = {row["run_id"] for row in planned(raw_preset).rows() if row["run_id"] and row["method"] == "lora"}
    assert not lora & run_ids(planned(changed))


def test_a_local_model_is_known_by_its_files_not_by_its_place(raw_preset, tmp_path):
    def ids(folder):
        raw_preset["models"] = {"tiny": {"kind": "path", "path": str(folder), "parameters": 1, "hidden_size": 1}}
        return run_ids(planned(raw_preset))

    first, moved, retrained = (shutil.copytree(SHIPPED, tmp_path / name) for name in "abc")
    weights = bytearray((retrained / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (retrained / "model.safetensors").write_bytes(weights)
    assert ids(first) == ids(moved)
    assert not ids(first) & ids(retrained)


def test_execution_settings_do_not_change_ids(raw_preset):
    changed = copy.deepcopy(raw_preset)
    changed["execution"] = {"gflops": 1.0, "threads": 2, "max_batch_tokens": 512, "keep_weights": "all"}
    assert run_ids(planned(raw_preset)) == run_ids(planned(changed))


def test_a_wider_grid_keeps_the_runs_it_had(raw_preset):
    wider = copy.deepcopy(raw_preset)
    wider["experiments"]["rank"]["lrs"]["lora"].append(3e-2)
    assert run_ids(planned(raw_preset)) < run_ids(planned(wider))


def test_sweep_and_its_grid(raw_preset):
    plan = planned(raw_preset)
    sweep = plan.sweep(plan.sweeps[0].sweep_id)
    assert [run.seed for run in sweep.grid()] == [0] * len(sweep.lrs)
    assert [(run.lr, run.seed) for run in sweep.repeats(0.5)] == [(0.5, 1)]
    with pytest.raises(UserError, match="sweep 'nope' is not in the plan"):
        plan.sweep("nope")


@given(lr=st.floats(1e-8, 1.0), other=st.floats(1e-8, 1.0), seed=st.integers(0, 9))
def test_run_ids_differ_exactly_when_runs_do(lr, other, seed):
    condition = make_plan(load_preset("smoke")).sweeps[0].condition
    assert (Run(condition, lr, seed).run_id == Run(condition, other, seed).run_id) == (lr == other)


def test_runs_shared_between_experiments_appear_once(raw_preset):
    sweep = planned(raw_preset).sweeps[0]
    other = Sweep(sweep.condition, lrs=(sweep.lrs[0], 0.5), seeds=1, experiments=("placement",))
    (merged,) = merge_sweeps([sweep, other])
    assert merged.lrs == tuple(sorted({*sweep.lrs, 0.5}))
    assert (merged.seeds, merged.experiments) == (sweep.seeds, ("rank", "placement"))
    assert {run.run_id for run in sweep.grid()} < {run.run_id for run in merged.grid()}


def test_longest_sweep_first(raw_preset):
    raw_preset["experiments"]["rank"]["ranks"] = [1, 64]
    ranks = [sweep.condition.rank for sweep in planned(raw_preset).sweeps]
    assert ranks[0] == 64


def test_plan_is_fast_and_needs_no_torch():
    code = (
        "import sys, time; start = time.process_time()\n"
        "from lorabench.config import load_preset\n"
        "from lorabench.plan import make_plan\n"
        "make_plan(load_preset('laptop')).rows()\n"
        "assert time.process_time() - start < 1.0, time.process_time() - start\n"
        "heavy = {'torch', 'transformers', 'pandas', 'matplotlib', 'pyarrow', 'reasoning_gym'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_large_plan_is_fast(raw_preset):
    rank = raw_preset["experiments"]["rank"]
    rank["ranks"] = list(range(1, 513))
    start = time.process_time()
    plan = planned(raw_preset)
    assert isinstance(plan.sweeps[0], Sweep)
    assert time.process_time() - start < 2.0
