"""Which runs a claim is about: steps that choose comparisons, and conditions that say what the runs must be like."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pandas as pd

from lorabench.analysis.comparison import Comparison
from lorabench.analysis.finding import MIN_SEEDS, UnjudgedError
from lorabench.analysis.invariances import with_scales
from lorabench.analysis.memorisation import is_memorisation
from lorabench.analysis.rewards import CONTROLS, LEAD, beyond_controls, leads, with_error_rates
from lorabench.claims.claim import Condition, Evidence
from lorabench.runs import lowest

Named = list[tuple[str, Comparison]]
"""Comparisons that a claim is judged on, each after its name in the reason; a name may say why it was chosen."""

FULL_STEPS = 1000
"""The number of steps of a run from which claims on whole runs are judged: the paper's runs take thousands."""


def chosen(*steps: Callable[[Named], Named]) -> Callable[[Evidence], Named]:
    """Return a function that chooses from all comparisons of the evidence by several steps, one after the other."""

    def choose(evidence: Evidence) -> Named:
        named = [(comparison.label, comparison) for comparison in evidence.comparisons]
        for step in steps:
            named = step(named)
        return named

    return choose


every_dataset = chosen()
"""Choose all comparisons."""


def learning(named: Named) -> Named:
    """Leave out the datasets of random facts, from which a model learns nothing general."""
    return [(name, comparison) for name, comparison in named if not is_memorisation(comparison.runs).any()]


def full_runs(named: Named) -> Named:
    """Leave out comparisons of fewer than `FULL_STEPS` steps, if there are longer ones."""
    return [(name, full) for name, full in named if (full.runs["steps"] >= FULL_STEPS).any()] or named


def longest_runs(named: Named) -> Named:
    """Choose, for each model and dataset, the comparison with the most steps; shorter runs are its beginning."""
    longest: dict[tuple[str, str], tuple[str, Comparison]] = {}
    for name, comparison in named:
        key = (comparison.runs["model"].iloc[0], comparison.runs["dataset"].iloc[0])
        _, known = longest.setdefault(key, (name, comparison))
        if comparison.runs["steps"].fillna(0).max() > known.runs["steps"].fillna(0).max():
            longest[key] = (name, comparison)
    return list(longest.values())


def longest_run(named: Named) -> Named:
    """Choose, for each model, the dataset with the most examples seen, and its comparison with the most steps."""

    def examples(runs: pd.DataFrame) -> float:
        return float((runs["steps"] * runs["batch_size"]).max())

    return _by_size(longest_runs(named), "steps", examples, "most examples")


def smallest_dataset(named: Named) -> Named:
    """Choose, for each model, the dataset with the fewest train tokens."""
    return _by_size(named, "train_tokens", lambda runs: -float(runs["train_tokens"].max()), "fewest tokens")


def _by_size(named: Named, column: str, size: Callable[[pd.DataFrame], float], why: str) -> Named:
    by_model: dict[str, dict[str, Named]] = {}
    for name, comparison in named:
        first = comparison.runs.iloc[0]
        by_model.setdefault(first["model"], {}).setdefault(first["dataset"], []).append((name, comparison))
    picked: Named = []
    for model, datasets in by_model.items():
        dataset, note = next(iter(datasets)), f"the only dataset of {model}"
        if len(datasets) > 1:
            runs = {key: [comparison.runs for _, comparison in group] for key, group in datasets.items()}
            if any(column not in rows or rows[column].isna().all() for parts in runs.values() for rows in parts):
                lacking = f"the runs table has no {column}, by which {model}'s dataset is chosen"
                raise UnjudgedError("not tested", lacking)
            sizes = {key: size(pd.concat(parts)) for key, parts in runs.items()}
            dataset, note = max(sizes, key=lambda key: sizes[key]), f"{why} of {len(datasets)} datasets"
        picked += [(f"{name} ({note})", comparison) for name, comparison in datasets[dataset]]
    return picked


def lora_runs(evidence: Evidence) -> list[tuple[str, Evidence]]:
    """Return the evidence of the LoRA runs of each model and dataset, in any parametrization, after its name.

    Its runs have the columns of `with_scales`.
    """
    groups = with_scales(evidence.runs).groupby(["model", "dataset"])
    return [(f"{model}/{dataset}", replace(evidence, runs=runs)) for (model, dataset), runs in groups]


def _too_short(evidence: Evidence) -> str | None:
    # Runs that memorize random facts do not count.
    kind = evidence.runs.get("data_kind", pd.Series("", index=evidence.runs.index))
    steps = _numbers(evidence.runs[~is_memorisation(evidence.runs) & (kind != "facts")], "steps")
    return f"at most {steps.max():,.0f} steps" if steps.max() < FULL_STEPS else None


LONG = Condition(f"runs of {FULL_STEPS:,} steps or more", _too_short, ("long_runs", "core", "paper"))
"""The condition of claims on whole runs: the paper's runs take thousands of steps."""

GENERATED = ("instruct", "worked", "facts", "arithmetic", "sums")
"""The kinds of data that are generated by a program; all others hold text that people or large models wrote."""


