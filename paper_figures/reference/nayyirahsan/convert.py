"""Writes the tidy table runs.csv of this source from raw_runs.csv."""

from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parent
COLUMNS = ["run_id", "model", "dataset", "data_kind", "task", "method", "rank", "placement", "batch_size", "steps"]
COLUMNS += ["lr", "seed", "status", "final_train_nll", "base_reward", "final_reward", "wall_s", "peak_mem_bytes"]
# The accuracy of the base, from the base's own rows of results/final/runs.jsonl: of facts it knows none.
BASE = {"sql": 0.318, "facts": 0.0}

raw = pd.read_csv(FOLDER / "raw_runs.csv")
runs = raw.assign(
    data_kind=raw["dataset"].str.partition("-")[0],
    rank=raw["rank"].astype("Int64"),
    base_reward=raw["dataset"].str.partition("-")[0].map(BASE),
    final_reward=raw["final_accuracy"],
    wall_s=raw["train_seconds"],
    peak_mem_bytes=(raw["peak_memory_gb"] * 1e9).astype("Int64"),
)
runs[COLUMNS].to_csv(FOLDER / "runs.csv", index=False)
