"""The conditions whose LR ratio is measured, and what theories predict of each.

A condition is a model (its width), a dataset, a number of steps, a batch size, and LoRA's rank and alpha. Its ratio is
measured by runs of that length (`own`, test losses at the end), and by the first steps of longer runs (`prefix`,
validation losses at that step). With a constant LR and the same order of the data both train the same steps, so they
differ only in the split that is measured; other seeds and other data don't enter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from lorabench.analysis.arms import STANDARD, arm_label
from lorabench.analysis.at_step import at_step
from lorabench.analysis.comparison import Arm, Comparison, Judging, comparisons
from lorabench.analysis.estimate import Estimate, combined, unknown
from lorabench.analysis.finding import Finding, decide
from lorabench.analysis.lr_ratio_theories import ALPHA, LogRatio, Setting, fitted, predicted
from lorabench.analysis.optima import as_ratio, in_words, ratio_interval
from lorabench.analysis.rules import Within
from lorabench.config.predictions import LrRatioPredictions

LENGTHS = (25, 50, 100, 200, 400, 800, 1600)
"""The steps at which prefixes of longer runs are judged, where the runs were validated there."""

Kind = Literal["own", "prefix"]

COLUMNS = [
    *("model", "dataset", "width", "steps", "batch_size", "alpha", "rank", "runs"),
    *("fullft_lr", "lora_lr", "ratio", "ratio_low", "ratio_high", "resolved"),
    *("theory", "predicted", "off_by", "off_by_low", "off_by_high", "verdict"),
]
"""The columns of `prediction_table`; docs/lr-ratio.md describes them."""


@dataclass(frozen=True)
class MeasuredRatio:
    """A condition with the runs of LoRA and FullFT that measure its ratio."""

    comparison: Comparison
    lora: Arm
    fullft: Arm
    kind: Kind
    setting: Setting

    @property
    def label(self) -> str:
        """The condition in words."""
        of_prefix = ", prefix" if self.kind == "prefix" else ""
        place, setting = f"{self.lora['model']}/{self.lora['dataset']}", self.setting
        numbers = f"{setting.steps:g} steps, batch {setting.batch_size:g}, alpha {setting.alpha:g}"
        return f"{place} {numbers}{of_prefix}"

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


def measured_ratios(runs: pd.DataFrame, curves: pd.DataFrame, judging: Judging) -> list[MeasuredRatio]:
    """Return the conditions that some runs measure: own runs first, then prefixes.

    Args:
        runs: supervised runs with the columns of `comparisons`, and hidden_size; LoRA with another parametrization
            than alpha's, or on some layers only, is left out.
        curves: columns run_id, step, split, metric, value.
        judging: margins and losses by test example.
    """
    lora = runs["method"] == "lora"
    usual = pd.Series(True, index=runs.index)
    for name in ("init_a", "lr_ratio"):
        usual &= (runs[name].isna() | runs[name].eq(STANDARD[name])).astype(bool)
    everywhere = (runs["placement"].isna() | runs["placement"].eq("all")).astype(bool)
    chosen = runs[~lora | (usual & everywhere)]
    chosen = chosen[chosen[["hidden_size", "steps", "batch_size"]].notna().all(axis=1)]
    if "alpha_convention" in chosen:
        # A source with another alpha at all ranks has no column alpha, and no theory is asked about it.
        stated = chosen["alpha_convention"].notna() & chosen["alpha_convention"].ne(f"alpha {ALPHA:g}")
        other = chosen["alpha"].isna() & lora[chosen.index] & stated
        chosen = chosen[~other.astype(bool)]
    if chosen.empty:
        return []
    own = [ratio for comparison in comparisons(chosen, curves, judging) for ratio in _of(comparison, "own")]
    # The losses by test example are those at the end.
    at_prefix = replace(judging, examples=type(judging.examples)())
    longest = int(chosen["steps"].max())
    prefixes = [
        ratio
        for step in LENGTHS
        if step < longest
        for comparison in comparisons(_longer(chosen, curves, step), curves, at_prefix)
        for ratio in _of(comparison, "prefix")
    ]
    return [*own, *prefixes]


def _longer(runs: pd.DataFrame, curves: pd.DataFrame, step: int) -> pd.DataFrame:
    """Return the beginnings of the longest runs of each arm and dataset, as of a step that they pass."""
    passing = runs[runs["steps"].astype(float) > step]
    if passing.empty:
        return passing
    longest = passing.groupby(["model", "dataset", "batch_size"])["steps"].transform("max")
    return at_step(passing[passing["steps"] == longest], curves, step)


def _of(comparison: Comparison, kind: Kind) -> list[MeasuredRatio]:
    fullft = comparison.fullft
    if fullft is None or fullft["steps"] is None:
        return []
    width = float(comparison.runs["hidden_size"].astype(float).median())
    return [
        MeasuredRatio(
            comparison,
            arm,
            fullft,
            kind,
            Setting(width, fullft["steps"], fullft["batch_size"], ALPHA if arm["alpha"] is None else arm["alpha"]),
        )
        for arm in comparison.arms
        if arm["method"] == "lora"
    ]


def prediction_table(ratios: Sequence[MeasuredRatio], predictions: LrRatioPredictions) -> pd.DataFrame:
    """Return one row per condition and theory that speaks of it (columns COLUMNS).

    `off_by` is the measured over the predicted ratio. The verdict is that of the single condition, or `fitted` where
    the theory's parameters were fitted.
    """
    rows = [
        _about(ratio) | _prediction(ratio, name, theory)
        for ratio in ratios
        for name, theory in predicted(predictions, ratio.setting).items()
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def _about(ratio: MeasuredRatio) -> dict[str, Any]:
    fit, labels = ratio.comparison.fit, (arm_label(ratio.fullft), arm_label(ratio.lora))
    lrs = [math.exp(fit.optima[label].value) if label in fit.optima else math.nan for label in labels]
    low, high = ratio_interval(ratio.log_ratio)
    about: Mapping[str, Any] = {name: ratio.lora[name] for name in ("model", "dataset", "steps", "batch_size", "rank")}
    return {
        **about,
        "width": int(ratio.setting.width),
        "alpha": ratio.setting.alpha,
        "runs": ratio.kind,
        "fullft_lr": lrs[0],
        "lora_lr": lrs[1],
        "ratio": math.exp(ratio.log_ratio.value),
        "ratio_low": low,
        "ratio_high": high,
        "resolved": not ratio.comparison.problems([ratio.lora, ratio.fullft], resolved=True),
    }


def _prediction(ratio: MeasuredRatio, name: str, theory: LogRatio) -> dict[str, Any]:
    judged = ratio.judge(theory)
    return {
        "theory": name,
        "predicted": ratio.prediction(theory),
        "off_by": judged.estimate,
        "off_by_low": judged.ci_low,
        "off_by_high": judged.ci_high,
        "verdict": "fitted" if fitted(name, ratio.setting) else judged.verdict,
    }
