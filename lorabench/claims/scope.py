"""Which runs a claim is about: steps that choose comparisons, and conditions that say what the runs must be like."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial, reduce

import pandas as pd

from lorabench.analysis.alpha_rules import PAPERS, AlphaRule, alpha_rule, alpha_rules
from lorabench.analysis.comparison import Comparison
from lorabench.analysis.finding import MIN_SEEDS
from lorabench.analysis.invariances import with_scales
from lorabench.analysis.memorisation import is_memorisation
from lorabench.analysis.rewards import CONTROLS, LEAD, beyond_controls, leads, with_error_rates
from lorabench.claims.claim import Condition, Evidence, condition, unjudged_if
from lorabench.config.fields import METHOD_NAMES
from lorabench.runs import lowest

Named = list[tuple[str, Comparison]]
"""Comparisons that a claim is judged on, each after its name in the reason; a name may say why it was chosen."""

FULL_STEPS = 1000
"""The number of steps of a run from which claims on whole runs are judged: the paper's runs take thousands."""

SHORT_RUN = 100
"""The number of steps up to which a run is short: the paper's ratio of optimal LRs is 10 for longer ones, and higher
for short ones."""

HIGH_RANK = 16
"""The rank from which on ranks count as high: the lower one of the two whose early curves the paper compares."""


def chosen(*steps: Callable[[Named], Named]) -> Callable[[Evidence], Named]:
    """Return a function that chooses from all comparisons of the evidence by several steps, one after the other."""

    def choose(evidence: Evidence) -> Named:
        every: Named = [(comparison.label, comparison) for comparison in evidence.comparisons]
        return reduce(lambda named, step: step(named), steps, every)

    return choose


every_dataset = chosen()
"""Choose all comparisons."""


def those(holds: Callable[[Comparison], object], or_all: bool = False) -> Callable[[Named], Named]:
    """Return a step that leaves out comparisons of which something does not hold, but not all of them if `or_all`."""
    return lambda named: [(name, each) for name, each in named if holds(each)] or (named if or_all else [])


memorising = those(lambda comparison: is_memorisation(comparison.runs).any())
"""Choose the datasets of random facts, from which a model learns nothing general."""

learning = those(lambda comparison: not is_memorisation(comparison.runs).any())
"""Choose the other datasets."""

full_runs = those(lambda comparison: (comparison.runs["steps"] >= FULL_STEPS).any(), or_all=True)
"""Leave out comparisons of fewer than `FULL_STEPS` steps, if there are longer ones."""

beyond_short = those(lambda comparison: (comparison.runs["steps"] > SHORT_RUN).any(), or_all=True)
"""Leave out comparisons of at most `SHORT_RUN` steps, if there are longer ones."""

several_ranks = those(lambda comparison: len(comparison.lora) > 1, or_all=True)
"""Leave out comparisons of one rank on all layers, if others have several."""

with_rank_1 = those(lambda comparison: 1 in comparison.lora, or_all=True)
"""Leave out comparisons without rank 1 on all layers, if others have it."""

sweeps_of_both = those(lambda comparison: comparison.fullft and comparison.highest, or_all=True)
"""Leave out comparisons that lack FullFT or LoRA above rank 1 on all layers, if others have both."""


def _at_alpha(text: str, fits: Callable[[AlphaRule], bool]) -> tuple[Condition, Callable[[Named], Named]]:
    """Return the condition that LoRA is judged at some alpha, and the step that leaves out comparisons at others, but
    not all of them."""

    # Every shipped preset has alpha 32; these two have runs for each of the claims.
    @condition(text, "core", "paper")
    def instead(evidence: Evidence) -> str | None:
        rules = alpha_rules(evidence.runs)
        return None if not rules or any(map(fits, rules)) else ", ".join(sorted(map(str, rules)))

    return instead, those(lambda comparison: fits(alpha_rule(comparison.runs)), or_all=True)


papers_alpha, at_papers_alpha = _at_alpha(f"LoRA with {PAPERS}", lambda rule: rule == PAPERS)
"""Optimal LRs and their ratio depend on alpha, and the paper's are those at alpha 32."""

one_alpha, at_one_alpha = _at_alpha("LoRA with one alpha at all ranks", lambda rule: not rule.power)
"""Ranks are alike at one LR by the factor alpha / r."""


