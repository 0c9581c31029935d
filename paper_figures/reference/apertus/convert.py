"""Writes the tidy tables runs.csv and curves.parquet of this source from raw_runs.csv and raw_curves.csv.gz.

The batch size is what 467 steps of one epoch imply: the first step is 0.002144 of an epoch in all runs.
"""

from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parent

raw = pd.read_csv(FOLDER / "raw_runs.csv")
runs = raw.rename(columns={"tail20_train_nll": "final_train_nll", "test_accuracy": "final_reward"})
runs = runs.assign(rank=runs["rank"].astype("Int64"), placement="all", batch_size=128).drop(columns="accuracy_line")
runs["base_reward"] = runs["model"].map({"Apertus-8B-Instruct-2509": 0.76, "Apertus-70B-Instruct-2509": 0.55})
runs.to_csv(FOLDER / "runs.csv", index=False)

curves = pd.read_csv(FOLDER / "raw_curves.csv.gz").rename(columns={"train_nll": "value"})
curves = curves.assign(split="train", metric="nll")[["run_id", "step", "split", "metric", "value"]]
curves.to_parquet(FOLDER / "curves.parquet", index=False, compression="zstd")
