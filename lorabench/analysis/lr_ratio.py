"""The ratio R of LoRA's to full fine-tuning's optimal learning rate: theories, and the conditions that test them.

Notation: d is the width (hidden size) of the model, T the number of steps, r the rank, LR_L and LR_F the optimal LRs
of LoRA and FullFT, so that R = LR_L / LR_F. A starts uniform within plus and minus 1/sqrt(d_in) of its layer, so its
entries have the standard deviation 1/sqrt(3 d_in), and B starts at 0. Adam moves every entry of a weight by about one
LR per step, in the direction of the sign of its gradient.

**A stands still.** Let x be the input of a layer and g the gradient at its output, so that the gradient of W is g x^T.
A step of FullFT changes W by -LR_F sign(g x^T), and the loss falls by LR_F |g|_1 |x|_1, where |x|_1 is about
sqrt(2/pi) sqrt(d_in) |x|_2. The first step of LoRA changes B by -LR_L sign(g (A x)^T), and the loss falls by
(alpha/r) LR_L |g|_1 |A x|_1, where |A x|_1 is about r sqrt(2/pi) |x|_2 / sqrt(3 d_in): the r entries of A x are sums of
many terms and hence normal. Both learn equally fast if

    R = sqrt(3) d_in / alpha.

The rank cancels. Layers differ in d_in; with its mean over all weights this is R = c d / alpha, with c of about
sqrt(3) * 1.3 = 2.25 for a Llama whose MLP is 2.5 times as wide as the model.

**A moves.** Once B is not 0, Adam moves A as fast as B, by LR_L sign(B^T g x^T), which changes A x by about
LR_L M sqrt(d) |x|_2 sqrt(2/pi), where M is the net number of steps into one direction. This is as large as the initial
A x, of size |x|_2 / sqrt(3 d), at the LR u* of about 1 / (sqrt(3) d M) up to a factor near 1. LoRA's steps are then
larger by the factor 1 + LR_L / u*, so that

    R (1 + LR_L / u*) = R (1 + R LR_F / u*) = c d / alpha.

The theories `movement` and `scale` are this equation with two ways to know LR_F / u*.

A condition is a model (its width), a dataset, a number of steps, a batch size, and LoRA's rank and alpha. Its ratio is
measured by runs of that length (`own`, test losses at the end), and by the first steps of longer runs (`prefix`,
validation losses at that step). With a constant LR and the same order of the data both train the same steps, so they
differ only in the split that is measured; other seeds and other data don't enter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.special import ndtri

from lorabench.analysis.arms import ALPHA, STANDARD, arm_label
from lorabench.analysis.comparison import Arm, Comparison, Judging, comparisons
from lorabench.analysis.curves import metric_points
from lorabench.analysis.estimate import N_DRAWS, Estimate, ExampleLosses, combined, normal, unknown
from lorabench.analysis.finding import Finding, decide
from lorabench.analysis.optima import as_ratio, in_words, ratio_interval
from lorabench.analysis.rules import Within
from lorabench.config.margins import FixedLoraTheory, LrRatioPredictions, MovementTheory, ScaleTheory

WIDTH, STEPS, BATCH_SIZE = 128, 50, 8
"""The condition at which, with the paper's alpha, parameters of theories are given."""


LogRatio = Callable[[np.ndarray], np.ndarray]
"""The natural logarithm of a predicted ratio as a function of that of FullFT's optimal LR."""


@dataclass(frozen=True)
class Setting:
    """A condition whose ratio is predicted; NaN where a published source does not give it."""

    width: float
    steps: float
    batch_size: float
    alpha: float


def _larger_root(factor: np.ndarray, target: float) -> np.ndarray:
    """Return the positive R with R (1 + factor R) = target, in a form that also holds where the factor is near 0."""
    return 2 * target / (1 + np.sqrt(1 + 4 * factor * target))


def _fixed(ratio: float) -> LogRatio:
    return lambda log_fullft: np.full(np.shape(log_fullft), math.log(ratio))