def longest_runs(named: Named) -> Named:
    """Choose, for each model and dataset, the comparison with the most steps; shorter runs are its beginning."""
    by_data: dict[tuple[str, str], Named] = {}
    for name, comparison in named:
        by_data.setdefault(tuple(comparison.runs.iloc[0][["model", "dataset"]]), []).append((name, comparison))
    return [max(of_data, key=lambda pair: pair[1].runs["steps"].fillna(0).max()) for of_data in by_data.values()]


def _by_size(column: str, size: Callable[[pd.DataFrame], float], why: str, named: Named) -> Named:
    by_model: dict[str, dict[str, Named]] = {}
    for name, comparison in named:
        first = comparison.runs.iloc[0]
        by_model.setdefault(first["model"], {}).setdefault(first["dataset"], []).append((name, comparison))
    picked: Named = []
    for model, datasets in by_model.items():
        dataset, note = next(iter(datasets)), f"the only dataset of {model} with these arms"
        if len(datasets) > 1:
            runs = {key: [comparison.runs for _, comparison in group] for key, group in datasets.items()}
            lacking = any(column not in rows or rows[column].isna().all() for parts in runs.values() for rows in parts)
            unjudged_if(lacking, f"the runs table has no {column}, by which {model}'s dataset is chosen")
            sizes = {key: size(pd.concat(parts)) for key, parts in runs.items()}
            dataset, note = max(sizes, key=lambda key: sizes[key]), f"{why} of {len(datasets)} datasets"
        picked += [(f"{name} ({note})", comparison) for name, comparison in datasets[dataset]]
    return picked


smallest_dataset = partial(_by_size, "train_tokens", lambda runs: -runs["train_tokens"].max(), "fewest tokens")
"""Choose, for each model, the dataset with the fewest train tokens."""


def longest_run(named: Named) -> Named:
    """Choose, for each model, the dataset with the most examples seen, and its comparison with the most steps."""
    return _by_size(
        "steps", lambda runs: (runs["steps"] * runs["batch_size"]).max(), "most examples", longest_runs(named)
    )


def lora_runs(evidence: Evidence) -> list[tuple[str, Evidence]]:
    """Return the evidence of the LoRA runs of each model and dataset (see `with_scales`), after its name."""
    return [
        (f"{model}/{dataset}", replace(evidence, runs=runs))
        for (model, dataset), runs in with_scales(evidence.runs).groupby(["model", "dataset"])
    ]


def _most_steps(evidence: Evidence) -> float:
    """Return the number of steps of the longest runs, NaN if it is not known; runs on random facts do not count."""
    kind = evidence.runs.get("data_kind", pd.Series("", index=evidence.runs.index))
    runs = evidence.runs[~is_memorisation(evidence.runs) & (kind != "facts")]
    return float(runs.get("steps", pd.Series(dtype=float)).astype(float).max())


@condition(f"runs of {FULL_STEPS:,} steps or more", "long_runs", "first_gpu", "core", "paper")
def whole_runs(evidence: Evidence) -> str | None:
    steps = _most_steps(evidence)
    return f"at most {steps:,.0f} steps" if steps < FULL_STEPS else None


@condition(
    f"runs of more than {SHORT_RUN} steps",
    *("laptop_more", "long_runs", "lr_ratio", "overnight", "smollm2", "first_gpu", "core", "paper"),
)
def longer_runs(evidence: Evidence) -> str | None:
    steps = _most_steps(evidence)
    return f"at most {steps:,.0f} steps" if steps <= SHORT_RUN else None


GENERATED = ("instruct", "worked", "facts", "arithmetic", "sums")
"""The kinds of data that are generated by a program; all others hold text that people or large models wrote."""


@condition("natural text", "overnight", "first_gpu", "core", "paper")
def natural_text(evidence: Evidence) -> str | None:
    generated = evidence.runs["data_kind"].isin(GENERATED) if "data_kind" in evidence.runs else pd.Series(dtype=bool)
    return "text that a program generated" if len(generated) and bool(generated.all()) else None


