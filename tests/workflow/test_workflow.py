"""The DAG: what a target needs, the smoke preset end to end, and errors before anything is computed."""

import re
from itertools import accumulate

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from lorabench.analysis.arms import ARM
from lorabench.claims.judge import CLAIMS
from lorabench.config.execution import EVAL_SOURCES
from lorabench.figures.catalog import figures_of_preset
from lorabench.models.base import converted_folder
from lorabench.planning.plan import make_plan
from lorabench.store.layout import Layout
from lorabench.utils.files import SNAKEFILE

from ..conftest import REPOSITORY
from .checkout import fresh_clone, git, shell, snakemake

HERE = "--snakefile", str(SNAKEFILE)
"""The workflow in another folder, without a clone."""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return fresh_clone(tmp_path_factory.mktemp("checkout"))


def planned_jobs(output: str) -> dict[str, int]:
    return {rule: int(count) for rule, count in re.findall(r"^(\w+)\s+(\d+)$", output, re.MULTILINE) if rule != "total"}


@pytest.mark.slow
def test_the_main_job_is_the_laptop_preset_whose_data_and_longest_jobs_come_first(tmp_path):
    output = snakemake(tmp_path, *HERE, "--dry-run")
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
    assert jobs == {"dataset": 1, "tokens": 1, "train": needed, "experiment_tables": 1, "figure": 1}
    # A figure of several experiments reads the tables of those that the preset has.
    target = "paper_figures/core/fig6_rl_lr.svg"
    output = snakemake(checkout, target, "--dry-run", "--printshellcmds", "--config", "preset=core")
    assert re.findall(r"--tables=(\S+)", output) == [f"results/core/tables/{name}" for name in ("rl_gsm8k", "rl_math")]
    assert planned_jobs(output)["experiment_tables"] == 2


def test_a_wrong_preset_is_one_sentence_before_anything_is_computed(tmp_path, raw_preset):
    raw_preset["experiments"]["rank"][0]["ranks"] = {"all": [0]}
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(raw_preset))
    output = snakemake(tmp_path, *HERE, "--config", "preset=wrong.yaml", fails=True)
    assert "wrong.yaml: experiments.rank.0.ranks.all.0 = 0: input should be greater than or equal to 1" in output
    assert "Traceback" not in output
    assert not (tmp_path / "results/wrong").exists()


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


@pytest.mark.slow
def test_rules_of_the_module_write_into_the_folder_and_a_prefix_is_refused(tmp_path):
    """A workflow in another folder uses this one as a module, as config/README.md says."""
    [snakefile] = re.findall(r"```python\n(.*?)```", (REPOSITORY / "config/README.md").read_text(), re.DOTALL)
    snakefile = snakefile.replace("path/to/lorabench", str(REPOSITORY))
    (tmp_path / "Snakefile").write_text(snakefile)
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.yaml").write_text("preset: smoke\n")
    snakemake(tmp_path, "results/smoke/plan.parquet")
    assert (tmp_path / "results/smoke/plan.parquet").is_file()
    (tmp_path / "Snakefile").write_text(snakefile.replace("config: config", 'config: config\n    prefix: "other"'))
    output = snakemake(tmp_path, "--dry-run", fails=True)
    assert "module prefix: 'other/results/smoke/report/index.html' is expected" in output
    assert "Traceback" not in output


# A command in place of lorabench, which says when a job starts and ends.
JOB = """#!/bin/bash
echo start >>log
sleep 0.5
echo end >>log
mkdir -p results/smollm2/jobs && touch results/smollm2/jobs/$3.parquet
"""


@pytest.mark.slow
def test_without_a_scheduler_no_more_jobs_run_at_once_than_there_are_gpus(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "bin").mkdir()
    for name, text in (("lorabench", JOB), ("nvidia-smi", "#!/bin/sh\nprintf '0\\n1\\n'\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    # Four training jobs of one GPU each, whose data and bases are there.
    layout = Layout.of("smollm2")
    jobs = [job for job in make_plan(layout.preset).jobs if job.sweeps[0].condition.task == "sft"][:4]
    for condition in (job.sweeps[0].condition for job in jobs):
        base = converted_folder(layout.preset.models[condition.model]) / "model.safetensors"
        for path in (layout.tokens(condition.model, condition.dataset), base):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch()
    options = (*HERE, "--cores", "32", "--allowed-rules", "train", "--config", "preset=smollm2")
    snakemake(tmp_path, *(str(layout.job(job)) for job in jobs), *options, commands=f"{tmp_path}/bin")
    words = (tmp_path / "log").read_text().split()
    assert words.count("start") == len(jobs)
    assert max(accumulate(1 if word == "start" else -1 for word in words)) == 2
    # One that needs more GPUs than there are would wait forever.
    refused = snakemake(
        tmp_path, *HERE, "--dry-run", "--config", "preset=paper", fails=True, commands=f"{tmp_path}/bin"
    )
    assert "GPUs, and this machine shows 2; lower execution.max_gpus" in refused
