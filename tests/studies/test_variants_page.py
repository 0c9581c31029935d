"""What the page on variants says of the numbers of others follows from their tables."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from ..conftest import REPOSITORY

REFERENCE = REPOSITORY / "paper_figures/reference"
PAGE = " ".join((REPOSITORY / "studies/variants/README.md").read_text().split())


@pytest.fixture(scope="module")
def accuracies():
    return pd.read_csv(REFERENCE / "variants_of_others.csv")


def within_one_point(runs: pd.DataFrame) -> tuple[float, float]:
    """Return the lowest and highest LR within a point of the best accuracy, interpolated over the log of the LR."""
    lrs, excess = np.log(runs["lr"].to_numpy()), runs["accuracy"].max() - 0.01 - runs["accuracy"].to_numpy()
    first, last = np.flatnonzero(excess <= 0)[[0, -1]]
    low = np.interp(0, excess[[first, first - 1]], lrs[[first, first - 1]])
    high = np.interp(0, excess[[last, last + 1]], lrs[[last, last + 1]])
    return float(np.exp(low)), float(np.exp(high))


def scientific(lr: float) -> str:
    return f"{lr:.1e}".replace("e-0", "e-")


def test_accuracies_over_the_learning_rate(accuracies):
    grids = dict(list(accuracies[accuracies["model"] == "Qwen3-0.6B-Base"].groupby("method")))
    span, middle = {}, {}
    for method in ("lora", "dora", "pissa"):
        best = grids[method].loc[grids[method]["accuracy"].idxmax()]
        low, high = within_one_point(grids[method])
        span[method], middle[method] = high / low, np.sqrt(low * high)
        accuracy = f"{best.accuracy * 100:.2f} ± {best.accuracy_sd:.2%}"
        assert f"| `{method}` | {accuracy} | {scientific(best.lr)} | {scientific(low)} to {scientific(high)} |" in PAGE
    olora, gralora = (grids[method].iloc[0] for method in ("olora", "gralora"))
    assert f"| `olora` | {olora.accuracy:.2%} | {scientific(olora.lr)} |" in PAGE
    assert f"GraLoRA, has {gralora.accuracy:.2%}" in PAGE
    assert f"{span['lora']:.1f} for LoRA, {span['dora']:.1f} for DoRA and {span['pissa']:.1f} for PiSSA" in PAGE
    assert middle["dora"] / middle["lora"] == pytest.approx(1, abs=0.05)
    assert f"that of PiSSA's is {middle['lora'] / middle['pissa']:.1f} times lower" in PAGE
    lora = grids["lora"].set_index("lr")["accuracy"]
    costs = [lora.max() - np.interp(np.log(lora.idxmax() * by), np.log(lora.index), lora) for by in (0.5, 2)]
    assert "costs LoRA {:.1f} or {:.1f} points".format(*(cost * 100 for cost in costs)) in PAGE


def test_best_accuracies_by_rank(accuracies):
    best = accuracies.pivot_table("accuracy", ["model", "rank"], "method").loc[["gemma-3-1b", "Llama-2-7B"]] * 100
    dora, pissa = best["dora"] - best["lora"], best["pissa"] - best["lora"]
    (gemma, llama), others = dora.groupby("model", sort=False).mean(), pissa.groupby("model", sort=False).mean()
    span = f"({dora['gemma-3-1b'].min():.1f} to {dora['gemma-3-1b'].max():.1f}, three runs each)"
    assert f"DoRA minus LoRA is {gemma:.1f} points in the mean of seven ranks of Gemma-3-1B {span}" in PAGE
    assert f"and {llama:.1f} of three ranks of Llama-2-7B" in PAGE
    assert "PiSSA minus LoRA is {:.1f} and {:.1f}.".format(*others) in PAGE


def test_accuracies_at_one_learning_rate(accuracies):
    shown = {"fullft": "full fine-tuning", "lora": "LoRA", "lora_plus": "LoRA+", "dora": "DoRA", "pissa": "PiSSA"}
    for run in accuracies[accuracies["source"] == "lift"].itertuples():
        assert f"{shown[run.method]} {run.accuracy * 100:.2f} ± {run.accuracy_sd:.2%}" in PAGE
    perl = accuracies[accuracies["source"] == "perl"].set_index("method")["accuracy"].map("{:.1%}".format)
    assert f"LoRA ({perl['lora']}; LoRA+ {perl['lora_plus']}) is below full fine-tuning ({perl['fullft']} over" in PAGE
    assert f"DoRA ({perl['dora']}) is above both" in PAGE


def test_runs_that_were_repeated_with_newer_software():
    table = pd.read_csv(REFERENCE / "peft-metamathqa/raw_runs.csv").drop_duplicates(["experiment", "created_at"])
    arms = {
        "full-finetuning--llama-3.2-3B-lr_0.00001": "full fine-tuning | |",
        "lora--llama-3.2-3B-rank32": "`lora`, rank 32 | 2 |",
        "lora--llama-3.2-3B-rank32-dora": "`dora`, rank 32 | 2 |",
        "lora--llama-3.2-3B-rank64": "`lora`, rank 64 | 2 |",
        "lora--llama-3.2-3B-rank64-rslora": "`rslora`, rank 64 | 8 |",
    }
    runs = [table[table["experiment"] == experiment].sort_values("created_at") for experiment in arms]
    for own, cells in zip(runs, arms.values(), strict=True):
        newest = own.iloc[-1]
        accuracy = f"{own['test_acc'].min() * 100:.1f} to {own['test_acc'].max():.1%}"
        cost = f"{newest['mem_max'] / 1e9:.1f} GB | {newest['train_time_s']:.0f} s"
        assert f"| {cells} {accuracy} | {newest['train_loss']:.3f} | {cost} |" in PAGE
    full, lora, dora, lora_64, rslora = runs
    assert f"takes {dora['train_time_s'].iloc[-1] / lora['train_time_s'].iloc[-1]:.2f} times as long" in PAGE
    lower, moved = max(lora["test_acc"].values - dora["test_acc"].values), np.ptp(full["test_acc"])
    assert f"is up to {lower * 100:.1f} points lower, while full fine-tuning's moves by {moved * 100:.1f}" in PAGE
    assert f"DoRA's {lora['train_loss'].iloc[-1] - dora['train_loss'].iloc[-1]:.4f} nats" in PAGE
    assert f"rsLoRA's {lora_64['train_loss'].iloc[-1] - rslora['train_loss'].iloc[-1]:.3f} are above" in PAGE


def test_what_a_learning_rate_costs_that_is_wrong_by_a_factor_of_two():
    curvatures = pd.read_csv(REPOSITORY / "paper_figures/published/evidence/lr_curvatures.csv").query("task == 'sft'")
    costs = curvatures[["loss_below", "loss_above"]] * np.log(2) ** 2
    ours = curvatures["source"] == "lorabench"
    low, high = (
        [f"{end:.3f}" for end in (part.min(axis=None), part.max(axis=None))] for part in (costs[~ours], costs[ours])
    )
    assert f"costs {low[0]} to {low[1]} nats at 0.6B and above and {high[0]} to {high[1]} at our scales" in PAGE
