"""A job is killed, gets a signal, runs out of memory or disk space, or meets another job on the same sweep."""

import errno
import fcntl
import os
import re
import signal
import threading
import time

import pytest
import torch

from lorabench.data.grading import Grader
from lorabench.errors import UserError
from lorabench.training.job import run_job
from lorabench.utils import signals
from lorabench.utils.checked_tensors import read_header
from lorabench.utils.exhaustion import memory_for
from lorabench.utils.lock import locked

from .conftest import AT_WORK


@pytest.mark.slow
def test_a_killed_job_goes_on_from_its_checkpoint_with_the_same_numbers(half, unbroken):
    first = half.run_path("sft", 0, "record.json")
    kept = first.stat().st_mtime_ns
    for task, number in AT_WORK.items():
        final, checkpoint = half.run_path(task, number), half.checkpoint(task, number)
        assert checkpoint.exists()
        assert not final.exists()
        # A job that is killed while it writes leaves such files.
        checkpoint.with_name(".checkpoint.safetensors.elsewhere.1.partial").write_bytes(b"half")
        staging = final.with_name(f"{final.name}.finishing")
        staging.mkdir()
        (staging / "record.json").write_text("{")
        assert "goes on after step" in half.train(task)
        assert half.numbers(task) == unbroken.numbers(task)
    assert first.stat().st_mtime_ns == kept
    results = half.path(half.layout.root)
    partial = [*results.rglob("*.partial"), *results.rglob("*.finishing")]
    assert [*partial, *results.glob("progress/*"), *results.glob("locks/*")] == []


@pytest.mark.slow
@pytest.mark.parametrize(("task", "number"), [("sft", signal.SIGINT), ("rl", signal.SIGTERM)])
def test_a_job_that_gets_a_signal_saves_a_checkpoint(task, number, place, unbroken):
    # The signal leads to the only checkpoint.
    place.change(lambda raw: raw["execution"].update(checkpoint_minutes=1000))
    job = place.start("step", "train", place.job(task).job_id)
    run = place.sweep(task).grid()[0]
    job.until(place.path(place.layout.progress(run)).exists)
    sent = time.monotonic()
    job.signal(number)
    assert job.wait() == 128 + number
    assert time.monotonic() - sent < 10
    lines = [line for line in job.text.splitlines() if not line[:2].isdigit()]
    assert lines == [f"lorabench: stopped by {number.name}; what was done is kept, the same command goes on from there"]
    assert place.checkpoint(task, 0).exists()
    assert not place.path(place.layout.lock(run)).exists()

    output = place.train(task)
    assert output.count("goes on after step") == 1
    assert place.numbers(task) == unbroken.numbers(task)


