"""Variants of LoRA: which one an arm is, how its best learning rate follows from LoRA's, and how wide its optimum is.

rsLoRA and LoRA+ are LoRA with another alpha or another LR of B, so tables hold them under the method `lora`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from lorabench.analysis.arms import STANDARD, arm_label, kept, with_losses
from lorabench.analysis.comparison import Arm, Comparison
from lorabench.analysis.curves import train_curves
from lorabench.analysis.estimate import Estimate, combined, student, unknown
from lorabench.config.fields import LORA_PLUS_RATIO, VARIANT_NAMES, Variant
from studies.lr_ratio.predictions import MovementTheory
from studies.lr_ratio.theories import Setting, converted_lr


def variant_of(arm: Mapping[str, Any]) -> Variant | None:
    """Return which variant of LoRA an arm is, or None; at rank 1 rsLoRA is LoRA."""
    if arm["method"] == "fullft":
        return None
    alpha, init_a, ratio = (arm[name] if arm[name] is not None else STANDARD[name] for name in STANDARD)
    if init_a != STANDARD["init_a"]:
        return None
    standard_alpha = alpha == STANDARD["alpha"]
    if arm["method"] != "lora":
        same = next((variant for variant in VARIANT_NAMES if variant == arm["method"]), None)
        return same if standard_alpha and ratio == STANDARD["lr_ratio"] else None
    if ratio == LORA_PLUS_RATIO:
        return "lora_plus" if standard_alpha else None
    if ratio != STANDARD["lr_ratio"]:
        return None
    if standard_alpha:
        return "lora"
    return "rslora" if math.isclose(alpha, STANDARD["alpha"] * math.sqrt(arm["rank"])) else None


@dataclass(frozen=True)
class Switch:
    """An arm of a variant beside LoRA of the same rank, layers and data."""

    comparison: Comparison
    variant: Variant
    arm: Arm
    lora: Arm

    @property
    def name(self) -> str:
        return f"{VARIANT_NAMES[self.variant]} r{self.arm['rank']}"

    @property
    def arms(self) -> list[Arm]:
        return [self.arm, self.lora]

    @property
    def log_ratio(self) -> Estimate:
        """The natural logarithm of the variant's best LR over LoRA's; in LoRA+ the LR is that of A."""
        return self.comparison.fit.log_ratio(arm_label(self.arm), arm_label(self.lora))

    def ratio_by_movement(self, theory: MovementTheory) -> float:
        """Return the ratio that the theory `movement` predicts from LoRA's fitted optimum and the size of the model.

        By it the LR times the size of A times alpha is the same. LoRA+ has `LORA_PLUS_RATIO` times the LR of B, for
        which the size of A counts, so that for the LR of A it is LoRA of as many times the alpha. NaN if the width or
        the number of steps is not known.
        """
        optimum = self.comparison.fit.optima.get(arm_label(self.lora))
        width = self.comparison.runs.get("hidden_size", pd.Series(dtype=float)).astype(float).mean()
        if optimum is None or math.isnan(width) or not self.lora["steps"]:
            return math.nan
        more = LORA_PLUS_RATIO if self.variant == "lora_plus" else self.arm["alpha"] / STANDARD["alpha"]
        here, there = (
            Setting(width, self.lora["steps"], self.lora["batch_size"], alpha, rank=self.lora["rank"])
            for alpha in (STANDARD["alpha"], STANDARD["alpha"] * more)
        )
        lr = math.exp(optimum.value)
        return converted_lr(lr, here, there, theory) / lr

    def ratio_by_first_update(self) -> float:
        """Return the ratio by which both first updates of the weights have one size; NaN if they are not known.

        The size is the norm of the change of all weights by the first step, over the LR: with Adam each entry of A and
        B changes by about the LR, so that the size follows from the initial factors. In PiSSA these are the largest
        singular directions of the weights, and both factors are not 0.
        """
        logs = []
        for arm in self.arms:
            norms = train_curves(self.comparison.rows[arm_label(arm)], self.comparison.curves, "update_norm")
            first = norms[norms["step"] == 1]
            sizes = first["value"].astype(float) / first["lr"].astype(float)
            logs.append(float(np.log(sizes).mean()) if (sizes > 0).all() else math.nan)
        return math.exp(logs[1] - logs[0])

    def log_width_ratio(self) -> Estimate:
        """Return the natural logarithm of the width of the variant's range of good LRs over that of LoRA's.

        A loss that rises by c (ln LR - x)^2 is within a margin m of the lowest over a range of ln LR that is
        2 sqrt(m/c) wide, so the ratio of two widths is the root of the inverse ratio of the curvatures c, whatever the
        margin. Ratios beyond `WIDEST` count as that, since a curvature may be 0.
        """
        known = curvatures(self.comparison)
        own, lora = (known.get(arm_label(arm), unknown()) for arm in self.arms)

        def log_ratio(curvature: np.ndarray, of_lora: np.ndarray) -> np.ndarray:
            ratio = np.maximum(of_lora, _FLAT) / np.maximum(curvature, _FLAT)
            return np.asarray(np.clip(0.5 * np.log(ratio), -math.log(WIDEST), math.log(WIDEST)))

        ratio = combined(log_ratio, own, lora)
        return replace(ratio, n_seeds=min(own.n_seeds, lora.n_seeds))


@kept
def curvatures(comparison: Comparison) -> dict[str, Estimate]:
    """Return the curvature of the loss in ln LR of each arm, by its label, around the best LR of its grid.

    It is the mean over the seeds that have this LR and both of its neighbours. The variance over seeds is pooled over
    the arms, as that of losses is, since three seeds hardly tell it.
    """
    by_seed = {}
    for label, rows in comparison.rows.items():
        grid = comparison.fit.grids.get(label)
        if grid is not None and 0 < grid.centre < len(grid.lrs) - 1:
            lrs = grid.lrs[grid.centre - 1 : grid.centre + 2]
            done = with_losses(rows[rows["status"].eq("done") & rows["lr"].isin(lrs)])
            losses = done.pivot(index="seed", columns="lr", values="test_loss").astype(float).dropna()
            slopes = np.diff(losses.to_numpy()) / np.diff(np.log(lrs))
            by_seed[label] = np.diff(slopes)[:, 0] / math.log(lrs[2] / lrs[0])
    several = [values for values in by_seed.values() if len(values) > 1]
    dof = sum(len(values) - 1 for values in several)
    variance = sum(float(((values - values.mean()) ** 2).sum()) for values in several) / max(dof, 1)
    known = {}
    for label, values in by_seed.items():
        if len(values):
            error, name = math.sqrt(variance / len(values)), f"curvature {comparison.label} {label}"
            known[label] = student(float(values.mean()), error, dof, name, len(values))
    return known


WIDEST = 10.0
"""The largest ratio of the widths of two ranges of good LRs that is told."""

_FLAT = 1e-9
"""The least curvature that is told from 0, in units of the loss per square of ln LR."""


def switches(comparison: Comparison, *variants: Variant) -> list[Switch]:
    """Return the arms of some variants, each beside LoRA of the same rank and layers, where there is one."""
    same = ["rank", "placement"]
    found = {(variant_of(arm), *(arm[name] for name in same)): arm for arm in comparison.arms if variant_of(arm)}
    return [
        Switch(comparison, variant, arm, found["lora", *setting])
        for (variant, *setting), arm in found.items()
        if variant in variants and ("lora", *setting) in found
    ]
