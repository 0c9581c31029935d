"""What the engine is started with, and what is left of it. Needs no vLLM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lorabench.config.experiments import Protocol
from lorabench.errors import UserError
from lorabench.planning.memory import engine_batch, engine_memory
from lorabench.planning.plan import make_plan
from lorabench.store.layout import Layout
from lorabench.training.context import SweepContext
from lorabench.training.distributed import SINGLE_PROCESS
from lorabench.training.rl.engine import EngineSettings, PolicyEngine, engine_settings

from .conftest import machine

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


def test_the_engine_has_the_options_that_the_plan_counts(tmp_path, monkeypatch, raw_rl_preset):
    monkeypatch.chdir(tmp_path)
    raw_rl_preset["experiments"]["rl_arithmetic"][0]["ranks"] = {"all": [2, 8], "attn": [4]}

    def context_of(rank: int | None = None, **execution) -> SweepContext:
        execution = {"gflops": 1.0, "sampler": "vllm"} | execution
        Path("mine.yaml").write_text(yaml.safe_dump(raw_rl_preset | {"execution": execution}))
        layout = Layout.of("mine.yaml")
        plan = make_plan(layout.preset)
        sweep = next(sweep for sweep in plan.sweeps if sweep.condition.rank == rank)
        return SweepContext(plan, sweep, layout, machine())

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