@pytest.fixture
def interruptible():
    """Give SIGINT its default handler, since a shell script starts commands in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_repeated_signal_is_ignored_until_the_grace_period_is_over(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with signals.stop_immediately():
        with signals.stop_after_step():
            os.kill(os.getpid(), signal.SIGINT)
            now = 1.0
            os.kill(os.getpid(), signal.SIGTERM)
            now = signals.GRACE - 1.0
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.requested()
        # While the command ends, too.
        os.kill(os.getpid(), signal.SIGTERM)
        # The second Ctrl-C.
        with signals.stop_after_step(), pytest.raises(signals.Stopped):
            os.kill(os.getpid(), signal.SIGINT)
    assert not signals.requested()


def test_a_signal_to_all_processes_of_a_job_makes_no_answer_wrong():
    hard = (["\\boxed{\\frac{2}{4}}"], ["\\frac{1}{2}"])
    with Grader("math") as grader:
        assert grader.grade(*hard) == [True]
        [worker] = grader._workers
        pid = worker._process.pid
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(pid, number)
        time.sleep(0.2)
        assert grader.grade(["\\boxed{\\frac{3}{6}}"], ["\\frac{1}{2}"]) == [True]
        assert worker._process.pid == pid


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "settings"),
    [("sft", "max_batch_tokens (now 160);"), ("rl", "max_batch_tokens (now 160) or max_cache_tokens (65536);")],
)
def test_out_of_memory_is_one_sentence_and_nothing_is_lost(task, settings, half, unbroken, monkeypatch):
    def full(*arguments, **options):
        raise MemoryError

    checkpoint = half.checkpoint(task, AT_WORK[task])
    before = int(read_header(checkpoint)["step"])
    with monkeypatch.context() as patched:
        patched.chdir(half.folder)
        patched.setattr(torch.optim.AdamW, "step", full)
        with pytest.raises(UserError, match=re.escape(f"lower execution.{settings} what is finished is kept")):
            run_job(half.plan, half.job(task), half.layout, lambda line: None)
    # In RL a step whose rewards are equal changes nothing, so some may be made before.
    assert int(read_header(checkpoint)["step"]) >= before > 0
    assert "goes on after step" in half.train(task)
    assert half.numbers(task) == unbroken.numbers(task)


@pytest.mark.parametrize(
    ("error", "beginning"),
    [
        (MemoryError(), "is out of memory: "),
        (torch.OutOfMemoryError("Tried to allocate 20.00 GiB."), "is out of memory on the GPU: "),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"), "is out of memory on the GPU: "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "is out of memory: "),
        (OSError(12, "Cannot allocate memory"), "is out of memory: "),
    ],
)
def test_every_kind_of_full_memory_is_one_sentence(error, beginning):
    with pytest.raises(UserError) as raised, memory_for("the sweep", "lower x"):
        raise error
    assert str(raised.value) == f"the sweep {beginning}lower x; what is finished is kept"
    with pytest.raises(RuntimeError, match="shapes"), memory_for("the sweep", "lower x"):
        raise RuntimeError("shapes do not fit")


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_job_goes_on_when_there_is_room(half, unbroken):
    """A limit of the size of files is a full disk too."""
    checkpoint = half.checkpoint("sft", 1)
    old = checkpoint.read_bytes()
    output = half.train("sft", status=2, file_size=100_000)
    path = checkpoint.relative_to(half.folder)
    assert output.splitlines()[-1].startswith(f"lorabench: no space left to write {path}; make room and give")
    assert "Traceback" not in output
    assert checkpoint.read_bytes() == old
    assert [entry.name for entry in checkpoint.parent.iterdir()] == ["checkpoint.safetensors"]
    assert not half.run_path("sft", 1).exists()
    assert "goes on after step" in half.train("sft")
    assert half.numbers("sft") == unbroken.numbers("sft")


@pytest.mark.slow
def test_of_two_jobs_on_one_sweep_the_second_waits(place, unbroken):
    sweep = place.sweep("sft")
    first = place.start("step", "train", sweep.sweep_id)
    first.until(place.path(place.layout.lock(sweep.grid()[0])).exists)
    second = place.start("step", "train", sweep.sweep_id)
    assert (first.wait(), second.wait()) == (0, 0), first.text + second.text
    assert "waits for another process, which is at work on " in second.text
    assert "goes on after" not in second.text
    assert place.numbers("sft") == unbroken.numbers("sft")
    assert not list(place.path(place.layout.root).glob("locks/*"))


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_without_locks_of_the_file_system_the_existence_of_the_file_decides(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    path, lines, held, done = tmp_path / "x.lock", [], threading.Event(), threading.Event()

    def hold() -> None:
        with locked(path, "x", lines.append):
            held.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    with signals.stop_after_step():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(signals.Stopped):
            locked(path, "x", lines.append).__enter__()
    assert path.exists()
    done.set()
    holder.join()
    assert lines == ["waits for another process, which is at work on x"]
    assert not path.exists()


def test_a_file_system_that_grants_no_locks_is_one_sentence(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match=r"x\.lock grants no locks \(No locks available\)"):
        locked(tmp_path / "x.lock", "x", print).__enter__()
