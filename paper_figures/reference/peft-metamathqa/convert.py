"""Writes the tidy table runs.csv of this source from raw_runs.csv.

Variants of LoRA, about which the paper says nothing, are left out. The raw table lists a run once for each commit of
its result. One configuration was run up to four times with one seed, which does not show the noise between seeds: the
mean of its runs counts as one run.
"""

from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parent
PLACEMENTS = {
    "full-finetuning--llama-3.2-3B-lr_0.00001": "all",
    "lora--llama-3.2-3B-rank10-target-mlp": "mlp",
    "lora--llama-3.2-3B-rank32": "attn",
    "lora--llama-3.2-3B-rank64": "attn",
}
SETTINGS = ["model", "dataset", "task", "method", "rank", "placement", "batch_size", "steps", "lr", "seed"]

raw = pd.read_csv(FOLDER / "raw_runs.csv")
raw = raw[raw["experiment"].isin(PLACEMENTS)].drop_duplicates(["experiment", "created_at"])
runs = raw[["model", "steps", "lr", "seed"]].assign(
    dataset="metamathqa",
    task="sft",
    method=raw["experiment"].str.startswith("full").map({True: "fullft", False: "lora"}),
    rank=raw["r"].astype("Int64"),
    placement=raw["experiment"].map(PLACEMENTS),
    batch_size=raw["batch"],
    status=raw["status"].map({"success": "done"}),
    final_train_nll=raw["train_loss"],
    trainable_params=raw["trainable"].astype("Int64"),
    wall_s=raw["train_time_s"],
    peak_mem_bytes=raw["mem_max"],
)
kinds = dict.fromkeys(("status", "trainable_params", "peak_mem_bytes"), "first")
kinds |= dict.fromkeys(("final_train_nll", "wall_s"), "mean")
runs = runs.groupby(SETTINGS, dropna=False, sort=False, as_index=False).agg(kinds)
runs.insert(0, "run_id", [f"peft-metamathqa-{place}" for place in range(len(runs))])
runs.to_csv(FOLDER / "runs.csv", index=False)
