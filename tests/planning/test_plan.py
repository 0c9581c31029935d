"""The plan: run ids are stable and specific, shared runs appear once, and planning takes little time and memory."""

import copy
import shutil
from functools import reduce
from operator import getitem

import pytest

from lorabench.config.loading import load_preset
from lorabench.config.preset import Preset
from lorabench.errors import UserError
from lorabench.models.specs import shipped_folder
from lorabench.planning.costs import per_experiment
from lorabench.planning.plan import make_plan
from lorabench.runs import Condition, Run


def planned(raw):
    return make_plan(Preset.model_validate(raw))


def run_ids(plan):
    return {row["run_id"] for row in plan.rows() if row["run_id"]}


def changed_block(raw, **changes):
    raw["experiments"]["rank"][0] |= changes
    return planned(raw)


def test_counts(raw_preset, raw_rl_preset):
    plan = planned(raw_preset)
    # FullFT: 2 LRs and 1 repeat; two ranks: 3 LRs and 1 repeat each.
    assert len(plan.sweeps) == 3
    assert sum(sweep.n_runs for sweep in plan.sweeps) == len(plan.rows()) == 3 + 4 + 4
    assert len(run_ids(plan)) == 8
    # The batch of RL counts responses.
    plan = planned(raw_rl_preset)
    assert sum(sweep.n_runs for sweep in plan.sweeps) == (1 + 1) + (3 + 1)
    for sweep in plan.sweeps:
        assert (sweep.condition.task, sweep.condition.steps, sweep.condition.batch_size) == ("rl", 3, 16)
        assert sweep.condition.rollouts.held_out == ("gcd-of-three",)


def test_run_id_of_known_content_never_changes():
    # Results on disk are found by these ids; see PROTOCOL_VERSION before changing an expected value.
    condition = Condition("sft", "m", "d", "lora", 8, "all", 32.0, 16, 100, identity="abc")
    assert Run(condition, 1e-3, 0).run_id == "99d66ac1a038"


def test_the_first_seed_moves_all_seeds_and_the_generated_test_examples():
    explored, held_out = (load_preset(name) for name in ("smoke", "smoke@100"))
    assert held_out.model_dump(exclude={"first_seed", "datasets", "problems"}) == explored.model_dump(
        exclude={"first_seed", "datasets", "problems"}
    )
    assert {name: spec.test_seed for name, spec in held_out.sources.items()} == dict.fromkeys(explored.sources, 100)
    rows = {preset.first_seed: make_plan(preset).rows() for preset in (explored, held_out)}
    assert sorted(row["seed"] + 100 for row in rows[0]) == sorted(row["seed"] for row in rows[100])
    assert not {row["run_id"] for row in rows[0]} & {row["run_id"] for row in rows[100] if row["run_id"]}
    # What is not generated stays as it is.
    docstrings = [load_preset(name).datasets["docstrings"] for name in ("overnight", "overnight@100")]
    assert docstrings[0] == docstrings[1]


RANK, RL = ("experiments", "rank", 0), ("experiments", "rl_arithmetic", 0)


@pytest.mark.parametrize(
    ("path", "value", "same"),
    [
        (("protocol",), {"alpha": 16.0}, False),
        (("datasets", "instruct", "seed"), 1, False),
        ((*RANK, "ranks"), {"all": [4, 1]}, True),
        (("execution",), {"gflops": 1.0, "threads": 2, "max_batch_tokens": 512, "keep_weights": "all"}, True),
        ((*RL, "mean_response_tokens"), 3, True),
        ((*RL, "group_size"), 2, False),
        ((*RL, "held_out"), [], False),
        ((*RL, "stop"), ["x"], False),
        (("problems", "gcd-of-three", "seed"), 1, False),
    ],
)
def test_what_changes_a_result_changes_the_id_and_nothing_else_does(raw_preset, raw_rl_preset, path, value, same):
    raw = raw_rl_preset if path[0] == "problems" or path[:3] == RL else raw_preset
    before = run_ids(planned(raw))
    *parents, last = path
    reduce(getitem, parents, raw)[last] = value
    after = run_ids(planned(raw))
    # Full fine-tuning has no alpha.
    kept = len(before) if same else 2 if path == ("protocol",) else 0
    assert len(before & after) == kept


