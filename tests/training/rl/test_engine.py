"""vLLM draws from the policies that the trainer hands over: their log-probabilities are the learner's."""

from __future__ import annotations

import json
import os
import signal
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lorabench.config.inputs import TinyModel
from lorabench.data.problems import make_problems, write_problems
from lorabench.errors import UserError
from lorabench.models.base import load_model, load_tokenizer, model_location
from lorabench.models.lora import add_lora, use_fast_products
from lorabench.models.passes import trained_parameters
from lorabench.planning.memory import EngineBatch
from lorabench.planning.plan import make_plan
from lorabench.runs import Job
from lorabench.store.collect import collect
from lorabench.store.io import read_table
from lorabench.store.layout import Layout
from lorabench.training.distributed import SINGLE_PROCESS
from lorabench.training.job import run_job
from lorabench.training.rl.engine import EngineSettings, PolicyEngine, llm_options
from lorabench.training.rl.sampler import Request, Stop, sample

from .conftest import learned, same_tokens

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed; docs/cluster.md says how"),
]

# The size of its heads, 32, is one that vLLM computes on a CPU.
BASE = TinyModel(kind="tiny", name="llama-128")
NEW_TOKENS = 16


def settings(spec=BASE, max_rank=None, tokenizes=False, adapted=None) -> EngineSettings:
    limits = 256, 1 << 28, max_rank, EngineBatch()
    options = llm_options(model_location(spec), "float32", *limits, tokenizes=tokenizes, adapted=adapted)
    return EngineSettings(options, None, 2)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BASE)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    questions = ("What is 12 + 30?", "Sort the letters: d a c", "What is the largest of 3, 9 and 4?")
    return prompts_of(tokenizer, questions)


def prompts_of(tokenizer, questions):
    """Return the token ids of chats up to the assistant's turn."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    return [tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]) for chat in chats]


@pytest.fixture
def stop(tokenizer):
    return Stop((tokenizer.eos_token_id,), NEW_TOKENS)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """The engine of the tests, which is started again where one needs other settings."""
    with PolicyEngine(SINGLE_PROCESS, tmp_path_factory.mktemp("logs") / "engine.log") as opened:
        yield opened
    assert not opened._caches.exists()


def move(model, scale, seed=0):
    """Change the trained weights as an update might."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def adapted(spec, rank, placement="all"):
    model = add_lora(load_model(spec), rank, placement, 32.0, True, 0)
    use_fast_products(model)
    return model


def requested(prompts, samples=4) -> list[Request]:
    return [Request(prompt, (0, 0, n, s)) for n, prompt in enumerate(prompts) for s in range(samples)]


def largest_difference(model, requests, responses) -> float:
    """Return the largest absolute difference of log-probabilities of the engine and the learner, in nats."""
    pairs = zip(requests, responses, strict=True)
    return max(float(np.abs(drawn.logprobs - learned(model, asked, drawn)).max()) for asked, drawn in pairs)


def test_adapters_are_the_learners_at_every_step(engine, tokenizer, prompts, stop):
    model, asked = adapted(BASE, 1), requested(prompts)
    responses = engine.draw(model, settings(max_rank=1), asked, stop)
    assert largest_difference(model, asked, responses) < 1e-3
    greedy = [Request(prompt, None) for prompt in prompts]
    own = sample(load_model(BASE), tokenizer, greedy, stop, 10_000)
    assert same_tokens(engine.draw(model, settings(max_rank=1), greedy, stop), own)
    assert same_tokens(engine.draw(model, settings(max_rank=1), asked, stop), responses)
    for step in range(1, 4):
        # All layers change, the unembedding included.
        move(model, 0.02, step)
        drawn = engine.draw(model, settings(max_rank=1), asked, stop)
        assert largest_difference(model, asked, drawn) < 1e-3
        # The keys of random numbers are equal, so only the policies differ.
        assert not same_tokens(drawn, responses)
        responses = drawn
    # Another run goes on with the same process.
    process, other = engine._process, adapted(BASE, 1)
    assert largest_difference(other, asked, engine.draw(other, settings(max_rank=1), asked, stop)) < 1e-3
    assert engine._process is process


