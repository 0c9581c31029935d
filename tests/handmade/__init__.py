"""Tidy tables made by hand, without training.

This module makes rows with all columns of a run, for pages, figures and files. `sft`, `rl` and `lora` make the few
columns that an estimator or a claim reads, with answers that are known exactly: in `sft` losses and in `rl` accuracies
are parabolas in log LR, and in `lora` training curves follow the theory of the parametrization.
"""

import math
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from lorabench.config.experiments import SeedNumbers
from lorabench.config.preset import Preset
from lorabench.runs import Run
from lorabench.store.schemas import CLAIMS, CURVES, EVALS, RUNS

LRS = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
STEPS = [0, 1, 2, 3, 5, 8, 13, 22, 35, 57, 92, 150]
SIGMA = 0.012
_VERSIONS = '{"torch": "2.8.0", "peft": "0.17.1", "transformers": "5.0.0"}'


def final_loss(rank: int | None, lr: float) -> float:
    """Return a test NLL with its minimum at 3e-3 (LoRA) or 1e-3 (FullFT); low ranks are worse."""
    optimum = 1e-3 if rank is None else 3e-3
    floor = 2.55 if rank is None else 2.55 + 0.3 / rank
    return floor + 0.35 * math.log(lr / optimum) ** 2 / math.log(3.16) ** 2 * (1.6 if lr > optimum else 0.5)


def make_run(rank: int | None, lr: float, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Return one row of `runs`; keyword arguments replace columns. A diverged run loses its final losses."""
    model, dataset = changes.get("model", "tiny"), changes.get("dataset", "instruct")
    noise = SIGMA * np.random.default_rng([rank or 0, seed, round(lr * 1e6)]).standard_normal()
    loss = final_loss(rank, lr) + noise
    row: dict[str, Any] = {
        "run_id": f"{model}-{dataset}-{'fullft' if rank is None else rank}-{lr:g}-{seed}",
        "experiments": ["rank"],
        "model": "tiny",
        "dataset": "instruct",
        "task": "sft",
        "method": "fullft" if rank is None else "lora",
        "rank": rank,
        "placement": None if rank is None else "all",
        "alpha": None if rank is None else 32.0,
        "lr": lr,
        "batch_size": 16,
        "steps": STEPS[-1],
        "seed": seed,
        "status": "done",
        "final_valid_nll": loss + 0.02,
        "final_test_nll": loss,
        "trainable_params": 828_288 if rank is None else 14_000 * rank,
        "base_params": 828_288,
        "train_tokens": 240_000,
        "train_flops": 1.2e12,
        "wall_s": 41.5,
        "peak_mem_bytes": 900_000_000,
        "device": "AMD EPYC 7B13",
        "threads": 1,
        "host": "node1",
        "started": f"2026-01-02T03:{seed:02d}:00+00:00",
        "git_sha": "0123456789abcdef0123456789abcdef01234567",
        "versions": _VERSIONS,
    }
    row |= changes
    if row["status"] == "diverged":
        row |= {"final_valid_nll": None, "final_test_nll": None, "diverged_at": 20}
    return row


def make_sweep(
    rank: int | None, lrs: list[float] | None = None, seeds: int = 3, diverged_from: float = 2e-2, **changes: Any
) -> list[dict[str, Any]]:
    """Return the runs of one arm: its LR grid, diverged from `diverged_from` on, and more seeds at the best LR."""
    lrs = lrs or LRS
    grid = [make_run(rank, lr, status="diverged" if lr >= diverged_from else "done", **changes) for lr in lrs]
    best = min((lr for lr in lrs if lr < diverged_from), key=lambda lr: final_loss(rank, lr), default=None)
    repeats = [make_run(rank, best, seed, **changes) for seed in range(1, seeds)] if best else []
    return grid + repeats


def make_eval(rank: int | str | None, value: float, **changes: Any) -> dict[str, Any]:
    """Return one row of `evals`: of a run of `make_run`, or of the base model if `rank` is `base`."""
    base = rank == "base"
    run = {} if base else make_run(rank, 3e-3, **{k: v for k, v in changes.items() if k in ("model", "dataset")})
    row = {name: run.get(name) for name in EVALS.names} | {
        "model": "tiny",
        "about": "learned",
        "task": "lorabench_instruct",
        "source": "instruct",
        "metric": "exact_match",
        "filter": "strict-match",
        "value": value,
        "stderr": 0.02,
        "higher_is_better": True,
        "n_samples": 1319,
        "num_fewshot": 5,
        "sampler": "own",
        "eval_batch_size": 16,
        "task_version": "3.0",
        "versions": '{"lm_eval": "0.4.13"}',
    }
    return row | changes


def make_record(run: Run, **outcome: Any) -> dict[str, Any]:
    """Return the record of a run, with no more than what is read without asking whether it is there."""
    spec = {**asdict(run.condition), "lr": run.lr, "seed": run.seed, "protocol": {}}
    environment = {"packages": {"torch": "2.8.0"}, "model_sha256": {}}
    outcome = {"status": "done", **outcome}
    return {"run_id": run.run_id, "spec": spec, "outcome": outcome, "environment": environment}


def _table(schema: pa.Schema, rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return a table of rows, typed as by `read_table`."""
    table = pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema=schema)
    whole = {field.name: "Int64" for field in schema if pa.types.is_int64(field.type)}
    return table.to_pandas().astype(whole)


