"""Interrupted lanes go on together to the last bit, or separately if their checkpoints are of different steps."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from lorabench.data.tokens import cache_key, read_tokens
from lorabench.models.base import load_model, load_tokenizer
from lorabench.training.checkpoint import checkpoint_position
from lorabench.training.lane_checkpoints import groups_at_same_position
from lorabench.training.loss import mean_nll

from .conftest import TINY, trained
from .lanes import CPU, base_of, run_of, series, train_together

LRS = {"lora": (3e-4, 1e-3, 3e-3), "fullft": (5e-5, 2e-4, 5e-4)}
STEPS, BREAK = 12, 7


class BrokenError(Exception):
    """Interrupts runs."""


def runs_of(method):
    return [run_of(method, lr, seed, steps=STEPS) for seed, lr in enumerate(LRS[method])]


def paths_of(runs, folder):
    return {run.run_id: folder / f"{run.run_id}.safetensors" for run in runs}


class Kept:
    """Collects the weights of each lane when its run has ended."""

    def __init__(self):
        self.weights = {}

    def __call__(self, stack, run):
        places = stack.lanes[run.run_id].places
        self.weights[run.run_id] = {name: p.of(p.parameter.detach()).clone() for name, p in places.items()}


def broken(runs, data, folder, lane):
    """Interrupt runs at the tick of a lane in step `BREAK`, when the lanes before it have saved that step."""

    def tick(number, step):
        if (number, step) == (lane, BREAK):
            raise BrokenError

    with pytest.raises(BrokenError):
        train_together(runs, base_of("qwen-64"), data, folder, checkpoint_seconds=0, tick=tick)


@pytest.mark.parametrize("method", LRS)
@pytest.mark.parametrize(("count", "lane"), [(3, 0), (3, 2)])
def test_lanes_resumed_equal_unbroken_ones(method, count, lane, short_data, tmp_path):
    runs, whole_weights, weights = runs_of(method)[:count], Kept(), Kept()
    whole = train_together(runs, base_of("qwen-64"), short_data, tmp_path / "whole", ended=whole_weights)
    broken(runs, short_data, tmp_path / "broken", lane)
    assert groups_at_same_position(paths_of(runs, tmp_path / "broken")) == [[run.run_id for run in runs]]
    steps = []
    resumed = train_together(
        runs,
        base_of("qwen-64"),
        short_data,
        tmp_path / "broken",
        tick=lambda number, step: steps.append((step, number)),
        ended=weights,
    )
    assert steps == [(step, number) for step in range(BREAK, STEPS + 1) for number in range(count)]
    for run in runs:
        ours, expected = resumed[run.run_id], whole[run.run_id]
        assert ours.curve == expected.curve
        assert (ours.final_valid_nll, ours.final_test_nll) == (expected.final_valid_nll, expected.final_test_nll)
        assert ours.train_tokens == expected.train_tokens
        for name, weight in whole_weights.weights[run.run_id].items():
            assert torch.equal(weights.weights[run.run_id][name], weight), name


@pytest.mark.parametrize("method", LRS)
def test_runs_whose_checkpoints_are_of_different_steps_go_on_apart(method, short_data, tmp_path):
    runs = runs_of(method)
    whole = train_together(runs, base_of("qwen-64"), short_data, tmp_path / "whole")
    folder = tmp_path / "broken"
    broken(runs, short_data, folder, 1)
    paths = paths_of(runs, folder)
    assert {checkpoint_position(path).step for path in paths.values()} == {BREAK - 1}
    first, lost, last = paths
    paths[lost].unlink()
    for path in folder.glob("*.next"):
        path.unlink()
    groups = groups_at_same_position(paths)
    assert groups == [[first, last], [lost]]
    by_id = {run.run_id: run for run in runs}
    steps: dict[str, list[int]] = {run_id: [] for run_id in by_id}
    for group in groups:
        together = [by_id[run_id] for run_id in group]
        outcomes = train_together(
            together,
            base_of("qwen-64"),
            short_data,
            folder,
            tick=lambda number, step, together=together: steps[together[number].run_id].append(step),
        )
        for run_id, outcome in outcomes.items():
            # The runs beside it are others than before, so its numbers differ by rounding.
            assert series(outcome, "nll") == pytest.approx(series(whole[run_id], "nll"), rel=1e-5)
            assert outcome.final_test_nll == pytest.approx(whole[run_id].final_test_nll, rel=1e-5)
    assert steps[lost] == list(range(1, STEPS + 1))
    assert steps[first] == steps[last] == list(range(BREAK, STEPS + 1))


def test_a_lane_that_diverged_before_the_break_does_not_hold_up_the_others(short_data, tmp_path):
    runs = [*runs_of("lora")[:2], run_of("lora", 1e3, 7, steps=STEPS)]
    whole = train_together(runs, base_of("qwen-64"), short_data, tmp_path / "whole")
    wild = whole[runs[2].run_id]
    assert wild.status == "diverged"
    assert wild.diverged_at < BREAK
    broken(runs, short_data, tmp_path / "broken", 1)
    rest = runs[:2]
    assert groups_at_same_position(paths_of(rest, tmp_path / "broken")) == [[run.run_id for run in rest]]
    steps = []
    resumed = train_together(
        rest, base_of("qwen-64"), short_data, tmp_path / "broken", tick=lambda number, step: steps.append(step)
    )
    assert min(steps) == BREAK
    for run in rest:
        assert resumed[run.run_id].curve == whole[run.run_id].curve


def numbers(rows):
    kept = ["run_id", "lr", "seed", "status", "final_valid_nll", "final_test_nll", "train_tokens", "train_flops"]
    return rows[[*kept, "trainable_params"]].sort_values("run_id", ignore_index=True)


@pytest.mark.slow
def test_weights_of_each_lane_are_a_peft_adapter_with_the_runs_test_loss(ready):
    rows = {}
    for lanes in (1, 3):
        plan, layout = ready(f"lanes-{lanes}", {"lanes": lanes, "keep_weights": "all"}, lora=[1e-3, 2e-3, 3e-3])
        rows[lanes], _ = trained(plan, layout, "lora")
    one, three = numbers(rows[1]), numbers(rows[3])
    exact = ["run_id", "lr", "seed", "status", "train_tokens", "train_flops", "trainable_params"]
    assert one[exact].equals(three[exact])
    for name in ("final_valid_nll", "final_test_nll"):
        assert three[name].to_list() == pytest.approx(one[name].to_list(), rel=1e-5)
    dataset = layout.dataset("instruct")
    data = read_tokens(layout.tokens("tiny", "instruct"), cache_key(load_tokenizer(TINY), dataset))
    assert len(three) == 4
    for row in three.itertuples():
        model = PeftModel.from_pretrained(load_model(TINY), layout.runs / row.run_id / "weights")
        measured = mean_nll(model, data["test"], 16_384, CPU, None)
        assert measured == pytest.approx(row.final_test_nll, rel=1e-6)
