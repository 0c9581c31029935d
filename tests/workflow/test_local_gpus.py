"""Without a scheduler, no more jobs run at once than there are GPUs."""

from __future__ import annotations

from itertools import accumulate

import pytest

from lorabench.models.base import converted_folder
from lorabench.planning.plan import make_plan
from lorabench.store.layout import Layout

from .checkout import fresh_clone, snakemake

pytestmark = pytest.mark.slow

# A command in place of lorabench, which says when a job starts and ends.
COMMAND = """#!/bin/bash
echo start >>log
sleep 0.5
echo end >>log
mkdir -p results/smollm2/jobs && touch results/smollm2/jobs/$3.parquet
"""


def test_jobs_wait_for_a_gpu(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    checkout = fresh_clone(tmp_path)
    (checkout / "bin").mkdir()
    for name, text in (("lorabench", COMMAND), ("nvidia-smi", "#!/bin/sh\nprintf '0\\n1\\n'\n")):
        (checkout / "bin" / name).write_text(text)
        (checkout / "bin" / name).chmod(0o755)
    # Four training jobs of one GPU each, whose data and bases are there.
    layout = Layout.of("smollm2")
    jobs = [job for job in make_plan(layout.preset).jobs if job.sweeps[0].condition.task == "sft"][:4]
    for condition in (job.sweeps[0].condition for job in jobs):
        base = converted_folder(layout.preset.models[condition.model]) / "model.safetensors"
        for path in (layout.tokens(condition.model, condition.dataset), base):
            (checkout / path).parent.mkdir(parents=True, exist_ok=True)
            (checkout / path).touch()
    options = ("--cores", "32", "--allowed-rules", "train", "--config", "preset=smollm2")
    snakemake(checkout, *(str(layout.job(job)) for job in jobs), *options, commands=f"{checkout}/bin")
    words = (checkout / "log").read_text().split()
    assert words.count("start") == len(jobs)
    assert max(accumulate(1 if word == "start" else -1 for word in words)) == 2
    # One that needs more GPUs than there are would wait forever.
    refused = snakemake(checkout, "--dry-run", "--config", "preset=paper", fails=True, commands=f"{checkout}/bin")
    assert "GPUs, and this machine shows 2; lower execution.max_gpus" in refused
