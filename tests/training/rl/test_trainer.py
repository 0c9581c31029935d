"""The job of an RL sweep as the workflow runs it: weights and tables; two processes sample and learn as one."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file
from transformers import MistralConfig

from lorabench.data.problems import make_problems, write_problems
from lorabench.errors import UserError
from lorabench.planning.plan import make_plan
from lorabench.runs import Job
from lorabench.store.layout import Layout
from lorabench.training.job import run_job
from lorabench.training.rl import trainer as rl_job
from lorabench.training.rl.loop import evaluate
from lorabench.training.rl.sampler import sample

from ..conftest import command


def prepare(raw: dict):
    """Write a preset and its problems into the working directory; return its plan and layout."""
    Path("mine.yaml").write_text(yaml.safe_dump(raw))
    layout = Layout.of("mine.yaml")
    for name, spec in layout.preset.problems.items():
        write_problems(make_problems(spec), layout.dataset(name))
    return make_plan(layout.preset), layout


@pytest.mark.slow
def test_sweeps_of_a_job_share_the_bases_scores_and_keep_the_weights_at_the_best_lr(
    tmp_path, raw_rl_preset, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    # On so fast a machine the sweeps are one job.
    raw_rl_preset["execution"]["gflops"] = 1e6
    plan, layout = prepare(raw_rl_preset)
    [whole], lines, evaluations = plan.jobs, [], []
    monkeypatch.setattr(rl_job, "evaluate", lambda *given: evaluations.append(given) or evaluate(*given))
    run_job(plan, whole, layout, lines.append)
    assert len(evaluations) == 1, "the sweeps of a job share the scores of the base"
    runs = pq.read_table(layout.job(whole)).to_pandas()
    assert len(runs) == 2 + 4
    shared = ["base_reward", "constant_reward", "rule_reward"]
    assert runs[["final_valid_reward", "final_reward", "best_reward", *shared]].notna().all(axis=None)
    assert runs[shared].nunique().max() == 1
    lora = runs[runs["method"] == "lora"]
    assert lora["train_flops"].div(lora["train_tokens"]).nunique() == 1

    at_best = lora[lora["seed"] == 1]["lr"].item()
    kept = {run_id for run_id in lora["run_id"] if (layout.runs / run_id / "weights").exists()}
    assert kept == set(lora.loc[lora["lr"] == at_best, "run_id"])


def test_a_sampler_that_computes_wrongly_ends_the_job_and_not_the_run(tmp_path, raw_rl_preset, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [block] = raw_rl_preset["experiments"]["rl_arithmetic"]
    block |= {"held_out": [], "ranks": {}, "lrs": {"fullft": [1e-4], "lora": []}, "seeds": 1}
    raw_rl_preset["execution"] |= {"checkpoint_minutes": 0}
    plan, layout = prepare(raw_rl_preset)
    job = Job(tuple(plan.sweeps))
    [run] = plan.sweeps[0].grid()

    def broken(model, tokenizer, requests, *others):
        responses = sample(model, tokenizer, requests, *others)
        # A request of training has the number of its step in its key.
        if requests[0].key is not None and requests[0].key[1] == 2:
            responses[3].logprobs[0] = np.nan
        return responses

    with monkeypatch.context() as patch:
        patch.setattr(rl_job, "sample", broken)
        with pytest.raises(UserError, match="gives token 1 of a response .* the log-probability nan, and"):
            run_job(plan, job, layout, lambda line: None)
    assert (layout.runs / f"{run.run_id}.partial/checkpoint.safetensors").is_file()
    run_job(plan, job, layout, lambda line: None)
    assert json.loads((layout.runs / run.run_id / "record.json").read_text())["outcome"]["status"] == "done"


def test_problems_beyond_a_sliding_window_are_refused(tmp_path, raw_rl_preset, monkeypatch):
    """Rows that responses share have masks without the window."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rl_job, "load_config", lambda spec: MistralConfig(sliding_window=12))
    plan, layout = prepare(raw_rl_preset)
    with pytest.raises(UserError, match="is more than the 12 tokens that the model takes"):
        run_job(plan, Job((plan.sweeps[0],)), layout, lambda line: None)


@pytest.mark.slow
def test_two_processes_sample_and_learn_as_one(tmp_path, raw_rl_preset, monkeypatch):
    raw_rl_preset["experiments"]["rl_arithmetic"][0] |= {"lrs": {"fullft": [1e-4], "lora": [1e-3]}, "seeds": 1}
    # On so fast a machine one sweep is too short for a job of its own.
    raw_rl_preset["execution"] |= {"keep_weights": "all", "checkpoint_minutes": 0.0, "gflops": 1000.0}
    rows = []
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        monkeypatch.chdir(tmp_path / str(processes))
        plan, layout = prepare(raw_rl_preset)
        [job] = plan.jobs
        if processes == 1:
            run_job(plan, job, layout, lambda line: None)
        else:
            together = command(job.job_id, "--processes", "2")
            done = subprocess.run(together, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        rows.append({row["run_id"]: row for row in pq.read_table(layout.job(job)).to_pylist()})
    expected, runs = rows
    assert runs.keys() == expected.keys()
    for run_id, run in runs.items():
        assert run["train_tokens"] == expected[run_id]["train_tokens"]
        ours, theirs = (
            {(point["step"], point["split"], point["metric"]): point["value"] for point in row["curve"]}
            for row in (run, expected[run_id])
        )
        assert ours.keys() == theirs.keys()
        for place, value in theirs.items():
            # The copy that samples must have the policy of the model that learns.
            if place[-1] == "kl":
                assert abs(ours[place]) < 1e-5, place
            elif place[-1] in ("ratio_mean", "ratio_max", "grad_norm", "entropy"):
                assert ours[place] == pytest.approx(value, rel=1e-4), place
            else:
                assert ours[place] == value, place
        file = "adapter_model" if run["method"] == "lora" else "model"
        saved = load_file(layout.runs / run_id / f"weights/{file}.safetensors")
        assert any(weight.any() for name, weight in saved.items() if "lora_A" not in name)
