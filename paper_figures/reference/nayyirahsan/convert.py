"""Writes the tidy table runs.csv of this source from raw_runs.csv."""

from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parent
COLUMNS = ["run_id", "model", "dataset", "data_kind", "task", "method", "rank", "placement", "batch_size", "steps"]
COLUMNS += ["lr", "seed", "status", "final_train_nll", "wall_s", "peak_mem_bytes"]

raw = pd.read_csv(FOLDER / "raw_runs.csv")
runs = raw.assign(
    data_kind=raw["dataset"].str.partition("-")[0],
    rank=raw["rank"].astype("Int64"),
    wall_s=raw["train_seconds"],
    peak_mem_bytes=(raw["peak_memory_gb"] * 1e9).astype("Int64"),
)
runs[COLUMNS].to_csv(FOLDER / "runs.csv", index=False)
