"""Writes the tidy tables runs.csv and curves.parquet of this source from raw_runs.csv and raw_curves.csv.gz.

Full fine-tuning of the 70B model stops at 100 steps. Since the learning rate is constant, the other runs of this model
are also read as runs of 100 steps, whose final loss is the mean training loss of the last 20 of them.
"""

from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parent
SHORT_MODEL, SHORT, WINDOW, LEAST = "Apertus-70B-Instruct-2509", 100, 20, 99

runs = pd.read_csv(FOLDER / "raw_runs.csv").rename(columns={"tail20_train_nll": "final_train_nll"})
runs = runs.assign(rank=runs["rank"].astype("Int64"), placement="all", status="done", batch_size=None)
curves = pd.read_csv(FOLDER / "raw_curves.csv.gz").rename(columns={"train_nll": "value"})
curves = curves.assign(split="train", metric="nll")[["run_id", "step", "split", "metric", "value"]]

of_model = runs[runs["model"] == SHORT_MODEL]
points = curves[curves["run_id"].isin(of_model["run_id"]) & (curves["step"] <= SHORT)]
reached = points.groupby("run_id")["step"].max()
of_model = of_model[of_model["run_id"].map(reached) >= LEAST]
last = points[points["step"] > SHORT - WINDOW].groupby("run_id")["value"].mean()
short = of_model.assign(steps=SHORT, final_train_nll=of_model["run_id"].map(last))
whole = runs[(runs["steps"] > SHORT) | (runs["model"] != SHORT_MODEL)]
runs = pd.concat([whole, short.assign(run_id=short["run_id"] + f"@{SHORT}")])
points = points[points["run_id"].isin(short["run_id"])]
curves = pd.concat(
    [curves[curves["run_id"].isin(whole["run_id"])], points.assign(run_id=points["run_id"] + f"@{SHORT}")]
)
runs.to_csv(FOLDER / "runs.csv", index=False)
curves.to_parquet(FOLDER / "curves.parquet", index=False, compression="zstd")