runs_table, evals_table, claims_table = (partial(_table, schema) for schema in (RUNS, EVALS, CLAIMS))


def curves_of(runs: pd.DataFrame) -> pd.DataFrame:
    """Return validation curves, which fall with log(step) from 4.2 nats to the final loss; diverged runs stop early."""
    points = runs.merge(pd.DataFrame({"step": STEPS}), how="cross", suffixes=("_of_run", ""))
    step, diverged = points["step"], points["status"].eq("diverged")
    final = points["final_valid_nll"].astype(float).mask(diverged, 5.0)
    value = 4.2 + (final - 4.2) * np.log1p(step) / math.log1p(STEPS[-1])
    points = points.assign(examples=16 * step, tokens=1600 * step, split="validation", metric="nll")
    points = points.assign(value=value.mask(diverged & (step > 20)))[CURVES.names]
    return points.astype(dict.fromkeys(("step", "examples", "tokens"), "Int64"))


def laptop_like() -> pd.DataFrame:
    """Return runs in the form of the laptop preset: one model, two datasets, FullFT and six ranks."""
    rows = []
    for dataset in ("instruct", "worked"):
        for rank in (None, 1, 2, 4, 8, 16, 64):
            rows += make_sweep(rank, dataset=dataset)
    return runs_table(rows)


def make_claim(claim_id: str, verdict: str = "confirmed", **changes: Any) -> dict[str, Any]:
    """Return one row of `claims`: an equality of losses that holds within 0.01 nats; keyword arguments replace columns.

    Without a test there is no number, and each verdict that needs it has its remark.
    """
    row: dict[str, Any] = {
        "claim_id": claim_id,
        "kind": "empirical",
        "fact": f"fact of {claim_id}",
        "statement": f"statement of {claim_id}",
        "figure": "2",
        "criterion": f"criterion of {claim_id}",
        "verdict": verdict,
        "reason": f"reason of {claim_id}",
        "paper_value": "no number",
        "unit": "nats per token",
        "n_runs": 0,
        "run_ids": [],
        "decide_around": None,
        "decide_lrs": [],
    }
    if verdict != "not tested":
        row |= {"estimate": 0.002, "ci_low": -0.004, "ci_high": 0.008, "detectable": 0.0085}
        row |= {"margin_low": -0.01, "margin_high": 0.01, "margin_rule": "2% of the gain"}
        row |= {"scope": "0.8M parameters, 50 steps, worked"}
    if verdict == "inconclusive":
        row |= {"would_decide": "6 seeds (now 3)", "decide_seeds": 6}
    if verdict == "setting not met":
        row["missing"] = "runs of 1,000 steps or more (here at most 200 steps; the preset core has them)"
    return row | changes


def with_model(preset: Preset, **changes: Any) -> Preset:
    """A GPU preset that has only the experiment `rank`, on one model."""
    experiments = preset.experiments.model_copy(update=dict.fromkeys(preset.experiments.chosen()))
    block = preset.experiments.rank[0].model_copy(update={"seeds": SeedNumbers(), **changes})
    experiments = experiments.model_copy(update={"rank": [block]})
    return preset.model_copy(update={"experiments": experiments, "evaluation": None})
