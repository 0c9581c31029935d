"""The noise of made-up sweeps: how large each source of it is, and how it is measured from a finished sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.calibration.made import MadeRl
from benchmarks.calibration.seeds import SeedNoise
from lorabench.analysis.arms import arm_label, each_arm
from lorabench.analysis.comparison import Comparison, comparisons
from lorabench.analysis.estimate import ExampleLosses
from lorabench.analysis.memorisation import is_memorisation
from lorabench.claims.reinforcement import rewarded_errors
from lorabench.config.margins import DEFAULT_MARGINS
from lorabench.store.checks import is_rl
from lorabench.store.tables import Tables

_SEEDS, _RL_SEEDS = SeedNoise(), SeedNoise(common=0.015, walk=0.04, arm=0.008, fullft=0.013, run=0.012)


@dataclass(frozen=True)
class NoiseLevels:
    """The noise of a sweep. Losses are in nats per token; SD is a standard deviation.

    The defaults are those of the preset `laptop` on its worked solutions, as the option --measure of
    `python -m benchmarks.calibration` measures them. What it does not measure, of RL, is chosen.
    """

    curvature: float = 0.053
    """The rise of the loss around its optimum, per squared unit of ln LR."""
    asymmetry: float = 0.2
    """The rate per ln LR by which the curvature grows towards high LRs; it is not measured."""
    seeds: SeedNoise = _SEEDS
    """What seeds do to the loss."""
    example_common: float = 0.123
    """SD over test examples of their difficulty for all arms alike."""
    example_arm: float = 0.0073
    """SD over test examples of their difficulty for one arm."""
    example_run: float = 0.051
    """SD over test examples of what is left for a single run."""
    batch: float = 0.044
    """SD over steps of the training loss, the same in all runs with one seed, which see the same batches."""
    step: float = 0.018
    """SD over steps of the training loss that is left for a single run."""
    gain: float = 0.61
    """The fall of the loss from the base to full fine-tuning."""
    loss: float = 0.18
    """The loss of full fine-tuning."""
    rl_curvature: float = 0.11
    """The rise of the error rate of reinforcement learning (RL), per squared unit of ln LR."""
    rl_seeds: SeedNoise = _RL_SEEDS
    """What seeds do to the error rate."""
    rl_problem_common: float = 0.8
    """The share of a test problem's difficulty, as a variance, that all arms have in common."""
    rl_problem_arm: float = 0.05
    """The share that is of one arm; the rest is of a single run."""
    rl_batch: float = 0.03
    """SD over steps of the training reward, the same in all runs with one seed."""
    rl_step: float = 0.03
    """SD over steps of the training reward that is left for a single run."""
    rl_base: float = 0.28
    """The accuracy of the base."""
    rl_tuned: float = 0.59
    """The accuracy of full fine-tuning."""

    @property
    def margin(self) -> float:
        """The margin of losses that the default preset gives, in nats per token."""
        return DEFAULT_MARGINS.loss * self.gain

    @property
    def rl_margin(self) -> float:
        """The margin of error rates that the default preset gives."""
        return DEFAULT_MARGINS.reward


_MEDIANS = ("curvature", "gain", "loss", "share", "growth")


def measure_noise(tables: Tables, datasets: Sequence[str] = ()) -> NoiseLevels:
    """Measure the noise of the runs of FullFT and of LoRA, without those on random facts.

    Standard deviations are pooled over comparisons of arms (over pairs of arms for the steps); the shape of the
    loss and its level are medians. A number that the tables can't give keeps its default.

    Args:
        tables: the tables `runs`, `curves` and `test_losses`.
        datasets: the datasets of supervised runs; by default all.
    """
    runs = tables.runs[~is_rl(tables.runs) & tables.runs["status"].eq("done").fillna(False)]
    runs = runs[~is_memorisation(runs).astype(bool)]
    runs = runs[runs["dataset"].isin(datasets)] if datasets else runs
    examples = ExampleLosses.of(tables.test_losses)
    parts: dict[str, list[float]] = {}
    for comparison in comparisons(runs, tables.curves):
        if comparison.fullft is None or not comparison.lora:
            continue
        fit, gain = comparison.fit, comparison.margin.value / comparison.judging.margins.loss
        measured = {"gain": gain, "loss": fit.lowest.get("FullFT", (math.nan, math.nan))[1], **fit.sizes}
        curvature = float(np.median([*fit.curvature.values()] or [math.nan]))
        measured |= {"curvature": curvature, **_examples(comparison, examples)}
        if "run" in measured and "n_examples" in measured:
            # Runs differ in what single test examples do to them, too.
            example_variance = measured["example_run"] ** 2 / measured.pop("n_examples")
            measured["run"] = math.sqrt(max(measured["run"] ** 2 - example_variance, 0.0))
        for name, value in measured.items():
            parts.setdefault(name, []).append(value)
        for name, values in _steps(comparison).items():
            parts.setdefault(name, []).extend(values)
    measured_noise = {
        name: float(np.nanmedian(values)) if name in _MEDIANS else math.sqrt(float(np.nanmean(np.square(values))))
        for name, values in parts.items()
        if np.isfinite(values).any()
    }
    return NoiseLevels(seeds=_popped(measured_noise, _SEEDS), **measured_noise, **_rl(tables))


