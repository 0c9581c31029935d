"""Writes the tidy table runs.csv of this source from raw_runs.csv; its curves.csv is tidy as it was published.

Runs that failed ended before their evaluation and are left out. Runs with equal settings and one seed are repeats,
which do not show the noise between seeds: their mean counts as one run.
"""

from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parent
SETTINGS = ["model", "dataset", "task", "method", "rank", "alpha", "placement", "batch_size", "steps", "lr", "seed"]
REWARDS = ["base_reward", "final_valid_reward", "final_reward", "best_reward"]

raw = pd.read_csv(FOLDER / "raw_runs.csv")
runs = raw[raw["status"] != "failed"].assign(
    dataset="competition_math",
    rank=raw["rank"].astype("Int64"),
    base_reward=raw["base_accuracy"],
    final_valid_reward=raw["eval_accuracy"],
    final_reward=raw["eval_accuracy"],
    best_reward=raw["best_eval_accuracy"],
)
columns = ["run_id", *SETTINGS, "group_size", "status", *REWARDS]
kinds = {name: "mean" if name in REWARDS else "first" for name in columns if name not in SETTINGS}
runs = runs.groupby(SETTINGS, dropna=False, sort=False, as_index=False).agg(kinds)
runs[columns].to_csv(FOLDER / "runs.csv", index=False)
