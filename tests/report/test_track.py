"""Finished runs go to trackio once, with their curves and outcome; without trackio there is one sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from lorabench.cli.commands import app
from lorabench.planning.plan import make_plan
from lorabench.report.track import track
from lorabench.store.collect import write_entries
from lorabench.store.layout import Layout
from lorabench.store.run_folder import RunFolder
from lorabench.store.schemas import CURVES, CurvePoint
from lorabench.utils.files import write_json

from ..handmade import make_record


class Trackio:
    """Keeps what it is given, as trackio's functions of the same names do."""

    def __init__(self) -> None:
        self.runs: dict[str, Any] = {}

    def Api(self) -> Any:  # noqa: N802
        def runs(project: str) -> list[Any]:
            if not self.runs:
                raise ValueError(f"Project '{project}' does not exist")
            return [SimpleNamespace(name=name) for name in self.runs]

        return SimpleNamespace(runs=runs)

    def init(self, project: str, name: str, **settings: Any) -> Any:
        assert project == "lorabench-smoke"
        assert name not in self.runs
        logged: list[Any] = []
        self.runs[name] = settings | {"logged": logged}
        print("* Trackio project initialized")
        return SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)


def test_finished_runs_are_logged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.chdir(tmp_path)
    layout = Layout.of("smoke")
    plan = make_plan(layout.preset)
    run = next(plan.sweeps[0].possible_runs())
    folder = RunFolder(layout.runs, run.run_id)
    points = [
        CurvePoint(0, 0, 0, "validation", "nll", 5.0),
        CurvePoint(1, 4, 80, "train", "nll", 4.0),
        CurvePoint(2, 8, 160, "train", "nll", None),
        CurvePoint(2, 8, 160, "validation", "nll", 3.0),
    ]
    write_entries(run.run_id, points, CURVES, folder.curves)
    outcome = {"status": "done", "final_test_nll": 2.5, "final_reward": None}
    record = make_record(run, **outcome)
    write_json(record, folder.record)
    trackio = Trackio()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    assert track(plan, layout) == ("lorabench-smoke", 1, 0)
    assert track(plan, layout) == ("lorabench-smoke", 0, 1)
    assert capsys.readouterr().out == ""
    [(name, tracked)] = trackio.runs.items()
    assert name == f"{run.condition.label} lr {run.lr:g} seed {run.seed} {run.run_id}"
    assert tracked["config"] == {"run_id": run.run_id, **json.loads(json.dumps(record["spec"]))}
    assert tracked["logged"] == [
        (0, {"validation/nll": 5.0}),
        (1, {"train/nll": 4.0}),
        (2, {"validation/nll": 3.0, "final_test_nll": 2.5}),
    ]


def test_without_trackio_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "trackio", None)
    result = CliRunner().invoke(app, ["track", "--preset", "smoke"])
    assert result.exit_code == 2
    assert result.stderr == "lorabench: trackio is not installed; install it with: pip install trackio\n"
