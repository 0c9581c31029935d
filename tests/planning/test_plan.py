"""The plan: run ids are stable and specific, shared runs appear once, and planning takes little time and memory."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabench.config.loading import load_preset
from lorabench.config.preset import Preset
from lorabench.errors import UserError
from lorabench.models.specs import shipped_folder
from lorabench.planning import bill
from lorabench.planning.expand import merge_sweeps
from lorabench.planning.plan import make_plan
from lorabench.runs import Condition, Run, Seeds, Sweep, next_runs


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
    assert Run(condition, 1e-3, 0).run_id == "99d66ac1a038"


def test_ids_do_not_depend_on_names_or_order(raw_preset):
    renamed = copy.deepcopy(raw_preset)
    renamed["models"] = {"other": renamed["models"]["tiny"]}
    renamed["experiments"]["rank"][0]["models"] = ["other"]
    renamed["experiments"]["rank"][0]["ranks"] = {"all": [4, 1]}
    assert run_ids(planned(raw_preset)) == run_ids(planned(renamed))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("protocol",), {"alpha": 16.0}),
        (("datasets", "instruct", "seed"), 1),
        (("experiments", "rank", 0, "epochs"), 2.0),
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

    first, moved, retrained = (shutil.copytree(shipped_folder("llama-128"), tmp_path / name) for name in "abc")
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
    wider["experiments"]["rank"][0]["lrs"]["lora"].append(3e-2)
    assert run_ids(planned(raw_preset)) < run_ids(planned(wider))


def test_sweep_and_its_grid(raw_preset):
    plan = planned(raw_preset)
    sweep = plan.job(plan.sweeps[0].sweep_id).sweeps[0]
    assert [run.seed for run in sweep.grid()] == [0] * len(sweep.lrs)
    with pytest.raises(UserError, match="job 'nope' is not in the plan"):
        plan.job("nope")


@given(lr=st.floats(1e-8, 1.0), other=st.floats(1e-8, 1.0), seed=st.integers(0, 9))
def test_run_ids_differ_exactly_when_runs_do(lr, other, seed):
    condition = make_plan(load_preset("smoke")).sweeps[0].condition
    assert (Run(condition, lr, seed).run_id == Run(condition, other, seed).run_id) == (lr == other)


def test_runs_shared_between_experiments_appear_once(raw_preset):
    sweep = planned(raw_preset).sweeps[0]
    other = Sweep(sweep.condition, (sweep.lrs[0], 0.5), Seeds(1), ("placement",))
    (merged,) = merge_sweeps([sweep, other])
    assert merged.lrs == tuple(sorted({*sweep.lrs, 0.5}))
    assert (merged.seeds, merged.experiments) == (sweep.seeds, ("rank", "placement"))
    assert merge_sweeps([merged, other]) == [merged]
    assert {run.run_id for run in sweep.grid()} < {run.run_id for run in merged.grid()}


def test_longest_sweep_first(raw_preset):
    raw_preset["experiments"]["rank"][0]["ranks"] = {"all": [1, 64]}
    ranks = [sweep.condition.rank for sweep in planned(raw_preset).sweeps]
    assert ranks[0] == 64


def test_plan_is_fast_and_needs_no_torch():
    code = (
        "import sys, time; start = time.process_time()\n"
        "from lorabench.config.loading import load_preset\n"
        "from lorabench.planning.plan import make_plan\n"
        "make_plan(load_preset('laptop')).rows()\n"
        "assert time.process_time() - start < 1.0, time.process_time() - start\n"
        "heavy = {'torch', 'transformers', 'pandas', 'matplotlib', 'pyarrow', 'reasoning_gym'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def changed_block(raw, **changes):
    raw["experiments"]["rank"][0] |= changes
    return planned(raw)


def test_seeds_at_every_lr(raw_preset):
    plan = changed_block(raw_preset, seeds={"every": 3})
    sweep = next(sweep for sweep in plan.sweeps if sweep.condition.method == "lora")
    cells = {(run.lr, run.seed) for run in sweep.grid()}
    assert cells == {(lr, seed) for lr in (1e-3, 3e-3, 1e-2) for seed in (0, 1, 2)}
    assert sweep.n_runs == 9
    assert next_runs(sweep, dict.fromkeys(cells, 0.0)) == []


def test_a_seed_that_is_repeated_anyway_is_not_run_twice(raw_preset):
    sweep = planned(raw_preset).sweeps[0]
    lr = sweep.lrs[0]
    (merged,) = merge_sweeps([sweep, Sweep(sweep.condition, (lr,), Seeds(1, given=((lr, 3),)), ("early",))])
    losses = {(run.lr, run.seed): 1.0 + run.lr for run in merged.grid()}
    assert next_runs(merged, losses) == []
    assert [run.seed for run in next_runs(merged, losses | {(sweep.lrs[1], 0): 0.0})] == [1]


def test_steps_are_those_of_the_epochs_or_fewer(raw_preset):
    assert {sweep.condition.steps for sweep in changed_block(raw_preset, steps=5).sweeps} == {5}
    assert {sweep.condition.steps for sweep in changed_block(raw_preset, steps=500).sweeps} == {16}
    assert {sweep.condition.steps for sweep in changed_block(raw_preset, steps=None, epochs=2.0).sweeps} == {32}


def test_a_method_without_lrs_is_no_arm(raw_preset):
    lrs = raw_preset["experiments"]["rank"][0]["lrs"]
    only_lora = changed_block(raw_preset, lrs=lrs | {"fullft": []})
    assert {sweep.condition.method for sweep in only_lora.sweeps} == {"lora"}
    only_fullft = changed_block(raw_preset, lrs=lrs | {"lora": []}, ranks={})
    assert [sweep.condition.method for sweep in only_fullft.sweeps] == ["fullft"]


def lora_conditions(plan):
    return [sweep.condition for sweep in plan.sweeps if sweep.condition.method == "lora"]


def test_alpha_grows_with_a_power_of_the_rank(raw_preset):
    powers = {0.0: {32.0}, 0.5: {32.0, 64.0}, 1.0: {32.0, 128.0}}
    for power, alphas in powers.items():
        conditions = lora_conditions(changed_block(raw_preset, alpha_power=power))
        assert {condition.alpha for condition in conditions} == alphas


def test_variants_are_a_factorial(raw_preset):
    plan = changed_block(raw_preset, alphas=[8.0, 32.0], lr_ratios=[1.0, 4.0], inits_a=[0.5], eps=1e-12)
    conditions = lora_conditions(plan)
    arms = {(c.rank, c.alpha, c.init_a, c.lr_ratio, c.eps) for c in conditions}
    assert arms == {(r, a, 0.5, q, 1e-12) for r in (1, 4) for a in (8.0, 32.0) for q in (1.0, 4.0)}
    fullft = next(sweep.condition for sweep in plan.sweeps if sweep.condition.method == "fullft")
    assert (fullft.alpha, fullft.init_a, fullft.lr_ratio, fullft.eps) == (None, None, None, 1e-12)


def test_a_transform_keeps_what_the_paper_says_it_keeps(raw_preset):
    plan = changed_block(raw_preset, ranks={"all": [4]}, transforms=[[2.0, 1.0], [1.0, 2.0], [3.0, 5.0]])
    runs = [run for sweep in plan.sweeps if sweep.condition.method == "lora" for run in sweep.grid()]
    kept = {
        (
            round(run.condition.alpha * run.condition.init_a * run.lr * run.condition.lr_ratio, 9),
            round(run.condition.init_a / run.lr, 6),
        )
        for run in runs
    }
    assert len(runs) == 4 * 3
    assert len(kept) == 3, "one class for each LR"
    assert len({run.run_id for run in runs}) == 12


def test_rl_counts_responses(raw_rl_preset):
    plan = planned(raw_rl_preset)
    assert sum(sweep.n_runs for sweep in plan.sweeps) == (1 + 1) + (3 + 1)
    for sweep in plan.sweeps:
        assert (sweep.condition.task, sweep.condition.steps, sweep.condition.batch_size) == ("rl", 3, 16)
        assert sweep.condition.rollouts.held_out == ("gcd-of-three",)


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("mean_response_tokens", 3, True),
        ("group_size", 2, False),
        ("held_out", [], False),
        ("stop", ["x"], False),
    ],
)
def test_what_changes_an_rl_run_changes_its_id(raw_rl_preset, key, value, same):
    changed = copy.deepcopy(raw_rl_preset)
    changed["experiments"]["rl_arithmetic"][0][key] = value
    assert (run_ids(planned(changed)) == run_ids(planned(raw_rl_preset))) == same


def test_problems_are_part_of_an_rl_run(raw_rl_preset):
    for name in ("gcd", "gcd-of-three"):
        changed = copy.deepcopy(raw_rl_preset)
        changed["problems"][name]["seed"] = 1
        assert not run_ids(planned(changed)) & run_ids(planned(raw_rl_preset))


def evaluated(raw, **changes):
    task = {"name": "lorabench_instruct", "about": "learned", "source": "instruct"}
    raw = copy.deepcopy(raw)
    raw["evaluation"] = {"experiments": ["rank"], "tasks": [task]} | changes
    return planned(raw)


def test_the_base_and_each_condition_are_evaluated_once(raw_preset):
    plan = evaluated(raw_preset)
    jobs = plan.evaluations()
    assert [job.sweep for job in jobs] == [None, *plan.sweeps]
    assert {job.model for job in jobs} == {"tiny"}
    assert len({job.eval_id for job in jobs}) == len(jobs)
    assert all(plan.evaluation(job.eval_id) == job for job in jobs)
    with pytest.raises(UserError, match="evaluation 'other' is not in the plan"):
        plan.evaluation("other")
    assert planned(raw_preset).evaluations() == []


def test_what_changes_scores_changes_an_evaluation(raw_preset):
    def ids(raw, **changes):
        return {job.eval_id for job in evaluated(raw, **changes).evaluations()}

    other_data = copy.deepcopy(raw_preset)
    other_data["datasets"]["instruct"]["seed"] = 1
    own, vllm = (raw_preset | {"execution": raw_preset["execution"] | {"sampler": name}} for name in ("own", "vllm"))
    assert ids(own) == ids(raw_preset)
    assert not ids(vllm) & ids(raw_preset)
    assert not ids(raw_preset) & ids(raw_preset, batch_size=8)
    assert not ids(raw_preset) & ids(other_data)


def test_the_estimate_has_the_evaluation(raw_preset):
    plan = evaluated(raw_preset)
    work = bill.per_experiment(plan)["evaluation"]
    assert (work.runs, work.jobs) == (0, 4)
    # Four jobs of 1000 documents of 200 tokens.
    assert work.tokens == 4 * 1000 * 200
    assert bill.minutes(plan, work, 1) == pytest.approx(2 * bill.minutes(plan, work, 2))
    assert "evaluation" not in bill.per_experiment(planned(raw_preset))


def test_a_plan_with_lrs_to_find_has_an_expected_and_a_largest_number_of_runs(raw_preset):
    [block] = raw_preset["experiments"]["rank"]
    raw_preset["experiments"]["rank"] = [block | {"lrs": "auto", "ranks": {"all": [4]}, "seeds": 3}]
    plan = planned(raw_preset)
    # Both methods start with the same LRs, and are expected to try one more before the seeds at three LRs.
    assert {sweep.lrs for sweep in plan.sweeps} == {(4.64e-4, 1e-3, 2.15e-3)}
    assert {(sweep.n_runs, sweep.most_runs) for sweep in plan.sweeps} == {(3 + 1 + 3 * 2, 9 * 3)}
    assert (len(plan.rows()), len(run_ids(plan))) == (20, 6)
    total = bill.total(plan)
    assert (total.runs, total.most_runs) == (20, 54)
    assert 2 < total.most_job_hours / total.job_hours < 54 / 20
    # A job's time limit covers the largest number of runs.
    shorter = planned(raw_preset | {"experiments": {"rank": [raw_preset["experiments"]["rank"][0] | {"seeds": 2}]}})
    assert {sweep.sweep_id for sweep in plan.sweeps}.isdisjoint(sweep.sweep_id for sweep in shorter.sweeps)
    # Another block's fixed LRs of the same condition are trained in the first wave.
    fixed = block | {"ranks": {"all": [4]}, "lrs": {"fullft": [], "lora": [1e-3, 5e-3]}, "seeds": 4}
    raw_preset["experiments"]["early"] = [fixed]
    both = next(sweep for sweep in planned(raw_preset).sweeps if sweep.condition.method == "lora")
    assert (both.lrs, both.seeds, both.experiments) == ((4.64e-4, 1e-3, 2.15e-3, 5e-3), Seeds(4, 3), ("rank", "early"))
    assert both.lattice is not None
