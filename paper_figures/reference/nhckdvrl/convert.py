"""Writes the tidy tables runs.csv and curves.csv of this source from raw_runs.csv and raw_edge.csv.

The loss of the base model is the point of each curve at step 0; further points are not published. Runs of raw_edge.csv
are those with AdamW in the model's own basis; rank, alpha and base loss are those that two of its files state. The two
seeds change the initial A alone, which does not show the noise between seeds: their mean counts as one run.
"""

from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parent
COLUMNS = ["run_id", "model", "dataset", "task", "method", "rank", "alpha", "placement", "batch_size", "steps"]
COLUMNS += ["lr", "seed", "status", "final_test_nll"]

edge = pd.read_csv(FOLDER / "raw_edge.csv").rename(columns={"final_eval_loss": "eval_nll"})
edge = edge.groupby(["method", "lr"], sort=False, as_index=False).agg({"eval_nll": "mean", "source_file": "first"})
lora = edge["method"].eq("lora")
edge = edge.assign(
    run_id="edge-" + edge["source_file"].str.extract(r"([^/]+)\.json$", expand=False),
    model="Qwen/Qwen3-0.6B-Base",
    dataset="NuminaMath-CoT-40000",
    task="sft",
    method=edge["method"].replace("full", "fullft"),
    rank=pd.Series(16, edge.index).where(lora),
    alpha=pd.Series(32.0, edge.index).where(lora),
    placement="all",
    batch_size=16,
    steps=500,
    seed=0,
    status="done",
    base_eval_nll=0.5531131647493528,
)
raw = pd.concat([pd.read_csv(FOLDER / "raw_runs.csv"), edge], ignore_index=True)
runs = raw.assign(rank=raw["rank"].astype("Int64"), final_test_nll=raw["eval_nll"])
runs[COLUMNS].to_csv(FOLDER / "runs.csv", index=False)
base = raw[["run_id"]].assign(step=0, split="validation", metric="nll", value=raw["base_eval_nll"])
base.to_csv(FOLDER / "curves.csv", index=False)
