"""The DAG: what a target needs, the smoke preset end to end, and errors before anything is computed."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from lorabench.analysis.arms import ARM
from lorabench.claims.judge import CLAIMS
from lorabench.config.execution import EVAL_SOURCES
from lorabench.figures.catalog import figures_of_preset
from lorabench.planning.plan import make_plan
from lorabench.store.layout import Layout

from ..conftest import REPOSITORY
from .checkout import fresh_clone, git, shell, snakemake, started

FAILURES = REPOSITORY / "docs/failures.md"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return fresh_clone(tmp_path_factory.mktemp("checkout"))


def planned_jobs(output: str) -> dict[str, int]:
    return {rule: int(count) for rule, count in re.findall(r"^(\w+)\s+(\d+)$", output, re.MULTILINE) if rule != "total"}


def test_the_main_job_is_the_laptop_preset_whose_data_and_longest_jobs_come_first(checkout):
    output = snakemake(checkout, "--dry-run")
    jobs, plan = planned_jobs(output), make_plan(Layout.of("laptop").preset)
    assert jobs["train"] == len(plan.jobs) < len(plan.sweeps)
    blocks = re.findall(r"^(?:local)?rule (\w+):\n((?: .*\n)+)", output, re.MULTILINE)
    given = [(rule, int(re.search(r"priority: (\d+)|$", said)[1] or 0), said) for rule, said in blocks]
    training = {
        re.search(r"jobs/(\S+)\.parquet", said)[1]: priority for rule, priority, said in given if rule == "train"
    }
    assert sorted(training, key=training.get, reverse=True) == [job.job_id for job in plan.jobs]
    read, first = {"dataset", "tokens", "pretraining", "eval_tasks"}, max(training.values()) + 1
    assert {(rule, priority) for rule, priority, _ in given if rule in read} == {(rule, first) for rule in read}
    assert {priority for rule, priority, _ in given if rule not in {*read, "train"}} == {0}
    assert min(training.values()) > 0


@pytest.mark.slow
def test_a_figure_is_a_target_that_trains_only_what_it_needs(checkout):
    target = "paper_figures/laptop/fig2_lr_by_rank.svg"
    jobs = planned_jobs(snakemake(checkout, target, "--dry-run", "--quiet", "rules"))
    needed = len(make_plan(Layout.of("laptop").preset).jobs_of("rank"))
    assert jobs == {"dataset": 2, "tokens": 2, "train": needed, "experiment_tables": 1, "figure": 1}
    # A figure of several experiments reads the tables of those that the preset has.
    target = "paper_figures/core/fig6_rl_lr.svg"
    output = snakemake(checkout, target, "--dry-run", "--printshellcmds", "--config", "preset=core")
    assert re.findall(r"--tables=(\S+)", output) == [f"results/core/tables/{name}" for name in ("rl_gsm8k", "rl_math")]
    assert planned_jobs(output)["experiment_tables"] == 2


def test_a_wrong_preset_is_one_sentence_before_anything_is_computed(checkout):
    raw = yaml.safe_load((REPOSITORY / "workflow/presets/smoke.yaml").read_text())
    raw["experiments"]["rank"][0]["ranks"] = {"all": [0]}
    (checkout / "wrong.yaml").write_text(yaml.safe_dump(raw))
    output = snakemake(checkout, "--config", "preset=wrong.yaml", fails=True)
    assert "wrong.yaml: experiments.rank.0.ranks.all.0 = 0: input should be greater than or equal to 1" in output
    assert "Traceback" not in output
    assert not (checkout / "results/wrong").exists()


@pytest.fixture(scope="module")
def smoke(checkout):
    """The smoke preset, run whole, and what git then says of the clone."""
    before = git(checkout, "status", "--porcelain")
    snakemake(checkout, "--config", "preset=smoke")
    changes = set(git(checkout, "status", "--porcelain").splitlines()) - set(before.splitlines())
    return checkout, changes


@pytest.mark.slow
def test_smoke_runs_to_the_report(smoke):
    checkout, _ = smoke
    results = checkout / "results/smoke"
    layout = Layout.of("smoke")
    runs = pq.read_table(results / "tables/runs.parquet").to_pandas()
    plan = make_plan(layout.preset)
    assert len(runs) == sum(sweep.n_runs for sweep in plan.sweeps)
    assert set(runs.status) == {"done"}
    assert runs.run_id.is_unique
    assert {row["run_id"] for row in plan.rows() if row["run_id"]} <= set(runs.run_id)
    # The repeats are at the LR that was best on the validation split.
    for _, arm in runs.groupby(ARM, dropna=False):
        grid, repeats = arm[arm.seed == 0], arm[arm.seed > 0]
        # In RL the best LR has the highest accuracy; of equally good LRs it is the lowest.
        loss = grid.final_valid_nll.fillna(-grid.final_valid_reward)
        assert set(repeats.lr) == {grid[loss == loss.min()].lr.min()}
    page = (results / "report/index.html").read_text()
    claims = pd.read_csv(results / "tables/claims.csv")
    assert len(claims) == len(CLAIMS)
    assert all(claim in page for claim in claims.claim_id)
    assert "smoke/report/index.html" in (checkout / "results/index.html").read_text()
    for figure in figures_of_preset(layout.preset):
        for suffix in ("svg", "png", "csv"):
            assert (checkout / f"paper_figures/smoke/{figure.name}.{suffix}").stat().st_size > 0
    # The base and every condition are evaluated.
    evals = pq.read_table(results / "tables/evals.parquet").to_pandas()
    assert evals.run_id.fillna("base").nunique() == len(plan.evaluations())
    assert set(evals.task) == EVAL_SOURCES.keys()
    assert set(evals.n_samples) == {8}


@pytest.mark.slow
def test_what_a_finished_clone_says_of_itself(smoke):
    checkout, changes = smoke
    assert changes == set()
    assert "Nothing to be done" in snakemake(checkout, "--config", "preset=smoke")
    assert "36/36 runs (100%), 4/4 jobs done" in shell("lorabench status --preset smoke", checkout)
    assert "nothing differs" in shell("lorabench verify results/smoke", checkout)
    snakemake(checkout, "--config", "preset=smoke", "--report", "snakemake_report.html")
    text = (checkout / "snakemake_report.html").read_text()
    assert "fig2_lr_by_rank" in text
    assert "claims with verdicts" in text


MOMENTS = [r"(local)?rule tokens:", *[r"1 of \d+ steps"] * 9]
"""Beginnings of lines of Snakemake at which it is killed, one after the other."""


def kill_at(checkout: Path, line: str) -> None:
    """Start the smoke preset, and kill Snakemake alone as it prints a line; what it has started goes on."""
    process = started(checkout, "--config", "preset=smoke")
    while not re.search(f"^{line}", printed := (checkout / "printed").read_text(), re.MULTILINE):
        assert process.poll() is None, printed
        time.sleep(0.01)
    process.kill()
    process.wait()


@pytest.mark.slow
def test_after_kills_the_documented_commands_end_in_the_report(smoke, tmp_path):
    documented = re.search(r"```text\n(snakemake --unlock\n.*?)```", FAILURES.read_text(), re.DOTALL)
    unlock, again = (line.split()[1:] for line in documented[1].splitlines())
    checkout = fresh_clone(tmp_path / "clone")
    for number, line in enumerate(MOMENTS):
        kill_at(checkout, line)
        if not number:
            # Which of the two comes first depends on whether a step was at work.
            assert re.search("--unlock|--rerun-incomplete", snakemake(checkout, "--config", "preset=smoke", fails=True))
        snakemake(checkout, *unlock, "--config", "preset=smoke")
    snakemake(checkout, *again, "--config", "preset=smoke")
    assert (checkout / "results/smoke/report/index.html").is_file()
    for name, columns in (("test_losses", None), ("evals", ["run_id", "task", "metric", "value"])):
        killed, undisturbed = (
            pq.read_table(folder / f"results/smoke/tables/{name}.parquet", columns=columns)
            for folder in (checkout, smoke[0])
        )
        assert killed.equals(undisturbed), name


@pytest.mark.slow
def test_what_snakemake_leaves_out_is_said(smoke):
    """It leaves out what reads a file by `ancient` where the file is there and is made again."""
    checkout, _ = smoke
    report = checkout / "results/smoke/report/index.html"
    report.rename(report.with_name("away"))
    try:
        output = snakemake(checkout, "--config", "preset=smoke", "--forcerun", "eval_tasks", fails=True)
    finally:
        report.with_name("away").rename(report)
    assert "results/smoke/report/index.html is not made yet: give the same command again" in output
    assert "Traceback" not in output


BAD_TASKS = [
    {"name": "lorabench_pretraining", "about": "forgotten", "limit": 4},
    # Only lm-eval's index shows that this task does not exist.
    {"name": "gsm8", "about": "learned"},
]


@pytest.mark.slow
def test_an_evaluation_that_fails_is_reported_early_and_keeps_back_only_its_scores(checkout, raw_preset):
    [block] = raw_preset["experiments"]["rank"]
    block |= {"ranks": {"all": [1]}, "lrs": {"fullft": [1e-3], "lora": [1e-3]}, "seeds": 1}
    evaluation = {"experiments": ["rank"], "tasks": BAD_TASKS, "pretraining_documents": 4}
    (checkout / "mine.yaml").write_text(yaml.safe_dump(raw_preset | {"evaluation": evaluation}))
    output = snakemake(checkout, "--keep-going", "--config", "preset=mine.yaml", fails=True)
    assert "lorabench: evaluation task 'gsm8' is not known to lm-eval; `lm-eval ls tasks` lists" in output
    assert output.index("rule eval_tasks:") < output.index("rule train:")
    layout = Layout.of(str(checkout / "mine.yaml"))
    assert all((checkout / layout.job(job)).is_file() for job in make_plan(layout.preset).jobs)
    assert "without the scores" in (checkout / layout.report_without_evaluation).read_text()
    assert not (checkout / layout.report).exists()
