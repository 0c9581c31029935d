"""A job of two processes on two GPUs that meets its time limit, and then a signal before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorabench.planning.costs import job_cost
from lorabench.planning.plan import make_plan
from lorabench.store.layout import Layout

from ..workflow.checkout import adapt_profile, snakemake
from .cluster import adapted_clone, job_tries, saved_step, until, workflow

pytestmark = pytest.mark.slurm

PRESETS = [Path(__file__).parent / name for name in ("cluster.yaml", "limited.yaml")]


def test_a_job_goes_on_after_its_time_limit_and_after_a_signal(cluster, tmp_path):
    checkout = adapted_clone(tmp_path, *PRESETS)
    adapt_profile(checkout, "# max_runtime: 1440", "max_runtime: 1")
    # This site takes GPUs as gres only. Its own signal, which changes nothing, keeps the one before the limit away.
    adapt_profile(checkout, "gpu_option: gpu", "gpu_option: gres")
    adapt_profile(checkout, "# slurm_extra: \"'--exclude=node7'\"", "slurm_extra: \"'--signal=CONT@1'\"")
    layout = Layout.of(str(checkout / "limited.yaml"))
    plan = make_plan(layout.preset)
    job = next(job for job in plan.jobs if job.sweeps[0].condition.task == "sft")
    condition = job.sweeps[0].condition
    snakemake(
        checkout, str(layout.tokens(condition.model, condition.dataset)), "--config", f"preset={layout.name}.yaml"
    )
    runs, log = checkout / layout.runs, checkout / layout.root / "logs" / f"{job.job_id}.log"

    def checkpoint() -> tuple[int, int]:
        """Return the number of parts of the only checkpoint, and its step; zeros if there is none."""
        files = list(runs.glob("*.partial/checkpoint.*safetensors"))
        whole = [path for path in files if path.name == "checkpoint.safetensors"]
        return (len(files), saved_step(whole[0])) if whole else (0, 0)

    def tries() -> list[dict[str, str]]:
        return job_tries(cluster.jobs(), job)

    two = ["--set-resources", "train:gres=gpu:2", "train:processes=2"]
    before = len(tries())
    with workflow(cluster, checkout, str(layout.job(job)), *two, preset="limited.yaml"):
        until(lambda: len(tries()) > before and tries()[before]["JobState"] == "TIMEOUT", "a time limit", 150)
        parts, first = checkpoint()
        assert parts == 2
        assert first > 0
        # The second try waits for Snakemake to ask for the state of the first one.
        until(lambda: log.exists() and f"goes on after step {first}" in log.read_text(), "a second try", 120)
        second = tries()[before + 1]
        # As `--signal=TERM@SECONDS` does, this signals all processes of the job's steps and not the batch script.
        cluster("scancel", "--signal=TERM", second["JobId"])
        until(lambda: tries()[before + 1]["JobState"] == "FAILED", "the end of the second try", 60)
        parts, step = checkpoint()
        assert parts == 2
        assert step > first
    cluster("scancel", "--user=root")
    needed = job_cost(plan, job)
    for submitted in tries()[before:]:
        assert submitted["TresPerNode"] == "gres/gpu:2"
        assert "TresPerJob" not in submitted
        assert f"mem={needed.mem_mb}M" in submitted["ReqTRES"]
        assert submitted["TimeLimit"] == "00:01:00"
    # Only the first try meets the limit, and no try started its work a second time within its job.
    assert [submitted["JobState"] for submitted in tries()[before : before + 2]] == ["TIMEOUT", "FAILED"]
    texts = [path.read_text() for path in (checkout / "slurm_logs").rglob("*.log")]
    assert texts
    assert not any("Trying to restart" in text for text in texts)
