"""The constants of the theories of the LR ratio, fitted to explored runs.

    python -m studies.lr_ratio.scripts.constants results/lr_ratio/tables
    python -m studies.lr_ratio.scripts.constants --regret results/lr_ratio@100/tables
    python -m studies.lr_ratio.scripts.constants --lora results/lr_ratio/tables results/lr_ratio@100/tables
    python -m studies.lr_ratio.scripts.constants --falling results/lr_decay/tables
    python -m studies.lr_ratio.scripts.constants --variants results/variants@100/tables

Reads tables of finished presets, and prints the section `predictions` of the theories that have constants to
fit: `movement` in two halves, c and k by the conditions in which A is frozen, and then u0 by those in which it is
trained; and its rivals `mu_a`, `scale` and `fixed_lora`. Conditions count by the inverse of their squared errors, each
by runs of its own length.

With `--regret`, it prints what it costs to take ten times, fifteen times, or as many times as `movement` says the
optimal LR of full fine-tuning: the rise of LoRA's lowest loss by its fit, in nats, in margins and as a share of the
gain, for each condition of the experiment `lr_ratio` with the paper's alpha and initial A.

With `--lora`, it prints how far each theory is off LoRA's own optimal LR in the second folder, predicted from the
optimal LR of full fine-tuning in the first one, so that no error is shared.

With `--falling`, it prints what `movement` says of runs whose LR falls linearly to zero, by the highest and by the mean
LR of full fine-tuning.

With `--variants`, it prints what theories say of the best LRs of rsLoRA and LoRA+ over LoRA's own, with no constant
fitted to them, and how far they are off.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from lorabench.analysis.arms import ALPHA, arm_label, in_experiments, with_arm_columns
from lorabench.analysis.comparison import Judging, comparisons
from lorabench.analysis.estimate import ExampleLosses
from lorabench.config.fields import LORA_PLUS_RATIO
from lorabench.config.margins import DEFAULT_MARGINS
from lorabench.errors import UserError
from lorabench.store.checks import is_rl
from lorabench.store.tables import Tables
from studies.lr_ratio.conditions import MeasuredRatio, measured_ratios, prediction_table, rms_factors
from studies.lr_ratio.predictions import DEFAULT, MovementTheory, MuATheory, Predictions, ScaleTheory
from studies.lr_ratio.theories import BATCH_SIZE, STEPS, Setting, predicted
from studies.variants.switches import switches

LEAST_ERROR = 0.1
"""The least standard error of the logarithm of a ratio that a condition counts with, since no theory is exact."""


def measured(tables: Tables) -> list[MeasuredRatio]:
    """Return the conditions of the experiment `lr_ratio` that tables measure."""
    runs = with_arm_columns(tables.runs[in_experiments(tables.runs, ("lr_ratio",)) & ~is_rl(tables.runs)])
    return measured_ratios(runs, tables.curves, Judging(DEFAULT_MARGINS, ExampleLosses.of(tables.test_losses)))


def settings_of(table: pd.DataFrame) -> list[Setting]:
    """Return the setting of each row."""
    names = [field.name for field in fields(Setting)]
    return [Setting(*row) for row in table[names].itertuples(index=False, name=None)]


def residuals(table: pd.DataFrame, theory: str, predictions: Predictions) -> np.ndarray:
    """Return ln(measured / predicted) over its standard error, (conditions,)."""
    at_lrs = zip(settings_of(table), np.log(table["fullft_lr"]), strict=True)
    said = np.array([float(predicted(predictions, setting)[theory](np.asarray(lr))) for setting, lr in at_lrs])
    # A 95% interval is 3.92 standard errors wide.
    errors = np.maximum(np.log(table["ratio_high"] / table["ratio_low"]) / 3.92, LEAST_ERROR)
    return np.asarray((np.log(table["ratio"]) - said) / errors)


def fitted(table: pd.DataFrame) -> Predictions:
    """Fit the constants to the rows of conditions, one row for each."""
    frozen, moving = table[table["frozen"]], table[~table["frozen"]]
    usual = moving[moving["init_a"].eq(1)]
    short = usual[usual["steps"].eq(STEPS) & usual["batch_size"].eq(BATCH_SIZE) & usual["alpha"].eq(ALPHA)]

    def fit(rows: pd.DataFrame, name: str, make: Callable[..., Predictions], *start: float) -> list[float]:
        """Return the constants, from which `make` makes predictions, whose residuals are the smallest."""
        solved = least_squares(lambda logs: residuals(rows, name, make(*np.exp(logs).tolist())), np.log(start))
        return [float(value) for value in np.exp(solved.x)]

    def movement(c: float, k: float, u0: float = 1.0) -> Predictions:
        return Predictions(movement=MovementTheory(c=c, u0=u0, k=k))

    def fixed(ratio: float) -> Predictions:
        stated = DEFAULT.fixed_lora
        return Predictions(fixed_lora=stated and stated.model_copy(update={"ratio": ratio}))

    c, k = fit(frozen, "movement", movement, 2.0, 0.6)
    [u0] = fit(moving, "movement", lambda u0: movement(c, k, u0), 2e-3)
    [root] = fit(moving, "mu_a", lambda c: Predictions(mu_a=MuATheory(c=c)), 2.0)
    by_scale = fit(usual, "scale", lambda c, kappa: Predictions(scale=ScaleTheory(c=c, kappa=kappa)), 2.25, 0.2)
    return Predictions(
        movement=MovementTheory(c=c, u0=u0, k=k),
        mu_a=MuATheory(c=root),
        scale=ScaleTheory(c=by_scale[0], kappa=by_scale[1]),
        fixed_lora=fixed(*fit(short, "fixed_lora", fixed, 4.0)).fixed_lora,
    )


def regrets(tables: Tables) -> pd.DataFrame:
    """Return what LRs by 10, 15 and the theory `movement` cost LoRA, one row per condition."""
    rows = []
    for each in measured(tables):
        setting = each.setting
        if each.kind != "own" or setting.frozen or (setting.init_a, setting.alpha) != (1.0, ALPHA):
            continue
        law = each.prediction(predicted(DEFAULT, setting)["movement"])
        curvature, margin = each.comparison.fit.curvature[arm_label(each.lora)], each.comparison.margin.value
        row = {"condition": each.label, "ratio": math.exp(each.log_ratio.value), "movement": law, "margin": margin}
        for name, ratio in (("10", 10.0), ("15", 15.0), ("movement", law)):
            rise = curvature * (math.log(ratio) - each.log_ratio.value) ** 2
            row |= {f"nats at {name}": rise, f"margins at {name}": rise / margin}
            row[f"share of the gain at {name}"] = rise * DEFAULT_MARGINS.loss / margin
        rows.append(row)
    return pd.DataFrame(rows)


def lora_optima(explored: pd.DataFrame, held_out: pd.DataFrame) -> pd.DataFrame:
    """Return by theory how far LoRA's held-out optimal LRs are off those that follow from explored ones of FullFT, from
    `prediction_table`s."""
    condition = ["model", "dataset", "steps", "batch_size", "alpha", "init_a", "frozen", "rank", "runs", "theory"]
    lrs = explored[[*condition, "fullft_lr"]].rename(columns={"fullft_lr": "explored_lr"})
    table = held_out.merge(lrs, on=condition)
    theories = (predicted(DEFAULT, setting) for setting in settings_of(table))
    at = zip(theories, table["theory"], np.log(table["explored_lr"]), strict=True)
    said = np.array([float(theory[name](np.asarray(lr))) + lr for theory, name, lr in at])
    off = np.exp(np.log(table["lora_lr"]) - said)
    low, high = (off * table[f"off_by_{end}"] / table["off_by"] for end in ("low", "high"))
    return rms_factors(table.assign(off_by=off, off_by_low=low, off_by_high=high))


def falling(table: pd.DataFrame) -> pd.DataFrame:
    """Return the ratio that `movement` predicts by the highest and by the mean LR, for rows of a `prediction_table` of
    runs whose LR falls linearly to zero."""
    own = table[table["runs"].eq("own") & table["theory"].eq("movement")]
    constant = (replace(setting, mean_lr=1.0) for setting in settings_of(own))
    theories = (predicted(DEFAULT, setting)["movement"] for setting in constant)
    logs = np.log(own["fullft_lr"])
    by_highest = [math.exp(theory(np.asarray(lr))) for theory, lr in zip(theories, logs, strict=True)]
    columns = ["dataset", "steps", "fullft_lr", "lora_lr", "ratio", "ratio_low", "ratio_high"]
    return own[columns].assign(by_highest=by_highest, by_mean=own["predicted"])


def variants(tables: Tables) -> pd.DataFrame:
    """Return the ratio of best LRs of rsLoRA and LoRA+ to LoRA, with what theories predict, one row per condition.

    For the LR of A both are LoRA with `more` times the alpha, by which the best LR falls as 1/more while A stands still
    (`still`), and as its root by `mu_a`; the root of the mean of squared logs, as a factor, is the last row.
    """
    movement = DEFAULT.movement
    assert movement is not None, "a default prediction"
    judging = Judging(DEFAULT_MARGINS, ExampleLosses.of(tables.test_losses))
    runs = tables.runs[in_experiments(tables.runs, ("variants",)) & ~is_rl(tables.runs)]
    rows = []
    for comparison in comparisons(runs, tables.curves, judging):
        for switch in switches(comparison, "rslora", "lora_plus"):
            more = LORA_PLUS_RATIO if switch.variant == "lora_plus" else math.sqrt(switch.arm["rank"])
            low, high = map(math.exp, switch.log_ratio.interval())
            ratio = {"ratio": math.exp(switch.log_ratio.value), "ratio_low": low, "ratio_high": high}
            theories = {"movement": switch.ratio_by_movement(movement), "still": 1 / more, "mu_a": 1 / math.sqrt(more)}
            rows.append({"condition": f"{comparison.label} {switch.name}", **ratio, **theories})
    if not rows:
        raise UserError("the tables have no runs of rsLoRA or LoRA+ beside LoRA of the experiment variants")
    table = pd.DataFrame(rows)
    off = {name: np.log(table["ratio"] / table[name]) for name in ("movement", "still", "mu_a")}
    factors = {name: math.exp(math.sqrt((logs**2).mean())) for name, logs in off.items()}
    return pd.concat([table, pd.DataFrame([{"condition": "off by, root mean square"} | factors])], ignore_index=True)


def main() -> None:
    """Print the constants, and by how much the theories with them are off."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tables", nargs="*", type=Path, help="folders with tables")
    parser.add_argument("--regret", action="store_true", help="print what learning rates by 10, 15 and a theory cost")
    parser.add_argument("--lora", action="store_true", help="print how far theories are off LoRA's own optimal LRs")
    parser.add_argument("--falling", action="store_true", help="print predictions for runs whose LR falls to zero")
    parser.add_argument("--variants", action="store_true", help="print how far theories are off rsLoRA and LoRA+")
    given = parser.parse_args()
    tables = [Tables.read(folder) for folder in given.tables]
    if given.variants or given.regret:
        for each in tables:
            print((variants if given.variants else regrets)(each).to_string(index=False, float_format="{:.3g}".format))
        return
    parts = [prediction_table(measured(each), DEFAULT) for each in tables]
    if given.lora:
        print(lora_optima(*(part[part["runs"] == "own"] for part in parts)).to_string(float_format="{:.3f}".format))
        return
    rows = pd.concat(parts)
    if given.falling:
        print(falling(rows).to_string(index=False, float_format="{:.3g}".format))
        return
    table = rows[rows["theory"].eq("still") & rows["runs"].eq("own") & rows["ratio_low"].notna()]
    constants = fitted(table)
    for name, theory in constants:
        if theory is not None:
            settings = settings_of(table)
            spoken = table[[name in predicted(constants, setting) for setting in settings]]
            logs = residuals(spoken, name, constants)
            values = ", ".join(f"{key}: {value:.3g}" for key, value in theory)
            print(f"{name}: {{{values}}}  # {len(spoken)} conditions, chi-squared {float((logs**2).sum()):.1f}")


if __name__ == "__main__":
    main()
