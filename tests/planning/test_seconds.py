"""Tokens and FLOPs against counts of models, and seconds of runs: launches of layers, long responses, and experts."""

from dataclasses import replace

import pytest

from lorabench.config.inputs import TinyModel
from lorabench.config.loading import load_preset
from lorabench.models.specs import dimensions
from lorabench.planning.flops import linear_flops_per_token, run_work
from lorabench.planning.plan import make_plan


@pytest.mark.parametrize(
    ("name", "placement", "rank"),
    [("llama-128", None, None), ("qwen-64", "attn", 3), ("moe-128", "all", 8)],
)
def test_flops_are_those_of_the_model_itself(name, placement, rank):
    from lorabench.models.base import load_model
    from lorabench.models.counts import train_flops_per_token
    from lorabench.models.lora import add_lora

    spec = TinyModel(kind="tiny", name=name)
    model, lora = load_model(spec), None
    if rank is not None:
        model, lora = add_lora(model, rank, placement, 32.0, True, 0), dimensions(spec).lora(placement, rank, True)[1]
    assert linear_flops_per_token(dimensions(spec), lora) == train_flops_per_token(model)


def test_evaluations_counted_are_those_made():
    from lorabench.training.sft import curve_steps

    preset = load_preset("laptop")
    condition = next(s.condition for s in make_plan(preset).sweeps if s.experiments == ("rank",))
    dataset = preset.datasets[condition.dataset]
    for steps in (1, 17, 9999):
        examples = len(curve_steps(steps, preset.protocol)) * dataset.validation + dataset.test
        work = run_work(preset, replace(condition, steps=steps))
        assert work.evaluated == examples * work.context
    # Where the curve is measured on fewer examples, its last point is of all.
    preset = load_preset("core")
    condition = next(s.condition for s in make_plan(preset).sweeps if s.experiments == ("batch_size",))
    points = len(curve_steps(condition.steps, preset.protocol))
    work = run_work(preset, condition)
    assert work.evaluated == ((points - 1) * 128 + 256 + 1024) * work.context
