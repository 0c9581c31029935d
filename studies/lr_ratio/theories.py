"""The ratio R of LoRA's to full fine-tuning's optimal learning rate: theories, and the conditions that test them.

A condition is a model (its width), a dataset, a number of steps, a batch size, and LoRA's rank, alpha, initial scale of
A, and whether A is trained. Its ratio is
measured by runs of that length (`own`, test losses at the end), and by the first steps of longer runs (`prefix`,
validation losses at that step). With a constant LR and the same order of the data both train the same steps, so they
differ only in the split that is measured. docs/lr-ratio.md derives the theories.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.special import ndtri

from lorabench.analysis.arms import ALPHA, arm_label
from lorabench.analysis.comparison import Comparison, Judging, comparisons
from lorabench.analysis.curves import metric_points
from lorabench.analysis.estimate import N_DRAWS, Estimate, ExampleLosses, combined, normal
from lorabench.analysis.finding import Finding, decide
from lorabench.analysis.lr_law import METHODS, SweptMethods
from lorabench.analysis.optima import as_ratio, in_words, ratio_interval
from lorabench.analysis.rules import Within
from lorabench.config.margins import LrRatioPredictions, MovementTheory

WIDTH, STEPS, BATCH_SIZE = 128, 50, 8
"""The condition at which, with the paper's alpha, parameters of theories are given."""


@dataclass(frozen=True)
class Setting:
    """A condition whose ratio is predicted; NaN where a published source does not give it."""

    width: float
    steps: float
    batch_size: float
    alpha: float
    init_a: float = 1.0
    """The scale of A's initial entries, in units of 1/sqrt(d_in)."""
    frozen: bool = False
    """Whether A stays at its initial values; the ratio is then that of B's optimal LR."""
    rank: float = 16
    """LoRA's rank; 16 stands for any high rank, where a published source does not give it."""
    mean_lr: float = 1.0
    """The mean LR of a run over its highest (see `mean_lr`)."""


LogRatio = Callable[[np.ndarray], np.ndarray]
"""The natural logarithm of a predicted ratio as a function of that of FullFT's optimal LR."""


def predicted(predictions: LrRatioPredictions, setting: Setting) -> dict[str, LogRatio]:
    """Return what each theory predicts for a setting, by its name; theories that are silent on it are left out.

    With width d, T steps, A's initial scale s and constants of each theory:

    - `movement`: R sqrt(s^2 + (R LR_F / u*)^2) = c d / alpha / (1 + k/r), where LR_F is FullFT's optimal LR and u* = u0
      (128/d) sqrt(50/T) the LR at which A moves by as much as its initial size at s = 1, into a direction that has
      nothing to do with it. u* falls with the width, and the net movement grows as that of a random walk; it goes by
      the mean LR of a run where the LR falls. While A is frozen, R = c d / (s alpha) / (1 + k/r) at rank r: the sizes
      of A's r products with an input differ by layer and input, most at rank 1, and the largest limit the LR.
    - `still`: R = c d / (s alpha), as if A never moved.
    - `mu_a`: c sqrt(d / alpha), the maximal-update theory of LoRA (Chen, Villar and Hayou, arXiv 2602.06204), by which
      LoRA's optimal LR goes as 1/sqrt(alpha d) and that of FullFT as 1/d. It speaks of A that is trained, and its
      initial scale does not matter.
    - `scale`: R (1 + kappa R) = c d / alpha. FullFT's best LR is the one whose outputs move by a certain amount over a
      run, so that it is proportional to u*, and the ratio depends on d / alpha alone.
    - `fixed_lora`: R_128 (d/128)^(fullft_exponent - lora_exponent). Published sweeps find LoRA's optimum at about the
      same LR from 0.6B to 32B parameters, while FullFT's falls. They do not vary alpha, length and batch size, so the
      theory speaks of the condition of its parameter only.
    - `constant`: the paper's number. The paper has alpha 32 throughout, so it is silent on other values.
    - `naive`: c d / alpha with c = 1/2, the paper's derivation, in which LoRA of full rank is made equal to FullFT.

    All but the first two are silent on a frozen A, and all but the first three on another scale of it.
    """
    movement, scale, fixed_lora = predictions.movement, predictions.scale, predictions.fixed_lora
    still, mu_a, constant, naive = predictions.still, predictions.mu_a, predictions.constant, predictions.naive
    width_over_alpha = setting.width / setting.alpha
    stated: dict[str, LogRatio] = {}
    if movement:
        target = movement.c * width_over_alpha / (1 + movement.k / setting.rank)

        def moving(log_fullft: np.ndarray) -> np.ndarray:
            factor = np.exp(log_fullft) / _unit(movement, setting)
            return np.asarray(0.5 * np.log(_positive_root(setting.init_a**2, factor**2, target**2)))

        stated["movement"] = _fixed(target / setting.init_a) if setting.frozen else moving
    if still:
        stated["still"] = _fixed(still.c * width_over_alpha / setting.init_a)
    if setting.frozen:
        return stated
    if mu_a:
        stated["mu_a"] = _fixed(mu_a.c * math.sqrt(width_over_alpha))
    if setting.init_a != 1:
        return stated
    if scale:
        ratio = _positive_root(1.0, np.asarray(scale.kappa), scale.c * width_over_alpha)
        stated["scale"] = _fixed(float(ratio))
    if fixed_lora and (setting.steps, setting.batch_size, setting.alpha) == (STEPS, BATCH_SIZE, ALPHA):
        exponent = fixed_lora.fullft_exponent - fixed_lora.lora_exponent
        stated["fixed_lora"] = _fixed(fixed_lora.ratio * (setting.width / WIDTH) ** exponent)
    if constant and setting.alpha == ALPHA:
        stated["constant"] = _fixed(constant.ratio)
    if naive:
        stated["naive"] = _fixed(naive.c * width_over_alpha)
    return stated


