"""Tokens and FLOPs against counts of models, and seconds of runs: launches of layers, long responses, and experts."""

from dataclasses import replace

import numpy as np
import pytest

from lorabench.config.inputs import TinyModel
from lorabench.config.loading import load_preset
from lorabench.models.specs import dimensions
from lorabench.planning.flops import _prompt_tokens, linear_flops_per_token, run_work
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


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("response", [300, 900])
def test_rl_learns_from_the_tokens_of_the_rows_that_it_makes(response, fused):
    from lorabench.training.rl.objective import ResponseGroup, row_parts
    from lorabench.training.rl.sampler import Response

    preset = load_preset("core").with_execution(fused_kernels=fused, max_batch_tokens=4096)
    condition = next(s.condition for s in make_plan(preset).sweeps if s.condition.dataset == "math")
    rollouts = replace(condition.rollouts, mean_response_tokens=response)
    condition = replace(condition, rollouts=rollouts, steps=1)
    work, size = run_work(preset, condition), rollouts.group_size
    prompt = round(_prompt_tokens(preset, condition))
    # One response is as long as it may be.
    longest = rollouts.max_new_tokens
    lengths = [longest, *[(size * response - longest) // (size - 1)] * (size - 1)]
    drawn = [Response(np.full(length, number), np.zeros(length), False) for number, length in enumerate(lengths)]
    groups = [ResponseGroup.of((1,) * prompt, drawn, np.arange(size))] * (condition.batch_size // size)
    parts = list(row_parts(groups, preset.execution.max_batch_tokens, one_row=fused))
    rows = [row for part in parts for row in part]
    tokens = sum(len(row.prompt) + sum(len(response.tokens) for response in row.responses) for row in rows)
    assert work.trained == pytest.approx(tokens, rel=0.1)
    # Without a mask a token sees its prompt and, in the mean over the tokens of long responses, half of these.
    seen = prompt + (min(response, longest / 2) if fused else size * response * len(groups) / len(rows))
    assert work.learned_context == pytest.approx(seen, rel=0.1)