def movement(theory: MovementTheory, setting: Setting) -> LogRatio:
    """Return the prediction given FullFT's optimal LR: R (1 + R LR_F / u*) = c d / alpha.

    u* = u0 (128/d) sqrt(50/T): the LR at which A's movement matters as much as its initial values falls with the width
    as derived above, and A's net movement grows as that of a random walk, M ~ sqrt(T). Where A hardly moves, R is
    c d / alpha. Where A's movement decides, R is sqrt(c u0 128 sqrt(50/T) / (alpha LR_F)): the width cancels but for
    the square root of LR_F, so the ratio is nearly the same for models of very different widths. The batch size acts
    through LR_F only. The rank does not matter.
    """
    at_unit = theory.u0 * WIDTH / setting.width * math.sqrt(STEPS / setting.steps)

    def log_ratio(log_fullft: np.ndarray) -> np.ndarray:
        ratio = _larger_root(np.exp(log_fullft) / at_unit, theory.c * setting.width / setting.alpha)
        return np.asarray(np.log(ratio))

    return log_ratio


def scale(theory: ScaleTheory, setting: Setting) -> LogRatio:
    """Return the prediction from width and alpha alone: R (1 + kappa R) = c d / alpha.

    FullFT's best LR is taken to be the one whose outputs move by a certain amount over a run. One step moves an output
    by LR_F |x|_1, where the entries of x are of size 1 after a norm, so a run moves it by about LR_F d M, and LR_F is
    proportional to 1 / (d M). So is u*, with the same M, which depends on the number of steps and on the noise of the
    gradients, that is on the batch size. In LR_F / u* = kappa all of this cancels. Hence R is a function of d / alpha:
    c d / alpha where that is small, and sqrt(c d / (kappa alpha)) where it is large, for all lengths and batch sizes.
    LoRA's own optimal LR then goes as 1 / M at small widths whatever the width, and as 1 / (M sqrt(d)) at large ones.
    """
    ratio = _larger_root(np.asarray(theory.kappa), theory.c * setting.width / setting.alpha)
    return _fixed(float(ratio))


def fixed_lora(theory: FixedLoraTheory, setting: Setting) -> LogRatio | None:
    """Return the prediction from the width alone: FullFT's optimal LR falls as a power of it, and LoRA's as another.

    Published sweeps find LoRA's optimum at about the same LR from 0.6B to 32B parameters, while FullFT's falls, so
    the ratio would be FullFT's optimum turned over: R = R_128 (d/128)^(fullft_exponent - lora_exponent). These sweeps
    do not vary alpha, length and batch size, so the theory speaks of the condition of its parameter only: alpha 32 and
    50 steps of 8 examples.
    """
    if (setting.steps, setting.batch_size, setting.alpha) != (STEPS, BATCH_SIZE, ALPHA):
        return None
    return _fixed(theory.ratio * (setting.width / WIDTH) ** (theory.fullft_exponent - theory.lora_exponent))


def predicted(predictions: LrRatioPredictions, setting: Setting) -> Mapping[str, LogRatio]:
    """Return what each theory predicts for a setting, by its name; theories that are silent on it are left out.

    The theory `constant` is the paper's number. The paper has alpha 32 throughout, so it is silent on other values. The
    theory `naive` is c d / alpha with c = 1/2: the paper's derivation, in which LoRA of full rank is made equal to
    FullFT.
    """
    constant, naive = predictions.constant, predictions.naive
    stated: dict[str, LogRatio | None] = {
        "movement": movement(predictions.movement, setting) if predictions.movement else None,
        "scale": scale(predictions.scale, setting) if predictions.scale else None,
        "fixed_lora": fixed_lora(predictions.fixed_lora, setting) if predictions.fixed_lora else None,
        "constant": _fixed(constant.ratio) if constant and setting.alpha == ALPHA else None,
        "naive": _fixed(naive.c * setting.width / setting.alpha) if naive else None,
    }
    return {name: log_ratio for name, log_ratio in stated.items() if log_ratio is not None}


