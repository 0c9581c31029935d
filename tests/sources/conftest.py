"""Small sources to read: a folder with a table and its source.yaml."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

COLUMNS = "name,kind,r,LR,seed,loss"
ROWS = [f"{kind}-{lr}-{seed},{kind},{'8' if kind == 'adapter' else ''},{lr},{seed},{loss}"
        for kind, lrs in (("full", (1e-5, 2e-5, 4e-5)), ("adapter", (1e-4, 2e-4, 4e-4)))
        for seed in (0,) for lr, loss in zip(lrs, (2.1, 2.0, 2.2), strict=True)]  # fmt: skip


@pytest.fixture
def source(tmp_path) -> Callable[..., Path]:
    """Return a function that writes a source; its arguments change the file `source.yaml` or the rows."""

    def write(rows: list[str] = ROWS, header: str = COLUMNS, name: str = "made-up", **changed: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "runs.csv").write_text("\n".join([header, *rows]) + "\n")
        runs = {
            "file": "runs.csv",
            "format": "csv",
            "sha256": hashlib.sha256((folder / "runs.csv").read_bytes()).hexdigest(),
            "columns": {
                "run_id": "name",
                "method": {"from": "kind", "values": {"full": "fullft", "adapter": "lora"}},
                "rank": "r",
                "lr": "LR",
                "seed": "seed",
                "final_test_nll": {"from": "loss", "unit": "nats"},
            },
            "constants": {"task": "sft", "model": "m", "dataset": "d", "placement": "all", "status": "done",
                          "batch_size": 8, "steps": 100},
        }  # fmt: skip
        runs |= changed.pop("runs", {})
        file = {
            "about": "made-up runs",
            "origin": {"repository": "a/b", "path": "c", "commit": "d", "date": "2026", "licence": "none"},
            "loss": "the test loss",
            "attributes": {"precision": "fp32 weights", "schedule": "constant", "alpha": "32", "base_kind": "base"},
            "doubts": ["one seed"],
            "models": {"m": {"scale": "1B", "parameters": 1_000_000_000}},
            "runs": runs,
        }
        (folder / "source.yaml").write_text(yaml.safe_dump(file | changed))
        return folder

    return write