def converted_lr(lr: float, here: Setting, there: Setting, theory: MovementTheory, fullft_growth: float = 1.0) -> float:
    """Convert LoRA's optimal LR from one setting of a model to another by the theory `movement`.

    By it, LR sqrt(s^2 + (LR / u*)^2) alpha (1 + k/r) is c d times the optimal LR of FullFT, which does not depend on
    alpha and the rank.

    Args:
        lr: the optimal LR of LoRA at `here`.
        here: the setting that it is from, of one width with `there`.
        there: the setting to convert it to.
        theory: the constants; c does not matter.
        fullft_growth: the optimal LR of FullFT there over that here, for another length or batch size.
    """

    def size_of_a(setting: Setting, at: float) -> float:
        return math.hypot(setting.init_a, 0.0 if setting.frozen else at / _unit(theory, setting))

    def scale(setting: Setting) -> float:
        return setting.alpha * (1 + theory.k / setting.rank)

    target = lr * size_of_a(here, lr) * scale(here) * fullft_growth / scale(there)
    if there.frozen:
        return target / there.init_a
    factor = np.asarray(1 / _unit(theory, there))
    return math.sqrt(float(_positive_root(there.init_a**2, factor**2, target**2)))


def _unit(theory: MovementTheory, setting: Setting) -> float:
    """Return u*, the highest LR of LoRA at which A moves by as much as its initial size, in units of 1/sqrt(d_in)."""
    return theory.u0 * WIDTH / setting.width * math.sqrt(STEPS / setting.steps) / setting.mean_lr


def _positive_root(constant: float, factor: np.ndarray, target: float) -> np.ndarray:
    """Return the positive y with y (constant + factor y) = target, in a form that also holds where the factor is 0."""
    return np.asarray(2 * target / (constant + np.sqrt(constant**2 + 4 * factor * target)))


def _fixed(ratio: float) -> LogRatio:
    return lambda log_fullft: np.full(np.shape(log_fullft), math.log(ratio))


def mean_lr(schedule: object) -> float:
    """Return the mean LR of a run over its highest, by the name of its schedule; 1 where that says nothing.

    It is a half where the LR falls to zero on a line or a cosine.
    """
    return 0.5 if str(schedule).startswith(("linear", "cosine")) else 1.0


OFF_BY = 1.6
"""The factor by which a measured ratio may be off a predicted one."""

LENGTHS = (25, 50, 100, 200, 400, 800, 1600)
"""The steps at which prefixes of longer runs are judged, where the runs were validated there."""

FROZEN = 100.0
"""The LR of B over that of A from which A counts as frozen."""

COLUMNS = [
    *("model", "dataset", "width", "steps", "batch_size", "alpha", "init_a", "frozen", "rank", "mean_lr", "runs"),
    *("fullft_lr", "lora_lr", "ratio", "ratio_low", "ratio_high", "resolved"),
    *("theory", "predicted", "off_by", "off_by_low", "off_by_high", "verdict"),
]
"""The columns of `prediction_table`; docs/tables.md describes them."""


