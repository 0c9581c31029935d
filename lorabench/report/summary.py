"""The tables of the report: claims with their runs, seed noise, optima, scores of lm-eval, runs, work and machines."""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd

from lorabench.analysis.arms import ARM, arm_label, each_arm
from lorabench.analysis.comparison import MIN_LRS, Judging, comparisons
from lorabench.analysis.gaps import best_losses
from lorabench.analysis.noise import seed_noise
from lorabench.analysis.optima import lr_optima
from lorabench.analysis.rewards import with_error_rates
from lorabench.analysis.rl_health import sampler_mismatch
from lorabench.analysis.studies import over_studies, seed_studies
from lorabench.planning import bill
from lorabench.planning.plan import Plan
from lorabench.report.facts import KINDS, VERDICTS, facts, in_order
from lorabench.runs import MAX_KL
from lorabench.store.checks import is_rl
from lorabench.store.io import list_of_words, with_all_columns

Records = list[dict[str, Any]]

_PLACE = ["model", "dataset", "batch_size", "steps"]
_RESULTS = ["best_mean", "best_median", "best_low", "best_high"]
_SCORE = ["about", "task", "metric", "filter"]
_INPUTS = ["model_sha256", "dataset_sha256", "tokenizer_sha256", "template_sha256"]


def labelled(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs in reading order, with the name of their arm as `label`."""
    order = ["model", "dataset", "batch_size", "steps", "method", "rank", "placement", "lr", "seed"]
    ordered = runs.sort_values(order, na_position="first").reset_index(drop=True)
    return ordered.assign(label=[arm_label(row) for _, row in ordered.iterrows()])


def claims(table: pd.DataFrame, runs: pd.DataFrame) -> Records:
    """Return each claim as a row, those of one fact next to each other, with the runs behind it as `runs`.

    `same_fact` holds the ids of the other claims that state the same fact, and `first` says whether the claim is the
    first of them.
    """
    known = runs.set_index("run_id")[["label", "model", "dataset", "lr", "seed", "status"]].to_dict("index")
    stating = {claim_id: fact.claim_ids for fact in facts(table) for claim_id in fact.claim_ids}
    shown = []
    for claim in _records(in_order(table)):
        together = stating[claim["claim_id"]]
        run_ids = [run_id for run_id in list_of_words(claim["run_ids"]) if run_id in known]
        shown.append(
            claim
            | {
                "runs": [{"run_id": run_id, **known[run_id]} for run_id in run_ids],
                "same_fact": [other for other in together if other != claim["claim_id"]],
                "first": together[0] == claim["claim_id"],
            }
        )
    return shown


def tally(table: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """Return, for each group of KINDS that occurs, its verdicts: `verdict`, and `facts`, each the ids of its claims."""
    stated = facts(table)
    groups = {}
    for group in KINDS:
        of_group = [fact for fact in stated if fact.group == group]
        if of_group:
            groups[group] = [
                {"verdict": verdict, "facts": [fact.claim_ids for fact in of_group if fact.verdict == verdict]}
                for verdict in VERDICTS
            ]
    return groups


def experiment(name: str, runs: pd.DataFrame, judging: Judging) -> dict[str, Any] | None:
    """Return the seed noise, the optimal LR and best result of each LR-tuned arm, and the LR ratios of an experiment.

    The result is the test NLL in nats per scored token, or in RL the test accuracy from 0 to 1. It is in best_mean (at
    the best LR, mean over seeds) and in best_median, best_low and best_high (at each seed's own best LR, over seeds).
    Returns None if the experiment has no LR-tuned arm.
    """
    runs = runs[[name in list_of_words(value) for value in runs["experiments"]]]
    rewarded = bool(is_rl(runs).any())
    runs = with_error_rates(runs) if rewarded else runs
    tuned = [of_arm for _, of_arm in each_arm(runs) if of_arm["lr"].nunique() >= MIN_LRS]
    if not tuned:
        return None
    runs = pd.concat(tuned)
    noise = seed_noise(runs)
    losses = best_losses(runs)[[*ARM, "lr_best", "loss_mean", "loss_sd", "n_seeds"]]
    arms = lr_optima(runs, judging).drop(columns="lr_best").merge(losses, on=ARM, how="left")
    arms = arms.merge(over_studies(seed_studies(runs)), on=ARM, how="left")
    arms["label"] = [arm_label(row) for _, row in arms.iterrows()]
    # A low error is a high accuracy.
    ends = ("loss_max", "loss_min") if rewarded else ("loss_min", "loss_max")
    for column, loss in zip(_RESULTS, ("loss_mean", "loss_median", *ends), strict=True):
        arms[column] = 1 - arms[loss] if rewarded else arms[loss]
    return {
        "name": name,
        "result": "accuracy" if rewarded else "NLL",
        "noise": noise.to_dict("records"),
        "arms": arms.to_dict("records"),
        "studies": bool((arms["n_studies"] > 1).any()),
        "ratios": _ratios(runs, judging),
    }


def _ratios(runs: pd.DataFrame, judging: Judging) -> Records:
    """Return the optimal LR of each LoRA arm over that of FullFT on the same model, dataset, batch size and length."""
    rows: Records = []
    for comparison in comparisons(runs, pd.DataFrame(), judging):
        fullft = comparison.fullft
        for arm in comparison.arms if fullft else []:
            label = arm_label(arm)
            if arm["method"] == "lora":
                ratio = comparison.fit.log_ratio(label, "FullFT")
                low, high = (math.exp(end) for end in ratio.interval())
                row = {name: arm[name] for name in _PLACE} | {"label": label, "ratio": math.exp(ratio.value)}
                row |= {"low": None if math.isnan(low) else low, "high": None if math.isnan(high) else high}
                resolved = [comparison.fit.resolved.get(name, False) for name in (label, "FullFT")]
                rows.append(row | {"resolved": all(resolved)})
    return rows


def sampler(plan: Plan, runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Any]:
    """Return how far the sampler's distribution is from the learner's in each arm of RL.

    Returns:
        `arms`, the rows of `sampler_mismatch` with their `label` and the name of their `sampler` (a list, empty
        for runs that are not in the plan); `names` of all samplers; `n_above`, the number of runs above the KL `limit`.
    """
    names = {
        run_id: sweep.condition.rollouts.sampler
        for sweep in plan.sweeps
        if sweep.condition.rollouts
        for run_id in sweep.run_ids
    }
    arms = _records(sampler_mismatch(runs, curves))
    for row in arms:
        row["label"] = arm_label(row)
        row["sampler"] = sorted({names[run_id] for run_id in row["run_ids"] if run_id in names})
    return {
        "arms": arms,
        "names": sorted({name for row in arms for name in row["sampler"]}),
        "n_above": sum(row["n_above"] for row in arms),
        "limit": MAX_KL,
    }


def evaluation(evals: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the scores of lm-eval, in one table per model, dataset, batch size and length.

    In each, `tasks` describes the columns, and `arms` are the rows, the base first; the `scores` of a row are in the
    order of `tasks`, None where a score is missing.
    """
    if evals.empty:
        return []
    evals = _without_perplexities(with_all_columns(evals, "evals"))
    base, trained = evals[evals["method"].isna()], labelled(evals[evals["method"].notna()])
    tables = []
    for place, of_place in trained.groupby(_PLACE, dropna=False):
        of_base = base[base["model"] == place[0]].assign(label="base")
        scores = pd.concat([of_base, of_place], ignore_index=True)
        columns = sorted(scores.groupby(_SCORE, dropna=False, sort=False), key=lambda column: column[0][0] != "learned")
        arms = [
            {
                **{name: of_arm[name].iloc[0] for name in ("label", "lr", "run_id")},
                "scores": [_of_score(of_arm, column) for _, column in columns],
            }
            for _, of_arm in scores.groupby(["label", "run_id"], dropna=False, sort=False)
        ]
        tasks = [dict(zip(_SCORE, key, strict=True)) | _settings(column) for key, column in columns]
        tables.append(dict(zip(_PLACE, place, strict=True)) | _settings(scores) | {"tasks": tasks, "arms": arms})
    return tables


def _without_perplexities(evals: pd.DataFrame) -> pd.DataFrame:
    """Leave out perplexities of tasks that have bits per byte, which is the same on another scale."""
    bits = evals.loc[evals["metric"] == "bits_per_byte", "task"]
    repeated = evals["task"].isin(bits) & evals["metric"].isin(["word_perplexity", "byte_perplexity"])
    return evals[~repeated]


def _of_score(of_arm: pd.DataFrame, column: pd.DataFrame) -> dict[str, Any] | None:
    """Return the value of an arm in a column, and its standard error."""
    of_column = of_arm.loc[of_arm.index.intersection(column.index), ["value", "stderr"]]
    return None if of_column.empty else {str(name): value for name, value in of_column.iloc[0].items()}


def _settings(scores: pd.DataFrame) -> dict[str, list[Any]]:
    """Return the settings of scores; each list has a single value if all scores were measured alike."""
    names = ("higher_is_better", "n_samples", "num_fewshot", "task_version", "sampler", "eval_batch_size")
    versions = [_versions(text).get("lm_eval") for text in _distinct(scores["versions"])]
    return {name: _distinct(scores[name]) for name in names} | {"lm_eval": sorted({name for name in versions if name})}


def environment(runs: pd.DataFrame) -> dict[str, Any]:
    """Return the devices, code and package versions of the runs; most are lists, since machines may differ."""
    return {
        "devices": _distinct(runs["device"]),
        "hosts": int(runs["host"].nunique()),
        "threads": _distinct(runs["threads"]),
        "commits": _distinct(runs["git_sha"]),
        "dirty": int(runs["git_dirty_patch"].notna().sum()),
        "started": (runs["started"].min(), runs["started"].max()),
        "versions": [_versions(text) for text in _distinct(runs["versions"])],
    }


def work(plan: Plan, runs: pd.DataFrame) -> dict[str, Any]:
    """Return the runs, tokens, FLOPs and seconds (one job at a time) that were planned, and that were spent."""
    planned = bill.training(plan, plan.jobs)
    return {
        "planned": {
            "runs": planned.runs,
            "tokens": planned.tokens,
            "flops": planned.flops,
            "seconds": planned.job_hours * 3600,
        },
        "spent": {
            "runs": len(runs),
            "tokens": runs["train_tokens"].sum(),
            "flops": runs["train_flops"].sum(),
            "seconds": runs["wall_s"].sum(),
        },
        "done": int((runs["status"] == "done").sum()),
        "diverged": int((runs["status"] == "diverged").sum()),
        "unrewarded": int((runs["status"] == "unrewarded").sum()),
        "jobs": planned.jobs,
    }


def runs_with_versions(runs: pd.DataFrame) -> Records:
    """Return every run as a row; `software` is the number, from 1, of its package versions in `environment`."""
    sets = _distinct(runs["versions"])
    return _records(runs.assign(software=runs["versions"].map({text: place for place, text in enumerate(sets, 1)})))


def inputs(runs: pd.DataFrame) -> Records:
    """Return the hashes of model, data, tokenizer and chat template, once for each combination."""
    return _records(runs[["model", "dataset", *_INPUTS]].drop_duplicates())


def _records(frame: pd.DataFrame) -> Records:
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def _distinct(column: pd.Series[Any]) -> list[Any]:
    return sorted(column.dropna().unique())


def _versions(text: str) -> dict[str, str]:
    """Parse package versions; a text that is not a JSON object, as in tables made by hand, is shown unparsed."""
    try:
        versions = json.loads(text)
    except ValueError:
        versions = None
    return versions if isinstance(versions, dict) else {"versions": text}
