"""Published numbers to compare with, from `paper_figures/reference` (its SOURCES.md names the sources)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache

import numpy as np
import pandas as pd

from lorabench.runs import lowest
from lorabench.utils.files import REFERENCE

SWEEP_COLUMNS = ["source", "model", "dataset", "family", "hidden_size", "method", "rank", "placement", "lr", "nll"]
"""The columns of `published_sweeps`; nll is the final test NLL in nats per token."""

# These facts are in the text of the sources, not in the files. Hidden sizes are from the models' configurations.
_TINKER, _REPLICATION = "tinker-cookbook", "michaelbzhu"
_HIDDEN_SIZES = {
    "llama-3.2-1b": 2048,
    "llama-3.2-3b": 3072,
    "llama-3.1-8b": 4096,
    "llama-3.1-8b-instruct": 4096,
    "qwen3-4b": 2560,
    "qwen3-8b": 4096,
    "qwen3-8b-base": 4096,
    "qwen3-30b-a3b": 2048,
    "qwen3-30b-a3b-base": 2048,
}
_DATASETS = {"tulu3": "tulu3", "tulu3sftmixture": "tulu3", "norobots": "norobots"}


def paper_numbers() -> dict[str, float]:
    """Return the numbers printed in the paper, by their key in `paper_numbers.csv`."""
    table = pd.read_csv(REFERENCE / "paper_numbers.csv")
    return dict(zip(table["key"], table["value"].astype(float), strict=True))


def published_sweeps() -> pd.DataFrame:
    """Return published final test losses by LR (SWEEP_COLUMNS), a mean for each model, method, rank, placement and LR:
    of `tinker-cookbook` the whole LR grid of LoRA, of `michaelbzhu` the best LR of each arm."""
    sweep = pd.read_csv(REFERENCE / "tinker_sft_sweep.csv")
    cells = sweep.groupby(["model", "rank", "lr"], as_index=False).agg(nll=("test_nll", "mean"))
    cells = cells.assign(source=_TINKER, dataset="tulu3", method="lora", placement="all")
    best = pd.read_csv(REFERENCE / "replication_michaelbzhu_sft.csv")
    best = best.rename(columns={"best_lr": "lr", "test_nll": "nll"})
    best = best.assign(source=_REPLICATION, model="Qwen/Qwen3-4B", dataset="norobots")
    table = pd.concat([cells, best], ignore_index=True)
    names = table["model"].map(_short)
    table["hidden_size"] = names.map(_HIDDEN_SIZES)
    table["family"] = names.str.split(r"[-\d]", regex=True).str[0]
    return table.reindex(columns=SWEEP_COLUMNS).astype({"rank": "Int64", "hidden_size": "Int64"})


def published_ratios() -> pd.DataFrame:
    """Return published ratios of LoRA's to FullFT's optimal LR, on models of 0.6B parameters and more: source, task,
    model, alpha, steps and note, and the lower and upper end of width, fullft_lr, lora_lr and ratio, as `<name>_low`
    and `<name>_high`; NaN where the source does not say."""
    return pd.read_csv(REFERENCE / "lr_ratio_at_scale.csv")


def sweep_of(model: str, dataset: str) -> pd.DataFrame:
    """Return the rows of `published_sweeps` for a model and a dataset; owner and case of their names do not matter."""
    table = published_sweeps()
    same_model = table["model"].map(_short) == _short(model)
    known = _DATASETS.get(re.sub("[^a-z0-9]", "", dataset.rsplit("/", 1)[-1].lower()))
    return table[same_model & (table["dataset"] == known)]


@cache
def estimates_by_claim() -> Mapping[str, str]:
    """Return the estimates of claims from published runs as text with model, data and source, by claim id."""
    replicated = sweep_of("Qwen3-4B", "norobots")
    arms = zip(replicated["rank"].fillna(0), replicated["placement"].fillna(""), strict=True)
    labels = [f"LoRA r{rank} {placement}" if rank > 0 else "FullFT" for rank, placement in arms]
    lr, nll = (dict(zip(labels, replicated[column], strict=True)) for column in ("lr", "nll"))
    best = "LoRA r256 all"
    gap = f"{nll[best] - nll['FullFT']:.4f} nats"
    values = {
        "A7": gap,
        "B1": f"{lr[best] / lr['FullFT']:.3g}",
        "B2": gap,
        "B4": f"{lr['LoRA r1 all'] / lr[best]:.2g}",
        "E2": f"{nll['LoRA r256 mlp'] - nll[best]:.4f} nats",
    }
    about = f"(Qwen3-4B, No Robots, one seed; {_REPLICATION})"
    llama = sweep_of("Llama-3.1-8B", "tulu3")
    optima = {}
    for rank in sorted(set(llama["rank"])):
        grid = llama[llama["rank"] == rank].sort_values("lr")
        # The best LR and its neighbours; it is at no edge.
        place = grid["lr"].tolist().index(lowest(dict(zip(grid["lr"], grid["nll"], strict=True))))
        around = grid.iloc[place - 1 : place + 2]
        optima[int(rank)] = math.exp(vertex(np.log(around["lr"].to_numpy()), around["nll"].to_numpy()))
    low, high = min(optima), max(optima)
    shift = f"{optima[high] / optima[low]:.2f} from rank {low} to {high} (Llama-3.1-8B, Tulu3, one seed; {_TINKER})"
    return {claim: f"{value} {about}" for claim, value in values.items()} | {"B3": shift}


def vertex(x: np.ndarray, y: np.ndarray) -> float:
    """Return the position of the lowest point of the parabola through three points whose middle is the lowest, and that
    position if all are equal."""
    (left, _, right), (rise_left, _, rise_right) = (x - x[1]).tolist(), (y - y[1]).tolist()
    curvature = rise_left * right - rise_right * left
    shift = (rise_left * right**2 - rise_right * left**2) / (2 * curvature) if curvature else 0.0
    return float(x[1] + shift)


def _short(model: str) -> str:
    # `meta-llama/Llama-3.1-8B` becomes `llama-3.1-8b`.
    return model.rsplit("/", 1)[-1].lower()
