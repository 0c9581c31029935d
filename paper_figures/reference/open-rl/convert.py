"""Writes the tidy table runs.csv of this source from raw_runs.csv: each row is the mean of two replicates."""

from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parent

raw = pd.read_csv(FOLDER / "raw_runs.csv")
runs = pd.DataFrame(
    {
        "run_id": [f"open-rl-{place}" for place in range(len(raw))],
        "model": raw["model"],
        "dataset": "gsm8k",
        "task": "rl",
        "method": raw["config"].map({"fullft": "fullft", "r32": "lora", "r1": "lora"}),
        "rank": raw["config"].map({"r32": 32, "r1": 1}).astype("Int64"),
        "placement": "all",
        "seed": 0,
        "n_seeds": 2,
        "status": "done",
        "final_valid_reward": raw["tail10_reward_mean"],
        "final_reward": raw["tail10_reward_mean"],
    }
)
runs.to_csv(FOLDER / "runs.csv", index=False)