def fitted(name: str, setting: Setting) -> bool:
    """Return whether parameters of a theory were fitted in a setting, which then tests nothing."""
    here = (setting.width, setting.steps, setting.batch_size) == (WIDTH, STEPS, BATCH_SIZE)
    return here and name in ("movement", "scale", "fixed_lora")


LENGTHS = (25, 50, 100, 200, 400, 800, 1600)
"""The steps at which prefixes of longer runs are judged, where the runs were validated there."""

COLUMNS = [
    *("model", "dataset", "width", "steps", "batch_size", "alpha", "rank", "runs"),
    *("fullft_lr", "lora_lr", "ratio", "ratio_low", "ratio_high", "resolved"),
    *("theory", "predicted", "off_by", "off_by_low", "off_by_high", "verdict"),
]
"""The columns of `prediction_table`; docs/tables.md describes them."""


@dataclass(frozen=True)
class MeasuredRatio:
    """A condition with the runs of LoRA and FullFT that measure its ratio."""

    comparison: Comparison
    lora: Arm
    fullft: Arm
    kind: Literal["own", "prefix"]
    setting: Setting

    @property
    def label(self) -> str:
        place, setting = f"{self.lora['model']}/{self.lora['dataset']}", self.setting
        return f"{place} {setting.steps:g} steps, batch {setting.batch_size:g}, alpha {setting.alpha:g}"

    @property
    def log_ratio(self) -> Estimate:
        """The natural logarithm of the measured ratio."""
        return self.comparison.fit.log_ratio(arm_label(self.lora), arm_label(self.fullft))

    def distance(self, theory: LogRatio) -> Estimate:
        """Return the natural logarithm of the measured over the predicted ratio.

        A prediction that depends on FullFT's optimal LR carries its error, in the same draws.
        """
        optima, labels = self.comparison.fit.optima, (arm_label(self.lora), arm_label(self.fullft))
        if any(label not in optima for label in labels):
            return unknown()
        distance = combined(lambda lora, fullft: lora - fullft - theory(fullft), *(optima[label] for label in labels))
        return replace(distance, n_seeds=self.log_ratio.n_seeds)

    def prediction(self, theory: LogRatio) -> float:
        """Return the predicted ratio; NaN if it depends on an LR that is not known."""
        optimum = self.comparison.fit.optima.get(arm_label(self.fullft))
        return float(np.exp(theory(np.asarray(math.nan if optimum is None else optimum.value))))

    def judge(self, theory: LogRatio) -> Finding:
        """Judge whether the measured ratio is the predicted one, within the margin of optimal LRs."""
        factor = self.comparison.judging.margins.lr_factor
        text = f"predicted {self.prediction(theory):.2f}, measured {in_words(self.log_ratio)}"
        if self.comparison.fit.noise_source:
            text += f"; seed noise from {self.comparison.fit.noise_source}"
        ids = self.comparison.run_ids([self.lora, self.fullft])
        problems = self.comparison.problems([self.lora, self.fullft], resolved=True)
        margin_rule = f"the predicted ratio within a factor of {factor:g}, by the preset's lr_factor"
        rule = Within.margin(math.log(factor))
        return as_ratio(decide(rule, self.distance(theory), text, ids, problems, margin_rule))


