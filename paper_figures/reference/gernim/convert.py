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
        "alpha": raw["method"].map({"lora": 32.0}),
        "lr": raw["lr"],
        # 4 prompts with 4 responses each, in 100 steps.
        "batch_size": 16,
        "group_size": 4,
        "steps": 100,
        # Each row is the mean of three seeds.
        "seed": 0,
        "n_seeds": raw["n_seeds"],
        "status": "done",
        # The README gives it for the base without training.
        "base_reward": 0.375,
        "final_valid_reward": raw["pass1_mean"],
        "final_reward": raw["pass1_mean"],
        "final_reward_sd": raw["pass1_sd"],
    }
)
runs.to_csv(FOLDER / "runs.csv", index=False)
