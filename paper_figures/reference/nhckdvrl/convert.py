"""Writes the tidy tables runs.csv and curves.csv of this source from raw_runs.csv.

The loss of the base model is the point of each curve at step 0; further points are not published.
"""

from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parent
COLUMNS = ["run_id", "model", "dataset", "task", "method", "rank", "alpha", "placement", "batch_size", "steps"]
COLUMNS += ["lr", "seed", "status", "final_test_nll"]

raw = pd.read_csv(FOLDER / "raw_runs.csv")
runs = raw.assign(rank=raw["rank"].astype("Int64"), final_test_nll=raw["eval_nll"])
runs[COLUMNS].to_csv(FOLDER / "runs.csv", index=False)
base = raw[["run_id"]].assign(step=0, split="validation", metric="nll", value=raw["base_eval_nll"])
base.to_csv(FOLDER / "curves.csv", index=False)
