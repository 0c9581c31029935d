"""vLLM is started as the plan counts, draws from the learner's policies, and leaves its log and no process."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from lorabench.config.experiments import Protocol
from lorabench.config.loading import load_preset
from lorabench.data.problems import make_problems, write_problems
from lorabench.doctor.bench import random_model
from lorabench.errors import UserError
from lorabench.models.base import load_model
from lorabench.models.lora import add_lora, use_fast_products
from lorabench.models.passes import trained_parameters
from lorabench.models.specs import Dimensions
from lorabench.planning.memory import engine_batch, engine_memory
from lorabench.planning.plan import make_plan
from lorabench.runs import MAX_KL, Condition, Job, Run
from lorabench.store.layout import Layout
from lorabench.training.context import Base, SweepContext
from lorabench.training.distributed import SINGLE_PROCESS
from lorabench.training.job import run_job
from lorabench.training.rl.engine import EngineSettings, PolicyEngine, engine_settings
from lorabench.training.rl.objective import ResponseGroup, StepMeasures, backward
from lorabench.training.rl.sampler import Request, Stop, sample
from lorabench.training.run import machine_of

from ..conftest import CPU, needs_gpu
from .conftest import TINY, learned, machine, same_tokens

NEW_TOKENS = 16


def needs_vllm(test):
    """Mark a test as one that starts vLLM."""
    missing = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed; docs/cluster.md says how")
    return pytest.mark.slow(pytest.mark.vllm(missing(test)))


@pytest.fixture
def context_of(raw_rl_preset, write_preset):
    """Return a function that gives the context of full fine-tuning, or of LoRA of a rank."""
    raw_rl_preset["experiments"]["rl_arithmetic"][0]["ranks"] = {"all": [1, 2], "attn": [4]}

    def context(rank: int | None = None, **execution) -> SweepContext:
        raw_rl_preset["execution"] = {"gflops": None if "gpu" in execution else 1.0, "threads": 2, "sampler": "vllm"}
        raw_rl_preset["execution"] |= execution
        layout = Layout.of(write_preset(raw_rl_preset))
        plan = make_plan(layout.preset)
        sweep = next(sweep for sweep in plan.sweeps if sweep.condition.rank == rank)
        return SweepContext(plan, sweep, layout, machine())

    return context


@pytest.fixture
def settings(context_of):
    """Return a function that gives the settings of the engine in full fine-tuning, or in LoRA of a rank."""
    return lambda rank=None: engine_settings(context_of(rank), 256, rank is None)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    questions = ("What is 12 + 30?", "Sort the letters: d a c", "What is the largest of 3, 9 and 4?")
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
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.device))


def adapted():
    model = add_lora(load_model(TINY), 1, "all", 32.0, True, 0)
    use_fast_products(model)
    return model


def requested(prompts) -> list[Request]:
    return [Request(prompt, (0, 0, n, s)) for n, prompt in enumerate(prompts) for s in range(4)]


def largest_difference(model, requests, responses) -> float:
    """Return the largest absolute difference of log-probabilities of the engine and the learner, in nats."""
    pairs = zip(requests, responses, strict=True)
    return max(float(np.abs(drawn.logprobs - learned(model, asked, drawn)).max()) for asked, drawn in pairs)


@needs_vllm
def test_adapters_are_the_learners_at_every_step(engine, settings, tokenizer, prompts, stop):
    model, asked = adapted(), requested(prompts)
    responses = engine.draw(model, settings(1), asked, stop)
    assert largest_difference(model, asked, responses) < 1e-3
    greedy = [Request(prompt, None) for prompt in prompts]
    own = sample(load_model(TINY), tokenizer, greedy, stop, 10_000)
    assert same_tokens(engine.draw(model, settings(1), greedy, stop), own)
    assert same_tokens(engine.draw(model, settings(1), asked, stop), responses)
    for step in (1, 2):
        # All layers change, the unembedding included.
        move(model, 0.02, step)
        drawn = engine.draw(model, settings(1), asked, stop)
        assert largest_difference(model, asked, drawn) < 1e-3
        # The keys of random numbers are equal, so only the policies differ.
        assert not same_tokens(drawn, responses)
        responses = drawn
    # Another run goes on with the same process.
    process, other = engine._process, adapted()
    assert largest_difference(other, asked, engine.draw(other, settings(1), asked, stop)) < 1e-3
    assert engine._process is process


@needs_vllm
@pytest.mark.parametrize("tied", [False, True])
def test_all_weights_are_the_learners_after_updates(tied, engine, settings, prompts, stop):
    model, asked = load_model(TINY), requested(prompts)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    for step in range(3):
        assert largest_difference(model, asked, engine.draw(model, settings(), asked, stop)) < 1e-3
        move(model, 0.01, step)


# Qwen3's heads. With weights larger than usual, other weights are another distribution.
LONG_PROMPTS = {
    "cuda": Dimensions(1024, 4, 16, 8, 128, 3072, 32_768, query_key_norms=True, in_bf16=True),
    "cpu": Dimensions(64, 2, 4, 2, 32, 96, 512, query_key_norms=True, in_bf16=True),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders of two bases with random weights."""
    folders = {}
    for device, sizes in LONG_PROMPTS.items():
        folders[device] = tmp_path_factory.mktemp(device)
        condition = Condition("rl", "tiny", "gcd", "fullft", None, None, None, 1, 1, identity="test")
        random_model(sizes, condition, load_preset("smoke"), CPU).bfloat16().save_pretrained(folders[device])
    return folders


