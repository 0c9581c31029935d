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
from collections.abc import Iterable, Sequence
from itertools import product
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
from lorabench.utils.markdown import table as markdown_table
from lorabench.utils.markdown import write_part

Condition = tuple[str, ...]
"""A source, a model, a dataset, a batch size and a number of steps, as text (`condition_of`)."""

RULES = ("ten", "fifteen", "movement", "recommend")
"""The rules in the order of the page."""

SHOWN_TASKS = {"sft": "SFT, nats", "rl": "RL, accuracy"}
PAGE = Path("studies/lr_ratio/README.md")

_PLACE = ["model", "dataset", "batch_size", "steps"]
_FIGURES = (
    ("fig1_envelopes", "before_training", "envelope", "nll", -1),
    ("fig6_rl_lr", "base", "accuracy", "accuracy", 1),
)
"""Figures whose tables have the base and full fine-tuning: their elements, their values, and which sign is better."""


def regrets(optima: Sequence[LrOptimum], gains: dict[Condition, float]) -> pd.DataFrame:
    """Return what LRs by each rule cost LoRA, one row per condition, by the width of the model and the length.

    Args:
        optima: all that are known.
        gains: what FullFT gains in nats per token, in RL in accuracy, as far as it is known.

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
            gain, margin = gains.get(condition_of(lora), math.nan), DEFAULT_MARGINS.reward
            if not lora.rl:
                margin = min(DEFAULT_MARGINS.loss * gain, DEFAULT_MARGINS.final_loss * min(own.losses))
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


def known_gains(sources: Sequence[SourceModel], presets: Sequence[Path]) -> dict[Condition, float]:
    """Return what FullFT gains over the base at its best LR, in conditions of sources and published presets.

    Both losses are of the same examples, as in the margins of claims: of validation, or, where a source has no other
    loss of the base than that of its first batch, of training. In RL both accuracies are of the test problems.
    """
    gains: dict[Condition, float] = {}
    for source in sources:
        curves = source.tables.curves
        for runs in source.conditions():
            fullft = runs[runs["method"].eq("fullft") & runs["status"].eq("done")]
            if fullft.empty:
                continue
            best = fullft[fullft["lr"] == fullft.groupby("lr")["loss"].mean().idxmin()]
            if source.is_rl:
                gain = float(best["final_reward"].mean()) - float(runs["base_reward"].mean())
            else:
                losses = curves[curves["run_id"].isin(runs["run_id"]) & curves["metric"].eq("nll")]
                first, after = losses[losses["split"].eq("validation") & losses["step"].eq(0)], "final_valid_nll"
                if first.empty:
                    first, after = losses[losses["split"].eq("train") & losses["step"].eq(1)], "final_train_nll"
                gain = float(first["value"].mean()) - float(best[after].mean())
            gains[_condition(source.folder, runs[_PLACE].iloc[0])] = gain
    for folder, (figure, before, after, value, sign) in product(presets, _FIGURES):
        path = folder / f"{figure}.csv"
        if not path.is_file():
            continue
        for place, rows in pd.read_csv(path).groupby(_PLACE):
            # In the first figure all points of the learning curve, so the last step counts.
            tuned = rows[rows["element"].eq(after) & rows["method"].eq("fullft")]
            tuned = tuned[tuned["step"] == tuned["step"].max()] if "step" in tuned else tuned
            base = float(rows.loc[rows["element"].eq(before), value].mean())
            gains[_condition(PROJECT, place)] = float((sign * (tuned[value] - base)).max())
    return gains


def page_part(costs: pd.DataFrame) -> str:
    """Return the table of the page: by task and source, the median and the worst cost of each rule."""
    lines = []
    for (task, source), rows in costs.groupby(["task", "source"], sort=False):
        line = [SHOWN_TASKS[str(task)], str(source), f"{len(rows)}"]
        margins = rows["margin"].dropna()
        line.append("not known" if margins.empty else f"{margins.median():.2g}")
        for rule in RULES:
            worst = rows.nlargest(1, f"{rule}_cost").iloc[0]
            # A cost beyond the grid is a least one.
            bound = "≥ " if worst[f"{rule}_at_least"] else ""
            line.append(f"{rows[f'{rule}_cost'].median():.2g}, {bound}{worst[f'{rule}_cost']:.2g}")
        lines.append(line)
    header = ["task", "source", "conditions", "margin", "ten", "fifteen", "`movement`", "pooled"]
    return "\n".join(["", *markdown_table(header, lines), ""])


def _condition(source: str, place: Iterable[Any]) -> Condition:
    model, dataset, batch_size, steps = place
    return source, model, dataset, str(float(batch_size)), str(float(steps))


def main() -> None:
    """Write the costs in all shipped sources and published presets, also into the page."""
    sources, presets = read_sources(source_folders()), evidence_folders(Path())
    costs = regrets(known_optima(sources, presets), known_gains(sources, presets))
    write_csv(costs, Path() / PUBLISHED / "evidence" / "lr_ratio_regret.csv")
    write_part(PAGE, "regret", "`python -m studies.lr_ratio.scripts.regret`", page_part(costs))


if __name__ == "__main__":
    main()
