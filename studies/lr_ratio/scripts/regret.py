"""What wrong learning rates cost LoRA at every scale: the rise of its loss over the lowest one of its grid.

    python -m studies.lr_ratio.scripts.regret

The table is written into paper_figures/published/evidence. It has a row for each condition of a shipped source or a
published preset in which LoRA has a grid of LRs and the optimal LR of full fine-tuning is known, and in it the cost of

- ten and fifteen times FullFT's optimal LR, at alpha 32;
- `movement`: as many times as the theory of the page says;
- `recommend`: the LR that is pooled from all other sources, as in advice/benchmarks/lr_left_out.py, where nothing of
  FullFT is known.

Losses are interpolated in ln LR (monotone cubic); beyond the grid, the cost is at least that of its edge. The published
sweep of the paper's authors has no FullFT, whose LR is then that of their law.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from advice.benchmarks.lr_left_out import condition_of, left_out, loss_above_best, movement_ratio, pooled_optimum
from lorabench.analysis.lr_law import PUBLISHED as LAW
from lorabench.analysis.lr_law import lineage, predict_lr
from lorabench.config.margins import DEFAULT_MARGINS
from lorabench.sources.lr_optima import AUTHORS, LrOptimum, known_optima
from lorabench.sources.measurements import PROJECT
from lorabench.sources.source import SourceModel, read_sources, source_folders
from lorabench.store.io import write_csv
from lorabench.store.published import PUBLISHED, evidence_folders

Base = tuple[str, str, str]
"""A source, a model and a dataset."""


def regrets(optima: Sequence[LrOptimum], before: dict[Base, float]) -> pd.DataFrame:
    """Return what LRs by each rule cost LoRA, one row per condition, by the width of the model and the length.

    Args:
        optima: all that are known.
        before: losses before training, in RL error rates, by source, model and dataset, as far as they are known.

    Returns:
        `NAME_cost` is in nats per token, in RL in accuracy, `NAME_margins` in margins of the default rules, and
        `NAME_share` a share of what FullFT gains, as far as these are known. With `NAME_at_least`, the LR is beyond the
        grid, or the lowest loss at its edge. `fullft` says where FullFT's LR is from.
    """
    fullft = {(known.rl, *condition_of(known)): known for known in optima if known.method == "fullft"}
    pooled = left_out(optima)
    pooled = pooled[(pooled["rule"] == "pooled") & (pooled["method"] == "lora")]
    names = ["source", "model", "dataset", "batch_size", "steps"]
    recommended = {
        (task == "rl", *map(str, place)): float(lr)
        for task, lr, *place in pooled[["task", "predicted", *names]].itertuples(index=False, name=None)
    }
    rows = []
    for lora in optima:
        if lora.method != "lora" or len(lora.losses) < 2:
            continue
        key = (lora.rl, *condition_of(lora))
        own, remark = fullft.get(key), "its grid"
        if own is not None:
            log_fullft = math.log(own.lr)
            remark = "its grid" if own.counts else "the edge of its grid"
        elif lora.source == AUTHORS:
            log_fullft, remark = math.log(predict_lr(LAW, lineage(lora.family), lora.width, "fullft")), "the law"
        else:
            continue
        row: dict[str, Any] = {name: getattr(lora, name) for name in ("source", "model", "width", "dataset")}
        row |= {"task": "rl" if lora.rl else "sft", "batch_size": lora.batch_size, "steps": lora.steps}
        row |= {"fullft_lr": math.exp(log_fullft), "fullft": remark}
        row |= {"lora_lr": lora.lr if lora.counts else math.nan, "movement": movement_ratio(lora, log_fullft)}
        gain = margin = math.nan
        if own is not None and own.losses:
            lowest = min(own.losses)
            gain = before.get((lora.source, lora.model, lora.dataset), math.nan) - lowest
            margin = DEFAULT_MARGINS.reward
            if not lora.rl:
                margin = min(DEFAULT_MARGINS.loss * gain, DEFAULT_MARGINS.final_loss * lowest)
        shift = pooled_optimum(lora).shift
        at = {"ten": log_fullft + math.log(10) - shift, "fifteen": log_fullft + math.log(15) - shift}
        at["movement"] = log_fullft + math.log(row["movement"])
        at["recommend"] = math.log(recommended[key])
        for name, log_lr in at.items():
            cost, beyond = loss_above_best(lora, log_lr)
            row |= {f"{name}_cost": cost, f"{name}_margins": cost / margin, f"{name}_share": cost / gain}
            row[f"{name}_at_least"] = beyond or not lora.counts
        rows.append(row | {"gain": gain, "margin": margin})
    return pd.DataFrame(rows).sort_values(["task", "width", "steps"], ascending=[False, True, True], kind="stable")


def losses_before_training(sources: Sequence[SourceModel], presets: Sequence[Path]) -> dict[Base, float]:
    """Return the losses before training, in RL the error rates, of sources and published presets."""
    before: dict[Base, float] = {}
    for source in sources:
        runs, curves = source.tables.runs, source.tables.curves
        for dataset, rows in runs.groupby("dataset"):
            if source.is_rl:
                value = 1 - float(rows["base_reward"].astype(float).mean()) if "base_reward" in rows else math.nan
            else:
                losses = curves[curves["run_id"].isin(rows["run_id"]) & curves["metric"].eq("nll")]
                first = losses[losses["split"].eq("validation") & losses["step"].eq(0)]
                if first.empty:
                    # The loss of the first batch, before the first step.
                    first = losses[losses["split"].eq("train") & losses["step"].eq(1)]
                value = float(first["value"].astype(float).mean())
            before[source.folder, source.model, str(dataset)] = value
    for folder in presets:
        for figure, element, column in (
            ("fig1_envelopes", "before_training", "nll"),
            ("fig6_rl_lr", "base", "accuracy"),
        ):
            path = folder / f"{figure}.csv"
            table = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=["element"])
            for row in table[table["element"] == element].to_dict("records"):
                value = float(row[column])
                before[PROJECT, row["model"], row["dataset"]] = value if column == "nll" else 1 - value
    return before


def main() -> None:
    """Write and print the costs in all shipped sources and published presets."""
    sources, presets = read_sources(source_folders()), evidence_folders(Path())
    costs = regrets(known_optima(sources, presets), losses_before_training(sources, presets))
    write_csv(costs, Path() / PUBLISHED / "evidence" / "lr_ratio_regret.csv")
    print(costs.to_string(index=False, float_format="{:.3g}".format))


if __name__ == "__main__":
    main()
