"""How many runs are trained together: what was measured to pay, what fits, and always the same number."""

from __future__ import annotations

import pytest

from lorabench.config import Execution, load_preset
from lorabench.gpus import GB, GPUS
from lorabench.lanes import lanes_of, paying, turns
from lorabench.lengths import longest_sequence
from lorabench.memory import USABLE, gpus_needed, peak_bytes, sweep_memory
from lorabench.models.dimensions import dimensions
from lorabench.plan import make_plan

PRESETS = ("smoke", "laptop", "smollm2", "core", "paper")

LANES = (1, 2, 4, 8)
# Milliseconds of a step for each lane with 1, 2, 4 and 8 lanes of LoRA: an AMD EPYC, 3 layers, two parts of a batch.
# Threads, width of the model, examples of a part, their tokens.
MEASURED = {
    (1, 128, 4, 64): (26.5, 24.9, 25.0, 25.5),
    (1, 128, 4, 128): (49.2, 52.1, 54.6, 55.3),
    (1, 128, 8, 128): (102, 104, 107, 111),
    (1, 128, 2, 128): (29.6, 26.0, 25.9, 26.6),
    (1, 64, 4, 64): (16.3, 12.9, 11.5, 12.7),
    (1, 64, 4, 128): (28.2, 26.5, 27.7, 27.8),
    (1, 64, 8, 128): (50.7, 52.2, 55.8, 58.0),
    (1, 64, 2, 128): (18.0, 14.8, 13.5, 14.0),
    (2, 128, 4, 64): (22.2, 15.8, 13.4, 13.8),
    (2, 128, 4, 128): (33.3, 28.2, 28.6, 28.3),
    (2, 128, 8, 128): (55.2, 54.6, 55.2, 56.1),
    (2, 128, 2, 128): (22.7, 15.8, 13.9, 14.3),
    (2, 64, 4, 64): (15.3, 10.7, 7.8, 6.7),
    (2, 64, 4, 128): (22.7, 16.0, 14.0, 15.1),
    (2, 64, 8, 128): (32.6, 29.5, 30.4, 31.2),
    (2, 64, 2, 128): (15.7, 11.2, 8.3, 7.5),
}


def with_execution(preset, **changes):
    return preset.model_copy(update={"execution": preset.execution.model_copy(update=changes)})


def first(plan, method, dataset, **fields):
    """A sweep of a plan."""
    for sweep in plan.sweeps:
        of = sweep.condition
        if (of.method, of.dataset) == (method, dataset) and all(getattr(of, k) == v for k, v in fields.items()):
            return sweep
    raise LookupError(f"no {method} on {dataset}")


@pytest.mark.parametrize("case", MEASURED)
def test_as_many_as_were_measured_to_pay(case):
    threads, hidden, rows, width = case
    times = dict(zip(LANES, MEASURED[case], strict=True))
    chosen = min(8, paying(Execution(threads=threads, gflops=1.0), "lora", rows * width, hidden))
    below, above = max(n for n in LANES if n <= chosen), min(n for n in LANES if n >= chosen)
    # Never slower than one lane, and near the fastest of all.
    assert max(times[below], times[above]) <= 1.03 * times[1]
    assert times[below] <= 1.03 * min(times.values())


def test_one_is_the_least_and_a_gpu_takes_more_than_a_thread():
    cpu, gpu = Execution(gflops=1.0), Execution(gpu="H100-80GB")
    assert paying(cpu, "fullft", 1e9, 128) == paying(gpu, "lora", 1e9, 128) == 1
    assert paying(gpu, "lora", 2048, 2048) == 8
    assert paying(Execution(gpu="A10"), "lora", 2048, 2048) == 1


