"""A bench of a small preset on the CPU, and records."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorabench.config.loading import load_preset
from lorabench.doctor.bench import Bench
from lorabench.doctor.record import Check, Record
from lorabench.planning.plan import make_plan
from lorabench.training.run import Machine


def bench_of(name: str, folder) -> Bench:
    """Return the bench of a shipped preset as a CPU computes it."""
    from lorabench.doctor.subject import on_this_device

    preset = load_preset(name)
    return Bench(
        make_plan(preset), on_this_device(preset, on_gpu=False), Machine(torch.device("cpu"), 4096, 1e9), folder
    )


@pytest.fixture
def smoke(tmp_path) -> Bench:
    return bench_of("smoke", tmp_path)


def record(device: str, **changes: Any) -> Record:
    """Return a record with one check."""
    fields: dict[str, Any] = {
        "date": "2026-11-26T12:00:00+00:00",
        "preset": "core",
        "device": device,
        "gpu": None,
        "host": "node1",
        "processes": 1,
        "seconds": 100.0,
        "git_sha": None,
        "packages": {"torch": "2.13.0"},
        "gflops": 250_000.0,
        "layer_seconds": 2e-4,
        "checks": [Check(name="device", status="pass", sentence="this is the GPU")],
    }
    return Record(**(fields | changes))
