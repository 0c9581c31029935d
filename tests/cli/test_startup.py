"""Commands that answer at once import no heavy package; test_cli.py measures their CPU time."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorabench.store.schemas import RUNS
from lorabench.utils.gpus import processor

HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "pandas", "pyarrow", "scipy", "numpy", "lm_eval"}

# Runs a command, then prints the packages that it has imported.
CALL = """
import json, sys
from lorabench.cli import app
app(sys.argv[1:], standalone_mode=False)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def imported(folder, *arguments):
    """Return the packages that a command imports."""
    # The subprocess imports this project from the same place as this process.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in (os.getcwd(), *sys.path) if path)}
    done = subprocess.run(
        [sys.executable, "-c", CALL, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "arguments", [("--help",), *(("plan", "--preset", name) for name in ("smoke", "laptop", "core"))], ids=" ".join
)
def test_help_and_plans_import_nothing_heavy(tmp_path, arguments):
    packages = imported(tmp_path, *arguments)
    assert "lorabench" in packages
    assert not packages & HEAVY


def test_a_plan_reads_measured_runs_without_pandas(tmp_path):
    folder = tmp_path / "results" / "smoke" / "tables"
    folder.mkdir(parents=True)
    run = {"run_id": "unknown", "status": "done", "device": processor(), "wall_s": 1.0, "peak_mem_bytes": 1}
    pq.write_table(pa.Table.from_pylist([run], schema=RUNS), folder / "runs.parquet")
    packages = imported(tmp_path, "plan", "--preset", "smoke")
    assert packages & HEAVY == {"numpy", "pyarrow"}
