"""The cost model: FLOPs against the paper's formula and counts on the models, memory against measurements."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lorabench.cli.main import app
from lorabench.cli.show import plan_json
from lorabench.config.experiments import Protocol
from lorabench.config.fields import PresetError
from lorabench.config.loading import load_preset
from lorabench.config.models import TinyModel
from lorabench.errors import UserError
from lorabench.estimates.flops import _validations, attention_flops_per_token, linear_flops_per_token, run_tokens
from lorabench.estimates.lane_count import lane_count, turns
from lorabench.estimates.memory import gpus_needed, step_memory, sweep_memory
from lorabench.estimates.seconds import flops_per_second, run_seconds, sweep_seconds
from lorabench.models.dimensions import Dimensions, dimensions
from lorabench.planning import bill
from lorabench.planning.budget import (
    CORE_CLAIMS_BY_EXPERIMENT,
    reduce_to_budget,
    split_budget,
    steps_in_order,
    with_budget,
)
from lorabench.planning.calibration import calibrate, calibrated, planned_runs
from lorabench.planning.plan import make_plan
from lorabench.storage.layout import Layout
from lorabench.tables.measured_speed import measure
from lorabench.utils.gpus import GPUS, is_called

GPU_PRESETS = ("core", "paper", "smollm2")


def with_execution(preset, **changes):
    return preset.model_copy(update={"execution": preset.execution.model_copy(update=changes)})


def with_model(preset, **changes):
    """A GPU preset that has only the experiment `rank`, on one model."""
    experiments = preset.experiments.model_copy(update=dict.fromkeys(preset.experiments.chosen()))
    block = preset.experiments.rank[0].model_copy(update={"seeds": 1, **changes})
    experiments = experiments.model_copy(update={"rank": [block]})
    return preset.model_copy(update={"experiments": experiments, "evaluation": None})


# FLOPs


@pytest.mark.parametrize(
    # The table of the paper's section on compute efficiency.
    ("width", "rank", "ratio"),
    [(2048, 1, 0.6676), (2048, 512, 1.1667), (4096, 1, 0.6672), (4096, 128, 0.7292), (4096, 512, 0.9167)],
)
def test_lora_takes_two_thirds_and_its_own_part(width, rank, ratio):
    square = Dimensions(width, 4, 16, 16, width // 16, width, width)
    lora = square.lora("all", rank, include_unembedding=True)[1]
    both = linear_flops_per_token(square, lora), linear_flops_per_token(square, None)
    assert both[0] / both[1] == pytest.approx(ratio, abs=5e-5)


@pytest.mark.parametrize("name", ["llama-128", "qwen-64", "moe-128"])
@pytest.mark.parametrize(("placement", "rank"), [(None, None), ("all", 8), ("attn", 3), ("mlp", 5)])
def test_flops_are_those_of_the_model_itself(name, placement, rank):
    from lorabench.models.base import load_model
    from lorabench.models.lora import add_lora
    from lorabench.models.size import train_flops_per_token

    spec = TinyModel(kind="tiny", name=name)
    model, lora = load_model(spec), None
    if rank is not None:
        model, lora = add_lora(model, rank, placement, 32.0, True, 0), dimensions(spec).lora(placement, rank, True)[1]
    assert linear_flops_per_token(dimensions(spec), lora) == train_flops_per_token(model)


def test_attention_grows_with_the_context_and_matters_when_it_is_long():
    sizes = dimensions(load_preset("paper").models["llama-3-1-8b"])
    one, ten = (attention_flops_per_token(sizes, context) for context in (1000, 10_000))
    assert ten == 10 * one == 4 * 10_000 * 4096 * 32
    assert one / (2 * sizes.active_linear) < 0.05 < 0.3 < ten / (2 * sizes.active_linear)


def test_evaluations_counted_are_those_made():
    from lorabench.training.sft.loop import curve_steps

    preset = load_preset("laptop")
    for steps in (1, 2, 17, 50, 250, 9999):
        assert _validations(preset, steps) == len(curve_steps(steps, preset.protocol))


# Memory


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "length"), [("llama-128", 128), ("qwen-64", 128), ("llama-128", 400)])
def test_memory_is_what_a_step_takes(name, length, precision):
    from lorabench.training.step_cost import measure_compute

    spec, protocol = TinyModel(kind="tiny", name=name), Protocol(precision=precision)
    preset = load_preset("laptop").model_copy(update={"protocol": protocol})
    for row in measure_compute("tiny", spec, [8, 64], "all", 8, length, 1, 1, protocol):
        estimate = step_memory(preset, dimensions(spec), row["rank"], row["placement"], 8 * length, length).total
        # An upper bound: the last gradients come when the first activations are gone.
        assert 1.0 <= estimate / row["peak_mem_bytes"] < 1.1


def test_memory_with_checkpoints_is_what_a_step_takes():
    import torch

    from lorabench.models.base import load_model
    from lorabench.training.step_cost import _Arm

    spec, protocol = TinyModel(kind="tiny"), Protocol(precision="bf16")
    preset = load_preset("laptop").model_copy(update={"protocol": protocol})
    model = load_model(spec)
    tokens = torch.randint(1024, (2, 8, 128))
    peaks = []
    for again in (False, True):
        if again:
            model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        peaks.append(_Arm(None, model, tokens[0], tokens[1], protocol).peak_memory())
        chosen = with_execution(preset, activation_checkpointing=again)
        assert 1.0 <= step_memory(chosen, dimensions(spec), None, None, 8 * 128, 128).total / peaks[-1] < 1.25
    assert peaks[1] < peaks[0]


def test_lora_of_8b_fits_one_80_gb_gpu_and_full_fine_tuning_takes_several():
    paper = with_execution(load_preset("paper"), gpu="H100-80GB")
    plan = make_plan(with_model(paper, models=["llama-3-1-8b"], ranks={"all": [1, 64, 256]}))
    gpus = {sweep.condition.rank: gpus_needed(plan.preset, sweep) for sweep in plan.sweeps}
    assert gpus[1] == gpus[64] == gpus[256] == 1
    assert gpus[None] == 4
    full = next(sweep for sweep in plan.sweeps if sweep.condition.rank is None)
    one, four = (sweep_memory(plan.preset, full, gpus) for gpus in (1, 4))
    assert (four.gradients, four.moments) == (one.gradients / 4, one.moments / 4)
    assert (four.activations, four.logits) == (one.activations, one.logits)
    whole = with_execution(plan.preset, sharding="ddp")
    assert sweep_memory(whole, full, 4).moments == one.moments


def test_lanes_of_lora_share_the_base_and_those_of_full_fine_tuning_nothing():
    plan = make_plan(with_model(load_preset("smollm2"), ranks={"all": [16]}, datasets=["worked"]))
    sizes, limit = dimensions(plan.preset.models["smollm2-135m"]), plan.preset.execution.max_batch_tokens
    for sweep in plan.sweeps:
        one, two, four = (sweep_memory(plan.preset, sweep, lanes=lanes) for lanes in (1, 2, 4))
        lora = sweep.condition.method == "lora"
        trained = sizes.lora("all", 16, True)[0] if lora else sizes.parameters
        assert (one.gradients, one.moments) == (4 * trained, 8 * trained)
        assert (four.gradients, four.moments) == (16 * trained, 32 * trained)
        assert four.weights - one.weights == 3 * 4 * trained
        assert four.copies == (0 if lora else 4 * one.copies)
        # A batch of 32 examples of 233 tokens; of two lanes and more all that goes through the model at once.
        tokens = [step.logits / (12 * sizes.vocabulary) for step in (one, two, four)]
        assert tokens == [32 * 233, 2 * 32 * 233, limit]
        assert (two.activations, four.activations / limit) == (2 * one.activations, one.activations / (32 * 233))


def test_lanes_of_rl_have_gradients_and_moments_each():
    plan = make_plan(load_preset("core"))
    sweep = next(s for s in plan.sweeps if s.condition.dataset == "gsm8k" and s.condition.rank == 1)
    trained = dimensions(plan.preset.models["llama-3-2-1b"]).lora("all", 1, True)[0]
    one, seven = (sweep_memory(plan.preset, sweep, lanes=lanes) for lanes in (1, 7))
    assert (seven.weights - one.weights, seven.moments) == (6 * 4 * trained, 7 * 8 * trained)
    # Gradients keep their place while responses are drawn; the cache was full before.
    assert seven.sampling - one.sampling == 6 * 4 * trained
    assert seven.logits == 8192 // 7 * 7 * 16 * 128256


def test_weights_that_lora_goes_with_stay_in_bf16():
    checkpoints = load_preset("paper")
    plain = with_execution(checkpoints, activation_checkpointing=False)
    sizes = dimensions(plain.models["llama-3-1-8b"])
    linear = sum(matrix.parameters for matrix in sizes.matrices)
    attention = sum(matrix.parameters for matrix in sizes.matrices if matrix.part in ("attn", "unembedding"))
    assert sizes.carrying("all", True) == linear
    for placement, cast in (("all", linear), ("attn", attention)):
        trained = sizes.lora(placement, 16, True)[0]
        step = step_memory(plain, sizes, 16, placement, 8192, 1024)
        assert (step.weights, step.copies) == (4 * (sizes.parameters + trained) + 2 * cast, 2 * (linear - cast))
        # Where memory counts for more, and where a part of each weight is elsewhere, they are cast in every pass.
        short = step_memory(checkpoints, sizes, 16, placement, 8192, 1024)
        assert (short.weights, short.copies) == (4 * (sizes.parameters + trained), 2 * linear / sizes.layers)
        assert step_memory(plain, sizes, 16, placement, 8192, 1024, gpus=2).copies == 2 * linear


def test_what_fits_nowhere_is_one_sentence():
    small = with_execution(load_preset("paper"), gpu="RTX-4090", max_gpus=2)
    plan = make_plan(with_model(small, models=["llama-3-1-8b"]))
    with pytest.raises(
        UserError, match=r"sweep llama-3-1-8b-\S+-fullft-\S+ needs \d+ GB on each of 2 x RTX-4090, which"
    ):
        bill.total(plan)


def test_compute_must_fit_one_gpu():
    paper = load_preset("paper")
    compute = paper.experiments.compute.model_copy(update={"models": ["qwen3-14b"]})
    changed = paper.model_copy(update={"experiments": paper.experiments.model_copy(update={"compute": compute})})
    with pytest.raises(UserError, match="experiment compute needs .* for qwen3-14b on one H200"):
        bill.compute(make_plan(changed))


def test_an_evaluated_model_must_fit_one_gpu():
    with pytest.raises(UserError, match="the evaluation needs 56 GB for llama-3-1-8b on one L40S, which has 44 GB"):
        bill.evaluation(make_plan(with_execution(load_preset("paper"), gpu="L40S")))


# The bill


def test_more_cores_are_faster_until_there_are_no_more_jobs():
    plan = make_plan(load_preset("smoke"))
    assert len(plan.jobs) < 64
    work = bill.training(plan, plan.jobs)
    minutes = [bill.minutes(plan, work, cores) for cores in (1, 2, 64, 128)]
    assert minutes[0] > minutes[1] > minutes[2] == minutes[3]
    # FullFT, two ranks, two placements: 3 LRs and a repeat each; two ranks with two seeds at one LR; RL like the first.
    assert (work.runs, work.jobs, work.gpu_hours) == (5 * 4 + 2 * 2 + 3 * 4, 7, 0)


def test_shared_runs_are_paid_once():
    rows = bill.per_experiment(make_plan(load_preset("core")))
    total = rows.pop("total")
    assert total.runs < sum(row.runs for row in rows.values())
    assert total.gpu_hours < sum(row.gpu_hours for row in rows.values())
    assert total.memory == max(row.memory for row in rows.values())


@pytest.mark.parametrize("name", GPU_PRESETS)
def test_gpu_hours_are_hours_times_gpus_and_money_is_their_price(name):
    plan = make_plan(load_preset(name))
    rows = json.loads(plan_json(plan, 2, price=2.5))["experiments"]
    for row in rows.values():
        assert row["job_hours"] <= row["gpu_hours"] <= row["gpus"] * row["job_hours"]
        assert row["money"] == pytest.approx(2.5 * row["gpu_hours"])
    assert rows["total"]["memory"] < GPUS[plan.preset.execution.gpu].memory


def test_a_faster_gpu_takes_less_and_a_given_speed_is_believed():
    core = load_preset("core")
    hours = [bill.total(make_plan(bill.on_gpu(core, gpu))).gpu_hours for gpu in ("A100-80GB", "H100-80GB")]
    assert hours[0] > 1.3 * hours[1]
    given = with_execution(core, gflops=50_000.0)
    assert flops_per_second(given.execution) == 50e12
    assert bill.total(make_plan(given)).gpu_hours > hours[1]
    # A speed that was measured on one GPU is not that of another.
    assert bill.on_gpu(given, "H200").execution.gflops is None
    with pytest.raises(UserError, match="gpu 'H1000' is not known; allowed: A100-40GB"):
        bill.on_gpu(core, "H1000")


def test_checkpointing_costs_a_third():
    plain = with_model(load_preset("core"), ranks={"all": [1]}, datasets=["tulu3"])
    again = with_execution(plain, activation_checkpointing=True)
    hours = [bill.total(make_plan(preset)).gpu_hours for preset in (plain, again)]
    assert 1.25 < hours[1] / hours[0] < 1.55


def test_lanes_share_launches_and_no_flops():
    together = load_preset("smollm2")
    plan, alone = make_plan(together), with_execution(together, lanes=1)
    layers = dimensions(together.models["smollm2-135m"]).layers
    sweep = next(
        s for s in plan.sweeps if (s.condition.dataset, s.condition.rank, len(s.lrs), s.seeds) == ("worked", 16, 7, 3)
    )
    assert lane_count(together, sweep, 1) == 3
    assert turns(together, sweep, 3) == 4
    (computing, of_one), (same, of_three) = (run_seconds(preset, sweep, 1) for preset in (alone, together))
    assert computing == same
    # A batch, forward and backward, launched 4 times for 9 runs rather than 9 times.
    full = 3 * sweep.condition.steps * layers * 0.8e-3
    tokens = run_tokens(together, sweep.condition)
    fewer = max(full * 4 / 9, 3 * tokens.trained / together.execution.max_batch_tokens * layers * 0.8e-3)
    launching = full + tokens.evaluated / together.execution.max_batch_tokens * layers * 0.8e-3
    assert computing + of_one == pytest.approx(launching)
    assert of_three == pytest.approx(max(0, of_one - (full - fewer)))
    assert sweep_seconds(together, sweep, 1) < sweep_seconds(alone, sweep, 1) / 2


def test_long_responses_cost_more_than_their_tokens():
    paper = load_preset("paper")
    plan = make_plan(paper)
    gsm8k, deepmath = (
        next(s for s in plan.sweeps if s.condition.dataset == name and s.condition.method == "lora")
        for name in ("gsm8k", "deepmath")
    )
    per_token = [
        sweep_seconds(paper, sweep, 1) / sweep.n_runs / run_tokens(paper, sweep.condition).drawn
        for sweep in (gsm8k, deepmath)
    ]
    assert per_token[1] > 3 * per_token[0]


def test_the_plan_is_printed_with_money_and_json():
    runner = CliRunner()
    shown = runner.invoke(app, ["plan", "--preset", "core", "--price", "3", "--gpu", "H200"])
    assert shown.exit_code == 0, shown.output
    assert all(word in shown.output for word in ("lanes", "GPU-hours", "money", "total", "H200"))
    laptop = runner.invoke(app, ["plan"])
    assert "minutes" in laptop.output
    assert "GPU-hours" not in laptop.output
    reply = json.loads(runner.invoke(app, ["plan", "--preset", "paper", "--json"]).output)
    assert reply["experiments"]["total"]["gpu_hours"] > 1000
    assert [reply["experiments"][name]["lanes"] for name in ("rank", "rl_math", "evaluation", "total")] == [1, 4, 0, 4]


# Calibration


@pytest.fixture(scope="module")
def smoke():
    return make_plan(load_preset("smoke"))


def table(plan, gflops, device="a CPU"):
    """Runs that took exactly the seconds that the cost model predicts at a speed."""
    rows = []
    for run_id, (preset, sweep) in planned_runs([plan]).items():
        seconds = run_seconds(preset, sweep, 0)[0] * preset.execution.gflops / gflops
        peak = int(sweep_memory(preset, sweep).total + 1e9)
        rows.append((run_id, "done", device, seconds, peak))
    return pd.DataFrame(rows, columns=["run_id", "status", "device", "wall_s", "peak_mem_bytes"])


def rows(frame):
    return frame.to_dict("records")


def test_calibration_finds_the_speed_and_no_error_where_there_is_none(smoke):
    calibration = calibrate(rows(table(smoke, 12.5)), planned_runs([smoke]), "a CPU")
    assert calibration.gflops == pytest.approx(12.5)
    assert (calibration.time.median, calibration.time.worst) == (pytest.approx(1), pytest.approx(1))
    assert calibration.memory.worst < 2.5
    assert calibrated(smoke.preset, calibration).execution.gflops == calibration.gflops


def test_calibration_tells_how_far_off_it_is(smoke):
    runs = table(smoke, 10.0)
    runs.loc[0, "wall_s"] *= 4
    calibration = calibrate(rows(runs), planned_runs([smoke]), "a CPU")
    assert calibration.time.lowest == pytest.approx(calibration.time.median / 4)
    assert calibration.time.worst == pytest.approx(1 / calibration.time.lowest)


def test_calibration_leaves_out_what_tells_nothing(smoke):
    runs = table(smoke, 10.0)
    odd = runs.assign(wall_s=1000.0)
    mixed = pd.concat([runs, odd.assign(status="diverged"), odd.assign(device="other"), odd.assign(run_id="unknown")])
    assert calibrate(rows(mixed), planned_runs([smoke]), "a CPU").gflops == pytest.approx(10)
    assert calibrate(rows(odd.assign(status="diverged")), planned_runs([smoke]), "a CPU") is None


def test_tables_are_found_and_must_hold_something(smoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert measure(smoke, []) is None
    folder = tmp_path / "results" / "smoke" / "tables"
    folder.mkdir(parents=True)
    table(smoke, 10.0, "somewhere else").to_csv(folder / "runs.csv", index=False)
    assert measure(smoke, []) is None, "another processor's runs are not this machine's"
    assert measure(smoke, [folder]).device == "somewhere else"
    with pytest.raises(UserError, match="no finished run of this preset was made on H100-80GB"):
        measure(make_plan(load_preset("core")), [folder])


@pytest.mark.parametrize(
    ("gpu", "device", "same"),
    [
        ("A100-80GB", "NVIDIA A100-SXM4-80GB", True),
        ("A100-80GB", "NVIDIA A100 80GB PCIe", True),
        ("A100-80GB", "NVIDIA A100-SXM4-40GB", False),
        ("H100-80GB", "NVIDIA H100 80GB HBM3", True),
        ("A10", "NVIDIA A100-SXM4-80GB", False),
        ("RTX-4090", "NVIDIA GeForce RTX 4090", True),
    ],
)
def test_gpus_are_known_by_what_they_call_themselves(gpu, device, same):
    assert gpu in GPUS
    assert is_called(gpu, device) == same


# The budget


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
    # No core claim needs DeepMath, the dearest; then MATH goes before GSM8K, which tests the same.
    assert steps[:3] == ["rl_deepmath", "placement_rl", "rl_math"]
    assert steps.index("placement_small") < steps.index("rl_gsm8k") < steps.index("rank")
    kept, dropped = reduce_to_budget(core, 350)
    assert [text.split(": ")[1].split(",")[0] for text in dropped] == ["rl_deepmath", "placement_rl"]
    assert kept.limits == [*core.limits, *dropped]
    assert kept.evaluation.experiments == ["rank", "rl_gsm8k", "rl_math"]
    assert not {"rl_deepmath", "placement_rl"} & set(kept.experiments.chosen())


def test_of_several_models_the_dearest_goes():
    paper = load_preset("paper")
    steps = [step.what for step in steps_in_order(make_plan(paper))]
    assert steps.index("rank on llama-3-1-8b") < steps.index("rank")
    assert "rank on llama-3-2-1b" not in steps
    # A core claim on placement is about a dense model.
    assert steps.index("placement on qwen3-30b-a3b-base") < steps.index("placement")
    assert "placement on llama-3-1-8b" not in steps
    kept, _ = reduce_to_budget(paper, 2500)
    assert {model for block in kept.experiments.rank for model in block.models} == {"llama-3-2-1b"}


def test_a_budget_too_small_for_anything_is_an_error():
    with pytest.raises(PresetError, match=r"a budget of 0\.1 GPU-hours is less than the .* of the last experiment"):
        reduce_to_budget(load_preset("core"), 0.1)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["core", "laptop"]), st.floats(0.02, 1), st.floats(0.02, 1))
def test_a_larger_budget_keeps_what_a_smaller_one_keeps(name, one, other):
    preset = load_preset(name)
    total = hours(preset)
    kept = []
    for share in sorted((one, other)):
        try:
            reduced, _ = reduce_to_budget(preset, share * total)
        except PresetError:
            continue
        plan = make_plan(reduced)
        assert hours(reduced) <= share * total
        kept.append({sweep.condition for sweep in plan.sweeps})
        # Blocks stay whole: what had full fine-tuning still has it, on the same grid.
        for experiment, blocks in reduced.experiments.trained().items():
            before = {json.dumps(b.lrs.model_dump()): b for b in preset.experiments.trained()[experiment]}
            assert all(json.dumps(block.lrs.model_dump()) in before for block in blocks)
    assert all(smaller <= larger for smaller, larger in pairwise(kept))


def test_budgets_keep_the_names_of_sweeps_and_folders(smoke):
    assert split_budget("paper@500") == ("paper", 500)
    assert split_budget("mine@home.yaml") == ("mine@home.yaml", None)
    assert with_budget("paper@500", 20) == "paper@20"
    for wrong in ("much", -1, "nan"):
        with pytest.raises(PresetError, match="a number of hours above 0"):
            with_budget("paper", wrong)
    layout = Layout.of("core@350")
    assert layout.root == Layout.of("core").root
    everything = {sweep.sweep_id for sweep in make_plan(Layout.of("core").preset).sweeps}
    assert {sweep.sweep_id for sweep in make_plan(layout.preset).sweeps} < everything
    assert layout.dropped


def test_core_claims_are_tested_by_those_experiments():
    from lorabench.claims import CLAIMS, CORE

    experiments = {claim.id: claim.experiments for claim in CLAIMS}
    for experiment, claims in CORE_CLAIMS_BY_EXPERIMENT.items():
        assert all(experiment in experiments[claim] for claim in claims), experiment
    assert set().union(*CORE_CLAIMS_BY_EXPERIMENT.values()) == set(CORE)


def test_bills_add_up():
    one = bill.Bill(1, 2, 3.0, 4.0, 5.0, 6.0, 7.0, 8, 9.0, 10.0, 3)
    both = one + replace(one, gpus=4, memory=20.0, longest_hours=1.0, lanes=2)
    assert both == bill.Bill(2, 4, 6.0, 8.0, 10.0, 12.0, 7.0, 8, 20.0, 20.0, 3)