@dataclass(frozen=True)
class MeasuredRatio(SweptMethods):
    """A condition with the runs of LoRA and FullFT that measure its ratio."""

    kind: Literal["own", "prefix"]
    setting: Setting

    @property
    def label(self) -> str:
        place, setting = f"{self.lora['model']}/{self.lora['dataset']}", self.setting
        words = [f"{place} {setting.steps:g} steps", f"batch {setting.batch_size:g}", f"alpha {setting.alpha:g}"]
        if setting.init_a != 1:
            words.append(f"init x{setting.init_a:g}")
        if setting.frozen:
            words.append("A frozen")
        return ", ".join([*words, f"r{self.lora['rank']}"])

    def log_optimum(self, method: str) -> Estimate:
        """Return the natural logarithm of the optimal LR of a method, of LoRA with a frozen A that of B."""
        optimum = super().log_optimum(method)
        shift = math.log(self.lora["lr_ratio"]) if method == "lora" and self.setting.frozen else 0.0
        return replace(optimum, value=optimum.value + shift)

    @cached_property
    def log_ratio(self) -> Estimate:
        """The natural logarithm of LoRA's optimal LR, with a frozen A that of B, over that of FullFT."""
        ratio = self.comparison.fit.log_ratio(arm_label(self.lora), arm_label(self.fullft))
        shift = math.log(self.lora["lr_ratio"]) if self.setting.frozen else 0.0
        return replace(ratio, value=ratio.value + shift)

    def prediction(self, theory: LogRatio) -> float:
        """Return the predicted ratio; NaN if it depends on an LR that is not known."""
        return float(np.exp(theory(np.asarray(self.log_optimum("fullft").value))))

    def judge(self, theory: LogRatio) -> Finding:
        """Judge whether the measured ratio is the predicted one, within the margin of optimal LRs.

        A prediction that depends on FullFT's optimal LR carries its error, in the same draws.
        """
        optima = [self.log_optimum(method) for method in ("lora", "fullft")]
        distance = combined(lambda lora, fullft: lora - fullft - theory(fullft), *optima)
        distance = replace(distance, n_seeds=self.log_ratio.n_seeds)
        factor, noise_text = self.comparison.judging.margins.lr_factor, self.comparison.fit.noise_text
        text = f"predicted {self.prediction(theory):.2f}, measured {in_words(self.log_ratio)}{noise_text}"
        ids = self.comparison.run_ids([self.lora, self.fullft])
        margin_rule = f"the predicted ratio within a factor of {factor:g}, by the preset's lr_factor"
        return as_ratio(decide(Within.margin(math.log(factor)), distance, text, ids, self.problems, margin_rule))


def at_step(runs: pd.DataFrame, curves: pd.DataFrame, step: int) -> pd.DataFrame:
    """Return the runs table as if training had ended at a step, for estimators that use final losses.

    Both final losses are the validation NLL at that step, since the test loss is measured only after the last step. The
    optimal LR is picked on the validation split anyway; the loss at that optimum is biased low by the choice, in all
    arms alike.

    Returns:
        The supervised runs with steps, status, final_valid_nll and final_test_nll as of that step. A run that diverged
        later is done, and a run that had diverged by then stays diverged. A run that ended earlier, or that has no
        validation loss at that step, is left out.
    """
    points = metric_points(curves, "validation", "nll").set_index("run_id")
    at_that_step = points.loc[points["step"] == step, "value"].groupby(level=0).first()
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


def coupled(short: Comparison, full: Comparison, from_short: Estimate, from_full: Estimate, name: str) -> Estimate:
    """Couple the error of a number from the losses at the end to that of one from the losses at a step of these runs.

    A run that has luck at a step has some of it at the end too, so the errors of numbers from the two fits are
    correlated as the residuals of the runs are. That correlation is taken at the lower end of its 68% interval, since
    a large one makes the difference of the numbers look precise, times the share of runs that both fits have; and no
    lower than 0. The number from the end is returned with its draws reordered so that their ranks have this
    correlation; its distribution is unchanged.
    """
    if not (from_short.known and from_full.known):
        return from_full
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
    return replace(from_full, seed_part=reordered)