@pytest.mark.parametrize("name", PRESETS)
def test_lanes_keep_every_limit_and_need_no_more_gpus(name):
    preset = load_preset(name)
    plan, execution = make_plan(preset), preset.execution
    for sweep in plan.sweeps:
        gpus = gpus_needed(preset, sweep)
        lanes, condition = lanes_of(preset, sweep, gpus), sweep.condition
        runs = len(sweep.lrs) + len(sweep.repeated), sweep.seeds - 1
        assert 1 <= lanes <= min(execution.lanes, max(runs))
        assert gpus == gpus_needed(with_execution(preset, lanes=1), sweep)
        available = USABLE * GPUS[execution.gpu].memory if execution.gpu else 4 * GB * execution.threads
        assert peak_bytes(preset, sweep, gpus, lanes) <= available
        if lanes > 1:
            assert lanes * longest_sequence(preset, condition) <= execution.max_batch_tokens
            assert turns(sweep, lanes) < turns(sweep, lanes - 1)
            assert not dimensions(preset.models[condition.model]).experts
            assert gpus < 2
            assert condition.task == "sft" or condition.method == "lora"


def test_the_laptop_trains_together_what_leaves_a_core_idle():
    preset = load_preset("laptop")
    plan = make_plan(preset)

    def chosen(method, dataset, **fields):
        return lanes_of(preset, first(plan, method, dataset, **fields), 0)

    # 4 examples of 71 tokens, of width 128 or 64; 4 and 2 of 166; 10 of 20, at three LRs.
    assert chosen("lora", "instruct", model="tiny") == chosen("fullft", "instruct", model="tiny") == 2
    assert chosen("lora", "instruct", model="llama-64") == 5
    assert chosen("lora", "worked", batch_size=8) == 1
    assert chosen("lora", "worked", batch_size=4) == 2
    assert chosen("lora", "facts") == 3
    assert chosen("lora", "instruct", model="moe") == 1
    # 640 responses fill a core.
    assert chosen("lora", "gcd") == chosen("fullft", "gcd") == 1
    four = with_execution(preset, threads=4)
    assert lanes_of(four, first(plan, "lora", "gcd"), 0) == 4
    assert lanes_of(four, first(plan, "fullft", "gcd"), 0) == 1
    assert lanes_of(with_execution(four, lanes=1), first(plan, "lora", "gcd"), 0) == 1
    # 200 tokens of the longest example go through the model at once for each lane, or none.
    assert lanes_of(with_execution(four, max_batch_tokens=700), first(plan, "lora", "worked", batch_size=4), 0) == 2


def test_runs_are_spread_over_as_few_turns():
    preset = load_preset("laptop")
    # Six LRs and one more seed later; then the five LRs and two seeds of most sweeps.
    plan = make_plan(preset)
    sweep = first(plan, "lora", "instruct", model="llama-64", rank=16)
    assert (len(sweep.lrs), len(sweep.repeated), sweep.seeds) == (5, 0, 3)
    assert [turns(sweep, lanes) for lanes in (1, 2, 3, 4, 5)] == [7, 4, 3, 3, 2]
    found = [lanes_of(with_execution(preset, lanes=most), sweep, 0) for most in (1, 2, 3, 4, 5, 8)]
    assert found == [1, 2, 3, 3, 5, 5]


def test_where_memory_is_short_lanes_are_fewer_and_gpus_not_more():
    preset = with_execution(load_preset("smollm2"), gpu="A100-80GB", max_gpus=4)
    sweep = first(make_plan(preset), "fullft", "instruct", model="smollm2-135m")
    small = with_execution(preset, gpu="A10")
    assert (lanes_of(preset, sweep, 1), gpus_needed(small, sweep)) == (6, 1)
    lanes = lanes_of(small, sweep, 1)
    assert 1 < lanes < 6
    assert sweep_memory(small, sweep, lanes=lanes).total <= USABLE * 24e9 < sweep_memory(small, sweep, lanes=6).total


def test_a_sharded_model_has_one_lane():
    preset = load_preset("core")
    sweep = first(make_plan(preset), "lora", "gsm8k")
    assert lanes_of(preset, sweep, 1) == 7
    assert lanes_of(preset, sweep, 2) == 1
    assert lanes_of(with_execution(preset, sharding="ddp"), sweep, 2) == 7
