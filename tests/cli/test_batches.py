"""Claims are decided batch after batch, each registered before its runs; Snakemake is stood in for."""

import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lorabench.cli.batches import decide, run_batches
from lorabench.cli.commands import app
from lorabench.config.loading import load_preset
from lorabench.errors import UserError
from lorabench.report.freeze import is_registered
from lorabench.store.io import read_rows, write_frame
from lorabench.store.layout import Layout

from ..handmade import sft

PASS = [sys.executable, "-c", ""]


@pytest.fixture
def preset(tmp_path: Path, monkeypatch, raw_preset, write_preset) -> str:
    monkeypatch.chdir(tmp_path)
    return write_preset(raw_preset)


class Workflow:
    """Makes the tables of batches with the gaps of LoRA to FullFT, in place of Snakemake."""

    def __init__(self, gaps: dict[int, float]) -> None:
        self.made, self.asked = sft.batches(gaps), []

    def __call__(self, preset: str, options: list[str]) -> tuple[list[str], dict[str, str]]:
        assert is_registered(preset)
        self.asked.append((preset.rpartition("@")[2], options))
        first_seed, layout = load_preset(preset).first_seed, Layout.of(preset)
        runs = self.made.runs[self.made.runs["seed"].between(first_seed, first_seed + 99)]
        assert len(runs)
        for folder in (layout.tables(), layout.tables("rank")):
            write_frame(runs, "runs", folder, all_columns=False)
            curves = self.made.curves[self.made.curves["run_id"].isin(runs["run_id"])]
            write_frame(curves, "curves", folder, all_columns=False)
        return PASS, {}


def looks(folder: Path) -> list[dict[str, Any]]:
    return read_rows(folder, "claims_by_batch", ["claim_id", "batches", "verdict"])


@pytest.mark.slow
def test_claims_are_run_until_they_are_decided(preset: str, capsys):
    # The margin is 0.058, and the first batch lies at it.
    workflow = Workflow({1: 0.056, 2: 0.02, 3: 0.02, 4: 0.02})
    decide(preset, ["B2"], "1h", workflow, ["--profile", "slurm"])
    out = Layout.of(preset).batches("B2")
    targets = [f"results/mine@{seed}/tables/rank/runs.parquet" for seed in (100, 200, 300, 400)]
    assert workflow.asked[0] == ("100", [targets[0], "--profile", "slurm"])
    assert [options[0] for _, options in workflow.asked] == targets[: len(workflow.asked)]
    verdicts = [look["verdict"] for look in looks(out)]
    assert len(verdicts) == len(workflow.asked)
    assert set(verdicts[:-1]) <= {"inconclusive"}
    printed = capsys.readouterr().out
    assert "each batch of rank: 11 runs, about " in printed
    page = (out / "index.html").read_text()
    assert page.count("<circle") == len(verdicts)


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_the_budget_ends_the_batch_at_work(before, preset: str, capsys):
    """Also of a command that a script has started in the background, where SIGINT is ignored."""

    def slow(preset: str, options: list[str]) -> tuple[list[str], dict[str, str]]:
        return [sys.executable, "-c", "import time; time.sleep(60)"], {}

    usual, started = signal.signal(signal.SIGINT, before), time.monotonic()
    try:
        decide(preset, ["B2"], "0.2s", slow, [])
    finally:
        signal.signal(signal.SIGINT, usual)
    assert time.monotonic() - started < 50
    assert "ended before batch" in capsys.readouterr().out
    assert not Layout.of(preset).batches("B2").exists()


@pytest.mark.slow
def test_some_batches_are_run_and_judged_together_and_again_from_their_tables(preset: str, tmp_path: Path):
    workflow = Workflow({0: 0.0, 1: 0.0, 2: 0.0})
    run_batches(preset, 2, workflow, ["-n"])
    assert workflow.asked == [("100", ["-n"]), ("200", ["-n"])]
    together = looks(Layout.of(preset).batches("all"))
    assert {look["batches"] for look in together} == {1, 2}
    folders = [str(Layout.of(f"{preset}@{seed}").tables()) for seed in (100, 200)]
    tables = [word for folder in folders for word in ("--tables", folder)]
    CliRunner().invoke(app, ["claims", *tables, "--preset", preset, "--out", "again"])
    assert looks(tmp_path / "again") == together


@pytest.mark.parametrize(
    ("ids", "preset_of", "budget", "message"),
    [
        (["B2", "b3"], "{}", "1h", "claim 'b3': allowed: A1, "),
        (["F1"], "{}", "1h", "claim 'F1': the preset mine has none of the experiments that it is judged on"),
        (["B2"], "{}@100", "1h", "batches have first seeds of their own; allowed: the name without @"),
        (["B2"], "{}", "soon", "--budget 'soon': allowed: a number with s, m, h or d after it, such as 30m"),
    ],
)
def test_what_can_not_be_decided_is_refused_before_anything_is_run(ids, preset_of, budget, message, preset):
    with pytest.raises(UserError, match=message):
        decide(preset_of.format(preset), ids, budget, lambda *_: (PASS, {}), [])
