"""Capacity: the tokens after which each rank leaves the highest rank's curve, and the bits of facts that it stores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, NullFormatter

from lorabench.analysis import memorisation
from lorabench.analysis.alpha_rules import judged_arms
from lorabench.analysis.arms import ARM, arm_label, arm_table
from lorabench.analysis.comparison import Comparison, comparisons
from lorabench.analysis.estimate import mean_over_seeds
from lorabench.analysis.optima import log_threshold, runs_at_optimum, tokens_at
from lorabench.analysis.slopes import log_log
from lorabench.figures import grid, style
from lorabench.figures.grid import ARM_COLUMNS, PANEL, Styles, envelopes, fitted_noise, only, points
from lorabench.store.tables import Tables
from lorabench.utils import formats

_COLUMNS = [*ARM_COLUMNS, "element", "step", "tokens", "tokens_low", "tokens_high", "excess", "nll", "lr", "run_id"]
_COLUMNS += ["trainable_params", "slope", "slope_low", "slope_high", "bits"]
_REACHED = [*ARM, "left", "step", "tokens", "tokens_low", "tokens_high", "error", "trainable_params"]
_NEEDED = ["entropy_bits", "final_test_nll", "test_scored_tokens", "trainable_params"]
_LINE: dict[str, Any] = {"color": "0.35", "linewidth": 1.1}
_HELD: dict[str, Any] = {"color": "0.35", "linewidth": 1.0, "linestyle": "--"}


def draw(tables: Tables) -> style.Drawn:
    """Draw the figure of capacity; return it, and what it plots as one tidy table.

    The column `element` says what a row is. In the left panel: `excess` (one step of an arm's envelope: `nll` is the
    validation NLL and `excess` its height above the lowest envelope, both in nats per scored token), `noise_band` (two
    sigma, in `excess`), `departure` (the step at which a rank leaves the highest rank's curve). In the right panel, of
    training tokens against adapter parameters: `threshold` (the tokens at which a rank that had joined the curve
    leaves it, from `tokens_low` to `tokens_high` with 95% confidence), `stays` (the tokens that a rank trained on
    without leaving), `slope` (points of the fitted line, with the slope and its interval), `proportional` (points of
    the reference line), `description_length` (the dataset's `bits`, and the parameters that hold them at 2 bits each).
    A row `diverged` is one run.
    """
    runs = tables.runs[judged_arms(tables.runs) & ~memorisation.is_memorisation(tables.runs)]
    comparisons = grid.compared(tables, runs)
    envelope = envelopes(runs, tables.curves)
    envelope = envelope[envelope["step"] > 0].rename(columns={"value": "nll"})
    envelope["excess"] = envelope["nll"] - envelope.groupby([*PANEL, "step"], dropna=False)["nll"].transform("min")
    ends = envelope.groupby(PANEL, dropna=False)["step"].agg(["min", "max"]).reset_index()
    ends = ends.melt(PANEL, value_name="step").merge(fitted_noise(comparisons), how="left", on=PANEL)
    thresholds = _thresholds(comparisons)
    left, stays = (thresholds[thresholds["left"] == known] for known in (True, False))
    # The description length is drawn where there are thresholds to compare it with.
    described = memorisation.description_lengths(runs).merge(thresholds[PANEL].drop_duplicates(), on=PANEL)
    params = (described["bits"] / memorisation.BITS_PER_PARAMETER).round().astype("Int64")
    parts = {
        "excess": envelope,
        "departure": grid.departure_rows(comparisons, envelope, ["nll", "excess", "tokens"]),
        "threshold": left,
        "stays": stays,
        "description_length": described.assign(trainable_params=params),
        "diverged": grid.diverged_runs(runs),
        "noise_band": ends.assign(excess=2 * ends["sigma"]).dropna(subset=["excess"]),
    }
    slopes = [_slopes(panel) for _, panel in left.groupby(PANEL, dropna=False)]
    plotted = grid.tidy(parts, _COLUMNS, *slopes)
    if plotted.empty:
        return style.empty_figure("There are no runs on a dataset other than random facts."), plotted
    figure, styles, panels = grid.panels(plotted, 2)
    for rows, [axes, right] in panels:
        noise, curves = only(rows, "noise_band").assign(floor=0.0), only(rows, "excess")
        grid.band(axes, noise, "step", "floor", "excess")
        grid.lines(axes, curves, "step", "excess", styles)
        points(axes, only(rows, "departure").assign(marker="o", filled=False), "step", "excess", styles, 6)
        style.log_axes(axes, "training step", "above the lowest envelope (nats / token)")
        if len(noise):
            # The axis is linear within the noise and logarithmic beyond, so that it has a place for 0 and for a whole
            # nat. Noise that is next to nothing would give it many empty decades.
            axes.set_yscale("symlog", linthresh=max(noise["excess"].iloc[0], 1e-4), linscale=0.6)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        sigma = grid.sigma_text(noise["excess"].iloc[0] / 2 if len(noise) else math.nan)
        style.note(axes, sigma, *grid.diverged_facts(rows, curves, "no curve"))
        _draw_thresholds(right, rows, styles)
    marks = {
        "departure": style.mark("leaves the highest rank's curve", "o", mfc="white", mew=1.4),
        "noise_band": style.shade(f"within 2{style.SIGMA} of seeds"),
        "stays": style.mark("never left", "^"),
        "slope": style.line("fitted slope, 95% interval", **_LINE),
        "proportional": style.line("slope 1", linestyle=":", **_LINE),
        "description_length": style.line("2 bits / parameter hold the first epoch's loss", **_HELD),
    }
    return style.legends(figure, styles, plotted, marks.items())


def _thresholds(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """Return the tokens at which each rank leaves, as claim A5 judges them, or that it trained on without leaving.

    `error` is the standard error of log10(tokens) from seeds. Ranks without a threshold are left out: those that never
    joined the highest rank's curve, lag without leaving, or do not leave along a line in log(step).
    """
    rows = []
    for comparison in comparisons:
        for rank, (curves, departure) in grid.judged_departures(comparison).items():
            arm = comparison.lora[rank]
            params = runs_at_optimum(comparison, arm)["trainable_params"].iloc[0]
            row = arm | {"trainable_params": params, "tokens": tokens_at(comparison, arm, math.inf)}
            threshold = log_threshold(curves, departure, comparison.margin.value)
            if departure.growth is None:
                rows.append(row | {"left": False})
            elif not isinstance(threshold, str):
                steps = (threshold.value, *threshold.interval())
                tokens = [tokens_at(comparison, arm, 10**step) for step in steps]
                row |= dict(zip(("tokens", "tokens_low", "tokens_high"), tokens, strict=True))
                row |= {"left": True, "step": round(10**threshold.value), "error": threshold.seed_error}
                rows.append(row)
    return pd.DataFrame(rows, columns=_REACHED).dropna(subset=["trainable_params", "tokens"])


def _slopes(left: pd.DataFrame) -> pd.DataFrame:
    """Return points of the fitted line, and of a line of slope 1, through the mean of the thresholds of one panel."""
    line = log_log(left["trainable_params"], left["tokens"], math.sqrt(float((left["error"] ** 2).mean())))
    x, y = (np.log10(left[name].to_numpy(float)) for name in ("trainable_params", "tokens"))
    ends = np.array([x.min(), x.mean(), x.max()])
    parts = []
    for element, slopes in (("slope", (line.slope, line.low, line.high)), ("proportional", (1.0, math.nan, math.nan))):
        tokens = 10 ** (y.mean() + np.multiply.outer(ends - x.mean(), slopes))
        part = pd.DataFrame({"trainable_params": (10**ends).round().astype(int), "tokens": tokens[:, 0]})
        part[["slope", "slope_low", "slope_high"]] = slopes
        part["tokens_low"], part["tokens_high"] = tokens[:, 1:].min(axis=1), tokens[:, 1:].max(axis=1)
        parts.append(part.assign(element=element, **left[PANEL].iloc[0]))
    return pd.concat(parts) if math.isfinite(line.slope) else pd.DataFrame()


def _draw_thresholds(axes: Axes, rows: pd.DataFrame, styles: Styles) -> None:
    thresholds, stays, slope = (only(rows, element) for element in ("threshold", "stays", "slope"))
    if thresholds.empty and stays.empty:
        unknown = f"{style.SIGMA} is unknown, so departures\ncannot be distinguished from noise."
        style.say(axes, "No rank is known to leave the shared curve." if len(only(rows, "noise_band")) else unknown)
        return
    grid.band(axes, slope, "trainable_params", "tokens_low", "tokens_high", "0.9")
    for line, linestyle in ((slope, "-"), (only(rows, "proportional"), ":")):
        axes.plot(line["trainable_params"].astype(float), line["tokens"], linestyle, **_LINE)
    marks = pd.concat([thresholds.assign(marker="o", filled=False), stays.assign(marker="^", filled=True)])
    points(axes, marks, "trainable_params", "tokens", styles, 6)
    held = only(rows, "description_length")
    for params in held["trainable_params"]:
        axes.axvline(float(params), **_HELD)
    axes.set(xscale="log", yscale="log", xlabel="adapter parameters", ylabel="train tokens at departure")
    for axis in (axes.xaxis, axes.yaxis):
        style.log_ticks(axis, EngFormatter(sep=""))
    leaving = "1 rank leaves" if len(thresholds) == 1 else f"{len(thresholds)} ranks leave"
    for fit in slope.head(1).to_dict("records"):
        leaving = f"slope {fit['slope']:.2f} {formats.fixed_interval(fit['slope_low'], fit['slope_high'], 2)}"
    style.note(axes, leaving, *(f"first epoch {formats.amount(bits, 'bit')}" for bits in held["bits"].head(1)))


_STORED = [*ARM_COLUMNS, "element", "trainable_params", "bits", "bits_low", "bits_high", "bits_per_parameter"]
_STORED += ["lr", "seed", "n_seeds", "run_id"]
_PER_PARAMETER = {1.0: ":", 2.0: "--"}


def draw_memorisation(tables: Tables) -> style.Drawn:
    """Draw how many bits of random facts an adapter stores; return the figure, and what it plots as one tidy table.

    The column `element` says what a row is: `seed` (one run at the LR nearest to its arm's optimum), `stored` (by the
    fitted lowest loss, with its 95% interval), `entropy` (all bits of the facts), `per_parameter` (ends of the lines of
    1 and 2 bits per parameter) or `diverged` (one run). `bits` are the bits of the facts' answers that are stored.
    """
    facts = tables.runs[judged_arms(tables.runs) & memorisation.is_memorisation(tables.runs)]
    if facts.empty:
        empty = pd.DataFrame(columns=_STORED)
        return style.empty_figure("There are no runs on a dataset of random facts."), empty
    names = {"bits_stored": "bits", "bits_stored_low": "bits_low", "bits_stored_high": "bits_high", "lr_best": "lr"}
    best = best_stored(facts).rename(columns=names)
    seeds = stored_bits(facts).rename(columns=names)
    at_best = {run_id for run_ids in best["run_ids"] for run_id in run_ids}
    # The lines of 1 and 2 bits per parameter span the range of a panel's adapters, or without any, of FullFT alone.
    spanned = best[best["method"].eq("lora")] if best["method"].eq("lora").any() else best
    params = spanned.groupby(PANEL, dropna=False)["trainable_params"].agg(["min", "max"]).mul([1 / 1.5, 1.5])
    params = params.round().astype("Int64").reset_index().melt(PANEL, value_name="trainable_params")
    ends = params.merge(pd.DataFrame({"bits_per_parameter": list(_PER_PARAMETER)}), how="cross")
    parts = {
        "seed": seeds[seeds["run_id"].isin(at_best)],
        "stored": best,
        "diverged": grid.diverged_runs(facts),
        "entropy": facts.groupby(PANEL, as_index=False, dropna=False).agg(bits=("entropy_bits", "max")),
        "per_parameter": ends.assign(bits=ends["bits_per_parameter"] * ends["trainable_params"]),
    }
    plotted = grid.tidy(parts, _STORED)
    figure, styles, panels = grid.panels(plotted)
    for rows, [axes] in panels:
        stored, seeds, entropy = only(rows, "stored"), only(rows, "seed"), only(rows, "entropy")
        per_parameter = only(rows, "per_parameter")
        for number, linestyle in _PER_PARAMETER.items():
            line = per_parameter[per_parameter["bits_per_parameter"].eq(number)]
            axes.plot(line["trainable_params"].astype(float), line["bits"], linestyle, **_LINE)
        for bits in entropy["bits"]:
            axes.axhline(bits, **_LINE, zorder=1)
        shown, positive = stored[stored["bits"] > 0], seeds[seeds["bits"] > 0]
        adapters = shown[shown["method"] == "lora"].sort_values("trainable_params")
        axes.plot(adapters["trainable_params"].astype(float), adapters["bits"], color="0.7", linewidth=1.0, zorder=2)
        seed_marks = positive[["arm", "trainable_params", "bits"]].assign(marker="_")
        points(axes, seed_marks, "trainable_params", "bits", styles, 11)
        # A logarithmic axis has no 0: an interval that reaches it is drawn to the lower end of the axis.
        floor = 0.7 * min(positive["bits"].min(), shown["bits"].min()) if len(positive) else math.nan
        points(axes, shown.assign(bits_low=shown["bits_low"].clip(lower=floor)), "trainable_params", "bits", styles)
        axes.set(xscale="log", yscale="log", xlabel="trainable parameters", ylabel="bits stored of the facts")
        for axis in (axes.xaxis, axes.yaxis):
            style.log_ticks(axis, EngFormatter(sep=""))
        nothing = ", ".join(stored.loc[~(stored["bits"] > 0), "arm"])
        known = [f"facts {formats.count(entropy['bits'].iloc[0])} bits"]
        known += [grid.seeds_text(stored["n_seeds"])] if len(stored) else []
        style.note(
            axes,
            *known,
            f"stored nothing: {nothing}" if nothing else "",
            *grid.diverged_facts(rows, stored, "none finished"),
        )
    marks = [
        ("entropy", style.line("all of the facts", **_LINE)),
        ("per_parameter", style.line("1 bit / parameter", linestyle=_PER_PARAMETER[1.0], **_LINE)),
        ("per_parameter", style.line("2 bits / parameter", linestyle=_PER_PARAMETER[2.0], **_LINE)),
        ("stored", style.mark("fitted lowest loss, 95% interval", "o", ls="-", lw=1.2)),
        ("seed", style.mark("one seed", "_", ms=9)),
    ]
    return style.legends(figure, styles, plotted, marks)


def stored_bits(runs: pd.DataFrame) -> pd.DataFrame:
    """Return runs on random facts with bits_stored, and bits_per_parameter (per trainable parameter): the entropy
    of the answers minus their summed NLL, in bits. They are negative for a model that predicts worse than a uniform
    guess, and NaN where a run diverged."""
    facts = runs.reindex(columns=list(dict.fromkeys([*runs, *ARM, *_NEEDED])))
    entropy, nll, tokens, params = (facts[name].to_numpy(float, na_value=math.nan) for name in _NEEDED)
    bits = entropy - nll * tokens / math.log(2)
    return facts.assign(bits_stored=bits, bits_per_parameter=bits / params)


def best_stored(runs: pd.DataFrame) -> pd.DataFrame:
    """Compute the bits that each arm of runs on random facts stores at its fitted lowest NLL, or else the mean one at
    lr_best.

    Returns:
        One row per arm with a finished run: lr_best (nearest to the fitted optimum), n_seeds, trainable_params,
        bits_stored with its 95% interval (`_low`, `_high`; NaN with one seed), bits_per_parameter, run_ids (at
        lr_best).
    """
    columns = ["lr_best", "n_seeds", "trainable_params", "bits_stored", "bits_stored_low", "bits_stored_high"]
    rows = []
    for comparison in comparisons(runs, pd.DataFrame()):
        for arm in comparison.arms:
            label, chosen = arm_label(arm), comparison.at_optimum(arm)
            if chosen.empty:
                continue
            first = chosen.iloc[0]
            at_lr = mean_over_seeds(chosen["final_test_nll"].to_numpy(float), f"loss of {comparison.label} {label}")
            minimum = comparison.fit.minima.get(label, at_lr)
            bits = memorisation.stored(minimum, float(first["entropy_bits"]), float(first["test_scored_tokens"]))
            low, high = bits.interval()
            numbers = [first["lr"], len(chosen), first["trainable_params"], bits.value, low, high]
            row = arm | dict(zip(columns, numbers, strict=True)) | {"run_ids": list(chosen["run_id"])}
            rows.append(row | {"bits_per_parameter": bits.value / first["trainable_params"]})
    return arm_table(rows, [*columns, "bits_per_parameter", "run_ids"])