def _popped(measured: dict[str, Any], default: SeedNoise) -> SeedNoise:
    """Remove the sizes of what seeds do from measured numbers, and return them."""
    measured.pop("curvatures", None)
    return replace(default, **{name: measured.pop(name) for name in asdict(default) if name in measured})


def _examples(comparison: Comparison, examples: ExampleLosses) -> dict[str, float]:
    """Measure the parts of the spread over test examples, from the covariances of runs that differ in their seed."""
    repeated: dict[str, str] = {}
    for arm in comparison.arms:
        arm_runs = comparison.rows[arm_label(arm)]
        several = arm_runs[arm_runs.groupby("lr")["seed"].transform("nunique") >= 3]
        repeated |= {run_id: arm_label(arm) for run_id in several["run_id"] if run_id in examples.nats}
    near, of = list(repeated), np.array(list(repeated.values()))
    if len(near) < 4:
        return {}
    losses = np.array([examples.nats[run_id] / np.maximum(examples.tokens[run_id], 1) for run_id in near])
    covariance = np.cov(losses)
    same = of[:, None] == of[None, :]
    itself = np.eye(len(near), dtype=bool)
    if not (same & ~itself).any() or same.all():
        return {}
    common, arm_too, total = (float(covariance[which].mean()) for which in (~same, same & ~itself, itself))
    return {
        "example_common": math.sqrt(max(common, 0.0)),
        "example_arm": math.sqrt(max(arm_too - common, 0.0)),
        "example_run": math.sqrt(max(total - arm_too, 0.0)),
        "n_examples": losses.shape[1],
    }


def _steps(comparison: Comparison) -> dict[str, Sequence[float]]:
    """Measure the noise of training losses by step, from runs of one seed and of several."""
    chosen = (comparison.curves["split"] == "train") & (comparison.curves["metric"] == "nll")
    wide = comparison.curves[chosen].pivot(index="step", columns="run_id", values="value").astype(float)
    single, batches = [], []
    by_seed: dict[int, list[np.ndarray]] = {}
    for arm, _ in each_arm(comparison.runs):
        for row in comparison.at_optimum(arm).itertuples():
            if row.run_id in wide:
                by_seed.setdefault(int(str(row.seed)), []).append(wide[row.run_id].dropna().to_numpy(float))
    for curves in by_seed.values():
        batches += [float(np.diff(curve[len(curve) // 2 :]).std(ddof=1)) / math.sqrt(2) for curve in curves[:1]]
        for other in curves[1:]:
            if len(other) == len(curves[0]) > 8:
                # Neighbouring steps share the trend; a difference of two runs has the variance of both.
                single.append(float(np.diff((other - curves[0])[len(other) // 2 :]).std(ddof=1)) / 2)
    return {"batch": batches, "step": single}


def _rl(tables: Tables) -> dict[str, Any]:
    """Measure the shape and the noise of error rates in RL; the shares of a problem's difficulty are not measured."""
    runs = tables.runs[is_rl(tables.runs)]
    if runs.empty:
        return {}
    parts: list[dict[str, float]] = []
    for comparison in comparisons(rewarded_errors(runs), tables.curves):
        minimum = comparison.fit.minima.get("FullFT")
        if minimum is None or not comparison.fit.sigma > 0:
            continue
        levels = NoiseLevels()
        run_share = 1 - levels.rl_problem_common - levels.rl_problem_arm
        problem_variance = run_share * minimum.value * (1 - minimum.value) / MadeRl.test_examples
        sizes = dict(comparison.fit.sizes)
        sizes["run"] = math.sqrt(max(sizes["run"] ** 2 - problem_variance, 0.0))
        curvature = float(np.median(list(comparison.fit.curvature.values())))
        base = float(comparison.runs["base_reward"].astype(float).mean())
        measured = {"rl_curvature": curvature, "rl_base": base, "rl_tuned": 1 - minimum.value}
        parts.append(measured | sizes)
    medians = {str(name): value for name, value in pd.DataFrame(parts, dtype=float).median().dropna().items()}
    return {"rl_seeds": _popped(medians, _RL_SEEDS), **medians}
