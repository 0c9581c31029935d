"""The conditions in which the ratio of optimal learning rates is measured, beside what theories predict of it.

The ratio of a condition is measured by runs of its length (`own`, test losses at the end), and by the first steps of
longer runs (`prefix`, validation losses at that step). With a constant LR and the same order of the data both train the
same steps, so they differ only in the split that is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd

from lorabench.analysis.arms import ALPHA, arm_label
from lorabench.analysis.comparison import Comparison, Judging, comparisons
from lorabench.analysis.curves import at_step
from lorabench.analysis.estimate import Estimate, ExampleLosses, combined
from lorabench.analysis.finding import Finding, decide
from lorabench.analysis.lr_law import METHODS, SweptMethods
from lorabench.analysis.optima import as_ratio, in_words, mean_lr, ratio_interval
from lorabench.analysis.rules import Within
from studies.lr_ratio.predictions import Predictions
from studies.lr_ratio.theories import LogRatio, Setting, predicted

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
"""The columns of `prediction_table`."""


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


def measured_ratios(runs: pd.DataFrame, curves: pd.DataFrame, judging: Judging) -> list[MeasuredRatio]:
    """Return the conditions that some supervised runs with hidden_size measure: own runs first, then prefixes.

    Alpha and A's initial scale may be any, and A may be trained like B or be frozen (see FROZEN); LoRA+ and LoRA on
    some layers only are left out.
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


def stated_predictions(judging: Judging) -> Predictions:
    """Return the predictions by which claims are judged."""
    return Predictions.model_validate(judging.predictions.get("lr_ratio", {}))


def prediction_table(ratios: Sequence[MeasuredRatio], predictions: Predictions) -> pd.DataFrame:
    """Return one row per condition and theory that speaks of it (COLUMNS); `off_by` is the measured over the predicted
    ratio, and the verdict is that of the condition."""
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
        Columns theory, conditions (the number of measured ones), rms_factor (the root mean square of ln(measured /
        predicted) as a factor), bias (their mean as a factor), worst (the factor of the worst condition), beyond (the
        number of conditions whose 95% interval leaves out all factors up to 1.6).
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
