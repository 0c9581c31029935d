"""What a preset's results show is made again from its runs: an edit in any of them is named, and nothing else."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
import yaml
from typer.testing import CliRunner

from lorabench.cli.commands import app
from lorabench.figures.catalog import FIGURES, save_figure
from lorabench.models.counts import counts_table
from lorabench.planning.plan import make_plan
from lorabench.report import other_margins, page, verify
from lorabench.report.judged import write_claims, write_verdicts_by_margin
from lorabench.runs import finished_losses
from lorabench.store import collect
from lorabench.store.io import write_frame, write_table
from lorabench.store.layout import Layout
from lorabench.store.made_from import named_in, of_runs
from lorabench.store.run_folder import RunFolder
from lorabench.store.schemas import CURVES, RUN_TEST_LOSSES, CurvePoint, ExampleLoss
from lorabench.store.waves import end_sweep

from ..handmade import STEPS, make_record, make_run

pytestmark = pytest.mark.slow

NAME = "fig2_lr_by_rank"
TABLES, FIGURE = Path("results/mine/tables"), Path(f"paper_figures/mine/{NAME}.csv")


def write_run(layout: Layout, run) -> float:
    """Write the folder of a run that was never trained, and return its validation loss."""
    row = make_run(run.condition.rank, run.lr, run.seed)
    spec = make_record(run)["spec"]
    record = make_record(run, **{name: value for name, value in row.items() if name not in {*spec, "versions"}})
    del record["outcome"]["run_id"], record["outcome"]["experiments"]
    with RunFolder(layout.runs, run.run_id).finishing(record) as staging:
        staged = RunFolder(staging.parent, staging.name)
        curve = [CurvePoint(step, 4 * step, 99 * step, "validation", "nll", 3 - step / 200) for step in STEPS]
        collect.write_entries(run.run_id, curve, CURVES, staged.curves)
        losses = [ExampleLoss(4 * row["final_test_nll"] + place - 3.5, 4) for place in range(8)]
        collect.write_entries(run.run_id, losses, RUN_TEST_LOSSES, staged.test_losses)
    return row["final_valid_nll"]


def make_all(layout: Layout) -> None:
    """Make tables, claims, figures and the page as the steps of the workflow do."""
    plan, tables, margins = make_plan(layout.preset), layout.tables(), layout.preset.margins
    for where, jobs in ((tables, plan.jobs), (layout.tables("rank"), plan.jobs_of("rank"))):
        collect.collect([layout.job(job) for job in jobs], where, plan, layout)
    write_frame(counts_table(), "counts", tables)
    write_claims([tables], tables, margins, {})
    write_verdicts_by_margin(tables, margins, {})
    save_figure(NAME, FIGURES[NAME].folders(layout), layout.figures)
    page.build(plan, layout, "mine.yaml", layout.report)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Return a folder in which a preset was run whole, but for the training."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for module in (page, verify):
            patched.setattr(module, "figures_of_preset", lambda preset: [FIGURES[NAME]])
        patched.setattr(other_margins, "FACTORS", (2.0,))
        lrs = [3e-4, 1e-3, 3e-3, 1e-2]
        block = {"models": ["tiny"], "datasets": ["instruct"], "ranks": {"all": [1, 4]}, "batch_sizes": [4]}
        block |= {"seeds": 2, "lrs": {"fullft": lrs, "lora": lrs}}
        sizes = {"train": 64, "validation": 8, "test": 8, "max_chars": 240, "mean_tokens": 40}
        data = {"kind": "file", "path": "../chats.jsonl", **sizes}
        Path("../chats.jsonl").write_text("{}")
        raw = {
            "description": "a preset for tests",
            "models": {"tiny": {"kind": "tiny"}},
            "datasets": {"instruct": data},
        }
        raw |= {"experiments": {"rank": [block]}, "margins": {"loss": 0.02, "reward": 0.1, "lr_factor": 1.6}}
        Path("mine.yaml").write_text(yaml.safe_dump(raw | {"execution": {"gflops": 20.0}}))
        layout = Layout.of("mine.yaml")
        plan = make_plan(layout.preset)
        for job in plan.jobs:
            rows = []
            for sweep in job.sweeps:
                finished_losses(sweep, lambda run: write_run(layout, run))
                rows.append(end_sweep(plan, sweep, layout, lambda line: None))
            write_table(pa.concat_tables(rows), layout.job(job))
        make_all(layout)
        yield folder


@pytest.fixture
def results(made, tmp_path, monkeypatch) -> Path:
    """Enter a copy of the folder, which a test may edit; return the folder of the preset's results."""
    shutil.copytree(made, tmp_path / "copy")
    shutil.copy(made.parent / "chats.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path / "copy")
    return Path("results/mine")


def verified(*arguments: object) -> tuple[int, list[str]]:
    result = CliRunner().invoke(app, ["verify", *map(str, arguments)])
    return result.exit_code, result.stdout.splitlines()


def edit(path: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Change a table as a user would, who knows of no checksum."""
    table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    changed = change(table)
    changed.to_parquet(path) if path.suffix == ".parquet" else changed.to_csv(path, index=False)


def put(row: int, column: str, value: object) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(table: pd.DataFrame) -> pd.DataFrame:
        table.loc[row, column] = value
        return table

    return change


def flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 3] ^= 1
    path.write_bytes(whole)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def different(lines: list[str]) -> set[str]:
    """Return the files that lines name as different."""
    told = ("agree", "are whole", "agrees", "as they are", "on", "makes it", "differs")
    return {line.partition(": ")[0] for line in lines if not line.endswith(told)}


def test_what_nobody_edited_agrees(results):
    status, lines = verified(results)
    assert (status, different(lines)) == (0, set())
    assert lines[0] == "results/mine/runs: 15 run folders are whole"
    assert "results/mine/tables/rank/test_losses.parquet: 120 rows agree" in lines
    assert [line for line in lines if line.endswith("tags and texts agree")]


def test_every_edit_is_named_and_nothing_else(results):
    layout = Layout.of("mine.yaml")
    runs = pd.read_parquet(TABLES / "runs.parquet")
    claims, page_file = pd.read_parquet(TABLES / "claims.parquet"), layout.report
    edit(TABLES / "runs.parquet", put(3, "final_test_nll", 1.25))
    edit(TABLES / "runs.csv", put(4, "final_test_nll", 1.5))
    edit(TABLES / "rank/test_losses.parquet", put(9, "loss", 7.0))
    edit(TABLES / "claims.parquet", put(5, "verdict", "confirmed!"))
    edit(TABLES / "claims.csv", put(6, "verdict", "contradicted!"))
    edit(TABLES / "rank/runs.csv", lambda table: table.assign(model="large"))
    edit(TABLES / "counts.csv", lambda table: table.drop(index=2))
    edit(FIGURE, put(2, "lr", 0.125))
    flip(TABLES / "curves.parquet")
    replace(FIGURE.with_suffix(".svg"), "#404040", "#404041")
    replace(page_file, "15 (15 expected): 15 done", "15 (15 expected): 14 done")
    (TABLES / "rank/curves.csv").unlink()
    status, lines = verified(results)
    expected = {
        f"{TABLES}/runs.parquet": f"run_id {runs.loc[3, 'run_id']}: final_test_nll is 1.25, recomputed ",
        f"{TABLES}/runs.csv": f"run_id {runs.loc[4, 'run_id']}: final_test_nll is 1.5, recomputed ",
        f"{TABLES}/rank/test_losses.parquet": f"run_id {runs.loc[1, 'run_id']}, example 1: loss is 7.0, recomputed ",
        f"{TABLES}/claims.parquet": f"claim_id {claims.loc[5, 'claim_id']}: verdict is confirmed!, recomputed ",
        f"{TABLES}/claims.csv": f"claim_id {claims.loc[6, 'claim_id']}: verdict is contradicted!, recomputed ",
        f"{TABLES}/rank/runs.csv": "every row: model is large, recomputed tiny",
        f"{TABLES}/counts.csv": "architecture llama-3.1-8b, placement all, part all, rank 256, ",
        f"{FIGURE}": "row 3: lr is 0.125, recomputed ",
        f"{FIGURE.with_suffix('.svg')}": "it is not the picture that ",
        f"{page_file}": "at #runs: '15 (15 expected): 14 done, ",
        f"{TABLES}/rank/curves.csv": "it is missing",
    }
    assert status == 1
    assert different(lines) == {*expected, f"{TABLES}/curves.parquet"}
    assert any(f"{TABLES}/curves.parquet is damaged" in line for line in lines)
    for name, start in expected.items():
        [line] = [line for line in lines if line.startswith(f"{name}: ")]
        assert line.startswith(f"{name}: {start}")


def test_damaged_and_deleted_runs_are_named(results):
    layout, runs = Layout.of("mine.yaml"), pd.read_parquet(TABLES / "runs.parquet")
    damaged, other, deleted = (RunFolder(layout.runs, run_id) for run_id in runs["run_id"][:3])
    replace(damaged.record, '"status": "done"', '"status": "diverged"')
    flip(other.curves)
    shutil.rmtree(deleted.final)
    name, _, named = next(verify.verify(results, None, lambda step: None))
    assert name == f"{layout.runs}"
    starts = [f"run {run.run_id} is damaged" for run in (damaged, other)] + [f"run {deleted.run_id} of "]
    assert len(named) == len(starts)
    assert all(any(line.startswith(start) for line in named) for start in starts)
    assert all(f"{layout.jobs}" in line for line in named)


def test_tables_name_the_records_of_their_runs(results):
    layout, runs = Layout.of("mine.yaml"), pd.read_parquet(TABLES / "runs.parquet")["run_id"]
    named = {named_in(TABLES / f"{name}.parquet") for name in ("runs", "curves", "test_losses")}
    assert named == {of_runs(layout.runs, runs)}
    replace(RunFolder(layout.runs, runs[0]).record, '"done"', '"diverged"')
    assert named != {of_runs(layout.runs, runs)}


def test_what_was_made_of_an_edited_table_names_it(results, monkeypatch):
    """Claims, figures and page that were made after the edit agree with each other."""
    layout, whole = Layout.of("mine.yaml"), collect.collect

    def edited(jobs, out, plan, layout):
        whole(jobs, out, plan, layout)
        edit(out / "runs.parquet", put(0, "final_test_nll", 2.0))

    with monkeypatch.context() as patched:
        patched.setattr(collect, "collect", edited)
        make_all(layout)
    shown = layout.report.read_text()
    assert f"drawn from the tables <code>{named_in(FIGURE.with_suffix('.svg'))[:12]}</code>" in shown
    lines = verified(results)[1]
    for name in (TABLES / "claims.parquet", FIGURE.with_suffix(".svg")):
        now = named_in(name)[:12]
        assert [line for line in lines if line.startswith(f"{name}: it was made from {now}, recomputed ")]
    assert f"{layout.report}" in different(lines)


def test_tables_without_run_folders_are_verified_from_the_tables_on(results):
    shutil.rmtree(results / "runs")
    edit(TABLES / "runs.csv", put(4, "final_test_nll", 1.5))
    status, lines = verified(results)
    assert "all is verified from the collected tables on" in lines[0]
    assert (status, different(lines)) == (1, {f"{TABLES}/runs.csv"})
    merged = results.parent / "merged"
    shutil.copytree(TABLES, merged)
    save_figure(NAME, [merged], merged)
    edit(merged / "claims.csv", put(6, "verdict", "contradicted!"))
    status, lines = verified(merged, "--preset", "mine.yaml")
    assert "all is verified from the collected tables on" in lines[0]
    assert (status, different(lines)) == (1, {"runs.csv", "claims.csv"})
    assert "fig2_lr_by_rank.svg: the picture agrees" in lines
    (merged / "runs.parquet").unlink()
    (merged / "runs.csv").unlink()
    assert verified(merged)[0] == 2
    assert verified(results, "--preset", "smoke")[0] == 2