def widths(smallest: int, number: int, presets: tuple[str, ...], family: str = "") -> Condition:
    """Return the condition that a number of models, or of models of a family, have a hidden size."""

    def instead(evidence: Evidence) -> str | None:
        runs = evidence.runs
        if family:
            runs = runs[runs["family"].astype(str).str.lower().str.startswith(family)]
        known = runs.reindex(columns=["model", "hidden_size"]).dropna().drop_duplicates("model")
        sizes = sorted({int(size) for size in known["hidden_size"]})
        if sum(size >= smallest for size in sizes) >= number:
            return None
        return f"hidden sizes {', '.join(map(str, sizes))}" if sizes else "hidden sizes are not known"

    text = f"{number} hidden sizes of {smallest:,} or more" + (f" in the family {family}" if family else "")
    return Condition(text, instead, presets)


RL_PRESETS = ("laptop_more", "variants", "first_gpu", "core", "paper")
"""The shipped presets whose RL has sweeps, responses and problems that a claim can be judged on."""

MIN_LRS = 6
"""The number of LRs from which a sweep of RL counts without seeds around its best LR."""


@condition(
    f"sweeps with the best LR between two others and {MIN_SEEDS} seeds at these, or of {MIN_LRS} LRs", *RL_PRESETS
)
def swept(evidence: Evidence) -> str | None:
    # FullFT and LoRA are each swept until an optimum is known.
    lacking = []
    for _, runs in evidence.runs.groupby("method"):
        arms = [rows for _, rows in runs.groupby(["model", "dataset", "rank", "placement"], dropna=False)]
        if not any(rows["lr"].nunique() >= MIN_LRS or _is_bracketed(rows) for rows in arms):
            most = max(rows["lr"].nunique() for rows in arms)
            lacking.append(f"at most {most} LRs of {METHOD_NAMES[runs['method'].iloc[0]]}")
    return ", ".join([*lacking, "no best LR between two others with these seeds"]) if lacking else None


def _is_bracketed(rows: pd.DataFrame) -> bool:
    """Return whether the best LR of an arm of RL lies between two worse ones, with MIN_SEEDS seeds at all three; a
    diverged or sick run is worse than any other."""
    by_lr = with_error_rates(rows).groupby("lr")
    losses = by_lr["validation_loss"].agg(lambda losses: losses.astype(float).fillna(1.0).mean())
    lrs = losses.index.tolist()
    lr = lowest(dict(zip(lrs, losses, strict=True)))
    best = 0 if lr is None else lrs.index(lr)
    seeds = by_lr["seed"].nunique().iloc[max(0, best - 1) : best + 2]
    return 0 < best < len(lrs) - 1 and bool((seeds >= MIN_SEEDS).all())


@condition(
    f"accuracies of every method {100 * LEAD:.0f} points above the best constant answer and cheap rule", *RL_PRESETS
)
def beats_controls(evidence: Evidence) -> str | None:
    # On one problem set at least.
    runs = evidence.runs
    rewarded = runs["status"].ne("unrewarded").groupby([runs["model"], runs["dataset"]]).transform("any")
    lead = leads(runs[rewarded.astype(bool)])
    if lead.empty or bool(beyond_controls(runs).any()):
        return None
    if lead["lead"].isna().all():
        return "the accuracies of the controls are not known"
    worst = lead.sort_values("lead").to_dict("records")[0]
    name = METHOD_NAMES[worst["method"]]
    controls = ", ".join(f"{text} {worst[column]:.3f}" for column, text in CONTROLS.items())
    return f"{worst['model']}/{worst['dataset']}: {name} {worst['accuracy']:.3f}, {controls}"


def response_length(tokens: int, presets: tuple[str, ...]) -> Condition:
    """Return the condition that responses of RL have a mean length."""

    @condition(f"responses of {tokens} tokens or more", *presets)
    def instead(evidence: Evidence) -> str | None:
        curves, length = evidence.curves, math.nan
        if not curves.empty:
            at_train = (curves["split"] == "train") & (curves["metric"] == "response_length")
            lengths = curves[at_train & curves["run_id"].isin(evidence.runs["run_id"])].astype({"value": float})
            length = lengths.groupby("run_id")["value"].mean().median()
        if pd.isna(length):
            # A source without lengths may state a length that the mean response has at least.
            length = evidence.runs.get("response_tokens", pd.Series(dtype=float)).astype(float).median()
        if pd.isna(length):
            return "no curves" if curves.empty else "response lengths are not known"
        return None if length >= tokens else f"{length:.1f} tokens on average"

    return instead
