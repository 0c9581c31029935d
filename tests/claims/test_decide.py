"""`lorabench plan --decide`: the further runs that would decide inconclusive claims, with their price."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from typer.testing import CliRunner

from lorabench.cli.main import app
from lorabench.config.preset import Preset
from lorabench.planning.plan import make_plan
from lorabench.store.io import write_frame
from lorabench.store.layout import Layout


@pytest.fixture(autouse=True)
def preset(raw_preset, tmp_path, monkeypatch, write_preset):
    """Work in an empty folder with the preset mine.yaml."""
    monkeypatch.chdir(tmp_path)
    write_preset(raw_preset)
    return make_plan(Preset.model_validate(raw_preset))


def claims_table(plan, **rows) -> None:
    """Write a table of claims: each row is the changes to a claim without a remedy, judged on all runs of the grid."""
    run_ids = [run.run_id for sweep in plan.sweeps for run in sweep.grid()]
    plain = {"statement": "a claim", "verdict": "inconclusive", "decide_lrs": [], "run_ids": run_ids}
    frame = pd.DataFrame([plain | {"claim_id": name} | changes for name, changes in rows.items()])
    write_frame(frame, "claims", Layout.of("mine.yaml").tables())


def decide(*arguments: str):
    return CliRunner().invoke(app, ["plan", "--preset", "mine.yaml", *arguments])


def costs(*arguments: str) -> dict[str, dict | None]:
    result = decide(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return {row["claim"]: row["cost"] for row in json.loads(result.stdout)["decisions"]}


def test_each_inconclusive_claim_has_its_further_runs_and_their_time(preset):
    fullft = next(sweep for sweep in preset.sweeps if sweep.condition.method == "fullft")
    claims_table(
        preset,
        A1={"decide_seeds": 4, "would_decide": "4 seeds (now 2)"},
        A2={"decide_lrs": ["LoRA_r4=0.03"], "would_decide": "LR 0.03 of LoRA r4"},
        A3={"decide_seeds": 3, "run_ids": [run.run_id for run in fullft.grid()]},
        A4={"decide_test_examples": 16},
        A7={
            "decide_seeds": 3,
            "decide_around": True,
            "would_decide": "3 seeds at the LRs around the optimum of LoRA r4",
        },
        A5={"would_decide": "more than 200 seeds"},
        A6={"verdict": "confirmed", "decide_seeds": 9},
    )
    all_of = costs("--decide", "all")
    assert list(all_of) == ["A1", "A2", "A3", "A4", "A7", "A5", "together"]
    # Three sweeps have two seeds each: 3 + 4 + 4 runs.
    assert {name: cost and cost["runs"] for name, cost in all_of.items()} == {
        "A1": 3 * 2,
        "A2": 1,
        "A3": 1,
        "A4": 11,
        # FullFT has two LRs, each rank of LoRA three.
        "A7": 3 + 5 + 5,
        "A5": None,
        "together": 11 + 1 + (2 + 2) + 2 * (2 + 2 * 2),
    }
    assert 0 < all_of["A2"]["job_hours"] < all_of["A4"]["job_hours"] < all_of["together"]["job_hours"]
    assert costs("--decide", "A2") == {"A2": all_of["A2"]}
    text = decide("--decide", "all").stdout
    assert "LR 0.03 of LoRA r4" in text
    assert "more than 200 seeds" in text


def test_without_an_inconclusive_claim_there_is_nothing_to_decide(preset):
    claims_table(preset, A1={"verdict": "confirmed"})
    assert "no claim is inconclusive" in decide("--decide", "all").stdout


MISTAKES = {
    "unknown": ("Z9", r"claim 'Z9' is not in the table of claims; allowed: all, A1, A2, A3"),
    "decided": ("A1", "claim A1 is confirmed; only an inconclusive one can be decided"),
    "no remedy": ("A2", "claim A2: no number of runs can be planned from its verdict, which says: 200 seeds or more"),
    "other runs": ("A3", "claim A3: none of its runs is in the plan; has the preset changed since it was run?"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_what_can_not_be_decided_is_one_sentence(mistake, preset):
    name, message = mistake
    claims_table(
        preset,
        A1={"verdict": "confirmed"},
        A2={"would_decide": "200 seeds or more"},
        A3={"decide_seeds": 4, "run_ids": ["another"]},
    )
    result = decide("--decide", name)
    assert (result.exit_code, result.stderr) == (2, f"lorabench: {message}\n")


def test_without_a_table_of_claims_nothing_is_known_to_decide():
    result = decide("--decide", "all")
    assert result.exit_code == 2
    assert result.stderr.startswith("lorabench: no table of claims in results/mine/tables: ")