def test_a_model_is_known_by_its_files_not_by_its_name_or_place(raw_preset, tmp_path):
    def ids(folder, name="tiny"):
        raw_preset["models"] = {name: {"kind": "path", "path": str(folder), "parameters": 1, "hidden_size": 1}}
        return run_ids(changed_block(raw_preset, models=[name]))

    first, moved, retrained = (shutil.copytree(shipped_folder("llama-128"), tmp_path / name) for name in "abc")
    weights = bytearray((retrained / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (retrained / "model.safetensors").write_bytes(weights)
    assert ids(first) == ids(moved) == ids(first, "other")
    assert not ids(first) & ids(retrained)


def variants(raw, names, preset=None, **changes):
    """Return a plan of some variants of LoRA, with changed fields of the block and sections of the preset."""
    block = raw["experiments"]["rank"][0] | {"variants": names, "ranks": {"all": [4]}} | changes
    return planned(raw | {"experiments": {"variants": [block]}} | (preset or {}))


def test_variants_of_lora_are_arms(raw_preset):
    """Those that other fields can say are the runs of these fields, and plain LoRA has the ids that it always had."""
    plain, *others = (variants(raw_preset, [name]) for name in ("lora", "rslora", "lora_plus", "dora", "pissa"))
    assert run_ids(plain) == run_ids(changed_block(copy.deepcopy(raw_preset), ranks={"all": [4]}))
    assert run_ids(others[0]) == run_ids(variants(raw_preset, ["lora"], alpha_power=0.5))
    assert run_ids(others[1]) == run_ids(variants(raw_preset, ["lora"], lr_ratios=[16.0]))
    together = variants(raw_preset, ["lora", "rslora", "lora_plus", "dora", "pissa"])
    assert run_ids(together) == run_ids(plain).union(*map(run_ids, others))
    assert {sweep.condition.method for sweep in together.sweeps} == {"fullft", "lora", "dora", "pissa"}


@pytest.mark.parametrize(
    ("names", "preset", "changes", "message"),
    [
        (["dora"], {}, {"ranks": {}, "lrs": {"fullft": [1e-3], "lora": []}}, "variants .'dora'. need ranks"),
        (["pissa"], {}, {"ranks": {"all": [129]}}, "PiSSA of tiny: rank 129 is more than the smallest .* layer, 128"),
        (["dora"], {"models": {"tiny": {"kind": "tiny", "name": "moe-128"}}}, {}, "a mixture of experts can only"),
    ],
)
def test_what_a_variant_cannot_be_combined_with_is_refused(raw_preset, names, preset, changes, message):
    with pytest.raises((UserError, ValueError), match=message):
        variants(raw_preset, names, preset, **changes)


def test_a_variant_has_one_gpu_and_this_projects_sampler(raw_preset, raw_rl_preset):
    execution = {"gpu": "H100-80GB", "max_gpus": 8, "job_hours": 0.001, "path_hours": 0.001}
    settings = {"preset": {"execution": execution}, "lrs": {"fullft": [], "lora": [1e-3]}}
    plans = [variants(raw_preset, [name], **settings) for name in ("lora", "dora")]
    assert [max(plan.gpus.values()) for plan in plans] == [8, 1]
    block = raw_rl_preset["experiments"]["rl_arithmetic"][0] | {"variants": ["dora"]}
    raw_rl_preset["experiments"] = {"variants_rl": [block]}
    with pytest.raises(UserError, match="execution.sampler = vllm takes plain LoRA only"):
        planned(raw_rl_preset | {"execution": {"gflops": 20.0, "sampler": "vllm"}})


def test_a_transform_keeps_what_the_paper_says_it_keeps(raw_preset):
    plan = changed_block(raw_preset, ranks={"all": [4]}, transforms=[[2.0, 1.0], [1.0, 2.0], [3.0, 5.0]])
    runs = [run for sweep in plan.sweeps if sweep.condition.method == "lora" for run in sweep.grid()]
    kept = set()
    for run in runs:
        arm = run.condition
        kept.add((round(arm.alpha * arm.init_a * run.lr * arm.lr_ratio, 9), round(arm.init_a / run.lr, 6)))
    assert len({run.run_id for run in runs}) == len(runs) == 4 * 3
    assert len(kept) == 3, "one class for each LR"


def test_the_base_and_each_condition_are_evaluated_once(raw_preset):
    task = {"name": "lorabench_instruct", "about": "learned", "source": "instruct"}

    def ids(raw):
        plan = planned(raw | {"evaluation": {"experiments": ["rank"], "tasks": [task]}})
        jobs = plan.evaluations()
        assert [job.sweep for job in jobs] == [None, *plan.sweeps]
        # Four jobs of 1000 documents of 200 tokens.
        work = per_experiment(plan)["evaluation"]
        assert (work.runs, work.jobs, work.tokens) == (0, 4, 4 * 1000 * 200)
        return {job.eval_id for job in jobs}

    # What changes scores changes an evaluation.
    other_data = copy.deepcopy(raw_preset)
    other_data["datasets"]["instruct"]["seed"] = 1
    vllm = raw_preset | {"execution": raw_preset["execution"] | {"sampler": "vllm"}}
    for other in (vllm, other_data):
        assert not ids(other) & ids(raw_preset)