@pytest.mark.parametrize("tied", [False, True])
def test_all_weights_are_the_learners_after_updates(tied, engine, prompts, stop):
    model = load_model(BASE)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    asked = requested(prompts)
    for step in range(4):
        assert largest_difference(model, asked, engine.draw(model, settings(tokenizes=True), asked, stop)) < 1e-3
        move(model, 0.01, step)


def test_a_text_ends_a_response_and_a_limit_cuts_it(engine, tokenizer, prompts):
    model = load_model(BASE)
    greedy = [Request(prompt, None) for prompt in prompts]
    whole = engine.draw(model, settings(tokenizes=True), greedy, Stop((), NEW_TOKENS))
    assert all(response.truncated and len(response.tokens) == NEW_TOKENS for response in whole)
    until = Stop((), NEW_TOKENS, (tokenizer.decode(whole[0].tokens[2:4]),))
    drawn = engine.draw(model, settings(tokenizes=True), greedy, until)
    own = sample(model, tokenizer, greedy, until, 10_000)
    assert same_tokens(drawn, own)
    assert [response.truncated for response in drawn] == [response.truncated for response in own]
    assert len(drawn[0].tokens) == 4


def test_what_the_engine_refuses_and_its_death_are_told(engine, prompts, stop):
    engine.draw(load_model(BASE), settings(tokenizes=True), requested(prompts), stop)
    with pytest.raises(UserError, match=r"^vLLM, .* failed: \w+: \w+") as refusal:
        engine.ask("weights", folder="nowhere")
    assert "\n" not in str(refusal.value)
    assert "Traceback" in engine._log.read_text()
    os.kill(engine._process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"^the process of vLLM, .* was ended by SIGKILL; start the same command"):
        engine.ask("weights", folder="nowhere")


STEPS = 5


def test_rl_is_on_policy_also_when_the_engine_was_killed(tmp_path, monkeypatch, raw_rl_preset):
    monkeypatch.chdir(tmp_path)
    [block] = raw_rl_preset["experiments"]["rl_arithmetic"]
    block |= {"ranks": {"all": [8]}, "steps": STEPS, "evaluations": 1, "held_out": [], "seeds": 1}
    block |= {"lrs": {"fullft": [], "lora": [1e-3]}}
    raw_rl_preset["execution"] |= {"threads": 2, "checkpoint_minutes": 0, "sampler": "vllm"}
    Path("mine.yaml").write_text(yaml.safe_dump(raw_rl_preset))
    layout = Layout.of("mine.yaml")
    write_problems(make_problems(layout.preset.problems["gcd"]), layout.dataset("gcd"))
    plan = make_plan(layout.preset)
    job = Job(tuple(plan.sweeps))
    asked, ask, before = [], PolicyEngine.ask, set(Path("/dev/shm").glob(f"lorabench-vllm-*-{os.getpid()}-*"))
    # The engine dies in step 3, whose base was evaluated before.
    deadly = [4]

    def counted(engine, name, *given, **arguments):
        asked.append(name)
        if deadly and asked.count("sample") == deadly[0]:
            deadly.clear()
            os.kill(engine._process.pid, signal.SIGKILL)
        return ask(engine, name, *given, **arguments)

    monkeypatch.setattr(PolicyEngine, "ask", counted)
    with pytest.raises(UserError, match="was ended by SIGKILL; start the same command again"):
        run_job(plan, job, layout, lambda line: None)
    assert set(Path("/dev/shm").glob(f"lorabench-vllm-*-{os.getpid()}-*")) == before
    asked.clear()
    run_job(plan, job, layout, lambda line: None)
    # It went on from the checkpoint: the base was evaluated again, then came the other steps and the last evaluation.
    assert asked.count("sample") == 1 + STEPS - 2 + 1
    collect([layout.job(job)], layout.tables(), plan, layout)
    [record] = layout.runs.glob("*/record.json")
    assert "vllm" in json.loads(record.read_text())["environment"]["packages"]
    # The sampler's distribution is the learner's at every step.
    curve = read_table(layout.tables(), "curves")
    kl = curve[(curve["split"] == "train") & (curve["metric"] == "kl")]["value"]
    assert len(kl) == STEPS
    assert kl.abs().max() < 1e-4
