"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import settings

# Tests run side by side, one per core; torch reads this when it is first imported.
os.environ["OMP_NUM_THREADS"] = "1"

REPOSITORY = Path(__file__).parent.parent
MARGINS = {"loss": 0.02, "reward": 0.1, "lr_factor": 1.6}
"""The section `margins` of presets that tests write."""

# The same few examples each time: a busy machine breaks no deadline, and a failure comes again.
settings.register_profile("lorabench", max_examples=30, deadline=None, derandomize=True)
settings.load_profile("lorabench")


def slow_but(fast: str, names: Iterable[str]) -> list[Any]:
    """Return names as parameters of a test, all but one of them marked as slow."""
    return [name if name == fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


FAST_SECONDS = 5.0
"""The longest time of a fast test in CI. Elsewhere nothing fails for it, since a machine may be slow or busy."""

_NOT_FAST = ("slow", "long", "gpu", "slurm")
_CPU_SECONDS = pytest.StashKey[float]()
# Where other work takes the cores, a test takes longer by the clock than on them; this is the most by the clock.
_BUSY = 3.0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Measure the CPU seconds of a test and of the processes that it waited for."""
    before = os.times()[:4]
    try:
        return (yield)
    finally:
        item.stash[_CPU_SECONDS] = sum(os.times()[:4]) - sum(before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Let a fast test that takes long fail in CI."""
    report = yield
    if "CI" not in os.environ or not (report.when == "call" and report.passed):
        return report
    seconds = max(min(call.duration, item.stash[_CPU_SECONDS]), call.duration / _BUSY)
    if seconds > FAST_SECONDS and not any(item.get_closest_marker(mark) for mark in _NOT_FAST):
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} took {seconds:.1f} s, and a fast test takes at most {FAST_SECONDS:g} s: "
            "make it faster, or mark it slow"
        )
    return report


@pytest.fixture
def raw_preset() -> dict[str, Any]:
    """A small valid preset as plain data, to be changed by a test."""
    return {
        "description": "a preset for tests",
        "models": {"tiny": {"kind": "tiny"}},
        "datasets": {"instruct": {"kind": "instruct", "train": 64, "validation": 8, "test": 8, "max_chars": 240}},
        "experiments": {
            "rank": [
                {
                    "models": ["tiny"],
                    "datasets": ["instruct"],
                    "ranks": {"all": [1, 4]},
                    "batch_sizes": [4],
                    "lrs": {"fullft": [1e-3, 3e-3], "lora": [1e-3, 3e-3, 1e-2]},
                    "seeds": 2,
                }
            ]
        },
        "margins": dict(MARGINS),
        "execution": {"gflops": 20.0},
    }


@pytest.fixture
def raw_rl_preset() -> dict[str, Any]:
    """A small valid preset of RL as plain data, to be changed by a test."""
    sizes = {"kind": "arithmetic", "tasks": ["gcd"], "max_value": 50}
    return {
        "description": "RL for tests",
        "models": {"tiny": {"kind": "tiny"}},
        "problems": {
            "gcd": {**sizes, "train": 32, "validation": 8, "test": 8},
            "gcd-of-three": {**sizes, "min_terms": 3, "max_terms": 3, "train": 4, "validation": 4, "test": 8},
        },
        "experiments": {
            "rl_arithmetic": [
                {
                    "models": ["tiny"],
                    "problems": ["gcd"],
                    "ranks": {"all": [2]},
                    "problems_per_step": 4,
                    "group_size": 4,
                    "steps": 3,
                    "max_new_tokens": 4,
                    "mean_response_tokens": 2,
                    "evaluations": 1,
                    "held_out": ["gcd-of-three"],
                    "lrs": {"fullft": [1e-4], "lora": [1e-3, 3e-3, 9e-3]},
                    "seeds": 2,
                }
            ]
        },
        "margins": dict(MARGINS),
        "execution": {"gflops": 1.0},
    }


@pytest.fixture
def write_preset(tmp_path: Path):
    """Return a function that writes plain data as a preset file and returns its path."""

    def write(raw: Any, name: str = "mine") -> str:
        path = tmp_path / f"{name}.yaml"
        path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw, sort_keys=False))
        return str(path)

    return write
