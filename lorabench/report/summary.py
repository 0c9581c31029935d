"""The tables of the report: claims with their runs, noise, optima, scores of lm-eval, runs, work, machines and data."""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd

from lorabench.analysis.arms import arm_label, arm_labels, each_arm, is_standard
from lorabench.analysis.comparison import Judging, comparisons
from lorabench.analysis.fit_rows import MIN_LRS
from lorabench.analysis.rewards import is_sick, with_error_rates
from lorabench.claims.recipe import RankRecommendation
from lorabench.data.sft import about
from lorabench.data.tokens import count_left_out
from lorabench.figures.grid import fitted_noise, optimum
from lorabench.figures.verdicts import END, LINEAR, in_margins
from lorabench.planning.costs import combined, job_cost
from lorabench.planning.plan import Plan
from lorabench.report.claim_text import facts, in_order
from lorabench.store.checks import is_rl
from lorabench.store.io import list_of_words, with_all_columns
from lorabench.store.layout import Layout

Records = list[dict[Any, Any]]

_PLACE = ["model", "dataset", "batch_size", "steps"]
_SCORE = ["about", "task", "metric", "filter"]


def labelled(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs in reading order, with the name of their arm as `label` and `software`.

    The latter is the number, from 1, of the run's package versions in `environment`.
    """
    order = [*_PLACE, "method", "rank", "placement", "lr", "seed"]
    ordered = runs.sort_values(order, na_position="first").reset_index(drop=True)
    return ordered.assign(label=arm_labels(ordered), software=ordered["versions"].rank(method="dense"))


def claims(table: pd.DataFrame, runs: pd.DataFrame) -> Records:
    """Return each claim as a row, those of one fact next to each other, with the runs behind it as `runs`.

    `same_fact` holds the ids of the other claims that state the same fact, and `bar` the claim's numbers in units of
    its margin, as places on an axis.
    """

    def place(value: float) -> float:
        # The axis is one from 0 to 100, and logarithmic beyond LINEAR margins.
        size = min(abs(value), END)
        length = size if size <= LINEAR else LINEAR + math.log10(size / LINEAR)
        return round(50 + math.copysign(length, value) / (LINEAR + math.log10(END / LINEAR)) * 50, 1)

    known = runs[["run_id", "label", "model", "dataset", "lr", "seed", "status"]]
    stating = {claim_id: ids for ids in facts(table)["claim_ids"] for claim_id in ids}
    placed = in_margins(table).set_index("claim_id")[["x", "x_low", "x_high", "holds_from", "holds_to"]]
    shown = in_order(table).to_dict("records")
    for claim in shown:
        claim_id = claim["claim_id"]
        claim["runs"] = known[known["run_id"].isin(list_of_words(claim["run_ids"]))].to_dict("records")
        claim["same_fact"] = [other for other in stating[claim_id] if other != claim_id]
        numbers = placed.loc[claim_id]
        claim["bar"] = None if numbers.isna().any() else numbers.map(place).to_dict()
    return shown


def costs(runs: pd.DataFrame, recommendation: RankRecommendation) -> dict[str, Any]:
    """Return the median seconds and bytes of memory of a finished run of the recommended arm and of full fine-tuning.

    Each of `wall_s` and `peak_mem_bytes` is a pair; the second is that of full fine-tuning.
    """
    place = {name: recommendation.setting[name] for name in _PLACE}
    own = runs[(runs[_PLACE] == pd.Series(place)).all(axis=1) & (runs["status"] == "done")]
    arms = [own[own["label"] == choice.label] for choice in (recommendation.use, recommendation.fullft)]
    return {name: [arm[name].median() for arm in arms] for name in ("wall_s", "peak_mem_bytes")}


def experiment(name: str, runs: pd.DataFrame, judging: Judging) -> dict[str, Any] | None:
    """Return the seed noise, the optimal LR and best result of each LR-tuned arm, and the LR ratios of an experiment.

    All are numbers of the fits by which claims are judged. The result is the fitted lowest test NLL in nats per scored
    token, or in RL the highest test accuracy from 0 to 1: `best`, from `best_low` to `best_high` (95% interval).
    Returns None if the experiment has no LR-tuned arm.
    """
    runs = runs[[name in list_of_words(value) for value in runs["experiments"]]]
    rewarded = bool(is_rl(runs).any())
    runs = with_error_rates(runs) if rewarded else runs
    tuned = [arm_runs for _, arm_runs in each_arm(runs) if arm_runs["lr"].nunique() >= MIN_LRS]
    if not tuned:
        return None
    compared = comparisons(pd.concat(tuned), pd.DataFrame(), judging)
    noise = fitted_noise(compared).to_dict("records")
    names = ("lr_best", "lr", "lr_low", "lr_high", "nll", "nll_low", "nll_high", "ratio")
    unknown = dict.fromkeys(names, math.nan) | {"resolved": False, "at_edge": False, "n_seeds": 0}
    arms = []
    for comparison in compared:
        fit = comparison.fit
        for arm in comparison.arms:
            label = arm_label(arm)
            grid = comparison.rows[label].loc[lambda rows: rows["seed"] == rows["seed"].min()]
            row: dict[str, Any] = arm | unknown | (optimum(comparison, arm) or {})
            if label in fit.optima:
                # At the edge of a grid too, it is the optimum of which the ratio and the recipe are.
                row["lr"] = math.exp(fit.optima[label].value)
            best = [row[name] for name in ("nll", "nll_low", "nll_high")]
            # A low error is a high accuracy.
            best = [1 - best[0], 1 - best[2], 1 - best[1]] if rewarded else best
            row |= dict(zip(("best", "best_low", "best_high"), best, strict=True))
            row |= {"label": label, "n_runs": len(grid), "n_diverged": int((grid["status"] == "diverged").sum())}
            row |= {"standard": bool(is_standard(comparison.rows[label]).all()), "ratio_resolved": False}
            if comparison.fullft and arm["method"] != "fullft":
                ratio = fit.log_ratio(label, "FullFT")
                low, high = map(math.exp, ratio.interval())
                row |= {"ratio": math.exp(ratio.value), "ratio_low": low, "ratio_high": high}
                row["ratio_resolved"] = fit.resolved.get(label, False) and fit.resolved.get("FullFT", False)
            arms.append(row)
        comparison.forget()
    return {"name": name, "result": "accuracy" if rewarded else "NLL", "noise": noise, "arms": arms}


def evaluation(evals: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the scores of lm-eval, in one table per model, dataset, batch size and length.

    In each, `tasks` describes the columns, and `arms` are the rows, the base first; the `scores` of a row are in the
    order of `tasks`, None where a score is missing.
    """
    if evals.empty:
        return []
    evals = with_all_columns(evals, "evals")
    # Perplexities of tasks that have bits per byte are the same on another scale.
    bits = evals.loc[evals["metric"] == "bits_per_byte", "task"]
    evals = evals[~(evals["task"].isin(bits) & evals["metric"].isin(["word_perplexity", "byte_perplexity"]))]
    base, trained = evals[evals["method"].isna()], labelled(evals[evals["method"].notna()])
    tables = []
    for place, setting in trained.groupby(_PLACE, dropna=False):
        base_scores = base[base["model"] == place[0]].assign(label="base")
        scores = pd.concat([base_scores, setting], ignore_index=True)
        columns = sorted(scores.groupby(_SCORE, dropna=False, sort=False), key=lambda column: column[0][0] != "learned")
        arms = []
        for _, rows in scores.groupby(["label", "run_id"], dropna=False, sort=False):
            parts = [rows.loc[rows.index.intersection(column.index), ["value", "stderr"]] for _, column in columns]
            values = [None if score.empty else score.iloc[0].to_dict() for score in parts]
            arms.append(rows[["label", "lr", "run_id"]].iloc[0].to_dict() | {"scores": values})
        tasks = [dict(zip(_SCORE, key, strict=True)) | _settings(column) for key, column in columns]
        tables.append(dict(zip(_PLACE, place, strict=True)) | _settings(scores) | {"tasks": tasks, "arms": arms})
    return tables


def _settings(scores: pd.DataFrame) -> dict[str, list[Any]]:
    """Return the settings of scores; each list has a single value if all scores were measured alike."""
    names = ("higher_is_better", "n_samples", "num_fewshot", "task_version", "sampler", "eval_batch_size")
    versions = {packages["lm_eval"] for packages in _versions(scores) if "lm_eval" in packages}
    return {name: _distinct(scores[name]) for name in names} | {"lm_eval": sorted(versions)}


def environment(runs: pd.DataFrame) -> dict[str, Any]:
    """Return the devices, code and package versions of the runs; most are lists, since machines may differ."""
    return {
        "devices": _distinct(runs["device"]),
        "hosts": int(runs["host"].nunique()),
        "threads": _distinct(runs["threads"]),
        "commits": _distinct(runs["git_sha"]),
        "dirty": int(runs["git_dirty_patch"].notna().sum()),
        "started": (runs["started"].min(), runs["started"].max()),
        "versions": _versions(runs),
    }


def _versions(table: pd.DataFrame) -> list[dict[str, str]]:
    """Return the versions of packages, by name, that occur in the column `versions`."""
    return [json.loads(text) for text in _distinct(table["versions"])]


def work(plan: Plan, runs: pd.DataFrame) -> dict[str, Any]:
    """Return the runs, tokens, FLOPs and seconds (one job at a time) that were planned, and that were spent."""
    planned = combined(job_cost(plan, job) for job in plan.jobs)
    names = {"tokens": "train_tokens", "flops": "train_flops", "seconds": "wall_s"}
    expected = {"runs": planned.runs, "tokens": planned.tokens, "flops": planned.flops}
    statuses = ("done", "diverged", "unrewarded", "collapsed")
    return {
        "planned": expected | {"seconds": planned.job_hours * 3600},
        "spent": {"runs": len(runs)} | {name: runs[column].sum() for name, column in names.items()},
        "jobs": planned.jobs,
        **{status: int((runs["status"] == status).sum()) for status in statuses},
        # Runs of RL that finished and count as diverged.
        "broken": int((is_rl(runs) & (runs["status"] == "done") & is_sick(runs)).sum()),
    }


def inputs(runs: pd.DataFrame) -> Records:
    """Return the hashes of model, data, tokenizer and chat template, once for each combination."""
    hashes = ["model_sha256", "dataset_sha256", "tokenizer_sha256", "template_sha256", "test_data"]
    return runs.reindex(columns=["model", "dataset", *hashes]).drop_duplicates().to_dict("records")


def dataset_origins(layout: Layout) -> list[dict[str, Any]]:
    """Describe each dataset that comes from a file or the hub, and each other one from which something was left out.

    Each has `name`, `source`, the numbers of all `rows` and of `usable` ones (null if the dataset is generated), and
    `left_out`, texts that say how many examples were left out and why.
    """
    described = []
    for name in layout.preset.sources:
        tally, path = layout.tally(name), layout.dataset(name)
        row: dict[str, Any] = {"name": name, "source": "generated", "rows": None, "usable": None, "left_out": []}
        if tally.is_file():
            read = json.loads(tally.read_text())
            row |= {"source": f"file, {read['format']}", "rows": read["rows"], "usable": read["usable"]}
            for bad in read["bad"]:
                row["left_out"].append(f"{bad['rows']} {bad['reason']} (first: row {bad['first']})")
        elif path.is_file() and (note := about(path)):
            row |= {"source": note["id"], "rows": note["rows"], "usable": note["usable"]}
            row["left_out"] = [f"{count} {reason}" for reason, count in note["left_out"].items() if count]
        for model in layout.preset.models if name in layout.preset.datasets else ():
            tokens = layout.tokens(model, name)
            counts = count_left_out(tokens) if tokens.is_file() else {}
            too_long = "with more tokens than max_tokens for"
            row["left_out"] += [f"{count} of {split} {too_long} {model}" for split, count in counts.items() if count]
        if row["source"] != "generated" or row["left_out"]:
            described.append(row)
    return described


def _distinct(column: pd.Series[Any]) -> list[Any]:
    return sorted(column.dropna().unique())