def at_step(runs: pd.DataFrame, curves: pd.DataFrame, step: int) -> pd.DataFrame:
    """Return the runs table as if training had ended at a step, for estimators that use final losses.

    With a constant LR and the same order of the data, a run's first steps are a short run. Both final losses are the
    validation NLL at that step, since the test loss is measured only after the last step. The optimal LR is picked on
    the validation split anyway; the loss at that optimum is biased low by the choice, in all arms alike.

    Args:
        runs: supervised runs, columns run_id, status, and any others; steps and diverged_at are optional.
        curves: columns run_id, step, split, metric, value.
        step: the step whose validation losses are read.

    Returns:
        The runs with steps, status, final_valid_nll and final_test_nll as of that step. A run that diverged later is
        done, and a run that had diverged by then stays diverged. A run that ended earlier, or that has no validation
        loss at that step, is left out.
    """
    points = metric_points(curves, "validation", "nll")
    at_that_step = points[points["step"] == step].drop_duplicates("run_id").set_index("run_id")["value"]
    loss = runs["run_id"].map(at_that_step.astype(float)).astype(float)
    loss = loss.where(loss.abs() < math.inf)
    diverged = (runs["status"] == "diverged") & loss.isna()
    if "diverged_at" in runs:
        diverged &= (runs["diverged_at"].isna() | (runs["diverged_at"] <= step)).astype(bool)
    kept = loss.notna() | diverged
    if "steps" in runs:
        kept &= (runs["steps"].isna() | (runs["steps"] >= step)).astype(bool)
    status = diverged[kept].map({True: "diverged", False: "done"})
    as_of = runs[kept].assign(steps=step, status=status, final_valid_nll=loss[kept], final_test_nll=loss[kept])
    return as_of.astype({"steps": "Int64"})


