"""Writes the tidy table runs.csv of this source from raw_runs.csv: the table of its README."""

from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parent
DATASETS = {
    "outcome": "MATH outcome reward",
    "process_peak": "MATH process reward",
    "distill": "MATH distillation",
}

raw = pd.read_csv(FOLDER / "raw_runs.csv")
runs = pd.DataFrame(
    {
        "run_id": [f"gernim-{place}" for place in range(len(raw))],
        "model": raw["model"],
        "dataset": raw["reward"].map(DATASETS),
        "task": "rl",
        "method": raw["method"],
        "rank": raw["rank"].astype("Int64"),
        "placement": "all",
        "lr": raw["lr"],
        "batch_size": None,
        # Each row is the mean of three seeds.
        "seed": 0,
        "n_seeds": raw["n_seeds"],
        "status": "done",
        "final_valid_reward": raw["pass1_mean"],
        "final_reward": raw["pass1_mean"],
        "final_reward_sd": raw["pass1_sd"],
    }
)
runs.to_csv(FOLDER / "runs.csv", index=False)