@needs_vllm
@pytest.mark.parametrize(
    ("device", "rank"),
    [("cpu", None), ("cpu", 16), *(pytest.param("cuda", rank, marks=needs_gpu) for rank in (None, 1, 16, 64))],
)
def test_long_prompts_are_the_learners_before_and_after_an_update(
    rank, device, folders, engine, raw_rl_preset, write_preset
):
    """On a GPU the engine computes by CUDA graphs and by Triton's kernels for LoRA, here in the presets' precision."""
    raw_rl_preset["models"] = {"tiny": {"kind": "path", "path": str(folders[device])}}
    raw_rl_preset["models"]["tiny"] |= {"parameters": 1, "hidden_size": 64}
    raw_rl_preset["protocol"] = {"precision": "bf16" if device == "cuda" else "fp32"}
    raw_rl_preset["experiments"]["rl_arithmetic"][0]["ranks"] = {"all": [1, 16, 64]}
    raw_rl_preset["execution"] = {"gflops": 1.0, "threads": 2, "sampler": "vllm", "max_cache_tokens": 70_000}
    layout = Layout.of(write_preset(raw_rl_preset))
    plan = make_plan(layout.preset)
    sweep = next(sweep for sweep in plan.sweeps if sweep.condition.rank == rank)
    where = machine_of(plan) if device == "cuda" else machine()
    context, generator = SweepContext(plan, sweep, layout, where), torch.Generator().manual_seed(0)
    drawing = engine_settings(context, 1024 + NEW_TOKENS, False)
    # On a CPU 64 would take a minute.
    count = 64 if device == "cuda" else 16
    prompts = torch.randint(LONG_PROMPTS[device].vocabulary, (count, 1024), generator=generator).tolist()
    asked = [Request(tuple(prompt), (0, 0, n, 0)) for n, prompt in enumerate(prompts)]

    def measured(responses) -> StepMeasures:
        pairs = zip(asked, responses, strict=True)
        return backward(model, [ResponseGroup.of(a.prompt, [drawn], np.zeros(1)) for a, drawn in pairs], where)

    with Base().trainable(context, Run(sweep.condition, 1e-3, 0)) as model:
        move(model, 0.02)
        for step in (1, 2):
            responses = engine.draw(model, drawing, asked, Stop((), NEW_TOKENS))
            assert all(np.isfinite(response.logprobs).all() for response in responses)
            own = measured(responses)
            assert own.tokens == len(asked) * NEW_TOKENS
            assert abs(own.kl) <= MAX_KL
            assert own.ratio_above_2 == 0
            move(model, 0.05, step)
            # What was drawn from the weights before is not the new learner's.
            assert measured(responses).kl > 10 * MAX_KL


@needs_vllm
def test_a_text_ends_a_response_and_a_limit_cuts_it(engine, settings, tokenizer, prompts):
    model, greedy = load_model(TINY), [Request(prompt, None) for prompt in prompts]
    whole = engine.draw(model, settings(), greedy, Stop((), NEW_TOKENS))
    assert all(response.truncated and len(response.tokens) == NEW_TOKENS for response in whole)
    until = Stop((), NEW_TOKENS, (tokenizer.decode(whole[0].tokens[2:4]),))
    drawn = engine.draw(model, settings(), greedy, until)
    own = sample(model, tokenizer, greedy, until, 10_000)
    assert same_tokens(drawn, own)
    assert [response.truncated for response in drawn] == [response.truncated for response in own]
    assert len(drawn[0].tokens) == 4