def at_end(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs table with the final validation NLL as both final losses, to compare with `at_step`."""
    return runs.assign(final_test_nll=runs["final_valid_nll"])


def coupled(
    short: Comparison, full: Comparison, from_short: Estimate, from_full: Estimate, name: str
) -> tuple[Estimate, Estimate]:
    """Couple the errors of two numbers, one from the losses at a step and one from those at the end of the same runs.

    A run that has luck at a step has some of it at the end too, so the errors of numbers from the two fits are
    correlated as the residuals of the runs are. That correlation is taken at the lower end of its 68% interval, since
    a large one makes the difference of the numbers look precise, times the share of runs that both fits have; and no
    lower than 0. The draws of the second number are reordered so that their ranks have this correlation; both numbers
    keep their distributions.
    """
    if not (from_short.known and from_full.known):
        return from_short, from_full
    residuals = pd.concat({"short": _residuals(short), "full": _residuals(full)}, axis=1)
    common = residuals.dropna()
    products = float((common["short"] * common["full"]).sum())
    squares = float((common["short"] ** 2).sum() * (common["full"] ** 2).sum())
    dof, correlation = min(short.fit.dof, full.fit.dof), 0.0
    if dof >= 2 and squares > 0:
        # No correlation above 0.999 is believed.
        lower = math.tanh(math.atanh(min(products / math.sqrt(squares), 0.999)) - 1 / math.sqrt(dof - 1))
        correlation = max(0.0, lower) * len(common) / len(residuals)
    order = np.argsort(from_short.seed_part, kind="stable")
    scores = np.empty(N_DRAWS)
    scores[order] = ndtri((np.arange(N_DRAWS) + 0.5) / N_DRAWS)
    scores = correlation * scores + math.sqrt(1 - correlation**2) * normal(f"coupled {name}")
    reordered = np.empty(N_DRAWS)
    reordered[np.argsort(scores, kind="stable")] = np.sort(from_full.seed_part)
    return from_short, replace(from_full, seed_part=reordered)


def _residuals(comparison: Comparison) -> pd.Series[float]:
    """Return by run_id the losses of a fit's runs minus its parabolas, without the mean of each seed."""
    fit, parts = comparison.fit, []
    for label, run_ids in fit.run_ids.items():
        arm_rows = comparison.rows[label].set_index("run_id").loc[list(run_ids)]
        distance = np.log(arm_rows["lr"].astype(float)) - fit.optima[label].value
        fitted = fit.minima[label].value + fit.curvature[label] * distance**2
        parts.append(arm_rows[["seed"]].assign(residual=arm_rows["final_test_nll"].astype(float) - fitted))
    rows = pd.concat(parts)
    residuals: pd.Series[float] = rows["residual"] - rows.groupby("seed")["residual"].transform("mean")
    return residuals


def measured_ratios(runs: pd.DataFrame, curves: pd.DataFrame, judging: Judging) -> list[MeasuredRatio]:
    """Return the conditions that some runs measure: own runs first, then prefixes.

    The runs are supervised, with the columns of `comparisons` and hidden_size. LoRA with another parametrization than
    alpha's, or on some layers only, is left out.
    """
    lora, usual = runs["method"] == "lora", pd.Series(True, index=runs.index)
    for name, value in (("init_a", STANDARD["init_a"]), ("lr_ratio", STANDARD["lr_ratio"]), ("placement", "all")):
        usual &= (runs[name].isna() | runs[name].eq(value)).astype(bool)
    chosen = runs[~lora | usual]
    chosen = chosen[chosen[["hidden_size", "steps", "batch_size"]].notna().all(axis=1)]
    if "alpha_convention" in chosen:
        # A source with another alpha at all ranks has no column alpha, and no theory is asked about it.
        stated = chosen["alpha_convention"].notna() & chosen["alpha_convention"].ne(f"alpha {ALPHA:g}")
        other = chosen["alpha"].isna() & lora[chosen.index] & stated
        chosen = chosen[~other.astype(bool)]
    if chosen.empty:
        return []
    ratios = [ratio for comparison in comparisons(chosen, curves, judging) for ratio in _ratios(comparison, "own")]
    # The losses by test example are those at the end.
    at_prefix = replace(judging, examples=ExampleLosses())
    for step in LENGTHS:
        # The beginnings of the longest runs of each arm and dataset, if these are longer.
        longer = chosen[chosen["steps"].astype(float) > step]
        if longer.empty:
            break
        longest = longer.groupby(["model", "dataset", "batch_size"])["steps"].transform("max")
        beginnings = at_step(longer[longer["steps"] == longest], curves, step)
        for comparison in comparisons(beginnings, curves, at_prefix):
            ratios += _ratios(comparison, "prefix")
    return ratios


def _ratios(comparison: Comparison, kind: Literal["own", "prefix"]) -> list[MeasuredRatio]:
    fullft = comparison.fullft
    if fullft is None or fullft["steps"] is None:
        return []
    size = float(comparison.runs["hidden_size"].astype(float).median()), fullft["steps"], fullft["batch_size"]
    return [
        MeasuredRatio(comparison, arm, fullft, kind, Setting(*size, ALPHA if arm["alpha"] is None else arm["alpha"]))
        for arm in comparison.arms
        if arm["method"] == "lora"
    ]


def prediction_table(ratios: Sequence[MeasuredRatio], predictions: LrRatioPredictions) -> pd.DataFrame:
    """Return one row per condition and theory that speaks of it (columns COLUMNS).

    `off_by` is the measured over the predicted ratio. The verdict is that of the single condition, or `fitted` where
    the theory's parameters were fitted.
    """
    rows: list[dict[str, Any]] = []
    for ratio in ratios:
        optima, lora, fullft = ratio.comparison.fit.optima, ratio.lora, ratio.fullft
        lrs = [optima[arm_label(arm)].value if arm_label(arm) in optima else math.nan for arm in (fullft, lora)]
        low, high = ratio_interval(ratio.log_ratio)
        about = {name: lora[name] for name in ("model", "dataset", "steps", "batch_size", "rank")}
        about |= {"width": int(ratio.setting.width), "alpha": ratio.setting.alpha, "runs": ratio.kind}
        about |= {"fullft_lr": math.exp(lrs[0]), "lora_lr": math.exp(lrs[1])}
        about |= {"ratio": math.exp(ratio.log_ratio.value), "ratio_low": low, "ratio_high": high}
        about["resolved"] = not ratio.comparison.problems([lora, fullft], resolved=True)
        for name, theory in predicted(predictions, ratio.setting).items():
            judged = ratio.judge(theory)
            prediction = {"theory": name, "predicted": ratio.prediction(theory), "off_by": judged.estimate}
            prediction |= {"off_by_low": judged.ci_low, "off_by_high": judged.ci_high}
            verdict = "fitted" if fitted(name, ratio.setting) else judged.verdict
            rows.append(about | prediction | {"verdict": verdict})
    return pd.DataFrame(rows, columns=COLUMNS)