def _without_natural_text(evidence: Evidence) -> str | None:
    generated = evidence.runs["data_kind"].isin(GENERATED) if "data_kind" in evidence.runs else pd.Series(dtype=bool)
    return "text that a program generated" if len(generated) and bool(generated.all()) else None


NATURAL = Condition("natural text", _without_natural_text, ("overnight", "core", "paper"))
"""The condition that data was written by people or large models, and not generated by a program."""


def widths(smallest: int, number: int, presets: tuple[str, ...]) -> Condition:
    """Return the condition that a number of models have a hidden size."""

    def instead(evidence: Evidence) -> str | None:
        known = evidence.runs.reindex(columns=["model", "hidden_size"]).dropna().drop_duplicates("model")
        sizes = sorted({int(size) for size in known["hidden_size"]})
        if sum(size >= smallest for size in sizes) >= number:
            return None
        return f"hidden sizes {', '.join(map(str, sizes))}" if sizes else "hidden sizes are not known"

    return Condition(f"{number} hidden sizes of {smallest:,} or more", instead, presets)


RL_PRESETS = ("laptop", "core", "paper")
"""The shipped presets whose RL has sweeps, responses and problems that a claim can be judged on."""

MIN_LRS = 6
"""The number of LRs from which a sweep of RL counts without seeds around its best LR."""


def _not_swept(evidence: Evidence) -> str | None:
    lacking = []
    for method, runs in evidence.runs.groupby("method"):
        arms = [rows for _, rows in runs.groupby(["model", "dataset", "rank", "placement"], dropna=False)]
        if not any(rows["lr"].nunique() >= MIN_LRS or _is_bracketed(rows) for rows in arms):
            most = max(rows["lr"].nunique() for rows in arms)
            lacking.append(f"at most {most} LRs of {'FullFT' if method == 'fullft' else 'LoRA'}")
    return ", ".join([*lacking, "no best LR between two others with these seeds"]) if lacking else None


def _is_bracketed(rows: pd.DataFrame) -> bool:
    """Return whether the best LR of an arm of RL lies between two worse ones, with MIN_SEEDS seeds at all three.

    A diverged or sick run is worse than any other.
    """
    by_lr = with_error_rates(rows).groupby("lr")
    losses = by_lr["validation_loss"].agg(lambda losses: losses.astype(float).fillna(1.0).mean())
    lrs = losses.index.tolist()
    lr = lowest(dict(zip(lrs, losses, strict=True)))
    best = 0 if lr is None else lrs.index(lr)
    seeds = by_lr["seed"].nunique().iloc[max(0, best - 1) : best + 2]
    return 0 < best < len(lrs) - 1 and bool((seeds >= MIN_SEEDS).all())


SWEPT = Condition(
    f"sweeps with the best LR between two others and {MIN_SEEDS} seeds at these, or of {MIN_LRS} LRs",
    _not_swept,
    RL_PRESETS,
)
"""The condition that FullFT and LoRA are each swept until an optimum is known."""


def _not_ahead(evidence: Evidence) -> str | None:
    runs = evidence.runs
    rewarded = runs["status"].ne("unrewarded").groupby([runs["model"], runs["dataset"]]).transform("any")
    lead = leads(runs[rewarded.astype(bool)])
    if lead.empty or bool(beyond_controls(runs).any()):
        return None
    if lead["lead"].isna().all():
        return "the accuracies of the controls are not known"
    worst = lead.sort_values("lead").to_dict("records")[0]
    name = "FullFT" if worst["method"] == "fullft" else "LoRA"
    controls = ", ".join(f"{text} {worst[column]:.3f}" for column, text in CONTROLS.items())
    return f"{worst['model']}/{worst['dataset']}: {name} {worst['accuracy']:.3f}, {controls}"


BEATS_CONTROLS = Condition(
    f"accuracies of every method {100 * LEAD:.0f} points above the best constant answer and cheap rule",
    _not_ahead,
    RL_PRESETS,
)
"""The condition that RL does better than constant answers and cheap rules on some problem set."""


def response_length(tokens: int, presets: tuple[str, ...]) -> Condition:
    """Return the condition that responses of RL have a mean length."""

    def instead(evidence: Evidence) -> str | None:
        curves, length = evidence.curves, math.nan
        if not curves.empty:
            at_train = (curves["split"] == "train") & (curves["metric"] == "response_length")
            lengths = curves[at_train & curves["run_id"].isin(evidence.runs["run_id"])].astype({"value": float})
            length = lengths.groupby("run_id")["value"].mean().median()
        if pd.isna(length):
            # A source without lengths may state a length that the mean response has at least.
            length = _numbers(evidence.runs, "response_tokens").median()
        if pd.isna(length):
            return "no curves" if curves.empty else "response lengths are not known"
        return None if length >= tokens else f"{length:.1f} tokens on average"

    return Condition(f"responses of {tokens} tokens or more", instead, presets)


def _numbers(runs: pd.DataFrame, column: str) -> pd.Series[float]:
    """Return the known values of a column; a column that the table lacks has none."""
    return runs[column].dropna().astype(float) if column in runs else pd.Series(dtype=float)