def _residuals(comparison: Comparison) -> pd.Series[float]:
    """Return by run_id the losses of a fit's runs minus its parabolas, without the mean of each seed."""
    fit, parts = comparison.fit, []
    for label, run_ids in fit.run_ids.items():
        arm_rows = comparison.rows[label].set_index("run_id").loc[list(run_ids)]
        optimum, minimum = fit.lowest[label]
        distance = np.log(arm_rows["lr"].astype(float)) - optimum
        fitted = minimum + fit.curvature[label] * distance**2
        parts.append(arm_rows[["seed"]].assign(residual=arm_rows["final_test_nll"].astype(float) - fitted))
    rows = pd.concat(parts)
    residuals: pd.Series[float] = rows["residual"] - rows.groupby("seed")["residual"].transform("mean")
    return residuals


def measured_ratios(runs: pd.DataFrame, curves: pd.DataFrame, judging: Judging) -> list[MeasuredRatio]:
    """Return the conditions that some runs measure: own runs first, then prefixes.

    The runs are supervised, with the columns of `comparisons` and hidden_size. Alpha and A's initial scale may be any,
    and A may be trained like B or be frozen (see FROZEN); LoRA+ and LoRA on some layers only are left out.
    """
    lora = runs["method"] == "lora"
    all_layers = runs["placement"].isna() | runs["placement"].eq("all")
    of_b = runs["lr_ratio"].fillna(1.0).astype(float)
    chosen = runs[~lora | (all_layers & ((of_b == 1) | (of_b >= FROZEN)))]
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
    mean = mean_lr(comparison.runs["schedule"].iloc[0]) if "schedule" in comparison.runs else 1.0
    if kind == "prefix" and mean < 1:
        # Where the LR falls over a run, its beginning is no shorter run.
        return []
    found = []
    for arm in comparison.arms:
        if arm["method"] == "lora":
            frozen = (arm["lr_ratio"] or 1.0) >= FROZEN
            setting = Setting(*size, arm["alpha"] or ALPHA, arm["init_a"] or 1.0, frozen, arm["rank"], mean)
            found.append(MeasuredRatio(comparison, fullft, arm, kind, setting))
    return found


def prediction_table(ratios: Sequence[MeasuredRatio], predictions: LrRatioPredictions) -> pd.DataFrame:
    """Return one row per condition and theory that speaks of it (columns COLUMNS).

    `off_by` is the measured over the predicted ratio, and the verdict that of the single condition.
    """
    rows: list[dict[str, Any]] = []
    for ratio in ratios:
        low, high = ratio_interval(ratio.log_ratio)
        about = {name: ratio.lora[name] for name in ("model", "dataset", "steps", "batch_size", "rank")}
        about |= {name: getattr(ratio.setting, name) for name in ("alpha", "init_a", "frozen", "mean_lr")}
        about |= {"width": int(ratio.setting.width), "runs": ratio.kind}
        about |= {f"{method}_lr": math.exp(ratio.log_optimum(method).value) for method in METHODS}
        about |= {"ratio": math.exp(ratio.log_ratio.value), "ratio_low": low, "ratio_high": high}
        about["resolved"] = not ratio.problems
        for name, theory in predicted(predictions, ratio.setting).items():
            judged = ratio.judge(theory)
            prediction = {"theory": name, "predicted": ratio.prediction(theory), "off_by": judged.estimate}
            prediction |= {"off_by_low": judged.ci_low, "off_by_high": judged.ci_high}
            rows.append(about | prediction | {"verdict": judged.verdict})
    return pd.DataFrame(rows, columns=COLUMNS)


def rms_factors(table: pd.DataFrame) -> pd.DataFrame:
    """Return by theory how far the measured ratios of a `prediction_table` are from the predicted ones.

    Returns:
        Columns theory, conditions (their number; a condition whose ratio is not measured is left out), rms_factor (the
        root mean square of ln(measured / predicted) as a factor), bias (their mean as a factor), worst (the factor of
        the worst condition), beyond (the number of conditions whose 95% interval leaves out all factors up to 1.6).
    """
    known = table[table["off_by"].notna()]
    rows = []
    for theory, of_theory in known.groupby("theory", sort=False):
        log_off = np.log(of_theory["off_by"].to_numpy(float))
        beyond = (of_theory["off_by_low"] > OFF_BY) | (of_theory["off_by_high"] < 1 / OFF_BY)
        row = {"theory": theory, "conditions": len(log_off), "rms_factor": math.exp(math.sqrt((log_off**2).mean()))}
        row |= {"bias": math.exp(log_off.mean()), "worst": math.exp(np.abs(log_off).max()), "beyond": int(beyond.sum())}
        rows.append(row)
    return pd.DataFrame(rows, columns=["theory", "conditions", "rms_factor", "bias", "worst", "beyond"])
