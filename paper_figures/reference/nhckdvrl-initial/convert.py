"""Writes the tidy table runs.csv of this source from raw_runs.csv; PiSSA and OLoRA start as they were published."""

from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parent

raw = pd.read_csv(FOLDER / "raw_runs.csv")
runs = raw[["method", "lr"]].assign(
    run_id=raw["source_file"].str.extract(r"([^/]+)\.json$", expand=False),
    model="Qwen/Qwen3-0.6B-Base",
    dataset="gsm8k",
    task="sft",
    rank=16,
    alpha=32.0,
    placement="all",
    batch_size=16,
    steps=300,
    seed=0,
    status="done",
    final_test_nll=raw["final_eval_loss"],
)
runs.to_csv(FOLDER / "runs.csv", index=False)
