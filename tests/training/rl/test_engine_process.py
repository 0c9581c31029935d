"""What the engine is started with, and what is left of it. Needs no vLLM."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from lorabench.config.experiments import Protocol
from lorabench.errors import UserError
from lorabench.models import vllm_support
from lorabench.planning.memory import engine_batch, engine_memory, handover_bytes
from lorabench.planning.plan import make_plan
from lorabench.runs import Job
from lorabench.store.layout import Layout
from lorabench.training.context import SweepContext
from lorabench.training.distributed import SINGLE_PROCESS
from lorabench.training.job import run_job
from lorabench.training.rl import engine
from lorabench.training.rl.engine import EngineSettings, PolicyEngine, engine_settings

from .conftest import machine

LOG = Path("unused.vllm.log")
CHILD = "import sys; from lorabench.training.rl.engine_worker import end_with; end_with(int(sys.argv[1]), sys.argv[2:])"
PARENT = (
    "import os, subprocess, sys, time; "
    f"child = subprocess.Popen([sys.executable, '-c', {CHILD!r}, str(os.getpid()), *sys.argv[1:]]); "
    "print(child.pid, flush=True); time.sleep(60)"
)


def test_a_process_ends_when_its_trainer_was_killed(tmp_path):
    folders = [tmp_path / "policies", tmp_path / "caches"]
    for folder in folders:
        folder.mkdir()
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *map(str, folders)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = Path(f"/proc/{int(parent.stdout.readline())}")
    time.sleep(2)
    assert all(folder.is_dir() for folder in folders)
    parent.kill()
    parent.wait()
    for _ in range(100):
        ended = not child.exists() or "Z" in (child / "stat").read_text().split()[2]
        if ended and not any(folder.exists() for folder in folders):
            return
        time.sleep(0.1)
    os.kill(int(child.name), signal.SIGKILL)
    raise AssertionError("the process lives on")


def test_folders_of_killed_jobs_are_removed_and_those_of_others_are_not():
    ended = subprocess.Popen(["true"])
    ended.wait()
    with PolicyEngine(SINGLE_PROCESS, LOG) as first:
        first.make_room(0)
        folder, node = first._folder, platform.node()
        assert folder.is_dir()
        names = (f"{node}-{ended.pid}", f"{node}-{os.getppid()}", f"{node}-2-{ended.pid}")
        left, running, elsewhere = (folder.with_name(f"lorabench-vllm-{name}-1") for name in names)
        for other in (left, running, elsewhere):
            other.mkdir()
        with PolicyEngine(SINGLE_PROCESS, LOG) as second:
            second.make_room(0)
            assert second._folder != folder
            assert not left.exists()
            assert running.is_dir()
            assert elsewhere.is_dir()
        running.rmdir()
        elsewhere.rmdir()
        assert folder.is_dir()
    assert not folder.exists()


@pytest.fixture
def small_memory(tmp_path, monkeypatch) -> Iterator[Path]:
    """A file system in memory of 1 MB in place of that of this machine; files go into the test's folder otherwise."""
    memory, other = tmp_path / "memory", tmp_path / "other"
    memory.mkdir()
    other.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(memory)], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a file system here")
    monkeypatch.setattr(engine, "MEMORY", memory)
    monkeypatch.setattr(tempfile, "tempdir", str(other))
    yield memory
    subprocess.run(["umount", "-l", str(memory)], check=True)


def test_policies_are_handed_over_where_there_is_room(small_memory, monkeypatch):
    other = Path(tempfile.gettempdir())
    with PolicyEngine(SINGLE_PROCESS, LOG) as opened:
        opened.make_room(1_000_000)
        assert opened._folder.parent == small_memory
        opened.make_room(2_000_000)
        assert opened._folder.parent == other
        opened.make_room(1_000_000)
        assert opened._folder.parent == other
    assert list(small_memory.iterdir()) == list(other.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(small_memory))
    sentence = rf"need 2 MB to be handed over to vLLM, and there are 1\.05 MB in {small_memory} free; make room"
    with PolicyEngine(SINGLE_PROCESS, LOG) as opened, pytest.raises(UserError, match=sentence):
        opened.make_room(2_000_000)


@pytest.fixture
def prepared(tmp_path, monkeypatch, raw_rl_preset) -> Callable[..., SweepContext]:
    """Return a function that writes a preset with vLLM, and returns the context of the sweep of a rank."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vllm_support, "find_spec", lambda name: True)

    def write(rank: int | None = None, **execution) -> SweepContext:
        [block] = raw_rl_preset["experiments"]["rl_arithmetic"]
        raw = raw_rl_preset | {"execution": {"gflops": 1.0, "sampler": "vllm"} | execution}
        block["ranks"] = {"all": [2, 8], "attn": [4]}
        Path("mine.yaml").write_text(yaml.safe_dump(raw))
        layout = Layout.of("mine.yaml")
        plan = make_plan(layout.preset)
        sweep = next(sweep for sweep in plan.sweeps if sweep.condition.rank == rank)
        return SweepContext(plan, sweep, layout, machine())

    return write


def test_a_policy_without_room_is_refused_before_anything_is_started(small_memory, prepared, monkeypatch):
    context = prepared()
    monkeypatch.setattr(tempfile, "tempdir", str(small_memory))
    assert 2 * handover_bytes(context.plan.preset, context.sweep.condition) > 1_100_000
    # There are no problems yet, which are read next.
    with pytest.raises(UserError, match="the policies of this job need .* MB to be handed over to vLLM"):
        run_job(context.plan, Job((context.sweep,)), context.layout, lambda line: None)


def test_the_engine_has_the_options_that_the_plan_counts(prepared):
    context = prepared(2, gpu="A10", max_cache_tokens=400)
    preset, condition = context.plan.preset, context.sweep.condition
    options = engine_settings(context, 100, False).options
    batch, (_, cache) = engine_batch(preset, condition), engine_memory(preset, condition.model, condition)
    assert (options["max_num_seqs"], options["max_num_batched_tokens"]) == batch
    assert options["kv_cache_memory_bytes"] == int(cache)
    assert 1 < batch.responses < condition.batch_size
    head = {"lm_head"} if Protocol().include_unembedding else set()
    assert head < set(options["lora_target_modules"])
    attention = engine_settings(prepared(4), 100, False).options["lora_target_modules"]
    assert {"q_proj", "o_proj"} < set(attention)
    assert not {"up_proj", "down_proj"} & set(attention)
    # On a CPU vLLM's own numbers stay, and with them what is drawn.
    options = engine_settings(prepared(), 100, False).options
    assert (options["max_num_seqs"], options["max_num_batched_tokens"]) == (256, 4096)


def test_the_log_and_the_traceback_of_an_engine_that_fails_are_kept(tmp_path):
    """Without vLLM its import fails, and with it the model."""
    log = tmp_path / "logs/run.vllm.log"
    with PolicyEngine(SINGLE_PROCESS, log) as opened:
        opened.make_room(0)
        for times in (1, 2):
            with pytest.raises(UserError, match=rf"^vLLM, .* failed: \w+: .*; its log is {log}$"):
                opened._start(EngineSettings({"model": str(tmp_path)}, None, 1))
            assert log.read_text().count("Traceback (most recent call last)") >= times
