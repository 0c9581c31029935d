"""The preset `first_gpu` fits one H100 for a day, and its runs are what every core claim is judged on."""

from __future__ import annotations

import json
import math
import zlib
from functools import cache

import numpy as np
import pandas as pd

from lorabench.claims.judge import CLAIMS, judge_claims
from lorabench.config.loading import load_preset
from lorabench.planning.costs import per_experiment
from lorabench.planning.plan import make_plan
from lorabench.runs import Run, Sweep, finished_losses
from lorabench.store.tables import Tables

from ..handmade import make_run, runs_table

PRESET = load_preset("first_gpu@100")
PLAN = make_plan(PRESET)


@cache
def luck(*about: object, size: float) -> float:
    """Return a normal random number that is always the same for the same things."""
    return size * np.random.default_rng(zlib.crc32(repr(about).encode())).standard_normal()


def excess(run: Run) -> float:
    """Return how far a made-up run is above its arm's lowest loss: a parabola in log LR, and the luck of a seed."""
    condition = run.condition
    optimum = 1e-5 if condition.task == "rl" else 1e-4
    if condition.rank is not None:
        optimum *= 5 if condition.rank == 1 else 10
    noise = luck(run.seed, size=0.003) + luck(run.run_id, size=0.001)
    return 0.02 * math.log(run.lr / optimum) ** 2 + noise


def finished(sweep: Sweep) -> list[Run]:
    return [Run(sweep.condition, lr, seed) for lr, seed in finished_losses(sweep, excess)]


def row(run: Run, experiments: tuple[str, ...]) -> dict[str, object]:
    condition, loss = run.condition, 1.5 + excess(run)
    names = ("model", "dataset", "task", "method", "placement", "alpha", "batch_size", "steps", "eps")
    columns = {name: getattr(condition, name) for name in (*names, "init_a", "lr_ratio")}
    columns |= {"run_id": run.run_id, "experiments": list(experiments), "protocol": json.dumps({})}
    columns |= {"family": "qwen3", "hidden_size": 1024, "base_params": 596_049_920}
    columns["trainable_params"] = 596_049_920 if condition.rank is None else 1000 * condition.rank
    columns["data_kind"] = PRESET.sources[condition.dataset].kind
    losses = {"final_valid_nll": loss, "final_test_nll": loss}
    if condition.task == "rl":
        accuracy = 0.7 - excess(run)
        losses = dict.fromkeys(losses) | dict.fromkeys(("final_valid_reward", "final_reward", "best_reward"), accuracy)
        losses |= {"base_reward": 0.4, "constant_reward": 0.02, "rule_reward": 0.05, "final_entropy": 0.3}
    return make_run(condition.rank, run.lr, run.seed, **columns, **losses)


def curve(run: Run) -> pd.DataFrame:
    steps = np.unique(np.geomspace(1, run.condition.steps, 60).round().astype(int))
    rl, scale = run.condition.task == "rl", run.condition.steps * run.condition.batch_size
    luck_of_batch = np.array([luck(run.seed, step, size=0.01) for step in steps])
    apart = excess(run)
    if run.condition.eps < 1e-12:
        # Runs are the same if alpha, A's initial scale and the LRs of A and B agree in two numbers.
        alpha, init_a, ratio = run.condition.alpha, run.condition.init_a, run.condition.lr_ratio
        apart = luck(run.seed, f"{alpha * init_a * run.lr * ratio:.3g}", f"{init_a / run.lr:.3g}", size=0.01)
    values = 1.5 + 2 / np.sqrt(steps) + luck_of_batch + apart * (steps > 1)
    points = pd.DataFrame({"step": steps, "split": "train", "metric": "nll", "value": values})
    if rl:
        points = points.assign(metric="response_length", value=200.0)
    else:
        start = {"step": 0, "split": "validation", "metric": "nll", "value": 3.0}
        points = pd.concat([points, pd.DataFrame([start])])
    return points.assign(run_id=run.run_id, examples=points["step"] * scale, tokens=points["step"] * scale)


def test_it_takes_a_day_of_one_gpu_at_most():
    total = per_experiment(PLAN)["total"]
    assert (PRESET.execution.gpu, PRESET.execution.max_gpus) == ("H100-80GB", 1)
    assert total.gpu_hours <= 24
    assert {sweep.seeds.best for sweep in PLAN.sweeps if sweep.lattice} == {3}
    assert max(sweep.condition.steps for sweep in PLAN.sweeps if "rank" in sweep.experiments) == 1000


def test_every_core_claim_is_judged_on_its_runs():
    runs = [(run, sweep.experiments) for sweep in PLAN.sweeps for run in finished(sweep)]
    tables = Tables(
        runs_table([row(run, experiments) for run, experiments in runs]), pd.concat([curve(run) for run, _ in runs])
    )
    core = [claim for claim in CLAIMS if claim.core]
    verdicts = judge_claims(tables, core, PRESET.margins).set_index("claim_id")["verdict"]
    assert len(verdicts) == 15
    assert not verdicts.isin(["not tested", "setting not met"]).any(), verdicts
