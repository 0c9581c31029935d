"""The memory that the next attempt of a job requests depends on how the earlier ones ended."""

from __future__ import annotations

import pytest

from lorabench.errors import UserError
from lorabench.store.attempts import Attempts
from lorabench.utils.exhaustion import NoMemoryError
from lorabench.utils.signals import Stopped


@pytest.fixture
def attempts(tmp_path):
    return Attempts(tmp_path / "progress" / "job.attempts.json")


def end(attempts: Attempts, error: BaseException) -> None:
    """Make an attempt that ends by an error."""
    with pytest.raises(type(error)), attempts.recorded():
        raise error


def test_time_limits_and_errors_raise_no_memory(attempts):
    for error in [Stopped(15)] * 200 + [UserError("out of memory on the GPU"), RuntimeError("a fault")]:
        end(attempts, error)
        assert attempts.memory_factor() == 1


def test_killed_attempts_raise_memory_to_three_times_at_most(attempts):
    factors = []
    for _ in range(6):
        # A killed process leaves the record of an attempt that runs. SystemExit reports a killed process of several.
        end(attempts, SystemExit("process 1 of 2 ended with exit code -9"))
        factors.append(attempts.memory_factor())
    assert factors == [1.5, 2, 2.5, 3, 3, 3]
    end(attempts, Stopped(15))
    assert attempts.memory_factor() == 3, "what a job needed before a time limit it needs after it"
    with attempts.recorded():
        pass
    assert not attempts.path.exists()
    end(attempts, NoMemoryError("out of memory"))
    assert attempts.memory_factor() == 1.5


def test_an_attempt_that_saves_too_slowly_at_its_time_limit_raises_no_memory(attempts):
    attempts.path.parent.mkdir()
    attempts.path.write_text('{"killed": 1, "failed": 1, "running": true}')
    # The first process reports the signal; then all are killed.
    attempts.explain()
    assert attempts.memory_factor() == 1.5


def test_a_job_that_fails_at_each_attempt_soon_refuses_to_begin(attempts):
    endings = [RuntimeError("a fault"), SystemExit("killed"), Stopped(15)]
    # A job that gets as far as its time limit between failures has not failed in a row.
    for number, error in enumerate(3 * endings, 1):
        with pytest.raises(type(error)), attempts.recorded(number):
            raise error
    for number, error in enumerate(2 * endings[:2], 10):
        with pytest.raises(type(error)), attempts.recorded(number):
            raise error
    with pytest.raises(UserError, match="failed 4 times in a row and is not tried again"):
        attempts.recorded(14).__enter__()
    # A new start of the workflow tries again.
    with attempts.recorded(1):
        pass
