"""vLLM next to a trainer: its log-probabilities are the learner's, and a policy that did not reach it is noticed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
import yaml

from lorabench.config.loading import load_preset
from lorabench.doctor import engine
from lorabench.doctor.bench import fits_one_gpu
from lorabench.planning.plan import make_plan
from lorabench.store.layout import Layout
from lorabench.training.rl.engine import PolicyEngine
from lorabench.training.run import Machine

from ..conftest import MARGINS

needs_vllm = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed; docs/cluster.md says how"),
]


@pytest.fixture
def layout(tmp_path, monkeypatch):
    """RL of the tiny base of width 128, whose heads of 32 vLLM computes on a CPU."""
    block = {
        "models": ["tiny"],
        "problems": ["sums"],
        "ranks": {"all": [1, 8]},
        "problems_per_step": 4,
        "group_size": 8,
        "steps": 2,
        "max_new_tokens": 28,
        "mean_response_tokens": 19,
        "evaluations": 1,
        "held_out": [],
        "lrs": {"fullft": [1e-4], "lora": [1e-3]},
        "seeds": 1,
    }
    preset = {
        "description": "RL by vLLM",
        "models": {"tiny": {"kind": "tiny", "name": "llama-128"}},
        "problems": {"sums": {"kind": "sums", "train": 600, "validation": 16, "test": 240}},
        "experiments": {"rl_arithmetic": [block]},
        "margins": dict(MARGINS),
        "execution": {"gflops": 40.0, "threads": 2, "sampler": "vllm"},
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(preset))
    return Layout.of("mine.yaml")


def test_the_largest_policies_that_fit_one_gpu_are_drawn_from():
    chosen = {}
    for name in ("core", "paper", "laptop"):
        plan = make_plan(load_preset(name))
        conditions = [sweep.condition for sweep in engine.policies(plan)]
        chosen[name] = [condition.method for condition in conditions]
        assert all(fits_one_gpu(plan.preset, sweep) for sweep in engine.policies(plan))
    # Full fine-tuning of 8B next to its engine takes several GPUs, and `laptop` draws by the project's own sampler.
    assert chosen == {"core": ["fullft", "lora"], "paper": ["lora"], "laptop": []}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=needs_vllm) for kind in ("fullft", "lora")])
def test_the_engine_draws_from_an_updated_policy_next_to_the_trainer(kind, layout, monkeypatch):
    plan = make_plan(layout.preset)
    assert [sweep.condition.rank for sweep in engine.policies(plan)] == [None, 8]
    sweep = next(sweep for sweep in engine.policies(plan) if sweep.condition.method == kind)
    machine = Machine(torch.device("cpu"), 4096)
    drawing = engine.measure_drawing(plan, layout, machine, sweep)
    check = engine.check_policy(plan.preset, drawing)
    assert check.status == "pass"
    assert drawing.measures.tokens == 8 * 128
    assert 1 < drawing.measures.ratio_max < 1.01
    speed = engine.check_drawing(plan.preset, sweep.condition, drawing)
    assert speed.status == "measured"
    assert 10 < speed.value < 1e5
    if kind == "fullft":
        return
    ask, handed_over = PolicyEngine.ask, []

    def ask_once(self, name, *others, **arguments):
        """Do not hand over a policy after the first."""
        if name == "adapter":
            handed_over.append(name)
            if len(handed_over) > 1:
                return None
        return ask(self, name, *others, **arguments)

    monkeypatch.setattr(PolicyEngine, "ask", ask_once)
    check = engine.check_policy(plan.preset, engine.measure_drawing(plan, layout, machine, sweep))
    assert check.status == "fail"
    assert check.value > 5 * engine.KL["bf16"]
