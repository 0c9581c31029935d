"""Writes the tidy tables runs.csv and curves.csv of this source from raw_runs.csv and raw_curves.csv.

The accuracy of a run is the share of right responses in its last 10 steps, and that of a base the share in the first
step of all its runs, before the first update. The source counts steps from 0.
"""

from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parent
METRICS = {"correct": "reward", "response_tokens": "response_length"}

raw = pd.read_csv(FOLDER / "raw_runs.csv")
raw["run_id"] = "open-rl-" + raw["model"] + "-" + raw["config"] + "-" + raw["replicate"]
steps = pd.read_csv(FOLDER / "raw_curves.csv").merge(raw[["run_id", "model", "config", "replicate"]])

last = steps[steps["step"] >= steps["step"].max() - 9].groupby("run_id")["correct"].mean()
base = steps[steps["step"] == 0].groupby("model")["correct"].mean()
runs = pd.DataFrame(
    {
        "run_id": raw["run_id"],
        "model": raw["model"],
        "dataset": "gsm8k",
        "task": "rl",
        "method": raw["config"].map({"fullft": "fullft", "r32": "lora", "r1": "lora"}),
        "rank": raw["config"].map({"r32": 32, "r1": 1}).astype("Int64"),
        "placement": "all",
        "alpha": raw["config"].map({"r32": 16.0, "r1": 16.0}),
        "lr": raw["lr"],
        "batch_size": raw["batch_size"],
        "group_size": raw["group_size"],
        "steps": raw["steps"],
        "seed": raw["replicate"].map({"a": 0, "b": 1}),
        "status": "done",
        "base_reward": raw["model"].map(base),
        "final_valid_reward": raw["run_id"].map(last),
        "final_reward": raw["run_id"].map(last),
    }
)
runs.to_csv(FOLDER / "runs.csv", index=False)

curves = steps.assign(step=steps["step"] + 1, split="train").rename(columns=METRICS)
curves = curves.melt(["run_id", "step", "split"], list(METRICS.values()), var_name="metric")
curves.to_csv(FOLDER / "curves.csv", index=False)
