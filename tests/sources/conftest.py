"""Small sources to read: a folder with a tidy table and its source.yaml."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

COLUMNS = "run_id,model,dataset,task,method,rank,placement,batch_size,steps,status,lr,seed,final_test_nll"


def row(method: str, lr: float, loss: float, seed: int = 0) -> str:
    """Return a finished run as a row of COLUMNS."""
    rank = 8 if method == "lora" else ""
    return f"{method}-{lr}-{seed},m,d,sft,{method},{rank},all,8,200,done,{lr},{seed},{loss}"


ROWS = [row(method, lr, loss) for method, lrs in (("fullft", (1e-5, 2e-5, 4e-5)), ("lora", (1e-4, 2e-4, 4e-4)))
        for lr, loss in zip(lrs, (2.1, 2.0, 2.2), strict=True)]  # fmt: skip


@pytest.fixture
def source(tmp_path) -> Callable[..., Path]:
    """Return a function that writes a source; its arguments change the file `source.yaml` or the tables."""

    def write(
        rows: list[str] = ROWS, header: str = COLUMNS, name: str = "made-up", curves: str | None = None, **changed: Any
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "runs.csv").write_text("\n".join([header, *rows]) + "\n")
        if curves is not None:
            (folder / "curves.csv").write_text(curves)
        file = {
            "about": "made-up runs",
            "origin": {"repository": "a/b", "path": "c", "commit": "d", "date": "2026", "licence": "none"},
            "loss": "the test loss",
            "attributes": {"precision": "fp32 weights", "schedule": "constant", "alpha": "32", "base_kind": "base"},
            "doubts": ["one seed"],
            "models": {"m": {"scale": "1B", "parameters": 1_000_000_000}},
            "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.csv")},
        }
        kept = {key: value for key, value in (file | changed).items() if value is not ...}
        (folder / "source.yaml").write_text(yaml.safe_dump(kept))
        return folder

    return write
