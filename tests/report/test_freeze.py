"""Rules are frozen before the runs, and runs that did not keep to them are refused."""

import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from typer.testing import CliRunner

from lorabench.claims.rules_hash import rules_sha256
from lorabench.cli.commands import app
from lorabench.config.loading import load_preset
from lorabench.errors import UserError
from lorabench.planning.plan import make_plan
from lorabench.report import freeze as freezing
from lorabench.report.freeze import (
    batches_of,
    came_out_again,
    check_kept,
    freeze,
    frozen_path,
    is_registered,
    preset_sha256,
    read_frozen,
    register,
    registered,
    summary_of,
    write_frozen,
)
from lorabench.runs import finished_losses
from lorabench.store.io import write_frame
from lorabench.store.layout import Layout

from ..handmade import claims_table, make_claim, make_run, runs_table

WHO = ("-c", "user.name=A. Tester", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")


def git(*arguments: str) -> str:
    return subprocess.run(["git", *WHO, *arguments], capture_output=True, text=True, check=True).stdout.strip()


def commit(what: str) -> str:
    git("add", "-A")
    git("commit", "-q", "--allow-empty", "-m", what)
    return git("rev-parse", "HEAD")


def runs_of(preset: str, sha: str) -> pd.DataFrame:
    """Make the finished runs of a preset, whose losses depend on the LR alone."""
    rows = []
    for sweep in make_plan(load_preset(preset)).sweeps:
        for lr, seed in finished_losses(sweep, lambda run: abs(run.lr - 3e-3)):
            [run] = {run for run in sweep.possible_runs() if (run.lr, run.seed) == (lr, seed)}
            ids = {"run_id": run.run_id, "git_sha": sha}
            rows.append(make_run(sweep.condition.rank, lr, seed, final_valid_nll=abs(lr - 3e-3), **ids))
    return runs_table(rows)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch, raw_preset, write_preset) -> SimpleNamespace:
    """Make a repository in which a preset was frozen, committed and then run."""
    monkeypatch.chdir(tmp_path)
    preset = write_preset(raw_preset)
    git("init", "-q")
    before = commit("before the freeze")
    rules = rules_sha256(load_preset(preset).margins, load_preset(preset).predictions or {})
    named = [make_claim("B1"), make_claim("B2", "inconclusive"), make_claim("E6", kind="count")]
    claims = claims_table([*named, make_claim("A1", "not tested")]).assign(rules=rules)
    path = tmp_path / "workflow/frozen/mine.yaml"
    write_frozen(freeze(f"{preset}@100", claims), path)
    commit("freeze")
    runs = runs_of(f"{preset}@100", commit("an empty commit"))
    return SimpleNamespace(path=path, preset=preset, claims=claims, runs=runs, before=before, rules=rules)


def checked(kept: SimpleNamespace, preset: str | None = None) -> str:
    layout = Layout.of(preset or f"{kept.preset}@100")
    return check_kept(read_frozen(kept.path), kept.path, layout, kept.runs, kept.claims)


def test_what_is_frozen_says_seeds_data_and_expected_verdicts(kept: SimpleNamespace):
    frozen = read_frozen(kept.path)
    assert (frozen.preset, frozen.rules_sha256) == (f"{kept.preset}@100", kept.rules)
    assert frozen.seeds == sorted(kept.runs["seed"].unique()) == [100, 101]
    assert frozen.data["instruct"].test == "other examples than the explored"
    assert {name: claim.verdict for name, claim in frozen.expected.items()} == {"B1": "confirmed", "B2": "inconclusive"}
    power = pd.DataFrame({"claim_id": ["B1", "B1"], "power_at_0": [0.9, 0.8], "power_at_2": [0.7, 1.0]})
    expected = freeze(f"{kept.preset}@100", kept.claims, power).expected
    assert (expected["B1"].power, expected["B2"].power) == (0.7, None)
    with pytest.raises(UserError, match="has the first seed 0, which was explored"):
        freeze(kept.preset, kept.claims)
    with pytest.raises(UserError, match="the explored claims were judged by abc and the rules of today are"):
        freeze(f"{kept.preset}@100", kept.claims.assign(rules="abc"))
    kept.path.write_text("preset: mine\nmargin: 1\n")
    with pytest.raises(UserError, match="mine.yaml is not as `lorabench freeze` writes it: .*'date'"):
        read_frozen(kept.path)


def test_the_command_takes_the_explored_verdicts_of_the_runs_here(kept: SimpleNamespace):
    def command(*arguments: str) -> str:
        return CliRunner().invoke(app, ["freeze", *arguments]).output.replace("\n", " ")

    assert "there are no verdicts of the preset mine in results/mine/tables" in command(kept.preset)
    assert f"run: lorabench run {kept.preset}@100" in command(kept.preset, "--unexplored")
    assert read_frozen(kept.path).data["instruct"].test == "no examples were explored"
    write_frame(kept.claims, "claims", Layout.of(kept.preset).tables())
    assert "mine has verdicts in results/mine/tables" in command(kept.preset, "--unexplored")
    # A further batch of seeds has a file of its own, and expects what the batch before does.
    assert f"run: lorabench run {kept.preset}@200" in command(f"{kept.preset}@200")
    further = read_frozen(kept.path.with_name("mine@200.yaml"))
    assert (further.seeds, further.expected) == ([200, 201], read_frozen(kept.path).expected)
    assert "mine.yaml waits for batch 4: freeze " in command(f"{kept.preset}@500")
    # Published verdicts of an earlier design do not count as explored.
    explored = Layout.of(kept.preset)
    shutil.rmtree(explored.tables())
    write_frame(kept.claims, "claims", explored.published)
    assert "has verdicts in" in command(kept.preset, "--unexplored")
    assert f"run: lorabench run {kept.preset}@100" in command(kept.preset, "--unexplored", "--redesigned")


