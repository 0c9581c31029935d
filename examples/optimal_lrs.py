"""The best learning rates of a published sweep, what is recommended for its model, and a configuration with neither."""

from pathlib import Path

import pandas as pd
from lora_advice.audit import audit
from lora_advice.recommend import recommend

from lorabench.analysis.loss_fit import Noise
from lorabench.api import fit_lr, judge
from lorabench.utils.files import REFERENCE

SOURCE = REFERENCE / "nhckdvrl"  # Qwen3-0.6B on 32,768 examples of NuminaMath-CoT at four batch sizes
runs = (
    pd.read_csv(SOURCE / "runs.csv")
    .query("dataset == 'NuminaMath-CoT-32768'")
    .rename(columns={"final_test_nll": "loss"})
)
noise = Noise(0.0012, 2, "repeated runs of this model on other data")  # its runs have one seed
for batch, same_batch in runs.groupby("batch_size"):
    advice = recommend("Qwen/Qwen3-0.6B", tokens=10e6, batch_size=int(batch), steps=32_768 // batch)
    for (method, rank), sweep in same_batch.groupby(["method", "rank"], dropna=False):
        fit, lr = fit_lr(sweep, noise), advice.settings[f"{method}_lr"]
        arm = "full fine-tuning" if method == "fullft" else f"LoRA of rank {rank:.0f}"
        print(f"batch {batch:3}, {arm:16}: best {fit.lr:.1e}, recommended {lr.value:.1e} [{lr.low:.1e}, {lr.high:.1e}]")
for claim in judge(SOURCE, claims=["B1", "B2"]).itertuples():
    interval = f"{claim.estimate:.3g} [{claim.ci_low:.3g}, {claim.ci_high:.3g}] {claim.unit}"
    print(f"{claim.statement}: {claim.verdict}, {interval}")
for finding in audit(Path(__file__).with_name("axolotl.yaml")).findings:
    print(f"axolotl.yaml, line {finding.line}: {finding.message}")