@needs_vllm
def test_the_death_of_the_engine_is_told(tmp_path, settings, prompts, stop):
    # Tests may run in any order, so that of the others stays alive.
    with PolicyEngine(SINGLE_PROCESS, tmp_path / "engine.log") as engine:
        engine.draw(load_model(TINY), settings(), requested(prompts), stop)
        os.kill(engine._process.pid, signal.SIGKILL)
        with pytest.raises(UserError, match=r"^the process of vLLM, .* has ended; start the same command"):
            engine.ask("weights", folder="nowhere")


CHILD = "import sys; from lorabench.training.rl.engine_worker import end_with; end_with(int(sys.argv[1]), sys.argv[2])"
PARENT = (
    "import os, subprocess, sys, time; "
    f"child = subprocess.Popen([sys.executable, '-c', {CHILD!r}, str(os.getpid()), sys.argv[1]]); "
    "print(child.pid, flush=True); time.sleep(60)"
)


@pytest.mark.slow
def test_a_process_ends_when_its_trainer_was_killed(tmp_path):
    folder = tmp_path / "policies"
    folder.mkdir()
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(folder)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = Path(f"/proc/{int(parent.stdout.readline())}")
    time.sleep(2)
    assert folder.is_dir()
    parent.kill()
    parent.wait()
    for _ in range(100):
        ended = not child.exists() or "Z" in (child / "stat").read_text().split()[2]
        if ended and not folder.exists():
            return
        time.sleep(0.1)
    os.kill(int(child.name), signal.SIGKILL)
    raise AssertionError("the process lives on")


def test_the_engine_has_the_options_that_the_plan_counts(context_of):
    context = context_of(2, gpu="A10", max_cache_tokens=400)
    preset, condition = context.plan.preset, context.sweep.condition
    options = engine_settings(context, 100, False).options
    batch, (_, cache) = engine_batch(preset, condition), engine_memory(preset, condition.model, condition)
    assert (options["max_num_seqs"], options["max_num_batched_tokens"]) == batch
    assert options["kv_cache_memory_bytes"] == int(cache)
    assert 1 < batch.responses < condition.batch_size
    head = {"lm_head"} if Protocol().include_unembedding else set()
    assert head < set(options["lora_target_modules"])
    attention = engine_settings(context_of(4), 100, False).options["lora_target_modules"]
    assert {"q_proj", "o_proj"} < set(attention)
    assert not {"up_proj", "down_proj"} & set(attention)
    # On a CPU vLLM's own numbers stay, and with them what is drawn.
    options = engine_settings(context_of(), 100, False).options
    assert (options["max_num_seqs"], options["max_num_batched_tokens"]) == (256, 4096)
    assert "lora_target_modules" not in options


def test_the_log_and_the_traceback_of_an_engine_that_fails_are_kept(tmp_path):
    """Without vLLM its import fails, and with it the model."""
    log = tmp_path / "logs/run.vllm.log"
    with PolicyEngine(SINGLE_PROCESS, log) as opened:
        for times in (1, 2):
            with pytest.raises(UserError, match=rf"^vLLM, .* failed: \w+: .*; its log is {log}$"):
                opened._start(EngineSettings({"model": str(tmp_path)}, None, 1))
            assert log.read_text().count("Traceback (most recent call last)") >= times
    assert not opened._caches.exists()


@needs_vllm
def test_rl_is_on_policy(tmp_path, monkeypatch, raw_rl_preset):
    monkeypatch.chdir(tmp_path)
    [block] = raw_rl_preset["experiments"]["rl_arithmetic"]
    block |= {"ranks": {"all": [8]}, "held_out": [], "seeds": 1, "lrs": {"fullft": [], "lora": [1e-3]}}
    raw_rl_preset["execution"] |= {"threads": 2, "sampler": "vllm"}
    Path("mine.yaml").write_text(yaml.safe_dump(raw_rl_preset))
    layout = Layout.of("mine.yaml")
    write_problems(make_problems(layout.preset.problems["gcd"]), layout.dataset("gcd"))
    plan = make_plan(layout.preset)
    job = Job(tuple(plan.sweeps))
    run_job(plan, job, layout, lambda line: None)
    [record] = map(json.loads, (path.read_text() for path in layout.runs.glob("*/record.json")))
    assert "vllm" in record["environment"]["packages"]
    # The sampler's distribution is the learner's at every step.
    [row] = pq.read_table(layout.job(job)).to_pylist()
    kl = [point["value"] for point in row["curve"] if (point["split"], point["metric"]) == ("train", "kl")]
    assert len(kl) == block["steps"]
    assert max(map(abs, kl)) < 1e-4
