"""What the page on variants says of the numbers of others follows from their tables."""

from __future__ import annotations

import pandas as pd
import pytest

from ..conftest import REPOSITORY

REFERENCE = REPOSITORY / "paper_figures/reference"
PAGE = " ".join((REPOSITORY / "studies/variants/README.md").read_text().split())
NAMES = {"fullft": "full fine-tuning", "lora": "LoRA", "dora": "DoRA", "pissa": "PiSSA", "olora": "OLoRA"}


@pytest.fixture(scope="module")
def accuracies():
    return pd.read_csv(REFERENCE / "variants_of_others.csv")


def test_best_accuracies_and_their_learning_rates(accuracies):
    runs = accuracies[(accuracies["model"] == "Qwen3-0.6B-Base") & accuracies["method"].isin(NAMES)]
    for method, grid in runs.groupby("method"):
        best = grid.loc[grid["accuracy"].idxmax()]
        spread = "" if pd.isna(best["accuracy_sd"]) else f" ± {best['accuracy_sd']:.2%}"
        accuracy = f"{best['accuracy'] * 100:.2f}{spread}" if spread else f"{best['accuracy']:.2%}"
        assert f"{accuracy} ({NAMES[method]}, {best['lr']:.1e})".replace("e-0", "e-") in PAGE


def test_accuracies_at_one_learning_rate(accuracies):
    for run in accuracies[accuracies["source"] == "lift"].itertuples():
        assert f"{NAMES[run.method]} {run.accuracy * 100:.2f} ± {run.accuracy_sd:.2%}" in PAGE
    perl = accuracies[accuracies["source"] == "perl"].set_index("method")["accuracy"]
    for method in ("lora", "fullft", "dora"):
        assert f"{NAMES[method]} {perl[method]:.1%}" in PAGE


def test_runs_that_were_repeated_with_newer_software():
    table = pd.read_csv(REFERENCE / "peft-metamathqa/raw_runs.csv").drop_duplicates(["experiment", "created_at"])
    ranges = {
        "full-finetuning--llama-3.2-3B-lr_0.00001": "full fine-tuning",
        "lora--llama-3.2-3B-rank32": "LoRA",
        "lora--llama-3.2-3B-rank32-dora": "DoRA at rank 32 has",
        "lora--llama-3.2-3B-rank64": "LoRA has",
        "lora--llama-3.2-3B-rank64-rslora": "rsLoRA at rank 64 has",
    }
    for experiment, words in ranges.items():
        accuracy = table.loc[table["experiment"] == experiment, "test_acc"]
        assert f"{words} {accuracy.min() * 100:.1f} to {accuracy.max():.1%}" in PAGE