def test_other_runs_are_refused(kept: SimpleNamespace):
    own = kept.runs
    refused = {
        r"runs of the commit \w{12}, which does not contain .*mine.yaml": own.assign(git_sha=kept.before),
        "runs of the commit None, which does not contain": own.assign(git_sha=None),
        "runs were made with uncommitted changes to the code: ": own.assign(git_dirty_patch="abc"),
        "runs have the seeds 0, which are not among those frozen": own.assign(seed=[0, *own["seed"][1:]]),
        "lacks runs of its plan: ": own[1:],
        "runs are not of the preset .*: other": pd.concat([own, own[:1].assign(run_id="other")], ignore_index=True),
    }
    for message, kept.runs in refused.items():
        with pytest.raises(UserError, match=message):
            checked(kept)


def test_other_rules_data_or_presets_are_refused(kept: SimpleNamespace, monkeypatch):
    with pytest.raises(UserError, match="preset .* was changed after it was frozen"):
        checked(kept, f"{kept.preset}@200")
    monkeypatch.setattr(freezing, "dataset_id", lambda spec: "another")
    with pytest.raises(UserError, match="the data instruct were changed after they were frozen"):
        checked(kept)
    monkeypatch.undo()
    monkeypatch.chdir(kept.path.parents[2])
    # So is a freeze that is changed, or committed after the runs.
    kept.path.write_text(kept.path.read_text().replace("confirmed", "contradicted"))
    with pytest.raises(UserError, match="mine.yaml is not committed as it is"):
        checked(kept)
    commit("other expectations")
    with pytest.raises(UserError, match="which does not contain .*mine.yaml"):
        checked(kept)
    kept.claims = kept.claims.assign(rules=["abc", *[kept.rules] * 3])
    with pytest.raises(UserError, match="the claims were judged by abc, and"):
        checked(kept)


def test_another_edition_of_shipped_text_is_another_preset():
    preset = load_preset("overnight@100")
    first = preset.datasets["docstrings"].model_copy(update={"edition": 1})
    other = preset.model_copy(update={"datasets": preset.datasets | {"docstrings": first}})
    assert preset_sha256(other) != preset_sha256(preset)


def test_verdicts_that_come_out_again_are_counted_among_the_decided_ones(kept: SimpleNamespace):
    frozen = read_frozen(kept.path)
    same = came_out_again(frozen, kept.claims)
    assert same["again"].fillna("").tolist() == ["yes", ""]
    assert summary_of(same).startswith("1 of 1 decided verdicts came out again on held-out seeds, and 2 of 2 estimates")
    other = claims_table([make_claim("B1", "contradicted", estimate=0.02), make_claim("B2", "not tested")])
    turned = came_out_again(frozen, other)[["explored", "held_out", "again", "within"]].fillna("")
    first, second = turned.to_numpy().tolist()
    assert first == ["confirmed", "contradicted", "no", "no"]
    assert second == ["inconclusive", "not tested", "", ""]
    # Of a preset that was never run nothing is expected, and all verdicts are told.
    frozen = freeze(f"{kept.preset}@100", None)
    assert (frozen.expected, frozen.seeds) == ({}, [100, 101])
    again = came_out_again(frozen, kept.claims)
    assert again["held_out"].tolist()[:2] == ["confirmed", "inconclusive"]
    assert again["again"].isna().all()
    assert summary_of(again) == "2 of 3 verdicts are decided, by rules fixed before any run"


def test_batches_count_that_were_registered_before_their_runs_without_a_gap(kept: SimpleNamespace):
    name, started = kept.preset, datetime.now(UTC).isoformat()

    def statuses(*numbers: int, day: str = started) -> dict[int, str]:
        seeds = pd.DataFrame({"seed": [100 * number for number in numbers], "started": day})
        return {batch.number: batch.status for batch in batches_of(name, seeds)}

    assert (is_registered(f"{name}@100"), is_registered(f"{name}@200")) == (True, False)
    assert statuses(0, 1, 2) == {0: "explored", 1: "registered", 2: "unregistered"}
    register(name, f"{name}@200")
    register(name, f"{name}@300")
    assert register(name, f"{name}@300") is None
    assert statuses(0, 1, 2, 3) == {0: "explored", 1: "registered", 2: "registered", 3: "registered"}
    # Batch 3 waits for the runs of batch 2, and none of batch 1 can be left out.
    assert statuses(1, 3) == {1: "registered", 2: "waiting", 3: "waiting"}
    assert statuses(2) == {1: "waiting", 2: "waiting", 3: "waiting"}
    assert statuses(1, day="2026-01-01")[1] == "unregistered"
    assert registered(name, 4) == [f"{name}@{seed}" for seed in (100, 200, 300, 400)]
    # Batches by other rules do not count, and the next ones begin anew.
    for number in (1, 2, 3):
        path = frozen_path(f"{name}@{100 * number}")
        path.write_text(path.read_text().replace(kept.rules, "another"))
    assert statuses() == {1: "explored", 2: "explored", 3: "explored"}
    with pytest.raises(UserError, match="@300 was run before it was registered, or registered by other rules"):
        register(name, f"{name}@300")
    assert registered(name, 2) == [f"{name}@400", f"{name}@500"]
    register(name, f"{name}@400")
    assert statuses(4) == {1: "explored", 2: "explored", 3: "explored", 4: "registered"}
    assert read_frozen(frozen_path(f"{name}@400")).expected == {}
