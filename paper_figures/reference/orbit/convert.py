"""Writes the tidy table runs.csv of this source from raw_runs.csv."""

from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parent
COLUMNS = ["run_id", "model", "dataset", "task", "method", "rank", "alpha", "placement", "batch_size", "group_size"]
COLUMNS += ["steps", "lr", "seed", "status", "base_reward", "final_valid_reward", "final_reward"]
COLUMNS += ["final_truncated", "wall_s"]

raw = pd.read_csv(FOLDER / "raw_runs.csv")
runs = raw.assign(
    rank=raw["rank"].astype("Int64"),
    base_reward=raw["base_accuracy"],
    final_valid_reward=raw["test_accuracy"],
    final_reward=raw["test_accuracy"],
    wall_s=raw["wall_h"] * 3600,
)
runs[COLUMNS].to_csv(FOLDER / "runs.csv", index=False)
