"""A user's own data from `lorabench init` to the report, through Snakemake."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from ..custom.conftest import write_rows
from .checkout import shell

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An empty folder in which a user made a preset and ran it, and what `lorabench init` printed."""
    folder = tmp_path_factory.mktemp("own")
    data = write_rows(folder / "mine.jsonl", 48)
    data.write_text(data.read_text() + '{"prompt": "no answer"}\nnot JSON\n')
    printed = shell("lorabench init my.yaml --model tiny --data mine.jsonl --rank 8 --seeds 2", folder)
    shell("lorabench run my.yaml --cores 2", folder)
    return folder, printed


def test_the_report_answers_for_this_model_and_data(finished):
    folder, _ = finished
    results = folder / "results" / "my"
    runs = pd.read_csv(results / "tables/runs.csv")
    assert set(runs["status"]) <= {"done", "diverged"}
    # Each arm has found its optimum: the best LR has both seeds, as have the LRs on both sides of it.
    assert set(runs["method"]) == {"fullft", "lora"}
    for _, arm in runs.groupby("method"):
        second = arm.loc[arm["seed"] == 1, "lr"]
        both = arm[arm["lr"].isin(second)]
        best = both.groupby("lr")["final_valid_nll"].mean().idxmin()
        assert second.min() < best < second.max()
    assert set(runs["dataset"]) == {"mine"}
    assert runs["template_sha256"].notna().all()
    page = (results / "report/index.html").read_text()
    assert "LoRA against full fine-tuning: tiny on mine.jsonl" in page
    [tally] = (results / "data").glob("mine.*.rows.json")
    assert json.loads(tally.read_text()) == {
        "format": "prompt/completion",
        "rows": 50,
        "usable": 48,
        "bad": [
            {"reason": "no text", "rows": 1, "first": 49},
            {"reason": "not JSON", "rows": 1, "first": 50},
        ],
    }


def test_recommendations_use_the_measured_runs(finished):
    folder, _ = finished
    seen = json.loads(shell("lorabench recommend tiny --json 2>/dev/null", folder))["seen"]
    assert [optimum["rank"] for optimum in seen] == [None, 8]
    assert all(optimum["where"].startswith("measured, results/my: mine, batch 4, 9 steps") for optimum in seen)
